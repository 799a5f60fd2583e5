"""How many reference tokens are kept, and which (ToPi Eq. 10)."""

from __future__ import annotations

import torch

from ditrim.engines.sets.ladder import Ladder


def count_by_influence(influence: torch.Tensor, tau: float) -> int:
    """The fewest tokens that hold a fraction tau of the influence in every row (ToPi Eq. 10).

    Tokens are taken in descending order of influence until their sum reaches tau of the total.

    Args:
        influence: (B, C) float32, not negative.
        tau: in [0, 1]; 1 keeps every token.
    """
    length = influence.shape[1]
    if tau >= 1.0:
        return length
    ranked = influence.double().sort(dim=1, descending=True).values
    mass = ranked.cumsum(dim=1)
    counts = (mass < tau * mass[:, -1:]).sum(dim=1) + 1
    return min(length, int(counts.max()))  # the one wait for the device


def bounded_count(
    count: int, length: int, ladder: Ladder, *, min_kept: int = 1, max_kept: int | None = None
) -> int:
    """A count within its bounds, rounded up to the ladder's granularity; `max_kept` wins over it.

    Rounding is filled by the next-ranked tokens, so it never costs fidelity.
    """
    count = ladder.round_up(min(max(count, min_kept), length))
    if max_kept is not None:
        count = min(count, max_kept)
    return min(count, length)
