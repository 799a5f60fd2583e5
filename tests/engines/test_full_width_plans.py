"""Plans of the real width and cut depth, built by TensorRT-RTX without a GPU.

As few blocks as have every kind of block in BACK, between the released models' own embeddings; up
to 4096 reference tokens beside 4096 noisy ones. The last block takes less memory than others, so
one before it is scored. A block in FRONT is one of BACK without the scoring, so that one set has
it. In bf16 they have the 8 rungs of a build, in fp16 3. And the small editor, whole.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditrim.engines.build.build import run_build
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.source import planned_config
from ditrim.engines.cost.devices import DEVICES
from ditrim.engines.estimate.estimate import estimate
from ditrim.engines.sets.engine_set import EngineSet, load_engine_set
from ditrim.export.checkpoint import WEIGHTS_NAME
from ditrim.export.family import FAMILIES
from ditrim.export.weights import index_placeholder

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") and importlib.util.find_spec("polygraphy")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx and polygraphy are not installed"),
]

# Model, precision, blocks in FRONT; in BACK two, of FLUX a double- and two single-stream blocks.
CASES = [
    ("qwen-edit", "bf16", 1),
    ("qwen-edit", "fp16", 0),
    ("flux-kontext", "bf16", 0),
    ("flux-kontext", "fp16", 0),
]
NOISE_VALUES = 1 << 24
# Several times what a build takes where something else has the other core.
MOST_SECONDS = 600


def write_checkpoint(folder: Path, model: str, depths: dict[str, int]) -> None:
    """A checkpoint of a cut-down model in bf16: small normal numbers, the same ones repeated."""
    family = FAMILIES[model]
    config = {**family.config, **depths, "_class_name": family.transformer_class}
    tensors = index_placeholder(family, config, torch.bfloat16).tensors
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(0)
    noise = (0.02 * torch.randn(NOISE_VALUES, generator=generator)).bfloat16()
    values = noise.view(torch.int16).numpy().tobytes()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / WEIGHTS_NAME, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        while end:
            end -= file.write(values[: min(end, len(values))])


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which go when the test is over."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def options_for(workshop: Path, model: str, precision: str, front_depth: int) -> BuildOptions:
    """Options of a set of a checkpoint that is written here."""
    depths = {"num_layers": front_depth + 2}
    scored = front_depth
    if model == "flux-kontext":
        depths = {"num_layers": front_depth + 1, "num_single_layers": 2}
        scored += 1
    write_checkpoint(workshop / "checkpoint", model, depths)
    return BuildOptions(
        model=model,
        weights=str(workshop / "checkpoint"),
        backend="tensorrt-rtx",
        precision=precision,
        front_depth=front_depth,
        layers=(scored,),
        rungs=8 if precision == "bf16" else 3,
        max_reference_tokens=4096,
        max_noisy_tokens=4096,
        max_text_tokens=512,
        max_batch=1,
        compute_capability=("8.9",),
        output=str(workshop / "set"),
        force=True,
    )


def build_timed(options: BuildOptions) -> tuple[EngineSet, float]:
    start = time.monotonic()
    engine_set = run_build(options).engine_set
    seconds = time.monotonic() - start
    assert seconds < MOST_SECONDS
    return engine_set, seconds


@pytest.mark.parametrize(("model", "precision", "front_depth"), CASES)
def test_a_rung_adds_little_and_the_stated_memory_is_the_estimate(
    workshop: Path, model: str, precision: str, front_depth: int
) -> None:
    options = options_for(workshop, model, precision, front_depth)
    built, seconds = build_timed(options)
    sizes = {role: (built.folder / f"{role}.plan").stat().st_size for role in built.manifest.plans}
    said = estimate(options, planned_config(options), DEVICES["rtx4090"])
    for plan in said.plans:
        spec = built.manifest.plans[plan.role]
        num_rungs = len(spec.profiles)
        assert num_rungs == len(options.reference_ladder.rungs) == options.rungs
        assert spec.device_memory_bytes is not None
        errors = [
            estimated / stated - 1
            for estimated, stated in zip(
                plan.activation_bytes, spec.device_memory_bytes, strict=True
            )
        ]
        print(
            f"{model} {precision} {plan.role}: {sizes[plan.role] / 1e6:.1f} MB in {seconds:.0f} s, "
            f"activations {spec.device_memory_bytes[0] / 1e6:.0f} to "
            f"{spec.device_memory_bytes[-1] / 1e6:.0f} MB, estimated {min(errors):+.1%} to "
            f"{max(errors):+.1%}"
        )
        if plan.role == "front" and not front_depth:  # the estimate is of blocks
            assert min(errors) > 0
            continue
        # The logits of 4096 rows, all at once, would be 1.7 GB more.
        assert -0.02 < min(errors) <= max(errors) < 0.1
        # All that is not weights, as if the first rung cost nothing more than another one.
        growth = (sizes[plan.role] - plan.weights_bytes) / (num_rungs - 1) / plan.weights_bytes
        assert 0 < growth < 0.1
    if not front_depth:
        return
    one, _ = build_timed(replace(options, rungs=1))
    for role, eight in sizes.items():
        single = (one.folder / f"{role}.plan").stat().st_size
        growth = (eight - single) / 7 / single
        print(f"{model} {precision} {role}: a rung adds {growth:.2%} to {single / 1e6:.1f} MB")
        assert 0 < growth < 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_small_editor_is_built_with_all_its_rungs(workshop: Path, precision: str) -> None:
    options = BuildOptions(
        preset="small",
        backend="tensorrt-rtx",
        precision=precision,
        compute_capability=("8.9",),
        output=str(workshop / "set"),
    )
    built, seconds = build_timed(options)
    manifest = load_engine_set(options.target, verify="hashes").manifest
    assert manifest == built.manifest
    assert (manifest.precision, manifest.source["kind"]) == (precision, "small")
    for role, spec in manifest.plans.items():
        rungs = [profile.reference.most for profile in spec.profiles]
        assert rungs == list(options.reference_ladder.rungs)
        assert len(rungs) == 8
        assert spec.device_memory_bytes is not None
        size = (built.folder / spec.file).stat().st_size
        print(f"small {precision} {role}: {size / 1e6:.1f} MB in {seconds:.0f} s")
