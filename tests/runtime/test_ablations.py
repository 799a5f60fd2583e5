"""ToPi's other scores and layers, on an engine set that tells the scores of every layer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_1 import run_details
from tiny import Call, make_call, tiny_transformer

import ditrim.runtime as ditrim
from ditrim.engines.backend import Engines
from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.topi import LAYERS
from ditrim.runtime.policy import SCORES

SIGMAS = [0.9, 0.5]
NUM_KEPT = 13  # of 26 tokens


@pytest.fixture(scope="module")
def call() -> Call:
    found = make_call("qwen-edit", batch=2, noisy=(4, 5), references=((5, 4), (2, 3)))
    found.kwargs["timestep"] = torch.full((2,), SIGMAS[0])
    return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Four layers, K = 1, L = (1, 3)."""
    root = tmp_path_factory.mktemp("details")
    tiny_transformer("qwen-edit").save_pretrained(root / "checkpoint")
    options = BuildOptions(
        weights=str(root / "checkpoint"),
        front_depth=1,
        layers=(1, 3),
        score_details=True,
        max_reference_tokens=64,
        max_noisy_tokens=64,
        max_text_tokens=32,
        output=str(root / "set"),
    )
    engine_set = build_engine_set(options)
    assert engine_set.manifest.detailed_layers == (1, 2, 3)
    assert "--score-details" in engine_set.manifest.command
    return load_engines(engine_set, device="cpu")


@pytest.fixture(scope="module")
def expected(call: Call) -> torch.Tensor:
    """(B, L, 3, C) float64, every third noisy row scored."""
    transformer = tiny_transformer("qwen-edit")
    return run_details(transformer, call, front_depth=1, layers=(1, 2, 3), stride=3)[1]


def kept_by(engines: str | Path | Engines, call: Call, **options: Any) -> list[list[int]]:
    """What an anchor keeps, sorted; the reduced step after it runs on as many."""
    lengths = [height * width for _, height, width in call.grids]
    noisy, *references = call.kwargs["hidden_states"].split(lengths, dim=1)
    policy = ditrim.ToPi(ratio=0.5, score_every=3, **options)
    steps = ditrim.EditSession(engines, policy, device="cpu").denoise(
        noisy=noisy,
        noisy_grid=call.grids[0][1:],
        references=references,
        reference_grids=[grid[1:] for grid in call.grids[1:]],
        text_embeds=call.kwargs["encoder_hidden_states"],
        sigmas=SIGMAS,
    )
    anchor, reduced = (step.records[0] for step in steps)
    assert (anchor.role, reduced.role) == ("anchor", "reduced")
    assert reduced.num_kept == NUM_KEPT
    assert anchor.kept_indices is not None
    return anchor.kept_indices.tolist()


def best(scores: torch.Tensor, layers: tuple[int, ...], score: str) -> list[list[int]]:
    """The better half by the sum of a score over layers (positions in BACK), sorted."""
    summed = scores[:, list(layers), SCORES.index(score)].sum(dim=1)
    return [
        sorted(sorted(range(len(row)), key=lambda j: -row[j])[:NUM_KEPT]) for row in summed.tolist()
    ]


CHOSEN = {"calibrated": (0, 2), "first": (0, 1), "last": (1, 2), "all": (0, 1, 2)}


@pytest.mark.parametrize("score", SCORES)
def test_tokens_are_ranked_by_the_score_and_the_layers_that_were_chosen(
    score: Any, engines: Engines, call: Call, expected: torch.Tensor
) -> None:
    found = {
        layers: kept_by(engines, call, score=score, layers=layers)
        for layers in LAYERS
        if layers != "random"
    }
    assert found == {layers: best(expected, chosen, score) for layers, chosen in CHOSEN.items()}
    assert len({str(kept) for kept in found.values()}) == 4  # each of them is another choice


def test_scores_choose_other_tokens(expected: torch.Tensor) -> None:
    """The comparison above tells the scores apart."""
    assert len({str(best(expected, (0, 2), score)) for score in SCORES}) == len(SCORES)


def test_random_layers_follow_the_seed(
    engines: Engines, call: Call, expected: torch.Tensor
) -> None:
    pairs = [best(expected, pair, "influence") for pair in itertools.combinations(range(3), 2)]
    found = [kept_by(engines, call, layers="random", seed=seed) for seed in range(6)]
    assert all(kept in pairs for kept in found)
    assert len({str(kept) for kept in found}) > 1
    assert kept_by(engines, call, layers="random", seed=0) == found[0]


@pytest.mark.parametrize("change", [{"score": "attention"}, {"layers": "all"}])
def test_a_set_without_details_says_how_to_build_one(
    change: dict[str, Any], call: Call, tiny_engine_sets: Any
) -> None:
    with pytest.raises(UsageError, match=r"needs an engine set that returns .* --score-details"):
        kept_by(tiny_engine_sets("qwen-edit"), call, **change)
