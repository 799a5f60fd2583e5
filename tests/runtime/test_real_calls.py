"""Calls as users of the released models make them, with default options, against diffusers.

Pipelines are complete (see `complete_pipelines`): only widths, depths and weights' values are not
the released ones. Sets are built by the public command from the released layout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from complete_pipelines import make_pipeline, prompt_of, save_pipeline
from PIL import Image

import ditrim.runtime as ditrim
from ditrim.commands.build_engine import main as build_engine
from ditrim.commands.edit_image import main as edit_image
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import DitrimError
from ditrim.runtime.editing.pipelines import load_pipeline

LIMIT = 1e-4
# Aspect ratios of photographs, screens and paper; all but the first were over the former limits.
SHAPES = {
    "1:1": (1024, 1024),
    "4:3": (1600, 1200),
    "16:9": (1920, 1080),
    "5:4": (1280, 1024),
    "2:1": (1400, 700),
    "21:9": (2520, 1080),
    "A4": (1240, 1754),
    "19.5:9": (1170, 2532),
    "3:5": (900, 1500),
}


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture with broad areas and edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


class World:
    """A family's complete pipeline, saved, and the set that `build-engine` makes of it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder, self.set = folder / "pipeline", folder / "set"
        self.pipe = make_pipeline(family)
        shards = {"max_shard_size": "60KB"} if family == "qwen-edit-plus" else {}
        save_pipeline(self.pipe, self.folder, **shards)
        arguments = ["--model", family, "--weights", str(self.folder), "--output", str(self.set)]
        assert build_engine([*arguments, "--quiet"]) == 0
        self.engines = load_engines(self.set, device="cpu")

    def call(self, pipe: Any = None, **arguments: Any) -> torch.Tensor:
        """One step of a call; the rest of its schedule is interrupted."""
        pipe = self.pipe if pipe is None else pipe

        def interrupt(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = True
            return values

        given: dict[str, Any] = {
            "image": photo((1600, 1200)),
            "prompt": prompt_of(12),
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            "callback_on_step_end": interrupt,
        } | arguments
        with torch.no_grad():
            result: torch.Tensor = pipe(**given).images
        return result

    def difference(self, pipe: Any = None, policy: Any = None, **arguments: Any) -> float:
        """How far the attached pipeline is from the plain one, by the largest value."""
        pipe = self.pipe if pipe is None else pipe
        expected = self.call(pipe, **copy.deepcopy(arguments))
        with ditrim.attach(pipe, self.engines, policy or ditrim.FullContext()):
            found = self.call(pipe, **copy.deepcopy(arguments))
        assert found.shape == expected.shape
        assert bool(expected.isfinite().all())
        return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def make(family: str) -> World:
        if family not in made:
            made[family] = World(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


Worlds = Callable[[str], World]


@pytest.mark.parametrize("family", ["qwen-edit", "qwen-edit-plus", "flux-kontext"])
def test_a_photo_of_4_by_3_is_served(family: str, world: Worlds) -> None:
    assert world(family).difference() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "4:3"])
@pytest.mark.parametrize("family", ["qwen-edit", "qwen-edit-plus", "flux-kontext"])
def test_every_usual_shape_is_served(family: str, shape: str, world: Worlds) -> None:
    assert world(family).difference(image=photo(SHAPES[shape])) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen-edit-plus", "qwen-edit-2511", "firered-edit", "firered-edit-1.1"]
)
def test_three_references_are_served(family: str, world: Worlds) -> None:
    images = [photo(SHAPES[shape], seed) for seed, shape in enumerate(("4:3", "A4", "21:9"))]
    assert world(family).difference(image=images) < LIMIT


@pytest.mark.parametrize("num_words", [1, 400])
@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_short_and_long_prompts_are_served(family: str, num_words: int, world: Worlds) -> None:
    assert world(family).difference(prompt=prompt_of(num_words)) < LIMIT


@pytest.mark.parametrize("family", ["qwen-edit-plus", "flux-kontext"])
def test_true_guidance_and_several_pictures_a_prompt_are_served(family: str, world: Worlds) -> None:
    guided = {"negative_prompt": prompt_of(3), "true_cfg_scale": 3.0}
    assert world(family).difference(**guided, num_images_per_prompt=2) < LIMIT


def test_callbacks_that_change_latents_and_decoded_pictures_are_served(world: Worlds) -> None:
    def halve(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.5 * values["latents"]}

    own = world("flux-kontext")
    own.pipe.vae.enable_tiling()
    try:
        arguments = {"output_type": "pt", "callback_on_step_end": halve}
        assert own.difference(**arguments) < LIMIT
    finally:
        own.pipe.vae.disable_tiling()


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_inpainting_pipelines_are_served(family: str, world: Worlds) -> None:
    from diffusers import FluxKontextInpaintPipeline, QwenImageEditInpaintPipeline

    own = world(family)
    kinds = {
        "qwen-edit": QwenImageEditInpaintPipeline,
        "flux-kontext": FluxKontextInpaintPipeline,
    }
    pipe = kinds[family](**own.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    size = SHAPES["4:3"]
    mask = Image.new("L", size, 0)
    mask.paste(255, (200, 200, 900, 800))
    assert own.difference(pipe, mask_image=mask, strength=0.9, num_inference_steps=4) < LIMIT


def test_another_scheduler_is_served(world: Worlds) -> None:
    from diffusers import UniPCMultistepScheduler

    own = world("flux-kontext")
    usual = own.pipe.scheduler
    own.pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        use_dynamic_shifting=True,
    )
    try:
        assert own.difference() < LIMIT
    finally:
        own.pipe.scheduler = usual


