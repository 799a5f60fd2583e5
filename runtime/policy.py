"""Reduction policies: what decides which reference tokens a step runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ditrim.plugins.errors import UsageError
from ditrim.runtime.schedule import Role, Schedule

if TYPE_CHECKING:
    import torch

    from ditrim.engines.ladder import Ladder


class Policy(Protocol):
    """What a session asks of a policy. Policies hold no state and can be shared."""

    @property
    def score_every(self) -> int:
        """On an anchor step, score every n-th noisy row."""
        ...

    def role(self, step: int) -> Role:
        """What step `step` (from 0) is."""
        ...

    def select(self, influence: torch.Tensor, ladder: Ladder) -> torch.Tensor:
        """Kept reference tokens after an anchor step.

        Args:
            influence: (B, C) float32 (ToPi Eq. 9).
            ladder: of the engine set.

        Returns:
            (B, K') int64, ascending in each row.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPi:
    """Token pruning for in-context generation (ToPi, Alg. 1).

    Every `interval`-th step is an anchor: it runs the full context and scores every reference
    token (Eq. 9). The steps between run on the fewest tokens that hold a fraction `tau` of that
    influence (Eq. 10, 11).

    Attributes:
        tau: fraction of the influence to keep, in [0, 1]; the paper's 0.85.
        interval: steps between anchors; the paper's Delta T = 10.
        warmup: steps at the start that run the full context unscored.
        score_every: score every n-th noisy row; 1 scores all, as the paper does.
        min_kept: keep at least so many tokens.
        max_kept: keep at most so many tokens; none means no bound.
    """

    tau: float = 0.85
    interval: int = 10
    warmup: int = 0
    score_every: int = 1
    min_kept: int = 1
    max_kept: int | None = None
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        if not is_number or not math.isfinite(self.tau) or not 0.0 <= self.tau <= 1.0:
            raise UsageError(
                f"tau must be a number in [0, 1], got {self.tau!r}; "
                "1 keeps every reference token, the paper uses 0.85"
            )
        for name in ("score_every", "min_kept"):
            _check_count(name, getattr(self, name))
        if self.max_kept is not None:
            _check_count("max_kept", self.max_kept)
            if self.max_kept < self.min_kept:
                raise UsageError(
                    f"max_kept ({self.max_kept}) is less than min_kept ({self.min_kept})"
                )
        object.__setattr__(self, "_schedule", Schedule(interval=self.interval, warmup=self.warmup))

    def role(self, step: int) -> Role:
        """See `Policy.role`."""
        return self._schedule.role(step)

    def select(self, influence: torch.Tensor, ladder: Ladder) -> torch.Tensor:
        """See `Policy.select`."""
        from ditrim.runtime.selection import select_by_influence

        return select_by_influence(
            influence, self.tau, ladder, min_kept=self.min_kept, max_kept=self.max_kept
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FullContext:
    """No reduction: every step runs on every reference token."""

    @property
    def score_every(self) -> int:
        """See `Policy.score_every`; nothing is scored."""
        return 1

    def role(self, step: int) -> Role:
        """See `Policy.role`."""
        return "full"

    def select(self, influence: torch.Tensor, ladder: Ladder) -> torch.Tensor:
        """Never asked for: no step is an anchor."""
        raise AssertionError("FullContext has no anchor steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDrop:
    """A baseline: as many tokens as `policy` would keep, chosen at random.

    Attributes:
        policy: decides roles and counts.
        seed: of the choice; the same influence and seed give the same tokens.
    """

    policy: ToPi
    seed: int = 0

    @property
    def score_every(self) -> int:
        """See `Policy.score_every`."""
        return self.policy.score_every

    def role(self, step: int) -> Role:
        """See `Policy.role`."""
        return self.policy.role(step)

    def select(self, influence: torch.Tensor, ladder: Ladder) -> torch.Tensor:
        """See `Policy.select`."""
        import numpy as np
        import torch

        count = self.policy.select(influence, ladder).shape[1]
        # Seeded by the scores as well: other anchors and samples get other tokens.
        salt = int(influence.double().sum().view(torch.int64)) & 0xFFFFFFFFFFFFFFFF
        mixed = np.random.SeedSequence([self.seed, salt]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.rand(influence.shape, generator=generator).argsort(dim=1)[:, :count]
        return order.sort(dim=1).values.to(influence.device)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be an integer of at least 1, got {value!r}")
