"""The `build-engine` command."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ditrim.commands.console import CommandParser, Terminal, run_command
from ditrim.engines.build.build import run_build, summary_of
from ditrim.engines.build.options import BACKENDS, PRESETS, VERIFY, BuildOptions
from ditrim.engines.build.source import planned_config
from ditrim.engines.files import format_bytes
from ditrim.export.family import FAMILIES
from ditrim.plugins.errors import UsageError

_EXAMPLES = """\
  build-engine --preset small
  build-engine --model qwen-edit --output engines-out/qwen-edit
  build-engine --model flux-kontext --weights ./FLUX.1-Kontext-dev --precision fp16
  build-engine --model qwen-edit --lora Qwen-Image-Edit-Lightning-8steps.safetensors
  build-engine --model qwen-edit --weights random --num-layers 3 --resolution 512x512
  build-engine --model qwen-edit-plus --num-references 3 --ladder 2048,4096,8192,12288
  build-engine --model qwen-edit --backend tensorrt --dry-run --device h100
  build-engine --model flux-kontext --backend tensorrt-rtx --compute-capability 8.9,12.0"""


def _parser() -> CommandParser:
    parser = CommandParser(
        "build-engine",
        description="Build an engine set: the two graphs of an in-context editor, their weights "
        "and a manifest, or\nplans in place of the graphs, in a folder.\nA set that is there and "
        "unchanged is recognised and reused.",
        examples=_EXAMPLES,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="qwen-edit",
        metavar="NAME",
        help=f"{', '.join(FAMILIES)} (default: qwen-edit)",
    )
    model.add_argument(
        "--preset", metavar="NAME", help=f"a shipped trained model: {', '.join(PRESETS)}"
    )
    model.add_argument(
        "--weights",
        metavar="FOLDER|FILE|HUB-ID|random",
        help="a diffusers pipeline or transformer folder, a safetensors file of the transformer, a "
        "hub id, or random (default: the model's hub id)",
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    model.add_argument(
        "--variant", metavar="NAME", help="of the weight files, as fp16 in *.fp16.safetensors"
    )
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA to merge into the weights: a file, a folder, or a hub id; can be repeated",
    )
    model.add_argument("--seed", type=int, metavar="N", help="seed of random weights (default: 0)")
    model.add_argument(
        "--num-layers", type=int, metavar="N", help="depth of a trial with random weights"
    )
    model.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the configuration of random weights; VALUE is JSON; can be repeated",
    )
    split = parser.add_argument_group("split and scoring")
    split.add_argument(
        "--front-depth", type=int, metavar="K", help="layers that always see the full context"
    )
    split.add_argument(
        "--layers",
        type=_whole_numbers,
        metavar="L,L,...",
        help="layers whose attention is scored",
    )
    split.add_argument(
        "--score-details",
        action="store_true",
        help="let BACK return three scores of each of its layers, which ToPi's ablations read",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)} (default: onnxruntime)",
    )
    engine.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32, fp16 or bf16 (default: fp32 for onnxruntime, bf16 for the others)",
    )
    engine.add_argument(
        "--graph-only", action="store_true", help="stop when the graphs are written"
    )
    plans = parser.add_argument_group("plans (tensorrt and tensorrt-rtx)")
    plans.add_argument(
        "--separate-anchor",
        action="store_true",
        help="a plan of its own for the anchor step, and no scoring in the reduced one",
    )
    plans.add_argument(
        "--allow-unfused",
        action="store_true",
        help="accept attention without a fused kernel, which is several times slower",
    )
    plans.add_argument(
        "--workspace",
        type=_size,
        metavar="SIZE",
        help="memory that a layer may use for itself, as 8GiB",
    )
    plans.add_argument(
        "--optimization-level", type=int, metavar="N", help="0 to 5; the library's default is 3"
    )
    plans.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="kernel timings kept between builds, or none (default: in the user's cache; tensorrt)",
    )
    plans.add_argument(
        "--compute-capability",
        metavar="N.N,...",
        help="what to build for (tensorrt-rtx; default: this GPU, without one 8.0 and up)",
    )
    plans.add_argument(
        "--weights-stripped",
        action="store_true",
        help="plans without weights, which get them from the set's graphs when loaded",
    )
    for name in ("batch", "noisy-tokens", "text-tokens"):
        plans.add_argument(f"--min-{name}", type=int, metavar="N", help="least served (default: 1)")
        tuned = "1" if name == "batch" else "a usual edit's"
        plans.add_argument(
            f"--opt-{name}", type=int, metavar="N", help=f"tuned for (default: {tuned})"
        )
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument(
        "--dry-run", action="store_true", help="say what the build would take, and build nothing"
    )
    estimate.add_argument(
        "--device", metavar="NAME", help="the GPU to estimate for (default: the one present)"
    )
    shape = parser.add_argument_group("lengths")
    shape.add_argument(
        "--resolution",
        type=_resolution,
        action="append",
        metavar="WxH",
        help="size of the picture in the making, in pixels; can be repeated (default: every shape "
        "that the model's pipeline makes, about a megapixel)",
    )
    shape.add_argument(
        "--reference-resolution",
        type=_resolution,
        action="append",
        metavar="WxH",
        help="size of each reference, in pixels; can be repeated (default: every shape that the "
        "pipeline scales references to, about a megapixel)",
    )
    shape.add_argument(
        "--num-references",
        type=int,
        metavar="N",
        help="references in an edit (default: as many as the model takes)",
    )
    shape.add_argument("--max-reference-tokens", type=int, metavar="N", help="of all references")
    shape.add_argument("--max-noisy-tokens", type=int, metavar="N", help="of the picture")
    shape.add_argument("--max-text-tokens", type=int, metavar="N", help="of the prompt")
    shape.add_argument("--max-batch", type=int, metavar="N", help="default: 4")
    shape.add_argument(
        "--ladder", type=_whole_numbers, metavar="N,N,...", help="reference lengths, increasing"
    )
    shape.add_argument(
        "--rungs", type=int, metavar="N", help="even reference lengths in all (default: 8)"
    )
    shape.add_argument(
        "--granularity",
        type=int,
        metavar="N",
        help="kept counts are rounded up to a multiple of it (default: 1; for plans a power of two "
        "that leaves at most 64 counts)",
    )
    output = parser.add_argument_group("target")
    output.add_argument(
        "--output", metavar="FOLDER", help="default: engines-out/<model or preset>[-...]"
    )
    output.add_argument("--force", action="store_true", help="build even if nothing changed")
    output.add_argument(
        "--verify",
        default="sizes",
        metavar="HOW",
        help=f"how a set that is there is checked: {' or '.join(VERIFY)} (default: sizes)",
    )
    return parser


def _whole_numbers(text: str) -> tuple[int, ...]:
    allowed = "whole numbers with commas between, as 512,1024"
    return tuple(_whole(part, allowed) for part in text.split(","))


def _whole(text: str, allowed: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _invalid(text, allowed) from None


def _invalid(text: str, allowed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not valid; give {allowed}")


def _resolution(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross:
        raise _invalid(text, "WIDTHxHEIGHT, as 1024x768")
    allowed = "WIDTHxHEIGHT in pixels, as 1024x768"
    return _whole(width, allowed), _whole(height, allowed)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _size(text: str) -> int:
    """Bytes of a size with a unit, as 8GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise _invalid(text, "a size, as 8GiB or 500MB")
    number = float(match[1]) * _UNITS[match[2]]
    if math.isinf(number):
        raise argparse.ArgumentTypeError(
            f"{text[:20]}... is more than any memory; give a size, as 8GiB"
        )
    return round(number)


