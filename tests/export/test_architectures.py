"""A third architecture is one value: LongCat-Image-Edit, which ditrim does not know, from here."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_sessions import relative_error
from torch import Tensor

import ditrim.runtime as ditrim
from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.cost.flops import CallSize, call_flops
from ditrim.engines.cost.parameters import count_parameters
from ditrim.engines.estimate.estimate import estimate
from ditrim.engines.load import load_engines
from ditrim.export.family import FAMILIES
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import CallArguments, Positions
from ditrim.plugins.architectures.flux import FLUX, place_by_ids
from ditrim.plugins.architectures.streams import count_inputs, input_products
from ditrim.plugins.architectures.transformers import architecture_of, blocks_of
from ditrim.plugins.layout import Layout
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.policy import FullContext
from ditrim.runtime.transformer import engine_transformer

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}
LAYOUT, NUM_TEXT = Layout((4, 5), ((5, 4), (2, 3))), 6


def embed(
    modules: Any, latents: Tensor, text: Tensor, timestep: Tensor, *_: Tensor | None, **__: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    temb = modules.time_embed(timestep.float() * 1000, latents.dtype)
    return modules.x_embedder(latents), modules.context_embedder(text), temb, None


def positions(layout: Layout, num_text: int) -> Positions:
    """The text on a diagonal, pictures behind its end; 1 is the picture in the making."""
    pictures = [
        torch.cartesian_prod(
            torch.tensor([index]), torch.arange(height) + num_text, torch.arange(width) + num_text
        )
        for index, (height, width) in enumerate(layout.grids, start=1)
    ]
    diagonal = torch.arange(num_text)
    return Positions(
        noisy=pictures[0],
        text=torch.stack([torch.zeros_like(diagonal), diagonal, diagonal], dim=1),
        reference=torch.cat(pictures[1:]),
    )


LONGCAT = replace(
    FLUX,
    name="longcat",
    transformer_class="LongCatImageTransformer2DModel",
    class_defaults={
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
    },
    embeddings=("time_embed", "context_embedder", "x_embedder"),
    embed=embed,
    front_inputs=lambda config: (),
    arguments=CallArguments(positions=("img_ids", "txt_ids")),
    place=functools.partial(place_by_ids, noisy_id=1),
    positions=positions,
    num_embedding_parameters=count_inputs,
    embedding_products=lambda config, size: input_products(config, size, 1),
    single_file=None,
    original_names=None,
)
FAMILY = replace(
    FAMILIES["flux-kontext"],
    name="longcat-edit",
    architecture="longcat",
    transformer_class="LongCatImageTransformer2DModel",
    pipeline_class="LongCatImageEditPipeline",
    hub_id="meituan-longcat/LongCat-Image-Edit",
    config={},
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, LONGCAT.name, LONGCAT)
    monkeypatch.setitem(FAMILIES, FAMILY.name, FAMILY)


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import LongCatImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LongCatImageTransformer2DModel(**CONFIG).eval()


@pytest.fixture(scope="module")
def engine_set(tmp_path_factory: pytest.TempPathFactory, transformer: Any) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("longcat")
    transformer.save_pretrained(root / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, LONGCAT.name, LONGCAT)
        patch.setitem(FAMILIES, FAMILY.name, FAMILY)
        build_engine_set(
            BuildOptions(
                model="longcat-edit",
                weights=str(root / "checkpoint"),
                front_depth=1,
                layers=(2,),
                max_reference_tokens=32,
                max_noisy_tokens=32,
                max_text_tokens=16,
                output=str(root / "engine"),
            )
        )
        yield root / "engine"


def call_of(latents: Tensor, text: Tensor, time: float) -> dict[str, Any]:
    """What the pipeline calls its transformer with."""
    where = positions(LAYOUT, NUM_TEXT)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "timestep": torch.full((len(latents),), time),
        "img_ids": torch.cat([where.noisy, where.reference]).double(),
        "txt_ids": where.text.float(),
        "guidance": None,
        "return_dict": False,
    }


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = LAYOUT.num_noisy + LAYOUT.num_reference
    latents = torch.randn(1, num_tokens, 16, generator=generator)
    return latents, torch.randn(1, NUM_TEXT, 24, generator=generator)


def test_its_calls_run_on_its_engines(engine_set: Path, transformer: Any) -> None:
    denoiser = Denoiser(load_engines(engine_set, device="cpu"), FullContext())
    stand_in = engine_transformer(denoiser)
    assert isinstance(stand_in, type(transformer))
    call = call_of(*draw(1), 0.7)
    with torch.no_grad():
        (expected,) = transformer(**call)
    (found,) = stand_in(**call)
    assert relative_error(found, expected[:, : LAYOUT.num_noisy]) < 1e-4
    assert stand_in.report.grids == LAYOUT.grids


def test_an_edit_is_that_of_its_transformer(engine_set: Path, transformer: Any) -> None:
    latents, text = draw(2)
    noisy, *references = latents.split([20, 20, 6], dim=1)
    session = ditrim.EditSession(engine_set, ditrim.FullContext(), device="cpu")
    levels = [1.0, 0.6, 0.2, 0.0]
    arguments: dict[str, Any] = {
        "noisy": noisy,
        "noisy_grid": LAYOUT.noisy,
        "references": references,
        "reference_grids": LAYOUT.references,
        "text_embeds": text,
        "sigmas": levels,
    }
    steps = list(session.denoise(**arguments))
    for (level, lower), step in zip(itertools.pairwise(levels), steps, strict=True):
        with torch.no_grad():
            (velocity,) = transformer(**call_of(torch.cat([noisy, *references], 1), text, level))
        noisy = noisy + (lower - level) * velocity[:, : LAYOUT.num_noisy]
        assert relative_error(step.latents, noisy) < 1e-4
    reduced = ditrim.EditSession(engine_set, ditrim.ToPi(ratio=0.5, interval=3), device="cpu")
    assert [step.records[0].num_kept for step in reduced.denoise(**arguments)] == [26, 13, 13]


def test_values_are_read_without_torch() -> None:
    program = (
        "import sys, ditrim.plugins.architectures as known\n"
        "print(*known.ARCHITECTURES, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["qwen", "flux", "False"], done.stderr


def test_its_costs_are_counted(transformer: Any) -> None:
    assert architecture_of(transformer) == "longcat"
    assert len(blocks_of(transformer)) == 3
    counts = count_parameters(CONFIG, "longcat", 1)
    assert counts.total == sum(p.numel() for p in transformer.parameters())
    size = CallSize(num_noisy=20, num_reference=26, num_text=6)
    full, reduced = (call_flops(CONFIG, "longcat", 1, 3, size, kept) for kept in (26, 13))
    assert full[0] == reduced[0]
    assert full[1] > reduced[1]
    options = BuildOptions(model="longcat-edit", weights="random", config=CONFIG)
    assert estimate(options, CONFIG, "a100-40").num_parameters == counts.total
