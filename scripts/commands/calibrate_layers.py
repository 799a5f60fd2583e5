"""The `calibrate-layers` command."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.commands.console import CommandParser, Terminal, run_command
from ditrim.export.family import FAMILIES, Family, family_named
from ditrim.plugins.errors import CheckpointError, UsageError

_EXAMPLES = """\
  calibrate-layers --preset small --output engines-out/calibration
  calibrate-layers --model qwen-edit --weights ./Qwen-Image-Edit --set ./edits --device cuda
  calibrate-layers --model flux-kontext --set ./edits --front-depth 10 --num-representative 3"""
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One edit to measure on."""

    images: Callable[[], list[Any]]
    prompt: str
    category: str


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
    measured.add_argument("--num-samples", type=int, default=48, metavar="N", help="default: 48")
    measured.add_argument(
        "--steps", type=int, default=10, metavar="N", help="denoising steps (default: 10)"
    )
    measured.add_argument("--seed", type=int, default=0, metavar="N", help="of scenes and noise")
    chosen = parser.add_argument_group("what is chosen")
    chosen.add_argument(
        "--num-representative", type=int, default=3, metavar="M", help="layers (default: 3)"
    )
    chosen.add_argument("--front-depth", type=int, metavar="K", help="default: the model's")
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
    for name, least in (
        ("num_samples", 1),
        ("steps", 1),
        ("num_representative", 1),
        ("front_depth", 0),
        ("seed", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
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


def _small_samples(count: int, seed: int) -> list[_Sample]:
    """Training scenes, as many of each category; never those of the held-out split."""
    import numpy as np
    from PIL import Image

    from ditrim.runtime.small_editor import scenes

    samples = []
    for index in range(count):
        category = scenes.CATEGORIES[index % len(scenes.CATEGORIES)]
        rng = np.random.default_rng([seed, index, 0xCA11])
        example = scenes.sample_edit(rng, category=category, split="train")

        def images(example: Any = example) -> list[Any]:
            return [Image.fromarray(reference) for reference in example.references]

        samples.append(_Sample(images=images, prompt=example.prompt, category=category))
    return samples


def _folder_samples(folder: Path, count: int, family: Family) -> list[_Sample]:
    from ditrim.runtime.editing.edit_set import load_edit_set
    from ditrim.runtime.editing.pictures import open_picture

    samples = []
    for task in load_edit_set(folder)[:count]:

        def images(task: Any = task) -> list[Any]:
            return [open_picture(path) for path in task.images]

        if len(task.images) > family.max_references:
            raise UsageError(
                f"an edit of {folder} has {len(task.images)} pictures; {family.name} takes at "
                f"most {family.max_references}"
            )
        samples.append(_Sample(images=images, prompt=task.prompt, category=task.category))
    return samples


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


@contextmanager
def _counted(terminal: Terminal, samples: Sequence[_Sample]) -> Iterator[Iterator[_Sample]]:
    """The samples, one by one, with a progress bar on a terminal."""
    from rich.progress import Progress

    with Progress(
        console=terminal.console, disable=terminal.is_quiet or not terminal.console.is_terminal
    ) as progress:
        yield iter(progress.track(samples, description="measuring"))


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

    family = family_named(arguments.model)
    if arguments.preset == "small":
        samples = _small_samples(arguments.num_samples, arguments.seed)
    else:
        samples = _folder_samples(arguments.set, arguments.num_samples, family)
    pipe = _load_pipeline(arguments)
    num_layers = len(blocks_of(pipe.transformer))
    front_depth = arguments.front_depth
    if front_depth is None:
        front_depth = _default_front_depth(arguments.preset, family.front_depth)
    top_layers(tuple([0.0] * num_layers), front_depth, arguments.num_representative)
    pipe.set_progress_bar_config(disable=True)
    raw: dict[str, list[list[float]]] = {}
    mass: dict[str, list[list[float]]] = {}
    with _counted(terminal, samples) as counted:
        for index, sample in enumerate(counted):
            images = sample.images()
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
    from ditrim.runtime.small_editor import model_folder

    return int(read_calibration(model_folder() / "calibration.json").get("front_depth", 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `run_command` for the exit codes."""
    return run_command(_parser, _calibrate, argv)
