"""Schedules, policies and selection against plain statements of ToPi Eq. 10 and 11."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_1 import kept_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime import CoverageToPi, FullContext, RandomDrop, ToPi
from ditrim.runtime.policy import CallView, Reduction


def ladder(longest: int, granularity: int = 1) -> Ladder:
    return Ladder(rungs=(longest,), granularity=granularity)


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def call_of(influence: torch.Tensor, granularity: int = 1, **more: Any) -> CallView:
    """An anchor's call; the references are one row of tokens unless `grids` says otherwise."""
    length = influence.shape[1]
    values: dict[str, Any] = {
        "step": 0,
        "branch": "cond",
        "ladder": ladder(length, granularity),
        "grids": ((1, 1), (1, length)),
        "influence": influence,
    }
    return CallView(**(values | more))


def kept_by(policy: Any, influence: torch.Tensor, **more: Any) -> list[list[int]]:
    kept = policy.select(call_of(influence, **more)).kept
    assert kept is not None
    rows: list[list[int]] = kept.tolist()
    return rows


def best(scores: torch.Tensor, count: int) -> list[int]:
    """The highest scores of one sample, ties to the lower index, ascending."""
    order = sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))
    return sorted(order[:count])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_selection_is_the_smallest_set_that_holds_tau(scores: list[float], tau: float) -> None:
    influence = torch.tensor([scores])
    found = kept_by(ToPi(tau=tau), influence)[0]
    if tau == 1.0:
        assert found == list(range(len(scores)))
        return
    total = float(influence.double().sum())
    held = float(influence[0, found].double().sum())
    assert held >= tau * total * (1 - 1e-12)
    ranked = sorted(scores, reverse=True)
    if len(found) > 1:  # one token fewer does not hold tau
        assert sum(ranked[: len(found) - 1]) < tau * total * (1 + 1e-6)
    expected = kept_tokens(influence[0].double(), tau)
    if abs(held - tau * total) > 1e-9 * max(total, 1):
        assert len(found) == len(expected) or abs(len(found) - len(expected)) <= 1
    assert found == sorted(set(found))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.85, 0.999, 1.0])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_selection_equals_the_plain_statement(length: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(length)
    influence = torch.rand(1, length, generator=generator)
    found = kept_by(ToPi(tau=tau), influence)[0]
    expected = list(range(length)) if tau == 1.0 else kept_tokens(influence[0].double(), tau)
    assert found == expected


def test_equal_scores_keep_the_first_tokens() -> None:
    assert kept_by(ToPi(tau=0.5), torch.ones(1, 10)) == [[0, 1, 2, 3, 4]]


def test_rounding_keeps_the_next_ranked_tokens() -> None:
    influence = torch.tensor([[0.1, 5.0, 0.2, 4.0, 0.3, 0.0, 0.0, 0.05]])
    exact = kept_by(ToPi(tau=0.9), influence)[0]
    rounded = kept_by(ToPi(tau=0.9), influence, granularity=4)[0]
    assert exact == [1, 3]
    assert rounded == [1, 2, 3, 4]


def test_the_batchs_largest_count_decides_for_all() -> None:
    influence = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.2]])
    assert kept_by(ToPi(tau=0.7), influence) == [[0, 1, 2], [0, 1, 3]]


def test_bounds_of_the_count() -> None:
    influence = torch.arange(10.0)[None]
    assert kept_by(ToPi(tau=0.0, min_kept=4), influence) == [[6, 7, 8, 9]]
    assert kept_by(ToPi(tau=0.9, max_kept=3), influence) == [[7, 8, 9]]
    assert kept_by(ToPi(tau=1.0, max_kept=3), influence) == [[7, 8, 9]]
    assert kept_by(ToPi(tau=0.9, min_kept=99), influence) == [list(range(10))]


def test_schedule_alternates_as_equation_11_says() -> None:
    policy, chosen = ToPi(interval=3, warmup=2), Reduction()
    roles = [policy.role(step, chosen) for step in range(9)]
    assert roles == [
        "full", "full", "anchor", "reduced", "reduced", "anchor", "reduced", "reduced", "anchor",
    ]  # fmt: skip
    assert {FullContext().role(step, chosen) for step in range(9)} == {"full"}
    assert {ToPi(interval=1).role(step, chosen) for step in range(9)} == {"anchor"}


