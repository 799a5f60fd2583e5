"""The reference lengths that an engine set serves."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from ditrim.plugins.errors import LadderError

# Kept counts that a set of plans has by default. Each takes kernels of its own that
# TensorRT-RTX compiles while it runs, and a CUDA graph where those are captured.
MOST_KEPT_COUNTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Reference lengths (rungs) in tokens; a shorter reference runs on the next rung up.

    Attributes:
        rungs: increasing lengths above 0; the last is the longest that is served.
        granularity: kept counts are rounded up to a multiple of it, or to their rung.
    """

    rungs: tuple[int, ...]
    granularity: int = 1

    def __post_init__(self) -> None:
        if not self.rungs:
            raise LadderError("the ladder has no rungs; give at least one reference length")
        for rung in self.rungs:
            if isinstance(rung, bool) or not isinstance(rung, int) or rung < 1:
                raise LadderError(f"ladder rung {rung!r} must be a whole number above 0")
        if list(self.rungs) != sorted(set(self.rungs)):
            raise LadderError(
                f"ladder rungs {', '.join(map(str, self.rungs))} must increase and not repeat"
            )
        if isinstance(self.granularity, bool) or not isinstance(self.granularity, int):
            raise LadderError(f"granularity {self.granularity!r} must be a whole number")
        if not 1 <= self.granularity <= self.longest:
            raise LadderError(
                f"granularity {self.granularity} is not in [1, {self.longest}], up to the longest "
                "reference length; choose a smaller one"
            )

    @classmethod
    def even(cls, longest: int, *, num_rungs: int = 8, granularity: int = 1) -> Ladder:
        """Rungs at equal parts of the longest, rounded up to the granularity.

        Args:
            longest: the longest reference length.
            num_rungs: how many; those that fall together are merged.
            granularity: see the class.

        Raises:
            LadderError: a number is out of range.
        """
        if longest < 1:
            raise LadderError(f"the longest reference length is {longest}; it must be above 0")
        if num_rungs < 1:
            raise LadderError(f"{num_rungs} rungs asked for; a ladder needs at least one")
        if granularity < 1:
            raise LadderError(f"granularity {granularity} is not in [1, {longest}]; choose 1 or up")
        parts = (-(-longest * part // num_rungs) for part in range(1, num_rungs + 1))
        rungs = {min(longest, -(-part // granularity) * granularity) for part in parts}
        return cls(rungs=tuple(sorted(rungs)), granularity=granularity)

    @property
    def longest(self) -> int:
        """The longest reference length served, in tokens."""
        return self.rungs[-1]

    def round_up(self, count: int) -> int:
        """A kept count rounded up to the granularity, but not past the rung that holds it."""
        rung = self.rung_for(min(count, self.longest))
        return min(rung, -(-count // self.granularity) * self.granularity)

    def rung_for(self, length: int) -> int:
        """The smallest rung that holds this many reference tokens.

        Raises:
            LadderError: there is none; names the length and the limit.
        """
        if length > self.longest:
            raise LadderError(
                f"{length} reference tokens do not fit: the longest rung of this ladder is "
                f"{self.longest}"
            )
        return self.rungs[bisect_left(self.rungs, length)]
