"""What a service counts, as plain numbers that any monitoring can read."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditrim.runtime.service.job import EditResult

# Upper bounds in seconds: a step of a small model to an edit of minutes.
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound.

    Attributes:
        bounds: increasing; a value counts to the first bound that it does not exceed.
        counts: one a bound, and a last one for what lies above all of them.
        total: sum of the values.
    """

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """A copy that does not change."""
        return Histogram(self.bounds, list(self.counts), self.total)

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceMetrics:
    """What a service has done so far, and what it does now.

    Attributes:
        state: "starting", "ready", "draining", "closed" or "failed".
        queue_length, running: edits that wait and that run.
        accepted: edits in all.
        outcomes: ended edits by outcome: "ok", "invalid", "cancelled", "deadline", "failed".
        refused: edits that were not accepted, by reason: "queue_full", "unavailable", "invalid".
        queue_seconds, edit_seconds: waiting and running times.
        stage_seconds: time of each stage of an edit.
        calls_by_role: model calls, "full", "anchor", "reduced" or "reuse".
        calls_by_rung: model calls by the rung that served BACK; reused ones ran none.
        kept_share: share of the reference tokens of every reduced call.
        loaded: names of the models in memory.
        loads, evictions: of models.
        warmup_seconds: of each model's last warm-up; it counts to nothing else.
        loras: LoRAs that act, by model.
        memory_bytes: "resident" of the process; on a GPU "device_allocated" and "device_peak".
    """

    state: str
    queue_length: int
    running: int
    accepted: int
    outcomes: Mapping[str, int]
    refused: Mapping[str, int]
    queue_seconds: Histogram
    edit_seconds: Histogram
    stage_seconds: Mapping[str, Histogram]
    calls_by_role: Mapping[str, int]
    calls_by_rung: Mapping[int, int]
    kept_share: Histogram
    loaded: tuple[str, ...]
    loads: int
    evictions: int
    warmup_seconds: Mapping[str, float]
    loras: Mapping[str, tuple[str, ...]]
    memory_bytes: Mapping[str, int]


class Recorder:
    """Counts what happens in a service. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted = 0
        self._outcomes: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._queue, self._edit = Histogram(), Histogram()
        self._stages: dict[str, Histogram] = {}
        self._roles: Counter[str] = Counter()
        self._rungs: Counter[int] = Counter()
        self._kept = Histogram(SHARES)
        self._warmups: dict[str, float] = {}

    def accept(self) -> None:
        """Count an edit that was accepted."""
        with self._lock:
            self._accepted += 1

    def refuse(self, reason: str) -> None:
        """Count an edit that was not."""
        with self._lock:
            self._refused[reason] += 1

    def end(self, outcome: str) -> None:
        """Count an edit that ended."""
        with self._lock:
            self._outcomes[outcome] += 1

    def wait(self, seconds: float) -> None:
        """Count the time that an edit waited."""
        with self._lock:
            self._queue.add(seconds)

    def warm(self, model: str, seconds: float) -> None:
        """Note how long a model's warm-up took."""
        with self._lock:
            self._warmups[model] = seconds

    def finish(self, result: EditResult) -> None:
        """Count what a finished edit took and did."""
        with self._lock:
            self._edit.add(result.seconds)
            for stage, milliseconds in result.stages.items():
                self._stages.setdefault(stage, Histogram()).add(milliseconds / 1e3)
            for record in result.report.steps:
                self._roles[record.role] += 1
                if record.role != "reuse":
                    self._rungs[record.rung] += 1
                if record.role == "reduced":
                    self._kept.add(record.num_kept / max(record.num_reference, 1))

    def stage(self, name: str, seconds: float) -> None:
        """Count the time of a stage outside of the service, as decoding a picture."""
        with self._lock:
            self._stages.setdefault(name, Histogram()).add(seconds)

    def mean_seconds(self) -> float:
        """Mean time of an edit that ran; 1 s before the first one."""
        with self._lock:
            return self._edit.total / self._edit.count if self._edit.count else 1.0

    def snapshot(
        self,
        *,
        state: str,
        queue_length: int,
        running: int,
        loaded: tuple[str, ...],
        loads: int,
        evictions: int,
        loras: Mapping[str, tuple[str, ...]],
    ) -> ServiceMetrics:
        """What was counted, with what the service is at now."""
        memory = memory_bytes()
        with self._lock:
            return ServiceMetrics(
                state=state,
                queue_length=queue_length,
                running=running,
                accepted=self._accepted,
                outcomes=dict(self._outcomes),
                refused=dict(self._refused),
                queue_seconds=self._queue.copy(),
                edit_seconds=self._edit.copy(),
                stage_seconds={name: times.copy() for name, times in self._stages.items()},
                calls_by_role=dict(self._roles),
                calls_by_rung=dict(self._rungs),
                kept_share=self._kept.copy(),
                loaded=loaded,
                loads=loads,
                evictions=evictions,
                warmup_seconds=dict(self._warmups),
                loras=loras,
                memory_bytes=memory,
            )


def memory_bytes() -> dict[str, int]:
    """Memory of this process, and of the GPU that it uses."""
    import psutil
    import torch

    sizes = {"resident": int(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        sizes["device_allocated"] = int(torch.cuda.memory_allocated())
        sizes["device_peak"] = int(torch.cuda.max_memory_allocated())
    return sizes
