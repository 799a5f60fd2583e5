"""RoPE tables of a call, in float32, from positions as each architecture has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import Positions
from ditrim.plugins.layout import Layout

THETA = 10000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTables:
    """Cosines and sines of the joint sequence's parts; D is the head width.

    Attributes:
        noisy: (G, D/2) cosines and (G, D/2) sines, float32.
        text: (T, D/2) each.
        reference: (C, D/2) each, all references together.
    """

    noisy: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]


def rope_for(
    architecture: str, layout: Layout, num_text: int, axes: Sequence[int], device: torch.device
) -> RopeTables:
    """Tables of pictures that lie as the architecture's pipeline lays them.

    Args:
        architecture: its name in `ARCHITECTURES`.
        layout: of the picture in the making and its references.
        num_text: T.
        axes: channels an axis, `axes_dims_rope`.
        device: where the tables go.
    """
    positions = ARCHITECTURES[architecture].positions(layout, num_text)
    return rope_at(architecture, positions, axes, device)


def rope_at(
    architecture: str, positions: Positions, axes: Sequence[int], device: torch.device
) -> RopeTables:
    """Tables of positions that a call gave; see `rope_for`."""
    dtype = getattr(torch, ARCHITECTURES[architecture].angles)

    def table(part: Tensor) -> tuple[Tensor, Tensor]:
        angles = _angles(part, axes, dtype)
        return (
            angles.cos().float().contiguous().to(device),
            angles.sin().float().contiguous().to(device),
        )

    return RopeTables(
        noisy=table(positions.noisy),
        text=table(positions.text),
        reference=table(positions.reference),
    )


def _angles(positions: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(L, axes) positions -> (L, D/2) angles; in the type that the released model has."""
    parts = []
    for axis, width in enumerate(axes):
        frequencies = 1.0 / torch.pow(THETA, torch.arange(0, width, 2, dtype=dtype) / width)
        parts.append(torch.outer(positions[:, axis].to(dtype), frequencies))
    return torch.cat(parts, dim=1)
