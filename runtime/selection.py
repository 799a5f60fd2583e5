"""Which reference tokens are kept (ToPi Eq. 10), on the device that holds the scores."""

from __future__ import annotations

import torch

from ditrim.engines.ladder import Ladder


def select_by_influence(
    influence: torch.Tensor,
    tau: float,
    ladder: Ladder,
    *,
    min_kept: int = 1,
    max_kept: int | None = None,
) -> torch.Tensor:
    """The fewest tokens that hold a fraction tau of the influence (ToPi Eq. 10).

    Tokens are taken in descending order of influence until their sum reaches tau of the total.
    The batch's largest count decides for all, and is rounded up to the ladder's granularity by
    keeping the next-ranked tokens, so that rounding never costs fidelity.

    Args:
        influence: (B, C) float32, not negative.
        tau: in [0, 1]; 1 keeps every token.
        ladder: whose granularity is used.
        min_kept, max_kept: bounds of the count; `max_kept` wins over the rounding.

    Returns:
        (B, K') int64, ascending in each row.
    """
    batch, length = influence.shape
    if tau >= 1.0 and (max_kept is None or max_kept >= length):
        return torch.arange(length, device=influence.device).expand(batch, -1).contiguous()
    ranked, order = influence.double().sort(dim=1, descending=True, stable=True)
    mass = ranked.cumsum(dim=1)
    target = tau * mass[:, -1:]
    counts = (mass < target).sum(dim=1) + 1
    count = max(int(counts.max()), min_kept)  # the one wait for the device
    count = ladder.round_up(min(count, length))
    if max_kept is not None:
        count = min(count, max_kept)
    return order[:, : min(count, length)].sort(dim=1).values
