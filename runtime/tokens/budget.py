"""How many tokens each reference may keep, and tokens that are always kept.

Composes with any selection: it works on scores, counts and kept indices only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Grids, lengths_of, slices_of

# (scores (B, L), grids, count) -> (B, count), as `select_with_coverage` is.
Selection = Callable[[Tensor, Grids, int], Tensor]


def select_top(scores: Tensor, count: int) -> Tensor:
    """The `count` best of each row, ties to the lower index: (B, count) int64, ascending."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def share_out(
    mass: Sequence[float], lengths: Sequence[int], count: int, least: Sequence[int]
) -> list[int]:
    """Split a count among references by their mass, by largest remainders.

    Args:
        mass: of each reference, not negative; all zero means by length.
        lengths: most tokens of each.
        count: of all together, at most the sum of the lengths.
        least: of each; lowered together where they need more than the count.

    Returns:
        Counts that add up to `count`, within [least, length] each.
    """
    assert 0 <= count <= sum(lengths)
    least = [min(low, length) for low, length in zip(least, lengths, strict=True)]
    if sum(least) > count:
        return share_out(least, least, count, [0] * len(least))
    total = sum(mass)
    weights = list(mass) if total > 0 else [float(length) for length in lengths]
    fixed, exact = _bounded_parts(weights, lengths, least, count)
    counts = {i: int(part) for i, part in exact.items()}
    spare = count - sum(fixed.values()) - sum(counts.values())
    for i in sorted(exact, key=lambda i: (counts[i] - exact[i], i)):
        if spare and counts[i] < lengths[i]:
            counts[i], spare = counts[i] + 1, spare - 1
    assert not spare
    return [fixed.get(i, counts.get(i, 0)) for i in range(len(lengths))]


def _bounded_parts(
    weights: Sequence[float], lengths: Sequence[int], least: Sequence[int], count: int
) -> tuple[dict[int, int], dict[int, float]]:
    """Parts of a count that are fixed at a bound, and exact parts of what is left for the others.

    Parts that hit a bound are fixed there and the rest is shared again among the others; those
    below their least go first when they are the larger correction.
    """
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(lengths)) if i not in fixed]
        rest = count - sum(fixed.values())
        around = sum(weights[i] for i in free)
        exact = {i: rest * (weights[i] / around if around else 1 / len(free)) for i in free}
        over = {i: exact[i] - lengths[i] for i in free if exact[i] > lengths[i]}
        under = {i: least[i] - exact[i] for i in free if exact[i] < least[i]}
        if not over and not under:
            return fixed, exact
        if sum(over.values()) >= sum(under.values()):
            fixed |= {i: lengths[i] for i in over}
        else:
            fixed |= {i: least[i] for i in under}


def budget_counts(grids: Grids, budgets: Sequence[float | int]) -> list[int]:
    """A user's budgets as counts: whole numbers are tokens, fractions in [0, 1] shares.

    Raises:
        UsageError: another number of budgets than references, one out of range, or all zero.
    """
    lengths = lengths_of(grids)
    if len(budgets) != len(lengths):
        raise UsageError(f"{len(budgets)} budgets for {len(lengths)} references; give one for each")
    counts = []
    for index, (budget, length) in enumerate(zip(budgets, lengths, strict=True)):
        is_count = isinstance(budget, int) and not isinstance(budget, bool)
        is_share = isinstance(budget, float) and 0.0 <= budget <= 1.0
        if not (is_share or (is_count and budget >= 0)):
            raise UsageError(
                f"budget {budget!r} of reference {index} must be a number of tokens, or a share "
                "between 0.0 and 1.0"
            )
        counts.append(min(int(budget), length) if is_count else int(-(-length * budget // 1)))
    if not sum(counts):
        raise UsageError("the budgets keep no token at all; give at least one reference some")
    return counts


def select_by_budget(
    scores: Tensor,
    grids: Grids,
    budgets: Sequence[float | int],
    ladder: Ladder,
    *,
    selection: Selection | None = None,
) -> Tensor:
    """Each reference's own budget, spent by `selection` on that reference alone.

    What rounding to the ladder's granularity adds goes to the best tokens of all references.

    Args:
        scores: (B, C) float32, of all references together.
        grids: (height, width) of each reference.
        budgets: of each, see `budget_counts`.

    Returns:
        (B, K') int64, ascending in each row.
    """
    counts = budget_counts(grids, budgets)
    parts = slices_of(lengths_of(grids, scores.shape[1]))
    kept = []
    for grid, part, count in zip(grids, parts, counts, strict=True):
        if count:
            own = scores[:, part]
            chosen = selection(own, (grid,), count) if selection else select_top(own, count)
            kept.append(chosen + part.start)
    return fill_up(torch.cat(kept, dim=1), scores, ladder.round_up(sum(counts)))


def keep_region(kept: Tensor, region: Tensor, scores: Tensor, ladder: Ladder) -> Tensor:
    """A selection with the tokens under a region's mask added.

    The batch's largest count decides and is rounded up to the ladder's granularity, both by keeping
    the tokens of the next-highest score.

    Args:
        kept: (B, K'), of any selection.
        region: (C,) or (B, C) bool, tokens that are always kept.
        scores: (B, C), not infinite.

    Returns:
        (B, K'') int64, ascending in each row, K'' >= K'.
    """
    wanted = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    wanted = wanted.scatter(1, kept, True) | region.to(scores.device)
    count = int(wanted.sum(dim=1).max())  # the one wait for the device
    return select_top(scores.masked_fill(wanted, torch.inf), ladder.round_up(count))


def fill_up(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """(B, K') brought to (B, count), ascending, by keeping the tokens of the next-highest score."""
    count = min(count, scores.shape[1])
    if kept.shape[1] >= count:
        return kept.sort(dim=1).values
    return select_top(scores.scatter(1, kept, torch.inf), count)


def region_of_mask(mask: Any, grid: tuple[int, int]) -> Tensor:
    """The tokens that a picture's mask touches: (height, width) bool of pixels -> (L,) bool."""
    pixels = torch.as_tensor(mask, dtype=torch.float32)
    if pixels.ndim != 2:
        raise UsageError(f"a region mask has two axes, got {pixels.ndim}")
    touched = torch.nn.functional.adaptive_max_pool2d((pixels > 0).float()[None, None], grid)
    return touched.flatten() > 0