def test_a_static_mask_has_one_anchor() -> None:
    policy, chosen = ToPi(interval=3, warmup=1, is_static=True), Reduction()
    assert [policy.role(step, chosen) for step in range(6)] == ["full", "anchor"] + ["reduced"] * 4
    assert policy.role(3, None) == "anchor"  # joined half-way, without what an anchor chose


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_a_ratio_keeps_that_share_of_the_most_influential(
    length: int, ratio: float, granularity: int
) -> None:
    granularity = min(granularity, length)
    influence = random_scores(2, length)
    found = kept_by(ToPi(ratio=ratio, tau=0.1), influence, granularity=granularity)
    count = max(1, math.ceil(ratio * length))
    count = min(length, math.ceil(count / granularity) * granularity)
    assert found == [best(row, count) for row in influence]


def test_a_ratio_of_equal_scores_keeps_the_first_tokens() -> None:
    assert kept_by(ToPi(ratio=0.5), torch.ones(2, 7)) == [[0, 1, 2, 3]] * 2


def test_budgets_are_spent_on_each_reference_by_itself() -> None:
    influence = random_scores(2, 18)
    influence[:, :12] += 5.0  # top-K over all would keep nothing of the second
    grids = ((2, 2), (3, 4), (2, 3))
    for policy in (ToPi(budgets=(5, 0.5)), CoverageToPi(budgets=(5, 0.5))):
        for row in kept_by(policy, influence, grids=grids):
            assert [sum(j < 12 for j in row), sum(j >= 12 for j in row)] == [5, 3]
    expected = [best(row[:12], 5) + [12 + j for j in best(row[12:], 3)] for row in influence]
    assert kept_by(ToPi(budgets=(5, 0.5)), influence, grids=grids) == expected
    with pytest.raises(UsageError, match="1 budgets for 2 references"):
        kept_by(ToPi(budgets=(5,)), influence, grids=grids)
    with pytest.raises(UsageError, match="needs to know where tokens lie"):
        kept_by(ToPi(budgets=(5,)), influence, grids=None)


@pytest.mark.parametrize("policy", [ToPi(tau=0.3), CoverageToPi(tau=0.3), ToPi(budgets=(2,))])
def test_tokens_under_a_region_are_kept_beside_the_chosen_ones(policy: Any) -> None:
    influence = random_scores(2, 20)
    region = torch.zeros(20, dtype=torch.bool)
    region[[3, 4, 11]] = True
    alone = kept_by(policy, influence)
    found = kept_by(policy, influence, region=region)
    for row, before in zip(found, alone, strict=True):
        assert {3, 4, 11} | set(before) <= set(row)
        assert row == sorted(set(row))
    assert len(found[0]) == max(len({3, 4, 11} | set(row)) for row in alone)
    rounded = kept_by(policy, influence, region=region, granularity=6)
    assert len(rounded[0]) % 6 == 0


def test_merging_averages_a_dropped_token_into_the_nearest_kept_one() -> None:
    influence, features = random_scores(2, 11), random_scores(2, 11, 4, seed=1) - 0.5
    policy = ToPi(ratio=0.4, mode="merge")
    assert policy.reads_features
    reduction = policy.select(call_of(influence, reference=features))
    later = random_scores(2, 11, 4, seed=2) - 0.5
    again = policy.regroup(call_of(influence, reference=later, reduction=reduction))
    assert again is not None
    for found, metric in ((reduction, features), (again, later)):
        assert found.kept is not None
        assert found.merge is not None
        assert found.kept.tolist() == [best(row, 5) for row in influence]
        merged = found.merge.merge(metric).numpy()
        for b, kept in enumerate(found.kept.tolist()):
            unit = metric[b].numpy() / np.linalg.norm(metric[b].numpy(), axis=1, keepdims=True)
            target = [
                i if i in kept else kept[int(np.argmax([unit[i] @ unit[j] for j in kept]))]
                for i in range(11)
            ]
            groups = [[i for i in range(11) if target[i] == j] for j in kept]
            expected = np.stack([metric[b].numpy()[group].mean(axis=0) for group in groups])
            np.testing.assert_allclose(merged[b], expected, rtol=1e-5, atol=1e-6)


def test_pruning_runs_on_what_the_anchor_chose() -> None:
    policy = ToPi(tau=0.5)
    reduction = policy.select(call_of(random_scores(2, 9)))
    assert reduction.merge is None
    assert not policy.reads_features
    # None: what the anchor chose.
    assert policy.regroup(call_of(random_scores(2, 9), reduction=reduction)) is None


