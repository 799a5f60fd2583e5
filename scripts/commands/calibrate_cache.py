"""The `calibrate-cache` command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import (
    CommandParser,
    Terminal,
    add_machine_options,
    run_command,
    steps_shown,
)
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.runtime.editing.pipelines import EditRequest

_EXAMPLES = """\
  calibrate-cache --engine engines-out/small --output small-cache.json
  calibrate-cache --engine <set> --set ./edits --steps 28 --output cache.json
  calibrate-cache --engine <set> --set ./edits --true-cfg-scale 4 --output cache.json"""
_MAX_SEED, _MAX_THREADS, _MAX_DEGREE = 2**31 - 1, 1024, 8
_SCENE_WORD = 0xCAC4E  # sets these training scenes apart from those of other commands


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One edit to measure on."""

    images: Callable[[], tuple[Image.Image, ...]]
    prompt: str


def _parser() -> CommandParser:
    parser = CommandParser(
        "calibrate-cache",
        description="Fit what TeaCache needs: a polynomial that predicts, from the change of "
        "FRONT's output\nsince the last step, how much the velocity changes. Runs edits with the "
        "full context.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--engine", required=True, metavar="FOLDER", help="from build-engine")
    parser.add_argument("--output", required=True, metavar="FILE", help="the calibration, .json")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--set",
        type=Path,
        metavar="FOLDER",
        help="pictures and edits.jsonl; the small editor draws its own training scenes",
    )
    measured.add_argument("--num-samples", type=int, default=24, metavar="N", help="default: 24")
    measured.add_argument(
        "--steps", type=int, metavar="N", help="as edits will be run (default: the pipeline's)"
    )
    measured.add_argument("--seed", type=int, default=0, metavar="N", help="of scenes and noise")
    measured.add_argument(
        "--true-cfg-scale", type=float, metavar="X", help="true guidance, as edits will be run"
    )
    measured.add_argument(
        "--guidance", type=float, metavar="X", help="embedded guidance scale (FLUX.1-Kontext)"
    )
    parser.add_argument(
        "--degree", type=int, default=4, metavar="N", help="of the polynomial (default: 4)"
    )
    add_machine_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `calibrate-cache`; returns the exit code."""
    return run_command(_parser, _calibrate, argv)


def _check(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("num_samples", 1, 10_000),
        ("steps", 2, 1000),
        ("degree", 1, _MAX_DEGREE),
        ("seed", 0, _MAX_SEED),
        ("threads", 0, _MAX_THREADS),
        ("true_cfg_scale", 0, 1000),
        ("guidance", 0, 1000),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} must lie in [{least}, {most}], got {value}")


def _calibrate(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything that can be refused is refused before the first step."""
    from ditrim.runtime.editing.pictures import check_output

    _check(args)
    check_output(args.output, "--output")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    terminal.stage(f"loading {args.engine}")
    from ditrim.engines.load import load_engines

    engines = load_engines(
        args.engine, device=args.device, threads=args.threads, verify=args.verify
    )
    manifest = engines.engine_set.manifest
    samples = _samples(args, str(manifest.source["kind"]))

    from ditrim.runtime.attachment import attach
    from ditrim.runtime.caches.calibration import (
        CacheCalibration,
        ChangeRecorder,
        check_enough,
        fit_polynomial,
        save_calibration,
        weights_digest,
    )
    from ditrim.runtime.editing.pipelines import (
        component_dtype,
        default_steps,
        load_pipeline,
        prepare_request,
        run_edit,
        silence_libraries,
    )
    from ditrim.runtime.policy import FullContext

    silence_libraries()
    engine_set = engines.engine_set
    pipe = load_pipeline(
        engine_set, args.pipeline, dtype=component_dtype(engines), scheduler=args.scheduler
    )
    if engines.device.type == "cuda":
        pipe.to(engines.device)
    steps = args.steps or default_steps(pipe, engine_set)
    check_enough(len(samples) * (steps - 1), args.degree)
    for index, sample in enumerate(samples):
        prepare_request(pipe, engine_set, _request(args, sample, steps, index))
    recorder = ChangeRecorder()
    with steps_shown(terminal, "measuring", len(samples) * steps) as advance:
        for index, sample in enumerate(samples):

            def on_step(done: int, total: int, first: int = index * steps) -> None:
                if terminal.interrupted_by is not None:  # a library may have swallowed it
                    raise KeyboardInterrupt
                advance(first + done, "")

            with attach(pipe, engines, FullContext(), cache=recorder):
                request = _request(args, sample, steps, index)
                run_edit(pipe, prepare_request(pipe, engine_set, request), on_step)
    fit = fit_polynomial(recorder.points, args.degree)
    calibration = CacheCalibration(
        model=manifest.model,
        front_depth=manifest.front_depth,
        weights=weights_digest(manifest),
        engine_identity=manifest.identity,
        precision=manifest.precision,
        tokens=recorder.tokens,
        num_steps=steps,
        num_samples=len(samples),
        seed=args.seed,
        points=tuple(recorder.points),
        fit=fit,
    )
    save_calibration(calibration, args.output)
    if fit.r_squared < 0.5:
        terminal.note(
            f"the polynomial explains {fit.r_squared:.0%} of the velocity's change only; "
            "StepCache, which needs no calibration, may do as well"
        )
    terminal.say(
        f"{len(recorder.points)} steps of {len(samples)} edits: the polynomial of degree "
        f"{args.degree} explains {fit.r_squared:.1%} of the variance; its error is "
        f"{fit.rms_error:.4f} (rms), {fit.max_error:.4f} at most\n"
        f"calibration: {args.output}"
    )
    return {
        "output": str(args.output),
        "model": manifest.model,
        "engine_identity": manifest.identity,
        "num_steps": steps,
        "num_samples": len(samples),
        "num_points": len(recorder.points),
        "degree": args.degree,
        "coefficients": list(fit.coefficients),
        "measured": list(fit.measured),
        "rms_error": fit.rms_error,
        "max_error": fit.max_error,
        "r_squared": fit.r_squared,
    }


