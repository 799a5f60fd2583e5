"""FRONT and BACK in torch against the unmodified diffusers transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithm_1 import run_model
from tiny import FAMILY_NAMES, Call, make_call, rope_of, tiny_transformer
from torch import Tensor

from ditrim.export.family import FAMILIES
from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, blocks_of, processors_installed
from ditrim.plugins.errors import UsageError

CPU = torch.device("cpu")
GEOMETRIES = [
    {"batch": 1, "noisy": (4, 5), "references": ((5, 4),), "num_text": 6},
    {"batch": 2, "noisy": (3, 3), "references": ((6, 2), (1, 5)), "num_text": 1},
    {"batch": 1, "noisy": (1, 1), "references": ((1, 1),), "num_text": 9},
]


def run_split(
    transformer: Any, call: Call, point: SplitPoint, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """FRONT, gather, BACK; influence at full length as well."""
    kwargs = call.kwargs
    rope = rope_of(transformer, call)
    batch = kwargs["hidden_states"].shape[0]
    reference_rope = [table.expand(batch, -1, -1) for table in rope.reference]
    noisy_text = [*rope.noisy, *rope.text]
    roles = dict.fromkeys(point.representative_layers, "score")
    with processors_installed(transformer, roles), torch.no_grad():
        outputs = FrontGraph(transformer, point)(
            kwargs["hidden_states"][:, : call.num_noisy],
            kwargs["hidden_states"][:, call.num_noisy :],
            kwargs["encoder_hidden_states"],
            kwargs["timestep"],
            kwargs.get("guidance"),
            kwargs.get("pooled_projections"),
            *noisy_text,
            *reference_rope,
        )
        noisy, reference, text, temb, *reference_temb = outputs
        if kept is not None:
            reference = reference[:, kept]
            reference_rope = [table[:, kept] for table in reference_rope]
        return BackGraph(transformer, point)(
            noisy,
            reference,
            text,
            temb,
            reference_temb[0] if reference_temb else None,
            *noisy_text,
            *reference_rope,
            torch.arange(call.num_noisy),
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("front_depth", [0, 1, 2, "default"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_front_and_back_at_full_length_equal_the_unmodified_transformer(
    family: str, front_depth: int | str, geometry: dict[str, Any]
) -> None:
    num_layers = 4
    if front_depth == "default":
        front_depth, num_layers = FAMILIES[family].front_depth, 12
    assert isinstance(front_depth, int)
    transformer = tiny_transformer(family, num_layers=num_layers)
    call = make_call(family, **geometry)
    with torch.no_grad():
        expected = transformer(**call.kwargs)[0][:, : call.num_noisy]
    point = SplitPoint(
        num_layers=num_layers, front_depth=front_depth, representative_layers=(num_layers - 1,)
    )
    velocity, _ = run_split(transformer, call, point)
    assert relative_error(velocity, expected) < 1e-5


@pytest.mark.parametrize("geometry", GEOMETRIES[:2])
@pytest.mark.parametrize("front_depth", [0, 2])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_reduced_length_and_influence_equal_algorithm_1(
    family: str, front_depth: int, geometry: dict[str, Any]
) -> None:
    transformer = tiny_transformer(family)
    call = make_call(family, **geometry)
    layers = (2, 3)
    point = SplitPoint(num_layers=4, front_depth=front_depth, representative_layers=layers)
    kept = torch.arange(0, sum(h * w for _, h, w in call.grids[1:]), 3)
    expected, _ = run_model(transformer, call, front_depth=front_depth, kept=kept)
    _, expected_influence = run_model(transformer, call, front_depth=front_depth, layers=layers)
    reduced, _ = run_split(transformer, call, point, kept)
    _, influence = run_split(transformer, call, point)
    assert relative_error(reduced, expected) < 1e-5
    assert expected_influence is not None
    assert relative_error(influence.double(), expected_influence) < 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pruning_changes_the_result(family: str) -> None:
    """The comparisons above could not fail if references did not matter."""
    transformer = tiny_transformer(family)
    call = make_call(family)
    full, _ = run_model(transformer, call, front_depth=1)
    reduced, _ = run_model(transformer, call, front_depth=1, kept=torch.arange(5))
    assert relative_error(reduced, full) > 1e-3


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_transformer_is_left_as_it_was(family: str) -> None:
    transformer = tiny_transformer(family)
    before = [block.attn.processor for block in blocks_of(transformer)]
    keys = [sorted(vars(block)) for block in blocks_of(transformer)]
    flags = [getattr(block, "zero_cond_t", None) for block in blocks_of(transformer)]
    point = SplitPoint(num_layers=4, front_depth=1, representative_layers=(2,))
    run_split(transformer, make_call(family), point)
    assert [block.attn.processor for block in blocks_of(transformer)] == before
    assert [sorted(vars(block)) for block in blocks_of(transformer)] == keys
    assert [getattr(block, "zero_cond_t", None) for block in blocks_of(transformer)] == flags


@pytest.mark.parametrize(
    ("front_depth", "layers", "message"),
    [
        (4, (3,), r"front depth 4 is not in \[0, 4\)"),
        (-1, (3,), r"front depth -1"),
        (1, (), "no representative layers given"),
        (2, (1,), r"representative layer 1 is not in \[2, 4\)"),
        (1, (2, 4), r"representative layer 4"),
        (1, (3, 2), "must increase and not repeat"),
        (1, (2, 2), "must increase and not repeat"),
    ],
)
def test_impossible_split_names_what_is_allowed(
    front_depth: int, layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        SplitPoint(num_layers=4, front_depth=front_depth, representative_layers=layers)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_defaults_of_a_family_fit_its_released_depth(family: str) -> None:
    entry = FAMILIES[family]
    num_layers = 57 if entry.architecture == "flux" else 60
    point = SplitPoint(
        num_layers=num_layers,
        front_depth=entry.front_depth,
        representative_layers=entry.representative_layers,
    )
    assert min(point.representative_layers) >= point.front_depth == 10


def test_unsupported_transformer_is_named() -> None:
    with pytest.raises(UsageError, match="Linear is not a transformer that can be split"):
        blocks_of(torch.nn.Linear(2, 2))
