"""`EditService`: a bounded queue of edits, and the threads that run them."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.editing.opening import ModelSource
from ditrim.runtime.service.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceFailed,
    QueueFull,
    ServiceError,
    Unavailable,
    UnknownModel,
    is_device_failure,
    is_memory_failure,
)
from ditrim.runtime.service.job import EditHandle, EditJob, Progress
from ditrim.runtime.service.metrics import Recorder, ServiceMetrics
from ditrim.runtime.service.model import LoadedModel
from ditrim.runtime.service.pool import ModelPool

if TYPE_CHECKING:
    from ditrim.runtime.editing.result_size import ResultSize

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "closed", "failed"]
_OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (Cancelled, "cancelled"),
    (DeadlineExceeded, "deadline"),
    (UsageError, "invalid"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """How a service runs its edits.

    Attributes:
        workers: edits that run at once, each in a thread of its own; a device is best kept busy by
            one or two.
        queue_size: edits that may wait besides.
        deadline_s: seconds from submission after which an edit ends, where its job names none; none
            means never.
        max_loaded: models in memory at once.
        warm_up: run every rung before the first edit.
        warm_sizes: of results, for the warm-up; none is the pipeline's own for a square picture.
        max_steps: denoising steps that a job may ask for.
    """

    workers: int = 1
    queue_size: int = 16
    deadline_s: float | None = None
    max_loaded: int = 1
    warm_up: bool = True
    warm_sizes: tuple[ResultSize, ...] = ()
    max_steps: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("queue_size", 0), ("max_loaded", 1), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise UsageError(f"deadline_s is {self.deadline_s:g}; it must be above 0")


class EditService:
    """Runs edits side by side, one queue before all of them. Any thread may use it.

    The results are those of the same edits run alone, to the bit, whatever runs beside them.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSource] | ModelSource | str,
        options: ServiceOptions | None = None,
    ) -> None:
        """Make a service; `start`, or a `with` block, loads its models.

        Args:
            models: by name, the first is the default; or one alone, or the folder of an engine set.
            options: how edits run.

        Raises:
            UsageError: there are no models.
        """
        if isinstance(models, str):
            models = ModelSource(engine=models)
        if isinstance(models, ModelSource):
            models = {"default": models}
        self.options = options or ServiceOptions()
        self._recorder = Recorder()
        self._pool = ModelPool(models, self.options.max_loaded, self._warm_up)
        self._changed = threading.Condition()
        self._queue: deque[EditHandle] = deque()
        self._running: set[EditHandle] = set()
        self._num_ending = 0  # have left both, and their ends are about to be seen
        self._deadlines: list[tuple[float, int, EditHandle]] = []
        self._numbers = itertools.count()
        self._state: State = "starting"
        self._reason = "it has not started yet"
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, *, wait: bool = True) -> None:
        """Load models, as many as may be in memory, and warm them up.

        Edits may be submitted meanwhile.

        Args:
            wait: return when it is done; else it goes on in the service's threads.

        Raises:
            DitrimError: with `wait`: a model cannot be loaded.
        """
        with self._changed:
            if self._threads:
                raise UsageError("the service was started already")
            names = [f"ditrim-edit-{number}" for number in range(self.options.workers)]
            self._threads = [threading.Thread(target=self._work, name=name) for name in names]
            self._threads.append(threading.Thread(target=self._watch_deadlines))
            for thread in self._threads:
                thread.daemon = True
                thread.start()
        if wait:
            self.wait_ready()

    def start_once(self) -> bool:
        """Start without waiting, unless somebody did; whether this call started it."""
        with self._changed:
            if self._threads:
                return False
        self.start(wait=False)
        return True

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until models are loaded and warmed up; false where `timeout` seconds passed.

        Raises:
            DitrimError: a model could not be loaded.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state != "starting", timeout)
            if self._error is not None:
                raise self._error
            return self._state != "starting"

    @property
    def state(self) -> State:
        """What the service does: only "ready" and "starting" take edits."""
        return self._state

    @property
    def reason(self) -> str:
        """One sentence about a state other than "ready"."""
        return self._reason

    @property
    def status(self) -> tuple[State, str]:
        """State and reason, of one moment."""
        with self._changed:
            return self._state, self._reason

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that are served, the default first."""
        return tuple(self._pool.sources)

    @property
    def sources(self) -> Mapping[str, ModelSource]:
        """What each name stands for."""
        return self._pool.sources

    def loaded(self, name: str) -> LoadedModel | None:
        """A model if it is in memory."""
        return self._pool.loaded(name)

    def submit(
        self, job: EditJob, on_progress: Callable[[Progress], None] | None = None
    ) -> EditHandle:
        """Accept an edit, or refuse it before anything runs.

        Args:
            job: the edit.
            on_progress: told what happens, from the thread that runs it; it should return at once.

        Raises:
            UsageError: the job is wrong; a model that is not in memory looks at it only when it
                is loaded, and the handle raises then.
            UnknownModel: it names a model that is not served.
            QueueFull: as many wait as may.
            Unavailable: the service is shutting down, or its device failed.
        """
        return self.submit_all([job], None if on_progress is None else lambda _, p: on_progress(p))[
            0
        ]

    def submit_all(
        self,
        jobs: Sequence[EditJob],
        on_progress: Callable[[int, Progress], None] | None = None,
    ) -> list[EditHandle]:
        """Accept several edits, or none of them; see `submit`.

        Args:
            jobs: the edits.
            on_progress: told the number of the job and what happens.
        """
        try:
            jobs = [self.check(job) for job in jobs]
        except (UsageError, UnknownModel):
            self._recorder.refuse("invalid")
            raise
        handles = [EditHandle(job, _numbered(on_progress, i)) for i, job in enumerate(jobs)]
        with self._changed:
            self._check_open(len(handles))
            for handle in handles:
                self._admit(handle)
            self._changed.notify_all()
        return handles

    def check(self, job: EditJob) -> EditJob:
        """Check a job as `submit` does, without running it.

        Raises:
            UsageError, UnknownModel: see `submit`.
        """
        steps = job.edit.steps
        if steps is not None and not 1 <= steps <= self.options.max_steps:
            raise UsageError(
                f"{steps} steps were asked for; this service runs 1 to {self.options.max_steps}"
            )
        job = replace(job, model=self._pool.name_of(job.model))
        assert job.model is not None
        model = self._pool.loaded(job.model)
        if model is not None:
            model.prepare(job)
        return job

    def metrics(self) -> ServiceMetrics:
        """What the service has counted so far."""
        loaded = self._pool.names_loaded()
        models = {name: self._pool.loaded(name) for name in loaded}
        with self._changed:
            state, waiting, running = self._state, len(self._queue), len(self._running)
        return self._recorder.snapshot(
            state=state,
            queue_length=waiting,
            running=running,
            loaded=loaded,
            loads=self._pool.num_loads,
            evictions=self._pool.num_evictions,
            loras={name: model.loras for name, model in models.items() if model is not None},
        )

    def note_stage(self, stage: str, seconds: float) -> None:
        """Count time that an application spends on an edit outside of the service."""
        self._recorder.stage(stage, seconds)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new edits and wait for those that were accepted.

        Args:
            timeout: seconds to wait at most.

        Returns:
            whether all of them ended.
        """
        with self._changed:
            if self._state in ("starting", "ready"):
                self._enter("draining", "it is shutting down")
            return self._changed.wait_for(self._is_idle, timeout)

    def close(self) -> None:
        """End every edit that is left, and let go of the models. A second call does nothing."""
        with self._changed:
            self._enter("closed", "it was closed")
            left = [*self._queue, *self._running]
        for handle in left:
            handle.fail(Unavailable("the service was closed before the edit was done"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._pool.close()

    def __enter__(self) -> EditService:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Drain, or where the block raised end everything at once."""
        if kind is None:
            self.drain()
        self.close()

    # Admission, under the lock.

    def _check_open(self, count: int) -> None:
        if self._state not in ("starting", "ready"):
            self._recorder.refuse("unavailable")
            raise Unavailable(f"the service takes no edits: {self._reason}")
        capacity = self.options.workers + self.options.queue_size
        if count > capacity:
            raise UsageError(
                f"{count} edits at once are more than this service's {capacity} places"
            )
        taken = len(self._queue) + len(self._running)
        if taken + count > capacity:
            self._recorder.refuse("queue_full")
            ahead = taken + count - capacity
            seconds = math.ceil(ahead * self._recorder.mean_seconds() / self.options.workers)
            raise QueueFull(
                f"the queue is full: {len(self._running)} edits run and {len(self._queue)} wait; "
                f"try again in about {max(1, seconds)} s",
                retry_after_s=max(1.0, seconds),
            )

    def _admit(self, handle: EditHandle) -> None:
        self._recorder.accept()
        handle.watch(partial(self._note_end, handle), self._note_seen)
        limit = handle.job.deadline_s or self.options.deadline_s
        if limit is not None:
            heapq.heappush(self._deadlines, (handle.submitted + limit, next(self._numbers), handle))
        self._queue.append(handle)

    def _enter(self, state: State, reason: str) -> None:
        if self._state == "closed":  # nothing follows, whatever a last edit ends in
            return
        self._state, self._reason = state, reason
        self._changed.notify_all()

    # Everything below runs in whichever thread ends an edit, or in the service's own.

    def _note_end(self, handle: EditHandle, error: BaseException | None) -> None:
        """Count an edit that is about to be seen to end, and free its place if it waits."""
        kinds = (name for kind, name in _OUTCOMES if isinstance(error, kind))
        self._recorder.end("ok" if error is None else next(kinds, "failed"))
        with self._changed:
            self._num_ending += 1
            if handle in self._queue:
                self._queue.remove(handle)

    def _note_seen(self) -> None:
        with self._changed:
            self._num_ending -= 1
            self._changed.notify_all()

    def _work(self) -> None:
        """Run edits until the service is closed; the first worker loads the models before."""
        if threading.current_thread() is self._threads[0]:
            self._open()
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._state in ("closed", "failed"):
                    return
                handle = self._queue.popleft()
                self._running.add(handle)
            end = self._run(handle)
            with self._changed:
                self._running.discard(handle)
                self._num_ending += 1
            end()
            self._note_seen()

    def _is_idle(self) -> bool:
        return not (self._queue or self._running or self._num_ending)

    def _has_work(self) -> bool:
        if self._state in ("closed", "failed"):
            return True
        return self._state != "starting" and bool(self._queue)

    def _open(self) -> None:
        """Load as many models as may be in memory."""
        try:
            for name in list(self._pool.sources)[: self.options.max_loaded]:
                if self._state == "closed":
                    return
                with self._pool.borrow(name):
                    pass
        except BaseException as error:  # whatever it is, it is why nothing can run
            logger.exception("the service cannot start")
            self._break(f"a model cannot be loaded: {error}", error)
            return
        with self._changed:
            if self._state == "starting":
                self._enter("ready", "")

    def _warm_up(self, model: LoadedModel) -> None:
        if not self.options.warm_up:
            return
        start = time.perf_counter()
        count = model.warm_up(self.options.warm_sizes)
        seconds = time.perf_counter() - start
        self._recorder.warm(model.name, seconds)
        logger.info("%s: %d short edits of warm-up took %.1f s", model.name, count, seconds)

    def _run(self, handle: EditHandle) -> Callable[[], object]:
        """Run an edit; what is returned ends it, for when its place is free again."""
        waited = time.monotonic() - handle.submitted
        self._recorder.wait(waited)
        assert handle.job.model is not None

        def tell(progress: Progress) -> None:
            handle.check()
            handle.tell(progress)

        try:
            with self._pool.borrow(handle.job.model) as model:
                prepared = model.prepare(handle.job)
                tell(Progress(phase="started"))
                result = model.run(prepared, tell)
        except BaseException as error:  # a worker outlives every edit
            return partial(handle.fail, self._explained(error))
        self._recorder.finish(result)
        return partial(handle.succeed, replace(result, queue_seconds=waited))

    def _explained(self, error: BaseException) -> DitrimError:
        """What a caller can make something of; a device's failure ends the service before."""
        if is_device_failure(error):
            logger.error("the device failed", exc_info=error)
            self._break(f"its device failed ({error}); restart it")
            return DeviceFailed(
                f"the device failed during the edit ({error}); the service takes no further "
                "edits: restart it"
            )
        if isinstance(error, DitrimError):
            return error
        if is_memory_failure(error):
            return DitrimError(
                "memory ran out; use a smaller picture, a smaller size or fewer steps"
            )
        logger.error("an edit failed in a way that is not known", exc_info=error)
        return DitrimError(f"internal error: {type(error).__name__}: {error}")

    def _break(self, reason: str, error: BaseException | None = None) -> None:
        """Take no more edits, and end those that wait."""
        with self._changed:
            self._error = error
            self._enter("failed", reason)
            waiting = list(self._queue)
        for handle in waiting:
            handle.fail(Unavailable(f"the service takes no edits: {reason}"))

    def _watch_deadlines(self) -> None:
        """End edits whose deadline passes, whether they wait or run."""
        while True:
            with self._changed:
                if self._state == "closed":
                    return
                now = time.monotonic()
                due = []
                while self._deadlines and (
                    self._deadlines[0][0] <= now or self._deadlines[0][2].done()
                ):
                    due.append(heapq.heappop(self._deadlines)[2])
                if not due:
                    self._changed.wait(self._deadlines[0][0] - now if self._deadlines else None)
                    continue
            for handle in due:
                where = "while it ran" if handle in self._running else "while it waited"
                handle.fail(DeadlineExceeded(f"the edit's deadline passed {where}"))


def _numbered(
    on_progress: Callable[[int, Progress], None] | None, number: int
) -> Callable[[Progress], None] | None:
    if on_progress is None:
        return None
    return lambda progress: on_progress(number, progress)


__all__ = ["EditService", "ServiceError", "ServiceOptions"]
