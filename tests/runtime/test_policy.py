"""Schedules, policies and selection against plain statements of ToPi Eq. 10 and 11."""

from __future__ import annotations

import pytest
import torch
from algorithm_1 import kept_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrim.engines.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime import FullContext, RandomDrop, ToPi
from ditrim.runtime.selection import select_by_influence


def ladder(longest: int, granularity: int = 1) -> Ladder:
    return Ladder(rungs=(longest,), granularity=granularity)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_selection_is_the_smallest_set_that_holds_tau(scores: list[float], tau: float) -> None:
    influence = torch.tensor([scores])
    found = select_by_influence(influence, tau, ladder(len(scores)))[0].tolist()
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
    found = select_by_influence(influence, tau, ladder(length))[0].tolist()
    expected = list(range(length)) if tau == 1.0 else kept_tokens(influence[0].double(), tau)
    assert found == expected


def test_equal_scores_keep_the_first_tokens() -> None:
    found = select_by_influence(torch.ones(1, 10), 0.5, ladder(10))
    assert found[0].tolist() == [0, 1, 2, 3, 4]


def test_rounding_keeps_the_next_ranked_tokens() -> None:
    influence = torch.tensor([[0.1, 5.0, 0.2, 4.0, 0.3, 0.0, 0.0, 0.05]])
    exact = select_by_influence(influence, 0.9, ladder(8))[0].tolist()
    rounded = select_by_influence(influence, 0.9, ladder(8, granularity=4))[0].tolist()
    assert exact == [1, 3]
    assert rounded == [1, 2, 3, 4]


def test_the_batchs_largest_count_decides_for_all() -> None:
    influence = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.2]])
    found = select_by_influence(influence, 0.7, ladder(4))
    assert found.tolist() == [[0, 1, 2], [0, 1, 3]]


def test_bounds_of_the_count() -> None:
    influence = torch.arange(10.0)[None]
    assert select_by_influence(influence, 0.0, ladder(10), min_kept=4).shape == (1, 4)
    assert select_by_influence(influence, 0.9, ladder(10), max_kept=3)[0].tolist() == [7, 8, 9]
    assert select_by_influence(influence, 1.0, ladder(10), max_kept=3)[0].tolist() == [7, 8, 9]
    assert select_by_influence(influence, 0.9, ladder(10), min_kept=99).shape == (1, 10)


def test_schedule_alternates_as_equation_11_says() -> None:
    policy = ToPi(interval=3, warmup=2)
    roles = [policy.role(step) for step in range(9)]
    assert roles == [
        "full", "full", "anchor", "reduced", "reduced", "anchor", "reduced", "reduced", "anchor",
    ]  # fmt: skip
    assert {FullContext().role(step) for step in range(9)} == {"full"}
    assert {ToPi(interval=1).role(step) for step in range(9)} == {"anchor"}


def test_random_drop_keeps_as_many_tokens_elsewhere() -> None:
    influence = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    topi = ToPi(tau=0.5)
    first = RandomDrop(policy=topi).select(influence, ladder(50))
    assert first.shape == topi.select(influence, ladder(50)).shape
    assert not torch.equal(first, topi.select(influence, ladder(50)))
    assert torch.equal(first, RandomDrop(policy=topi).select(influence, ladder(50)))
    assert not torch.equal(first, RandomDrop(policy=topi, seed=1).select(influence, ladder(50)))
    assert all(row.tolist() == sorted(set(row.tolist())) for row in first)


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
    ],
)
def test_impossible_parameters_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ToPi(**values)  # type: ignore[arg-type]
