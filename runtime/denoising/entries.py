"""Entries of a batch whose texts are of one length run together: taken apart, and joined again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ditrim.runtime.denoising.calls import FrontResult
    from ditrim.runtime.policy import Reduction


def scattered(parts: list[Tensor], order: Tensor | None) -> Tensor:
    """Group results back in batch order."""
    if order is None:
        return parts[0]
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[order.to(joined.device)] = joined
    return result


def is_same(kept: Tensor, other: Tensor | None) -> bool:
    """Whether two selections are equal; different tensors on a device are not compared."""
    if other is None or kept is other:
        return kept is other
    is_near = kept.device.type == "cpu" and other.device.type == "cpu"
    return is_near and torch.equal(kept, other)


def with_entries(whole: Tensor | None, kept: Tensor, front: FrontResult, batch: int) -> Tensor:
    """The tokens (B, K') that a call chose, with those of one more group of batch entries."""
    if front.rows is None:
        return kept
    if whole is None:
        whole = kept.new_zeros(batch, kept.shape[1])
    whole[front.rows.to(kept.device)] = kept
    return whole


def entries_of(reduction: Reduction, front: FrontResult) -> Reduction:
    """A reduction of the whole batch, for a group of its entries."""
    if front.rows is None:
        return reduction
    rows = front.rows.to(front.hidden["noisy"].device)
    return replace(
        reduction,
        kept=None if reduction.kept is None else reduction.kept[rows],
        merge=None if reduction.merge is None else reduction.merge.entries(rows),
        noisy_merge=None if reduction.noisy_merge is None else reduction.noisy_merge.entries(rows),
    )
