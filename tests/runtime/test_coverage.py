"""Selection with coverage and budgets a reference, against plain statements in numpy."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime import CoverageToPi, ToPi
from ditrim.runtime.policy import CallView
from ditrim.runtime.tokens.budget import (
    budget_counts,
    fill_up,
    keep_region,
    region_of_mask,
    select_by_budget,
    share_out,
)
from ditrim.runtime.tokens.coverage import (
    hilbert_order,
    inclusion_chances,
    select_with_coverage,
)

KINDS = ["random", "equal", "zero", "one", "ties"]
GRIDS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3)


def ladder(longest: int, granularity: int = 1) -> Ladder:
    return Ladder(rungs=(longest,), granularity=granularity)


def kept_by(
    policy: ToPi, influence: torch.Tensor, grids: Any = None, granularity: int = 1, **more: Any
) -> torch.Tensor:
    """What a policy keeps after an anchor."""
    length = influence.shape[1]
    view = CallView(
        step=0,
        branch="cond",
        ladder=ladder(length, granularity),
        grids=((1, 1), *(grids or ((1, length),))),
        influence=influence,
        **more,
    )
    kept = policy.select(view).kept
    assert kept is not None
    return kept


def scores(batch: int, length: int, seed: int = 0, power: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator) ** power


def plain_chances(weights: list[Fraction], count: int) -> list[Fraction]:
    """min(1, c w) adding up to a count: the heaviest become certain, one by one."""
    certain: set[int] = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in certain)
        left = count - len(certain)
        chances = [
            Fraction(1) if i in certain else left * w / rest if rest else Fraction(0)
            for i, w in enumerate(weights)
        ]
        over = [i for i, chance in enumerate(chances) if chance > 1]
        if not over:
            return chances
        certain.add(max(over, key=lambda i: weights[i]))


def plain_selection(chances: list[Fraction], curve: list[int]) -> list[int]:
    """Systematic sampling along the curve, in exact arithmetic."""
    kept, before = [], Fraction(0)
    for token in curve:
        after = before + chances[token]
        # Kept where the running sum passes n + 1/2.
        if (after + Fraction(1, 2)) // 1 > (before + Fraction(1, 2)) // 1:
            kept.append(token)
        before = after
    return sorted(kept)


def plain_curve(height: int, width: int) -> list[int]:
    """A Hilbert curve drawn by its recursive definition: right-angled turns of a square."""
    side = 1
    while side < max(height, width):
        side *= 2

    def draw(x: float, y: float, ax: float, ay: float, bx: float, by: float, n: int) -> None:
        if n == 1:
            places.append((int(y + (ay + by) / 2), int(x + (ax + bx) / 2)))
            return
        ax, ay, bx, by = ax / 2, ay / 2, bx / 2, by / 2
        draw(x, y, bx, by, ax, ay, n // 2)
        draw(x + ax, y + ay, ax, ay, bx, by, n // 2)
        draw(x + ax + bx, y + ay + by, ax, ay, bx, by, n // 2)
        draw(x + ax + 2 * bx, y + ay + 2 * by, -bx, -by, -ax, -ay, n // 2)

    places: list[tuple[int, int]] = []
    draw(0, 0, side, 0, 0, side, side)
    return [y * width + x for y, x in places if y < height and x < width]


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (2, 2), (4, 4), (8, 8), (5, 7), (12, 3)])
def test_curve_is_hilberts(grid: tuple[int, int]) -> None:
    found = hilbert_order(*grid).tolist()
    assert sorted(found) == list(range(grid[0] * grid[1]))
    height, width = grid
    if height == width and height & (height - 1) == 0:
        for first, second in itertools.pairwise(found):
            (y, x), (v, u) = divmod(first, width), divmod(second, width)
            assert abs(y - v) + abs(x - u) == 1
        transposed = [x * width + y for y, x in (divmod(token, width) for token in found)]
        assert plain_curve(*grid) in (found, transposed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
def test_chances_equal_the_plain_statement(weights: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(weights)))
    found = inclusion_chances(torch.tensor([weights]).double(), torch.tensor([count]))[0]
    expected = plain_chances([Fraction(w) for w in weights], count)
    np.testing.assert_allclose(found.numpy(), [float(c) for c in expected], rtol=0, atol=1e-9)
    assert float(found.sum()) == pytest.approx(count, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.data())
def test_selection_equals_the_plain_statement(
    height: int, width: int, seed: int, data: st.DataObject
) -> None:
    length = height * width
    count = data.draw(st.integers(1, length))
    influence = scores(2, length, seed)
    found = select_with_coverage(influence, ((height, width),), count)
    curve = hilbert_order(height, width).tolist()
    for b in range(2):
        weights = [Fraction(float(value)) for value in influence[b]]
        chances = plain_chances(weights, count)
        # A sum that comes to a half exactly is decided by rounding.
        sums = np.cumsum([float(chances[token]) for token in curve])
        assume(np.abs((sums + 0.5) % 1 - np.rint((sums + 0.5) % 1)).min() > 1e-6 or count == length)
        assert found[b].tolist() == plain_selection(chances, curve)


@settings(max_examples=80, deadline=None)
@given(GRIDS, st.integers(1, 2), st.sampled_from(KINDS), st.data())
def test_any_scores_give_as_many_different_tokens_as_asked(
    grids: list[tuple[int, int]], batch: int, kind: str, data: st.DataObject
) -> None:
    length = sum(h * w for h, w in grids)
    count = data.draw(st.integers(1, length))
    influence = {
        "random": scores(batch, length, data.draw(st.integers(0, 99)), 8.0),
        "equal": torch.full((batch, length), 0.3),
        "zero": torch.zeros(batch, length),
        "one": torch.zeros(batch, length).index_fill(1, torch.tensor([length // 2]), 5.0),
        "ties": scores(batch, length).mul(3).round(),
    }[kind]
    exponent = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    found = select_with_coverage(influence, grids, count, exponent=exponent)
    assert found.dtype == torch.int64
    assert found.shape == (batch, count)
    for row in found.tolist():
        assert row == sorted(set(row))
        assert row[0] >= 0
        assert row[-1] < length
    if kind == "one" and exponent > 0:
        assert found.eq(length // 2).any(dim=1).all()
    assert torch.equal(found, select_with_coverage(influence, grids, count, exponent=exponent))


def test_equal_scores_are_kept_evenly() -> None:
    found = select_with_coverage(torch.ones(1, 256), ((16, 16),), 64)[0]
    cells = torch.zeros(8, 8).index_put((found // 16 // 2, found % 16 // 2), torch.ones(64), True)
    assert cells.eq(1).all()


def test_every_cell_keeps_its_share_to_within_one_token() -> None:
    influence = scores(1, 1024, power=6.0)
    for count in (40, 256, 700):
        chances = inclusion_chances(influence.double(), torch.tensor([count]))
        found = select_with_coverage(influence, ((32, 32),), count)
        kept = torch.zeros(1, 1024).scatter(1, found, 1.0).double()
        for side in (2, 4, 8, 16):
            cells = [
                x.view(32 // side, side, 32 // side, side).sum(dim=(1, 3)) for x in (kept, chances)
            ]
            assert (cells[0] - cells[1]).abs().max() <= 1 + 1e-9


def test_certain_tokens_are_always_kept() -> None:
    influence = torch.full((1, 144), 0.01)
    influence[0, 30:50] = 1.0
    found = select_with_coverage(influence, ((12, 12),), 30)[0].tolist()
    assert set(range(30, 50)) <= set(found)
    assert len({(i // 12 // 6, i % 12 // 6) for i in found}) == 4  # and something everywhere


def test_a_loud_region_does_not_starve_the_others() -> None:
    influence = torch.full((1, 144), 0.2)
    influence.view(12, 12)[:6] = 1.0
    top = kept_by(ToPi(tau=0.4), influence)
    found = select_with_coverage(influence, ((12, 12),), top.shape[1])[0]
    assert (top < 72).all()
    quiet = int((found >= 72).sum())
    assert abs(quiet - top.shape[1] / 6) <= 1


def test_each_reference_keeps_its_least_share() -> None:
    grids = ((8, 8), (4, 8))
    influence = torch.cat([torch.ones(1, 64), torch.full((1, 32), 1e-6)], dim=1)
    found = select_with_coverage(influence, grids, 48, min_share=0.5)[0]
    assert int((found >= 64).sum()) == 8  # half of 48 * 32 / 96
    alone = select_with_coverage(influence, grids, 48, min_share=0.0)[0]
    assert int((alone >= 64).sum()) == 0


def test_entries_of_a_batch_share_references_out_by_themselves() -> None:
    grids = ((4, 4), (4, 4))
    first = torch.cat([torch.ones(16), torch.full((16,), 0.1)])
    influence = torch.stack([first, first.flip(0)])
    found = select_with_coverage(influence, grids, 11)
    assert (found < 16).sum(dim=1).tolist() == [10, 1]
    for b in range(2):
        alone = select_with_coverage(influence[b : b + 1], grids, 11)
        assert torch.equal(found[b : b + 1], alone)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("granularity", [1, 8])
def test_the_budget_is_topis(tau: float, granularity: int) -> None:
    influence = scores(2, 60)
    found = kept_by(CoverageToPi(tau=tau), influence, ((6, 10),), granularity)
    assert found.shape == kept_by(ToPi(tau=tau), influence, ((6, 10),), granularity).shape
    if tau == 1.0:
        assert found.tolist() == [list(range(60))] * 2
    policy = CoverageToPi(tau=tau, min_kept=9, max_kept=17)
    assert 9 <= kept_by(policy, influence, ((6, 10),), granularity).shape[1] <= 17


def test_a_single_token_is_kept() -> None:
    assert kept_by(CoverageToPi(tau=0.0), torch.zeros(2, 1)).tolist() == [[0], [0]]


@pytest.mark.parametrize("policy", [ToPi, CoverageToPi])
def test_the_regions_tokens_are_always_kept(policy: type[ToPi]) -> None:
    influence, grids = scores(2, 96), ((8, 8), (4, 8))
    region = torch.zeros(96, dtype=torch.bool)
    region[[5, 6, 13, 70, 95]] = True
    for tau in (0.0, 0.3, 0.9):
        alone = kept_by(policy(tau=tau), influence, grids, 4)
        found = kept_by(policy(tau=tau), influence, grids, 4, region=region)
        assert found.shape[1] >= alone.shape[1]
        assert found.shape[1] % 4 == 0
        for row in found.tolist():
            assert {5, 6, 13, 70, 95} <= set(row)


def test_impossible_counts_and_grids_are_named() -> None:
    with pytest.raises(UsageError, match="cannot keep 5 of 4 reference tokens; keep 1 to 4"):
        select_with_coverage(torch.ones(1, 4), ((2, 2),), 5)
    with pytest.raises(UsageError, match="hold 4 tokens, the references have 6"):
        select_with_coverage(torch.ones(1, 6), ((2, 2),), 2)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20) | st.floats(0, 20), st.integers(1, 12), st.integers(0, 6)),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_shares_add_up_and_keep_their_bounds(
    parts: list[tuple[float, int, int]], data: st.DataObject
) -> None:
    mass, lengths, least = (list(column) for column in zip(*parts, strict=True))
    count = data.draw(st.integers(0, sum(lengths)))
    found = share_out(mass, lengths, count, least)
    assert sum(found) == count
    low = [min(a, b) for a, b in zip(least, lengths, strict=True)]
    for index, part in enumerate(found):
        assert 0 <= part <= lengths[index]
        if sum(low) <= count:
            assert part >= low[index]


def test_shares_follow_the_mass_by_largest_remainders() -> None:
    assert share_out([5.0, 3.0, 2.0], [99, 99, 99], 10, [0, 0, 0]) == [5, 3, 2]
    assert share_out([1.0, 1.0, 1.0], [9, 9, 9], 10, [0, 0, 0]) == [4, 3, 3]
    assert share_out([9.0, 1.0], [4, 20], 10, [0, 0]) == [4, 6]
    assert share_out([9.0, 1.0], [20, 20], 10, [0, 4]) == [6, 4]
    assert share_out([0.0, 0.0], [10, 30], 8, [0, 0]) == [2, 6]
    assert share_out([1.0, 1.0], [10, 10], 2, [6, 2]) == [2, 0]


def test_budgets_are_counts_or_shares() -> None:
    grids = ((4, 4), (2, 5))
    assert budget_counts(grids, [0.5, 3]) == [8, 3]
    assert budget_counts(grids, [1.0, 99]) == [16, 10]
    assert budget_counts(grids, [0.01, 0]) == [1, 0]
    for bad, message in (
        ([0.5], "1 budgets for 2 references"),
        ([1.5, 1], "budget 1.5 of reference 0"),
        ([-1, 1], "budget -1 of reference 0"),
        ([True, 1], "budget True of reference 0"),
        ([0, 0.0], "keep no token at all"),
    ):
        with pytest.raises(UsageError, match=message):
            budget_counts(grids, bad)


@pytest.mark.parametrize("selection", [None, select_with_coverage])
def test_each_references_budget_is_kept(selection: object) -> None:
    grids, values = ((4, 4), (2, 5)), scores(2, 26)
    found = select_by_budget(values, grids, [0.25, 6], ladder(26), selection=selection)  # type: ignore[arg-type]
    assert (found < 16).sum(dim=1).tolist() == [4, 4]
    assert found.shape == (2, 10)
    if selection is None:
        for b in range(2):
            best = sorted(range(16), key=lambda i: -float(values[b, i]))[:4]
            rest = sorted(range(16, 26), key=lambda i: -float(values[b, i]))[:6]
            assert found[b].tolist() == sorted(best + rest)
    rounded = select_by_budget(values, grids, [0.25, 6], ladder(26, 8))
    assert rounded.shape == (2, 16)
    assert all(set(a) <= set(b) for a, b in zip(found.tolist(), rounded.tolist(), strict=True)) or (
        selection is not None
    )


def test_a_region_is_added_to_any_selection() -> None:
    values = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7, 0.3], [0.1, 0.9, 0.2, 0.8, 0.3, 0.7]])
    kept = torch.tensor([[0, 2], [1, 3]])
    region = torch.tensor([True, False, False, True, False, False])
    found = keep_region(kept, region, values, ladder(6))
    assert found.tolist() == [[0, 2, 3], [0, 1, 3]]
    rounded = keep_region(kept, region, values, ladder(6, granularity=4))
    assert rounded.tolist() == [[0, 2, 3, 4], [0, 1, 3, 5]]
    per_entry = torch.stack([region, torch.zeros(6, dtype=torch.bool)])
    assert keep_region(kept, per_entry, values, ladder(6)).tolist() == [[0, 2, 3], [1, 3, 5]]
    assert keep_region(kept, torch.zeros(6, dtype=torch.bool), values, ladder(6)).equal(kept)


def test_filling_up_keeps_the_next_best() -> None:
    values = torch.tensor([[0.5, 0.4, 0.9, 0.1]])
    assert fill_up(torch.tensor([[3]]), values, 3).tolist() == [[0, 2, 3]]
    assert fill_up(torch.tensor([[3, 0]]), values, 1).tolist() == [[0, 3]]
    assert fill_up(torch.tensor([[3]]), values, 9).tolist() == [[0, 1, 2, 3]]


def test_a_pixel_touches_its_token() -> None:
    mask = np.zeros((10, 12), dtype=bool)
    mask[9, 0] = mask[0, 6] = True
    assert region_of_mask(mask, (2, 3)).tolist() == [False, True, False, True, False, False]
    with pytest.raises(UsageError, match="two axes, got 3"):
        region_of_mask(np.zeros((2, 2, 3)), (2, 2))