@pytest.mark.parametrize(
    ("layers", "positions"),
    [("calibrated", [2, 4]), ("first", [0, 1]), ("last", [4, 5]), ("all", [0, 1, 2, 3, 4, 5])],
)
@pytest.mark.parametrize("score", ["influence", "attention", "key-similarity"])
def test_scores_of_chosen_layers_are_summed(layers: Any, positions: list[int], score: Any) -> None:
    scores = random_scores(2, 6, 3, 10)
    place = ("influence", "attention", "key-similarity").index(score)
    expected = sum(scores[:, i, place] for i in positions)
    influence = scores[:, 2, 0] + scores[:, 4, 0]
    details = {
        "scores": scores,
        "scored_layers": (1, 2, 3, 4, 5, 6),
        "calibrated_layers": (3, 5),
    }
    found = kept_by(ToPi(ratio=0.3, score=score, layers=layers), influence, **details)
    assert isinstance(expected, torch.Tensor)
    assert found == [best(row, 3) for row in expected]
    if (score, layers) != ("influence", "calibrated"):
        with pytest.raises(UsageError, match="build one with --score-details"):
            kept_by(ToPi(ratio=0.3, score=score, layers=layers), influence)


def test_random_layers_are_as_many_as_calibrated_ones_and_repeat() -> None:
    scores = torch.eye(6)[:, None].expand(6, 3, 6)[None]  # layer i has all its mass on token i
    details = {"scores": scores, "scored_layers": tuple(range(6)), "calibrated_layers": (3, 5)}
    seen = set()
    for seed in range(20):
        policy = ToPi(tau=1.0, layers="random", seed=seed)
        call = call_of(scores[:, 3, 0], **details)
        chosen = policy.scores_of(call)[0].nonzero().flatten().tolist()
        assert chosen == policy.scores_of(call)[0].nonzero().flatten().tolist()
        assert len(chosen) == 2
        seen.add(tuple(chosen))
    assert len(seen) > 5


def test_random_drop_keeps_as_many_tokens_elsewhere() -> None:
    influence, topi = random_scores(2, 50), ToPi(tau=0.5)
    first = kept_by(RandomDrop(policy=topi), influence)
    assert len(first[0]) == len(kept_by(topi, influence)[0])
    assert first != kept_by(topi, influence)
    assert first[0] != first[1]
    assert first == kept_by(RandomDrop(policy=topi), influence)
    assert first != kept_by(RandomDrop(policy=topi, seed=1), influence)
    assert first != kept_by(RandomDrop(policy=topi), influence, step=10)
    assert first != kept_by(RandomDrop(policy=topi), random_scores(2, 50, seed=1))
    assert all(row == sorted(set(row)) for row in first)


def test_random_drop_takes_ratios_budgets_and_regions() -> None:
    influence = random_scores(2, 18)
    region = torch.zeros(18, dtype=torch.bool)
    region[:4] = True
    half = RandomDrop(policy=ToPi(ratio=0.5))
    assert [len(row) for row in kept_by(half, influence)] == [9, 9]
    assert [len(row) for row in kept_by(half, influence, granularity=4)] == [12, 12]
    assert all(set(range(4)) < set(row) for row in kept_by(half, influence, region=region))
    shared = RandomDrop(policy=ToPi(budgets=(5, 0.5)))
    for row in kept_by(shared, influence, grids=((2, 2), (3, 4), (2, 3))):
        assert [sum(j < 12 for j in row), sum(j >= 12 for j in row)] == [5, 3]
    with pytest.raises(UsageError, match="RandomDrop drops tokens and its policy has mode='merge'"):
        RandomDrop(policy=ToPi(mode="merge"))


def test_random_drop_picks_every_token_equally_often() -> None:
    policy = RandomDrop(policy=ToPi(ratio=0.25))
    counts = np.zeros(20)
    for step in range(400):
        counts[kept_by(policy, torch.ones(1, 20), step=step)[0]] += 1
    assert counts.sum() == 400 * 5
    assert np.abs(counts - 100).max() < 45  # five deviations of a binomial of 400 and 1/4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": 1.5}, r"tau must be a number in \[0, 1\], got 1.5"),
        ({"tau": -0.1}, r"got -0.1"),
        ({"tau": float("nan")}, r"got nan"),
        ({"tau": "0.85"}, r"got '0.85'"),
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"interval": 2.5}, "interval must be an integer of at least 1, got 2.5"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"score_every": 0}, "score_every must be an integer of at least 1, got 0"),
        ({"min_kept": 0}, "min_kept must be an integer of at least 1"),
        ({"min_kept": 5, "max_kept": 4}, r"max_kept \(4\) is less than min_kept \(5\)"),
        ({"ratio": 1.5}, r"ratio must be a number in \[0, 1\], got 1.5"),
        ({"ratio": 0.5, "budgets": (3,)}, "ratio and budgets both say how many tokens to keep"),
        (
            {"score": "keys"},
            "score must be one of influence, attention, key-similarity, got 'keys'",
        ),
        ({"layers": "middle"}, "layers must be one of calibrated, random, .*, got 'middle'"),
        ({"mode": "drop"}, "mode must be one of prune, merge, got 'drop'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_impossible_parameters_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ToPi(**values)  # type: ignore[arg-type]