def _samples(args: argparse.Namespace, kind: str) -> list[_Sample]:
    if args.set is not None:
        return _folder_samples(args.set, args.num_samples)
    if kind != "small":
        raise UsageError("--set is missing: a folder with pictures and edits.jsonl")
    return _small_samples(args.num_samples, args.seed)


def _small_samples(count: int, seed: int) -> list[_Sample]:
    """Training scenes, as many of each category; never those of the held-out split."""
    import numpy as np
    from PIL import Image

    from ditrim.runtime.small_editor import scenes

    samples = []
    for index in range(count):
        example = scenes.sample_edit(
            np.random.default_rng([seed, index, _SCENE_WORD]),
            category=scenes.CATEGORIES[index % len(scenes.CATEGORIES)],
            split="train",
        )

        def images(example: Any = example) -> tuple[Image.Image, ...]:
            return tuple(Image.fromarray(reference) for reference in example.references)

        samples.append(_Sample(images=images, prompt=example.prompt))
    return samples


def _folder_samples(folder: Path, count: int) -> list[_Sample]:
    from ditrim.runtime.editing.edit_set import load_edit_set
    from ditrim.runtime.editing.pictures import open_picture

    samples = []
    for task in load_edit_set(folder)[:count]:

        def images(task: Any = task) -> tuple[Image.Image, ...]:
            return tuple(open_picture(path) for path in task.images)

        samples.append(_Sample(images=images, prompt=task.prompt))
    return samples


def _request(args: argparse.Namespace, sample: _Sample, steps: int, index: int) -> EditRequest:
    from ditrim.runtime.editing.pipelines import EditRequest

    return EditRequest(
        images=sample.images(),
        prompt=sample.prompt,
        true_cfg_scale=args.true_cfg_scale,
        guidance=args.guidance,
        steps=steps,
        seed=args.seed + index,
    )
