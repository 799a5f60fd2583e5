"""Optimisation profiles of a plan: which lengths each one spans and which it is tuned for.

A profile a rung: profile i spans the reference lengths (rung i-1, rung i] and is tuned for the rung
itself, since kept counts are rounded up to it. Nothing here knows TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import LadderError

if TYPE_CHECKING:
    from ditrim.engines.sets.specs import Limits, TensorSpec

PLAN_ROLES = ("front", "back", "anchor")
Which = Literal["least", "best", "most"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRange:
    """Sizes of an axis that a profile serves, `least` to `most`, tuned for `best`."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        sizes = (self.least, self.best, self.most)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
            raise LadderError(f"the range {sizes} must hold whole numbers")
        if not 1 <= self.least <= self.best <= self.most:
            raise LadderError(
                f"the range {self.least} to {self.most}, tuned for {self.best}, contradicts "
                "itself: least, best and most must be above 0 and must not fall"
            )

    def holds(self, size: int) -> bool:
        """Whether a size can be served."""
        return self.least <= size <= self.most


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSpec:
    """One optimisation profile: a range for every named axis.

    Attributes:
        batch, noisy, reference, text: of the axes of these names; those that a plan does not have
            are ignored.
        rows: scored rows; none where the plan has no `score_rows`.
    """

    batch: AxisRange
    noisy: AxisRange
    reference: AxisRange
    text: AxisRange
    rows: AxisRange | None = None

    def range_of(self, axis: str) -> AxisRange:
        """The range of a named axis."""
        value: AxisRange | None = getattr(self, axis)
        assert value is not None, f"a plan without {axis}"
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """The axes that are the same in every profile."""

    batch: AxisRange
    noisy: AxisRange
    text: AxisRange

    @classmethod
    def up_to(cls, limits: Limits) -> Ranges:
        """From 1 to the limits; tuned for one edit at the longest lengths."""
        return cls(
            batch=AxisRange(least=1, best=1, most=limits.batch),
            noisy=AxisRange(least=1, best=limits.noisy, most=limits.noisy),
            text=AxisRange(least=1, best=limits.text, most=limits.text),
        )


def plan_roles(*, separate_anchor: bool) -> tuple[str, ...]:
    """The plans of a set, in the order in which they are built."""
    return PLAN_ROLES if separate_anchor else PLAN_ROLES[:2]


def is_scored(role: str, *, separate_anchor: bool) -> bool:
    """Whether a plan takes `score_rows` and gives `influence`."""
    return role == "anchor" or (role == "back" and not separate_anchor)


def ladder_profiles(
    ladder: Ladder,
    limits: Limits | Ranges,
    role: str,
    *,
    separate_anchor: bool = False,
    usual: tuple[int, ...] = (),
) -> tuple[ProfileSpec, ...]:
    """A profile for each rung.

    FRONT and the anchor step run at a request's full reference length, which may be on any rung, so
    every plan has every rung. In the plan that serves both steps (BACK with scoring), the longest
    rung is tuned for scoring all noisy rows, the lower ones for one, which is a reduced step's.

    Args:
        ladder: reference lengths.
        limits: the largest sizes of the other axes, or their ranges.
        role: "front", "back" or "anchor".
        separate_anchor: whether the set has an anchor plan, so that BACK scores nothing.
        usual: whole reference lengths of usual edits. The profile that holds one is tuned for the
            longest of them, the others for their rung.
    """
    ranges = limits if isinstance(limits, Ranges) else Ranges.up_to(limits)
    assert role in PLAN_ROLES, role
    profiles = []
    for least, rung in _spans(ladder):
        rows = None
        if is_scored(role, separate_anchor=separate_anchor):
            scores_all = role == "anchor" or rung == ladder.longest
            best = ranges.noisy.best if scores_all else 1
            rows = AxisRange(least=1, best=best, most=ranges.noisy.most)
        profiles.append(
            ProfileSpec(
                batch=ranges.batch,
                noisy=ranges.noisy,
                reference=AxisRange(
                    least=least,
                    best=max((n for n in usual if least <= n <= rung), default=rung),
                    most=rung,
                ),
                text=ranges.text,
                rows=rows,
            )
        )
    return tuple(profiles)


def _spans(ladder: Ladder) -> Iterator[tuple[int, int]]:
    below = 0
    for rung in ladder.rungs:
        yield below + 1, rung
        below = rung


def shape_of(spec: TensorSpec, profile: ProfileSpec, which: Which) -> tuple[int, ...]:
    """A tensor's shape at the least, best or most sizes of a profile."""
    return tuple(
        axis if isinstance(axis, int) else int(getattr(profile.range_of(axis), which))
        for axis in spec.shape
    )


def profile_for(profiles: tuple[ProfileSpec, ...], reference: int) -> int:
    """The index of the profile that spans a reference length.

    Raises:
        LadderError: there is none; names the length and the limit.
    """
    for index, profile in enumerate(profiles):
        if profile.reference.holds(reference):
            return index
    raise LadderError(
        f"{reference} reference tokens fit no profile; the longest is {profiles[-1].reference.most}"
    )
