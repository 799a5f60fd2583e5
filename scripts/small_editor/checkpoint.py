"""What every training here keeps: an averaged model, and a checkpoint that a kill leaves whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn


def update_average(average: nn.Module, trainee: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights toward the trained ones; faster in the first steps."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(average.parameters()), [w.detach() for w in trainee.parameters()], share
        )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside the target, then replace it, so that a kill leaves a whole checkpoint."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)