@pytest.mark.parametrize("family", ["qwen-edit-plus", "flux-kontext"])
def test_pipelines_in_bfloat16_are_served(family: str, world: Worlds) -> None:
    pipe = make_pipeline(family).to(torch.bfloat16)
    # The engines compute in float32, the transformer in bfloat16: 8 bits of mantissa.
    assert world(family).difference(pipe) < 2.0**-5


def test_the_default_policy_reduces_a_real_call(world: Worlds) -> None:
    own = world("qwen-edit")
    with ditrim.attach(own.pipe, own.engines) as attachment, torch.no_grad():
        own.pipe(
            image=photo((1600, 1200)),
            prompt=prompt_of(12),
            num_inference_steps=3,
            output_type="latent",
        )
    roles = [step.role for step in attachment.report.steps]
    assert roles == ["anchor", "reduced", "reduced"] or roles == ["anchor", "anchor", "reduced"]
    assert attachment.report.steps[-1].num_kept < attachment.report.steps[0].num_reference == 4144


def test_the_parts_of_a_variant_are_loaded_with_it(world: Worlds, tmp_path: Path) -> None:
    own = world("flux-kontext")
    half = make_pipeline("flux-kontext").to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    engine_set = own.engines.engine_set
    source = {**engine_set.manifest.source, "location": str(tmp_path), "variant": "fp16"}
    engine_set = replace(engine_set, manifest=replace(engine_set.manifest, source=source))
    found = load_pipeline(engine_set).vae.state_dict()
    assert all(torch.equal(found[n], v.float()) for n, v in half.vae.state_dict().items())
    source = {**source, "variant": None}
    engine_set = replace(engine_set, manifest=replace(engine_set.manifest, source=source))
    with pytest.raises(DitrimError, match="cannot be loaded"):
        load_pipeline(engine_set)


def edited(own: World, folder: Path, capsys: Any, *options: str) -> tuple[dict[str, Any], Any]:
    """What `edit-image --json` says, and the picture."""
    out = folder / "out.png"
    arguments = ["--engine", str(own.set), "--prompt", prompt_of(8), "--output", str(out)]
    capsys.readouterr()
    code = edit_image([*arguments, "--steps", "2", "--json", *options])
    content = json.loads(capsys.readouterr().out)
    assert code == 0, content
    return content, np.asarray(Image.open(out))


def test_the_first_example_of_the_readme_edits_a_photo_of_4_by_3(
    world: Worlds, tmp_path: Path, capsys: Any
) -> None:
    own = world("qwen-edit")
    photo((1600, 1200)).save(tmp_path / "photo.jpg")
    content, found = edited(own, tmp_path, capsys, "--image", str(tmp_path / "photo.jpg"))
    assert found.shape == (896, 1184, 3)
    assert content["reference_tokens"] == 4144
    assert content["kept_ratio"] < 1


def test_edit_image_gives_a_kontext_portrait_its_shape(
    world: Worlds, tmp_path: Path, capsys: Any
) -> None:
    own, path = world("flux-kontext"), tmp_path / "in.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: a portrait of 3000 x 4000
    photo((4000, 3000)).save(path, exif=exif, quality=95)
    content, found = edited(own, tmp_path, capsys, "--image", str(path), "--policy", "full")
    assert (content["width"], content["height"]) == (880, 1168)
    assert content["size_reason"] == "the shape of the first picture (3000 x 4000)"
    upright = Image.open(path).rotate(-90, expand=True)
    expected = own.pipe(
        image=upright,
        prompt=prompt_of(8),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        width=880,
        height=1168,
        max_area=880 * 1168,
    ).images[0]
    assert int(np.abs(found.astype(int) - np.asarray(expected).astype(int)).max()) <= 1


def test_edit_image_takes_its_shape_from_the_first_of_several_pictures(
    world: Worlds, tmp_path: Path, capsys: Any
) -> None:
    own = world("qwen-edit-plus")
    options = []
    for index, size in enumerate(((64, 48), (900, 1500))):
        photo(size, index).save(tmp_path / f"{index}.png")
        options += ["--image", str(tmp_path / f"{index}.png")]
    content, found = edited(own, tmp_path, capsys, *options)
    assert (content["width"], content["height"]) == (1184, 896)
    assert found.shape == (896, 1184, 3)


def test_edit_image_runs_a_distilled_editors_scheduler(
    world: Worlds, tmp_path: Path, capsys: Any
) -> None:
    own, report = world("qwen-edit"), tmp_path / "report.json"
    photo((640, 480)).save(tmp_path / "in.png")
    options = ["--image", str(tmp_path / "in.png"), "--scheduler", "lightning", "--size", "256x192"]
    edited(own, tmp_path, capsys, *options, "--report", str(report), "--steps", "4")
    steps = json.loads(report.read_text())["run"]["steps"]
    sigmas = torch.linspace(1.0, 0.25, 4)
    shifted = 3 * sigmas / (1 + 2 * sigmas)  # exp(ln 3) whatever the size
    times = torch.tensor([step["timestep"] for step in steps])
    torch.testing.assert_close(times, shifted, atol=1e-4, rtol=0)
    assert [step["role"] for step in steps] == ["anchor", "reduced", "anchor", "reduced"]
