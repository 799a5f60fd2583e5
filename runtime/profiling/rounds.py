"""Rounds of measurements: every round runs every part once, in an order that is drawn anew.

What slows the machine for a while, and whatever ran before, then slows all parts alike. Before each
part torch's threads are given time to stop spinning, which would slow the engine's.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

SETTLE_SECONDS = 0.005  # pause before a part, in which idle threads stop spinning
_T = TypeVar("_T")


class Rounds:
    """Runs parts round by round, and keeps how long they took.

    Attributes:
        number: of the round that runs, from 0.
        samples: milliseconds by what took them, in rounds that count.
        warmup: the same of the rounds before; empty where the first rounds had to count.
    """

    def __init__(self, settle_s: float = SETTLE_SECONDS) -> None:
        """Take the seconds that pass before each part, in which idle threads stop spinning."""
        self.number = 0
        self.samples: dict[Hashable, list[float]] = {}
        self.warmup: dict[Hashable, list[float]] = {}
        self._settle_s = settle_s

    def add(self, key: Hashable, milliseconds: float) -> None:
        """Add a sample, at least one tick of the clock."""
        # A clock's tick is the least that it can measure.
        self.samples.setdefault(key, []).append(max(milliseconds, 1e-6))

    def timed(self, key: Hashable, run: Callable[[], _T]) -> _T:
        """Run and keep the time as a sample."""
        start = time.perf_counter()
        result = run()
        self.add(key, (time.perf_counter() - start) * 1e3)
        return result

    def turn(self, parts: Sequence[Callable[[], object]]) -> None:
        """Run every part once, each after a pause, in the order given in the first round alone."""
        order = list(parts)
        if self.number > 0:
            random.Random(self.number).shuffle(order)
        for run in order:
            self.alone(run)

    def alone(self, run: Callable[[], _T]) -> _T:
        """Run a part after a pause."""
        self.settle()
        return run()

    def settle(self) -> None:
        """Pause until idle threads have stopped spinning."""
        if self._settle_s:
            time.sleep(self._settle_s)

    def run(
        self,
        one_round: Callable[[], None],
        repeats: int,
        warmup: int,
        on_round: Callable[[int, str], None] = lambda done, word: None,
        *,
        budget_s: float | None = None,
    ) -> None:
        """Run all rounds.

        Args:
            one_round: what a round does.
            repeats: rounds that count.
            warmup: rounds before them; they count where the budget leaves no others.
            on_round: called with the number of finished rounds and a word about them.
            budget_s: no round begins that would end later than this, in seconds.
        """
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        begun = time.perf_counter()
        try:
            for self.number in range(warmup + repeats):
                if self.number == warmup:
                    self.warmup, self.samples = self.samples, {}
                start = time.perf_counter()
                one_round()
                on_round(self.number + 1, "warming up" if self.number < warmup else "measuring")
                now = time.perf_counter()
                if budget_s is not None and now + (now - start) > begun + budget_s:
                    break
        finally:
            if was_enabled:
                gc.enable()
