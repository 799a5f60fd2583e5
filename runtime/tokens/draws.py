"""Random choices that a request can repeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU that whole numbers from 0 decide, such as a seed and a step.

    Neighbouring numbers give unrelated draws.
    """
    import numpy as np
    import torch

    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
