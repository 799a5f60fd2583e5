"""Scoring for torch: the project's Triton kernel on NVIDIA GPUs, bounded blocks elsewhere."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ditrim.plugins.kernel import MAX_WIDTH, MIN_CAPABILITY, WIDTH_STEP


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_served(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def can_use_kernel(hidden: Tensor, width: int) -> bool:
    """Whether the kernel scores heads of this width in a tensor's dtype and on its device."""
    return (
        hidden.is_cuda
        and hidden.dtype in (torch.float16, torch.bfloat16)
        and width % WIDTH_STEP == 0
        and width <= MAX_WIDTH
        and _has_triton()
        and _is_served(hidden.device)
    )


# An operator of its own, so that a compiled block does not look inside.
@torch.library.custom_op("ditrim::influence", mutates_args=())
def score_with_kernel(
    queries: Tensor,
    keys: Tensor,
    reference_keys: Tensor,
    reference_values: Tensor,
    scale: float,
) -> Tensor:
    """Token influence score of one layer (ToPi Eq. 9), by `plugins.kernel.influence`."""
    from ditrim.plugins.kernel import influence

    return influence(
        queries.contiguous(), keys.contiguous(), reference_keys, reference_values, scale
    )


@torch.library.custom_op("ditrim::influence_in_blocks", mutates_args=())
def score_in_blocks(
    queries: Tensor,
    keys: Tensor,
    reference_keys: Tensor,
    reference_values: Tensor,
    scale: float,
) -> Tensor:
    """The same without the kernel; a compiled block would unroll its loop over rows."""
    from ditrim.plugins.log_sum_exp import influence

    return influence(queries, keys, reference_keys, reference_values, scale)


@score_in_blocks.register_fake
@score_with_kernel.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    reference_keys: Tensor,
    reference_values: Tensor,
    scale: float,
) -> Tensor:
    return keys.new_empty(keys.shape[0], reference_keys.shape[2], dtype=torch.float32)
