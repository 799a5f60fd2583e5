"""Times work on a GPU by events on its stream."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ditrim.runtime.denoising.calls import Clock


class EventClock(Clock):
    """A `Clock` whose laps are events on the device's stream; read by `finish`."""

    __slots__ = ("_device", "_marks")

    def __init__(self, device: torch.device) -> None:
        super().__init__(None)
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._mark("")

    def _mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((part, event))

    def lap(self, part: str) -> None:
        self._mark(part)

    def finish(self) -> None:
        """Wait for the last event and read all of them."""
        self._marks[-1][1].synchronize()
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            self.parts[part] = self.parts.get(part, 0.0) + before.elapsed_time(after)