def _config(items: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--config: {item!r} is not valid; give KEY=VALUE, as num_layers=3")
        if key in config:
            raise UsageError(f"--config: {key} is given twice")
        try:
            config[key] = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(
                f"--config {key}: {text[:80]!r} is not JSON; give a number, true, false, a list as "
                '[4,6,6] or "text" in quotes'
            ) from None
    return config


def options_from(arguments: argparse.Namespace) -> BuildOptions:
    """Options from parsed arguments.

    Raises:
        UsageError: one is not valid; names it.
    """
    values = vars(arguments).copy()
    for name in ("json", "verbose", "quiet", "dry_run", "device"):
        del values[name]
    for name in ("resolution", "reference_resolution"):
        values[name] = None if values[name] is None else tuple(values[name])
    for name in ("precision", "revision"):
        if values[name] is not None and not values[name].strip():
            raise UsageError(f"--{name} is empty; give a name, or leave it out")
    values["precision"] = arguments.precision or ""
    if arguments.compute_capability is not None:
        values["compute_capability"] = tuple(arguments.compute_capability.split(","))
    values["config"] = _config(arguments.config)
    values["lora"] = tuple(arguments.lora)
    return BuildOptions(**values)


def _estimate(options: BuildOptions, device: str | None, terminal: Terminal) -> dict[str, Any]:
    from ditrim.engines.estimate.estimate import estimate
    from ditrim.engines.estimate.text import lines_of

    plan = estimate(options, planned_config(options), device)
    for line in lines_of(plan):
        terminal.say(line)
    return {"estimate": plan.to_dict()}


def _build(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    options = options_from(arguments)
    if arguments.dry_run:
        return _estimate(options, arguments.device, terminal)
    if arguments.device is not None:
        raise UsageError(
            "--device names the GPU of an estimate and needs --dry-run; plans are built for the "
            "GPU that is present, or with --compute-capability"
        )
    if options.precision == "fp16" and options.backend == "onnxruntime":
        terminal.note("fp16 graphs need ONNX Runtime's CUDA provider (onnxruntime-gpu) to run")
    with terminal.progress() as progress:
        result = run_build(options, progress=progress)
    summary = summary_of(result)
    did = "unchanged, reused" if result.is_reused else "built"
    manifest = result.engine_set.manifest
    terminal.say(f"{did} in {result.seconds:.1f} s: {result.engine_set.folder}")
    terminal.say(
        f"  {manifest.model}, {manifest.precision}, {manifest.backend} "
        f"{manifest.backend_version}, {format_bytes(summary['num_bytes'])}"
    )
    layers = ", ".join(map(str, manifest.representative_layers))
    terminal.say(
        f"  {manifest.num_layers} layers, front depth {manifest.front_depth}, scored layers "
        f"{layers} ({manifest.layers_source})"
    )
    limits = manifest.limits
    terminal.say(
        f"  references up to {manifest.ladder.longest} tokens "
        f"({', '.join(map(str, manifest.ladder.rungs))}), kept counts in steps of "
        f"{manifest.ladder.granularity}, noisy {limits.noisy}, text {limits.text}, batch "
        f"{limits.batch}"
    )
    for role, plan in summary["plans"].items():
        built_for = ", ".join(manifest.target["compute_capabilities"])
        terminal.say(
            f"  {role} plan: {format_bytes(plan['num_bytes'])}, {plan['num_profiles']} profiles"
            + _activations(plan["device_memory_bytes"])
            + f", compute capability {built_for}"
        )
    return summary


def _activations(sizes: Sequence[int] | None) -> str:
    """Return a plan's activation memory by the library's log, from the shortest to the longest."""
    if not sizes:
        return ""
    return f", activations {format_bytes(min(sizes))} to {format_bytes(max(sizes))}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `build-engine`; returns its exit code."""
    return run_command(_parser, _build, argv)
