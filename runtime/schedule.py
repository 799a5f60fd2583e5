"""When the full context is run, and when a part of it will do (ToPi Eq. 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditrim.plugins.errors import UsageError

Role = Literal["full", "anchor", "reduced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Evenly spaced anchor steps.

    Attributes:
        interval: steps from one anchor to the next, the paper's Delta T; 1 makes every step one.
        warmup: steps at the start that run the full context unscored.
    """

    interval: int = 10
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")

    def role(self, step: int) -> Role:
        """What step `step` (from 0) is: full and unscored, full and scored, or reduced."""
        if step < self.warmup:
            return "full"
        return "anchor" if (step - self.warmup) % self.interval == 0 else "reduced"
