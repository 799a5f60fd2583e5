"""When the full context is run, and when a part of it will do (ToPi Eq. 11)."""

from __future__ import annotations

from dataclasses import dataclass

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policy import Role

# The paper's Delta T, for schedules of some tens of steps.
USUAL_INTERVAL = 10
# Shorter schedules, as distilled models run them, have two anchors.
FEW_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Anchor steps: evenly spaced, or placed by the number of steps.

    Attributes:
        interval: steps from one anchor to the next, the paper's Delta T; 1 makes every step one.
            None places anchors by `num_steps`: every tenth step from 20 steps on, as in the paper,
            otherwise the first step and the one in the middle, if steps follow it.
        warmup: steps at the start that run the full context unscored.
        num_steps: of the request; none where it is not known, which counts as many.
    """

    interval: int | None = None
    warmup: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        values = [("warmup", self.warmup, 0)]
        if self.interval is not None:
            values.append(("interval", self.interval, 1))
        for name, value, least in values:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")

    def role(self, step: int) -> Role:
        """Return the role of a step (from 0): full and unscored, full and scored, or reduced."""
        if step < self.warmup:
            return "full"
        after = step - self.warmup
        if self.interval is None and self.num_steps is not None and self.num_steps < FEW_STEPS:
            scored = self.num_steps - self.warmup
            is_anchor = after == 0 or (after == scored // 2 and after < scored - 1)
        else:
            is_anchor = after % (self.interval or USUAL_INTERVAL) == 0
        return "anchor" if is_anchor else "reduced"
