"""The `calibrate-layers` command."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import (
    MAX_SEED,
    CommandParser,
    Terminal,
    add_whole,
    run_command,
    steps_shown,
)
from ditrim.export.family import FAMILIES, Family, family_named
from ditrim.plugins.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from ditrim.runtime.evaluation.edits import ComparedEdit

_EXAMPLES = """\
  calibrate-layers --preset small --output engines-out/calibration
  calibrate-layers --model qwen-edit --weights ./Qwen-Image-Edit --set ./edits --device cuda
  calibrate-layers --model flux-kontext --set ./edits --front-depth 10 --num-representative 3"""
_DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> CommandParser:
    parser = CommandParser(
        "calibrate-layers",
        description="Measure how much attention each layer gives to the references (ToPi Eq. 4) "
        "over a set of edits,\nand choose the representative layers L (Eq. 5): calibration.json, "
        "and the curve as calibration.png.",
        examples=_EXAMPLES,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="qwen-edit", metavar="NAME", help=", ".join(FAMILIES))
    model.add_argument("--preset", metavar="NAME", help="a shipped trained model: small")
    model.add_argument(
        "--weights", metavar="FOLDER|HUB-ID", help="a diffusers pipeline (default: the hub id)"
    )
    model.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, ...")
    model.add_argument("--dtype", default=None, metavar="NAME", help=" or ".join(_DTYPES))
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--set",
        type=Path,
        metavar="FOLDER",
        help="pictures and edits.jsonl; the small editor draws its own training scenes",
    )
    add_whole(measured, "--num-samples", 1, None, "edits", 48)
    add_whole(measured, "--steps", 1, None, "denoising steps", 10)
    add_whole(measured, "--seed", 0, MAX_SEED, "of scenes and noise", 0)
    chosen = parser.add_argument_group("what is chosen")
    add_whole(chosen, "--num-representative", 1, None, "layers", 3)
    add_whole(chosen, "--front-depth", 0, None, "default: the model's")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibration-out"),
        metavar="FOLDER",
        help="default: calibration-out",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    family_named(arguments.model)
    if arguments.preset not in (None, "small"):
        raise UsageError(f"--preset is {arguments.preset!r}; allowed: small")
    if arguments.dtype not in (None, *_DTYPES):
        raise UsageError(f"--dtype is {arguments.dtype!r}; allowed: {', '.join(_DTYPES)}")
    if arguments.preset == "small" and (arguments.weights or arguments.set):
        raise UsageError(
            "--preset small has its own weights and scenes: leave --weights, --set out"
        )
    if arguments.preset == "small":
        for name, default in (("model", "qwen-edit"), ("device", "cpu"), ("dtype", None)):
            if getattr(arguments, name) != default:
                raise UsageError(f"--{name} cannot be combined with --preset small, which fixes it")
    if arguments.preset is None and arguments.set is None:
        raise UsageError("--set is missing: a folder with pictures and edits.jsonl")


def _check_folder(folder: Path) -> None:
    """Nothing is measured for a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"--output {folder} is no folder that can be written: {error.strerror}"
        ) from error


def _check_references(samples: Sequence[ComparedEdit], family: Family, folder: Path) -> None:
    for sample in samples:
        number = len(sample.open().images)
        if number > family.max_references:
            raise UsageError(
                f"an edit of {folder} has {number} pictures; {family.name} takes at most "
                f"{family.max_references}"
            )


def _load_pipeline(arguments: argparse.Namespace) -> Any:
    if arguments.preset == "small":
        from ditrim.runtime.small_editor import load_small_pipeline

        return load_small_pipeline()
    import diffusers
    import torch

    family = family_named(arguments.model)
    location = arguments.weights or family.hub_id
    dtype = getattr(torch, arguments.dtype or "bfloat16")
    try:
        pipe = getattr(diffusers, family.pipeline_class).from_pretrained(
            location, torch_dtype=dtype
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot load the pipeline {location!r}: {first_line}. Calibration runs the whole "
            "pipeline: give --weights a folder in the diffusers layout (model_index.json)"
        ) from error
    try:
        return pipe.to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UsageError(f"--device {arguments.device} cannot be used: {first_line}") from error


def _calibrate(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    _check(arguments)
    _check_folder(arguments.output)
    import torch

    from ditrim.export.calibration import (
        Calibration,
        mean_curve,
        save_calibration,
        sensitivity_recorded,
        top_layers,
    )
    from ditrim.plugins.architectures.transformers import blocks_of
    from ditrim.runtime.evaluation.edits import choose_samples

    family = family_named(arguments.model)
    samples = choose_samples(arguments.set, arguments.num_samples, "layers", arguments.seed)
    if arguments.set is not None:
        _check_references(samples, family, arguments.set)
    pipe = _load_pipeline(arguments)
    num_layers = len(blocks_of(pipe.transformer))
    front_depth = arguments.front_depth
    if front_depth is None:
        front_depth = _default_front_depth(arguments.preset, family.front_depth)
    top_layers(tuple([0.0] * num_layers), front_depth, arguments.num_representative)
    pipe.set_progress_bar_config(disable=True)
    raw: dict[str, list[list[float]]] = {}
    mass: dict[str, list[list[float]]] = {}
    with steps_shown(terminal, "measuring", len(samples), "edits") as advance:
        for index, sample in enumerate(samples):
            advance(index, sample.name)
            images = list(sample.open().images)
            with sensitivity_recorded(pipe.transformer) as recorder:
                pipe(
                    image=images if len(images) > 1 else images[0],
                    prompt=sample.prompt,
                    num_inference_steps=arguments.steps,
                    generator=torch.Generator().manual_seed(arguments.seed * 100_003 + index),
                    output_type="latent",
                )
            raw.setdefault(sample.category, []).extend(recorder.raw)
            mass.setdefault(sample.category, []).extend(recorder.mass)
    sensitivity = mean_curve([curve for curves in raw.values() for curve in curves])
    calibration = Calibration(
        model=arguments.preset or arguments.model,
        front_depth=front_depth,
        representative_layers=top_layers(sensitivity, front_depth, arguments.num_representative),
        sensitivity=sensitivity,
        mass=mean_curve([curve for curves in mass.values() for curve in curves]),
        mass_by_category={name: mean_curve(curves) for name, curves in sorted(mass.items())},
        num_samples=len(samples),
        num_steps=arguments.steps,
        seed=arguments.seed,
    )
    path, plot = save_calibration(calibration, arguments.output)
    layers = ",".join(map(str, calibration.representative_layers))
    terminal.say(
        f"representative layers {layers} (front depth {front_depth}); use them with: "
        f"build-engine ... --front-depth {front_depth} --layers {layers}\n"
        f"curve: {path}\nplot: {plot}"
    )
    return {**calibration.as_dict(), "calibration": str(path), "plot": str(plot)}


def _default_front_depth(preset: str | None, family_default: int) -> int:
    """The small editor keeps K where its last calibration put it, else one sixth, as the paper."""
    if preset is None:
        return family_default
    from ditrim.engines.build.source import read_calibration
    from ditrim.engines.presets import small_editor_folder

    return int(read_calibration(small_editor_folder() / "calibration.json").get("front_depth", 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `calibrate-layers`; returns the exit code."""
    return run_command(_parser, _calibrate, argv)
