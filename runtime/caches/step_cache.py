"""Step caching: a step's velocity is used again while the model's input hardly changes.

FRONT stands for the first blocks of First-Block-Cache: it runs at every step, and BACK is spared
where FRONT's output has changed little. The change is measured on noisy tokens only. Composes with
any policy: anchors always run, and each guidance branch decides for itself.

Unlike First-Block-Cache, which reuses what the other blocks *added*, the velocity itself is reused:
BACK ends with the projection, and the hidden states before it never leave the engine.

With K = 0 FRONT is the embedding alone: its noisy tokens know nothing of the timestep. There the
change of the timestep's embedding is added to theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policy import check_count

TOKENS = ("noisy", "joint")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontView:
    """FRONT's outputs at one step, as a cache sees them.

    Attributes:
        noisy: (B, G, d).
        reference: (B, C, d); none where it is not remembered.
        temb: (B, d), the timestep's embedding, where K = 0; else none.
    """

    noisy: Tensor
    reference: Tensor | None = None
    temb: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheMemory:
    """Outputs of its last steps that a branch keeps.

    Attributes:
        front: FRONT's outputs that the next step's are compared with.
        velocity: (B, G, c_out) of the last step that ran BACK.
        totals: for each batch entry, the change that has gathered since then.
        reuses: steps since then.
    """

    front: FrontView
    velocity: Tensor
    totals: tuple[float, ...] = ()
    reuses: int = 0


class Cache(Protocol):
    """Decides when BACK is spared. Holds nothing of a request and can be shared."""

    def look(self, memory: CacheMemory, front: FrontView) -> tuple[bool, CacheMemory]:
        """Whether the velocity that is remembered will do for this step, and what to remember.

        Not asked at the first step of a branch, nor at an anchor.
        """
        ...

    def remember(
        self, memory: CacheMemory | None, front: FrontView, velocity: Tensor
    ) -> CacheMemory:
        """Return what is kept of a step that ran BACK; `memory` is none at a branch's first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """First-Block-Cache's criterion: the change since the last step that ran BACK.

    Attributes:
        threshold: reuse while the relative change (mean absolute difference over mean absolute
            value) stays under it; in a batch that of every entry.
        max_reuses: run BACK at the latest after so many reused steps; none means no bound.
        tokens: whose change is measured: "noisy", or "joint" for the references' too.
    """

    threshold: float
    max_reuses: int | None = None
    tokens: Literal["noisy", "joint"] = "noisy"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_options(self.max_reuses, self.tokens)

    def look(self, memory: CacheMemory, front: FrontView) -> tuple[bool, CacheMemory]:
        if self.max_reuses is not None and memory.reuses >= self.max_reuses:
            return False, memory
        changes = relative_changes(_compared(front, self.tokens), memory.front)
        after = replace(memory, totals=changes, reuses=memory.reuses + 1)
        return all(change < self.threshold for change in changes), after

    def remember(
        self, memory: CacheMemory | None, front: FrontView, velocity: Tensor
    ) -> CacheMemory:
        return CacheMemory(front=_compared(front, self.tokens), velocity=velocity)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeaCache:
    """TeaCache's criterion: what a polynomial makes of the change from step to step, summed.

    `calibrate-cache` fits the polynomial, so that it predicts the relative change of the velocity
    from that of FRONT's output; `load_tea_cache` reads its file.

    Attributes:
        threshold: reuse while the sum since the last step that ran BACK stays under it; in a batch
            that of every entry.
        coefficients: of the polynomial, highest power first, as `numpy.polyfit` gives them. What it
            makes negative counts as 0.
        max_reuses: run BACK at the latest after so many reused steps; none means no bound.
        tokens: whose change is measured: "noisy", or "joint" for the references' too.
        measured: least and largest change that the polynomial was fitted on. A smaller one counts
            as the least; beyond the largest, the prediction grows in proportion. None takes the
            polynomial as it is.
    """

    threshold: float
    coefficients: tuple[float, ...]
    max_reuses: int | None = None
    tokens: Literal["noisy", "joint"] = "noisy"
    measured: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)
        _check_options(self.max_reuses, self.tokens)
        values = self.coefficients
        if not isinstance(values, tuple) or not values or not all(map(_is_finite, values)):
            raise UsageError(
                f"coefficients must be a tuple of finite numbers, highest power first, got "
                f"{values!r}; calibrate-cache fits them"
            )
        pair = self.measured
        if pair is not None and (
            len(pair) != 2 or not all(map(_is_finite, pair)) or not 0 <= pair[0] <= pair[1]
        ):
            raise UsageError(
                f"measured must be the least and the largest change, from 0 up, got {pair!r}"
            )

    def look(self, memory: CacheMemory, front: FrontView) -> tuple[bool, CacheMemory]:
        front = _compared(front, self.tokens)
        predicted = [self.predict(change) for change in relative_changes(front, memory.front)]
        before = memory.totals or (0.0,) * len(predicted)
        if len(before) == len(predicted):
            predicted = [total + more for total, more in zip(before, predicted, strict=True)]
        after = replace(memory, front=front, totals=tuple(predicted), reuses=memory.reuses + 1)
        if self.max_reuses is not None and memory.reuses >= self.max_reuses:
            return False, after
        return all(total < self.threshold for total in after.totals), after

    def remember(
        self, memory: CacheMemory | None, front: FrontView, velocity: Tensor
    ) -> CacheMemory:
        return CacheMemory(front=_compared(front, self.tokens), velocity=velocity)

    def predict(self, change: float) -> float:
        """The velocity's relative change that a change of FRONT's output stands for, from 0 up."""
        if self.measured is not None:
            least, largest = self.measured
            if change > largest > 0:
                return self.predict(largest) * change / largest
            change = least if change < least else change  # NaN stays
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return 0.0 if value < 0 else value


def relative_changes(now: FrontView, before: FrontView) -> tuple[float, ...]:
    """Mean absolute difference over mean absolute value, of each batch entry; waits for the device.

    What `before` remembers is compared: noisy tokens, with the references' in the same means where
    they are there. The timestep's embedding, where it is there, adds its own relative change.
    Infinite where shapes differ, so that BACK runs; NaN where inputs are.
    """
    tokens = [(now.noisy, before.noisy)]
    if before.reference is not None and now.reference is not None:
        tokens.append((now.reference, before.reference))
    tembs = []
    if before.temb is not None and now.temb is not None:
        tembs.append((now.temb, before.temb))
    if any(a.shape != b.shape for a, b in tokens + tembs):
        return (math.inf,) * now.noisy.shape[0]
    changes = _ratio(tokens)
    if tembs:
        changes = changes + _ratio(tembs)
    return tuple(changes.tolist())


def _ratio(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Relative L1 change, summed over the pairs, (B,)."""
    difference = torch.stack([(a.float() - b.float()).abs().flatten(1).sum(1) for a, b in pairs])
    size = torch.stack([b.float().abs().flatten(1).sum(1) for _, b in pairs])
    total = difference.sum(0)
    return torch.where(total == 0, total, total / size.sum(0))


def _compared(front: FrontView, tokens: str) -> FrontView:
    """Return the outputs that later steps are compared with."""
    return front if tokens == "joint" else replace(front, reference=None)


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _check_threshold(threshold: float) -> None:
    if not _is_finite(threshold) or threshold <= 0:
        raise UsageError(f"threshold must be a number above 0, got {threshold!r}")


def _check_options(max_reuses: int | None, tokens: str) -> None:
    if max_reuses is not None:
        check_count("max_reuses", max_reuses)
    if tokens not in TOKENS:
        raise UsageError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}")
