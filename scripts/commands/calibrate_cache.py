"""The `calibrate-cache` command."""

from __future__ import annotations

import argparse
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
from ditrim.commands.editing import (
    add_engine_options,
    add_machine_options,
    add_step_options,
    open_engines,
    request_of,
)
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.runtime.editing.pipelines import EditRequest

_EXAMPLES = """\
  calibrate-cache --engine engines-out/small --output small-cache.json
  calibrate-cache --engine <set> --set ./edits --steps 28 --output cache.json
  calibrate-cache --engine <set> --set ./edits --true-cfg-scale 4 --output cache.json"""
_MAX_DEGREE = 8


def _parser() -> CommandParser:
    parser = CommandParser(
        "calibrate-cache",
        description="Fit what TeaCache needs: a polynomial that predicts, from the change of "
        "FRONT's output\nsince the last step, how much the velocity changes. Runs edits with the "
        "full context.",
        examples=_EXAMPLES,
    )
    add_engine_options(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="the calibration, .json")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--set",
        type=Path,
        metavar="FOLDER",
        help="pictures and edits.jsonl; the small editor draws its own training scenes",
    )
    add_whole(measured, "--num-samples", 1, 10_000, "edits", 24)
    add_whole(measured, "--seed", 0, MAX_SEED, "of scenes and noise", 0)
    add_step_options(measured, least_steps=2)
    add_whole(parser, "--degree", 1, _MAX_DEGREE, "of the polynomial", 4)
    parser.set_defaults(negative_prompt=None, size="auto")
    add_machine_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `calibrate-cache`; returns the exit code."""
    return run_command(_parser, _calibrate, argv)


def _calibrate(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything that can be refused is refused before the first step."""
    from ditrim.runtime.editing.pictures import check_output
    from ditrim.runtime.evaluation.edits import choose_samples

    check_output(args.output, "--output")
    opened = open_engines(args, terminal)
    engines, engine_set = opened.engines, opened.engine_set
    manifest = engine_set.manifest
    if args.set is None and manifest.source["kind"] != "small":
        raise UsageError("--set is missing: a folder with pictures and edits.jsonl")
    samples = choose_samples(args.set, args.num_samples, "cache", args.seed)

    from ditrim.runtime.attachment import attach
    from ditrim.runtime.caches.calibration import (
        CacheCalibration,
        ChangeRecorder,
        check_enough,
        fit_polynomial,
        save_calibration,
        weights_digest,
    )
    from ditrim.runtime.editing.pipelines import default_steps, prepare_request, run_edit
    from ditrim.runtime.policy import FullContext

    pipe = opened.pipeline()
    steps = args.steps or default_steps(pipe, engine_set)
    check_enough(len(samples) * (steps - 1), args.degree)

    def request_at(index: int) -> EditRequest:
        images, prompt = samples[index].open().images, samples[index].prompt
        request = request_of(args, images, prompt, args.seed + index)
        return prepare_request(pipe, engine_set, request)

    for index in range(len(samples)):
        request_at(index)
    recorder = ChangeRecorder()
    with steps_shown(terminal, "measuring", len(samples) * steps) as advance:
        for index in range(len(samples)):

            def on_step(done: int, total: int, first: int = index * steps) -> None:
                advance(first + done, "")

            with attach(pipe, engines, FullContext(), cache=recorder):
                run_edit(pipe, request_at(index), on_step)
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
