from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import LadderError


def test_even_ladder_is_eighths_of_the_longest() -> None:
    assert Ladder.even(4096).rungs == (512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)


def test_even_ladder_rounds_rungs_up_and_merges_equal_ones() -> None:
    assert Ladder.even(100, num_rungs=8, granularity=32).rungs == (32, 64, 96, 100)


@given(st.integers(1, 5000), st.integers(1, 20), st.integers(1, 128))
def test_every_length_has_the_smallest_rung_that_holds_it(
    longest: int, num_rungs: int, granularity: int
) -> None:
    ladder = Ladder.even(longest, num_rungs=num_rungs, granularity=min(granularity, longest))
    assert ladder.longest == longest
    for length in {1, longest // 2 + 1, longest}:
        rung = ladder.rung_for(length)
        assert rung == min(item for item in ladder.rungs if item >= length)
        rounded = ladder.round_up(length)
        assert length <= rounded <= longest
        assert rounded == longest or rounded % ladder.granularity == 0


def test_reference_longer_than_ladder_names_length_and_limit() -> None:
    with pytest.raises(LadderError, match=r"5000 reference tokens do not fit: .* is 4096"):
        Ladder.even(4096).rung_for(5000)


@pytest.mark.parametrize(
    ("rungs", "granularity", "message"),
    [
        ((), 1, "no rungs"),
        ((0, 4), 1, "rung 0 must be a whole number above 0"),
        ((4, 4), 1, "rungs 4, 4 must increase and not repeat"),
        ((8, 4), 1, "rungs 8, 4 must increase"),
        ((4, 8), 9, r"granularity 9 is not in \[1, 8\]"),
        ((4, 8), 0, r"granularity 0 is not in \[1, 8\]"),
    ],
)
def test_impossible_ladders_are_refused(
    rungs: tuple[int, ...], granularity: int, message: str
) -> None:
    with pytest.raises(LadderError, match=message):
        Ladder(rungs=rungs, granularity=granularity)
