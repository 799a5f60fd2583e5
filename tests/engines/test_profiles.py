from __future__ import annotations

from itertools import pairwise

import pytest

from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.profiles import (
    AxisRange,
    Ranges,
    is_scored,
    ladder_profiles,
    plan_roles,
    profile_for,
    shape_of,
)
from ditrim.engines.sets.specs import Limits, TensorSpec
from ditrim.plugins.errors import LadderError

LADDER = Ladder(rungs=(512, 1024, 4096))
LIMITS = Limits(batch=4, noisy=4096, text=512)


@pytest.mark.parametrize("role", ["front", "back", "anchor"])
def test_profiles_span_the_lengths_between_the_rungs_without_gap_or_overlap(role: str) -> None:
    spans = [profile.reference for profile in ladder_profiles(LADDER, LIMITS, role)]
    assert [(span.least, span.best, span.most) for span in spans] == [
        (1, 512, 512),
        (513, 1024, 1024),
        (1025, 4096, 4096),
    ]
    assert all(upper.least == lower.most + 1 for lower, upper in pairwise(spans))


@pytest.mark.parametrize(
    ("role", "separate", "best"),
    [
        ("front", False, None),
        ("back", False, [1, 1, 4096]),
        ("back", True, None),
        ("anchor", True, [4096, 4096, 4096]),
    ],
)
def test_scored_rows_are_tuned_for_the_step_that_runs_the_profile(
    role: str, separate: bool, best: list[int] | None
) -> None:
    profiles = ladder_profiles(LADDER, LIMITS, role, separate_anchor=separate)
    rows = [profile.rows for profile in profiles]
    assert is_scored(role, separate_anchor=separate) == (best is not None)
    if best is None:
        assert rows == [None, None, None]
    else:
        assert [(item.least, item.best, item.most) for item in rows if item] == [
            (1, tuned, 4096) for tuned in best
        ]


def test_a_separate_anchor_is_a_third_plan() -> None:
    assert plan_roles(separate_anchor=False) == ("front", "back")
    assert plan_roles(separate_anchor=True) == ("front", "back", "anchor")


def test_ranges_of_the_other_axes_are_those_given() -> None:
    ranges = Ranges(
        batch=AxisRange(least=2, best=2, most=4),
        noisy=AxisRange(least=1024, best=2048, most=4096),
        text=AxisRange(least=16, best=128, most=512),
    )
    for profile in ladder_profiles(LADDER, ranges, "back"):
        assert (profile.batch, profile.noisy, profile.text) == (
            ranges.batch,
            ranges.noisy,
            ranges.text,
        )
    assert ladder_profiles(LADDER, ranges, "back")[-1].range_of("rows").best == 2048


def test_shape_takes_named_axes_from_the_profile_and_keeps_fixed_ones() -> None:
    profile = ladder_profiles(LADDER, LIMITS, "back")[1]
    reference = TensorSpec(name="reference", dtype="bfloat16", shape=("batch", "reference", 3072))
    assert shape_of(reference, profile, "least") == (1, 513, 3072)
    assert shape_of(reference, profile, "best") == (1, 1024, 3072)
    assert shape_of(reference, profile, "most") == (4, 1024, 3072)
    rows = TensorSpec(name="score_rows", dtype="int64", shape=("rows",))
    assert shape_of(rows, profile, "best") == (1,)


@pytest.mark.parametrize(("length", "index"), [(1, 0), (512, 0), (513, 1), (4096, 2)])
def test_profile_of_a_length_is_the_one_that_spans_it(length: int, index: int) -> None:
    assert profile_for(ladder_profiles(LADDER, LIMITS, "front"), length) == index


def test_length_beyond_the_ladder_names_both() -> None:
    with pytest.raises(LadderError, match=r"4097 reference tokens fit no profile; .* is 4096"):
        profile_for(ladder_profiles(LADDER, LIMITS, "front"), 4097)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 3), (1, 4, 3), (3, 2, 1)])
def test_range_that_contradicts_itself_is_refused(sizes: tuple[int, int, int]) -> None:
    least, best, most = sizes
    with pytest.raises(LadderError, match=f"the range {least} to {most}, tuned for {best}, contr"):
        AxisRange(least=least, best=best, most=most)


def test_range_of_something_else_than_whole_numbers_is_refused() -> None:
    with pytest.raises(LadderError, match="must hold whole numbers"):
        AxisRange(least=1, best=2.5, most=3)  # type: ignore[arg-type]
