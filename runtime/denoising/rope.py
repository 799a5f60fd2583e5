"""Rotary position tables, once a request and in float32, as each model defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditrim.runtime.geometry import Grid

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


def qwen_rope(
    grids: Sequence[Grid], num_text: int, axes: Sequence[int], device: torch.device
) -> RopeTables:
    """Tables of Qwen-Image: frame, height and width axes, the last two centred.

    Args:
        grids: (frames, height, width) in tokens: the picture's first, then each reference's.
        num_text: T.
        axes: channels an axis, `axes_dims_rope`.
        device: where the tables go.
    """
    images = [
        _angles(_centred_positions(grid, index), axes, torch.float32)
        for index, grid in enumerate(grids)
    ]
    start = max(max(height // 2, width // 2) for _, height, width in grids)
    text_positions = torch.arange(start, start + num_text)[:, None].expand(-1, len(axes))
    text = _angles(text_positions, axes, torch.float32)
    reference = torch.cat(images[1:]) if len(images) > 1 else images[0][:0]
    return _tables(images[0], text, reference, device)


def _centred_positions(grid: Grid, index: int) -> Tensor:
    """(frames * height * width, 3) positions of one image's tokens."""
    frames, height, width = grid
    return torch.cartesian_prod(
        torch.arange(index, index + frames),
        torch.arange(height) - (height - height // 2),
        torch.arange(width) - (width - width // 2),
    )


def flux_rope(
    image_ids: Tensor, text_ids: Tensor, num_noisy: int, axes: Sequence[int], device: torch.device
) -> RopeTables:
    """Tables of FLUX.1 from position ids.

    Args:
        image_ids: (G + C, 3); text_ids: (T, 3).
        num_noisy: G.
        axes: channels an axis, `axes_dims_rope`.
        device: where the tables go.
    """
    image = _angles(image_ids.cpu(), axes, torch.float64)
    text = _angles(text_ids.cpu(), axes, torch.float64)
    return _tables(image[:num_noisy], text, image[num_noisy:], device)


def flux_ids(grids: Sequence[Grid]) -> Tensor:
    """(G + C, 3) position ids of a picture and its references, as FluxKontextPipeline makes them.

    The first axis is 0 for the picture and counts the references from 1.
    """
    return torch.cat(
        [
            torch.cartesian_prod(torch.tensor([index]), torch.arange(height), torch.arange(width))
            for index, (_, height, width) in enumerate(grids)
        ]
    )


def _angles(positions: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(L, axes) positions -> (L, D/2) angles; float64 for FLUX, float32 for Qwen, as released."""
    parts = []
    for axis, width in enumerate(axes):
        frequencies = 1.0 / torch.pow(THETA, torch.arange(0, width, 2, dtype=dtype) / width)
        parts.append(torch.outer(positions[:, axis].to(dtype), frequencies))
    return torch.cat(parts, dim=1)


def _tables(noisy: Tensor, text: Tensor, reference: Tensor, device: torch.device) -> RopeTables:
    def table(angles: Tensor) -> tuple[Tensor, Tensor]:
        return (
            angles.cos().float().contiguous().to(device),
            angles.sin().float().contiguous().to(device),
        )

    return RopeTables(noisy=table(noisy), text=table(text), reference=table(reference))
