"""Calls as users of the released models make them, on the torch backend, with default options.

Pipelines are complete (see `complete_pipelines`): only widths, depths and weights' values are not
the released ones.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from complete_pipelines import make_pipeline, prompt_of, save_pipeline
from PIL import Image

import ditrim
from ditrim.commands.edit_image import main as edit_image
from ditrim.commands.evaluate_policies import main as evaluate_policies
from ditrim.commands.profile_latency import main as profile_latency

# Calls that their families' users make: pictures, words, and what else.
CALLS: dict[str, list[dict[str, Any]]] = {
    "qwen-edit": [
        {"size": (1600, 1200)},
        {"size": (1170, 2532), "words": 400, "negative_prompt": "dark", "true_cfg_scale": 4.0},
    ],
    "qwen-edit-plus": [{"size": (1240, 1754), "references": 3}],
    "qwen-edit-2511": [{"size": (2520, 1080), "references": 2, "num_images_per_prompt": 2}],
    "flux-kontext": [{"size": (900, 1500)}, {"size": (1920, 1080), "words": 400}],
}


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with broad areas and edges."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    call = dict(call)
    size, words, count = call.pop("size"), call.pop("words", 12), call.pop("references", 1)
    images = [photo(size, seed) for seed in range(count)]

    def interrupt(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    return call | {
        "image": images if count > 1 else images[0],
        "prompt": prompt_of(words),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "callback_on_step_end": interrupt,
    }


@pytest.mark.parametrize(
    ("family", "number"),
    [(family, n) for family, calls in CALLS.items() for n in range(len(calls))],
)
def test_one_line_serves_what_users_call(family: str, number: int) -> None:
    pipe, arguments = make_pipeline(family), arguments_of(CALLS[family][number])
    with torch.no_grad():
        expected = pipe(**copy.deepcopy(arguments)).images
        with ditrim.attach(pipe, policy=ditrim.FullContext()):
            found = pipe(**copy.deepcopy(arguments)).images
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_edit_image_runs_a_saved_pipeline_without_a_build(family: str, tmp_path: Path) -> None:
    pipe = make_pipeline(family)
    folder = save_pipeline(pipe, tmp_path / "pipeline")
    picture, result, report = (tmp_path / name for name in ("in.png", "out.png", "report.json"))
    photo((640, 480)).save(picture)
    place = ["--engine", "torch", "--pipeline", str(folder), "--device", "cpu"]
    edit = ["--image", str(picture), "--prompt", prompt_of(6), "--steps", "4", "--size", "256x192"]
    files = ["--output", str(result), "--report", str(report)]
    assert edit_image([*place, *edit, *files, "--quiet"]) == 0
    with Image.open(result) as made:
        assert made.size == (256, 192)
    steps = json.loads(report.read_text())["run"]["steps"]
    assert [step["role"] for step in steps] == ["anchor", "reduced", "anchor", "reduced"]
    assert steps[1]["num_kept"] < steps[1]["num_reference"]


def test_evaluate_policies_compares_on_the_shipped_editor(tmp_path: Path) -> None:
    place = ["--engine", "torch", "--pipeline", "small", "--device", "cpu", "--quiet"]
    choice = ["--policy", "topi", "--count", "2", "--steps", "4", "--no-lpips"]
    assert evaluate_policies([*place, *choice, "--output", str(tmp_path / "compared")]) == 0
    assert (tmp_path / "compared" / "report.html").is_file()


def test_profile_latency_measures_the_familys_edit(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--engine", "torch", "--pipeline", "small", "--device", "cpu"]
    rounds = ["--repeats", "5", "--warmup", "1", "--max-noise", "10", "--rung", "234"]
    assert profile_latency([*place, *rounds, "--quiet", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    sizes = {(row["noisy"], row["text"], row["reference"]) for row in rows}
    assert sizes == {(144, 64, 468)}
    assert {row["part"] for row in rows} >= {"front", "back", "anchor", "selection"}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ([], "--pipeline small"),
        (["--pipeline", "nowhere-at-all"], "neither a folder that exists"),
        (["--pipeline", "small", "--device", "cuda"], "sees no GPU"),
        (["--pipeline", "small", "--cuda-graphs", "4"], "CUDA graphs need a GPU"),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo((64, 48)).save(tmp_path / "in.png")
    edit = [
        "--image",
        str(tmp_path / "in.png"),
        "--prompt",
        "x",
        "--output",
        str(tmp_path / "o.png"),
    ]
    assert edit_image(["--engine", "torch", *options, *edit]) == 2
    assert remedy in capsys.readouterr().err
