"""What a service is asked for, what it tells on the way, and what it gives back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ditrim.plugins.errors import UsageError
from ditrim.runtime.service.errors import Cancelled, ServiceError

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.report import RunReport

Phase = Literal["started", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditJob:
    """One edit and how a service is to run it.

    Attributes:
        edit: pictures, prompt, seed and numbers, as a pipeline is asked for them.
        model: name of one of the service's models; none is the first.
        policy: as a person types it, see `policy_from_text`; may hold a step cache.
        cache: a step cache beside the policy, see `step_cache_from`.
        lora: a LoRA that the model was built or loaded with; none runs what is active.
        mask: white where the first picture may change; L or RGB, of that picture's size.
        keep_region: of the first picture: reference tokens under its light parts are always kept.
        deadline_s: seconds from submission after which the edit ends; none is the service's.
    """

    edit: EditRequest
    model: str | None = None
    policy: str = "topi"
    cache: str | None = None
    lora: str | None = None
    mask: Image.Image | None = None
    keep_region: Image.Image | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise UsageError(f"a deadline of {self.deadline_s:g} s has passed already; give more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What happened to an edit that runs.

    Attributes:
        phase: "started" when it left the queue, "step" after a step.
        done, total: steps.
        role: of the last model call, see `StepRecord`; empty before the first.
        kept: share of the reference tokens that it ran on.
    """

    phase: Phase
    done: int = 0
    total: int = 0
    role: str = ""
    kept: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """A finished edit.

    Attributes:
        image: RGB.
        edit: the request as it ran, with steps and size decided.
        model: its name.
        report: what every model call did.
        seconds: from the first to the last work on it.
        queue_seconds: that it waited.
        stages: milliseconds in "text", "vae_encode", "vae_decode", "front", "back", "select",
            "gather" and "other"; on a GPU those of its transformer are of submitting the work.
    """

    image: Image.Image
    edit: EditRequest
    model: str
    report: RunReport
    seconds: float
    queue_seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)


class EditHandle:
    """An edit that was accepted. Any thread may wait for it or cancel it."""

    def __init__(self, job: EditJob, on_progress: Callable[[Progress], None] | None) -> None:
        """Take the job and who is told of its progress, from the thread that runs it."""
        self.job = job
        self.future: Future[EditResult] = Future()
        self.submitted = time.monotonic()
        self.future.set_running_or_notify_cancel()  # only this handle ends it
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._has_ended = False
        self._before: Callable[[BaseException | None], None] = lambda error: None
        self._after: Callable[[], None] = lambda: None

    def result(self, timeout: float | None = None) -> EditResult:
        """Wait for the result.

        Raises:
            UsageError: the request is wrong in a way that only running it showed.
            ServiceError: it was cancelled, ran out of time, or the service could not run it.
            DitrimError: it failed; says why.
            TimeoutError: `timeout` seconds passed; the edit goes on.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether there is a result or an error; what was cancelled may run to its step's end."""
        return self.future.done()

    def cancel(self) -> bool:
        """End the edit: at once where it waits, after the present step where it runs.

        Returns:
            whether this call ended it; false where it had ended.
        """
        return self.fail(Cancelled("the edit was cancelled"))

    def add_done_callback(self, call: Callable[[EditHandle], None]) -> None:
        """Call with this handle when there is a result or an error, from whichever thread."""
        self.future.add_done_callback(lambda _: call(self))

    # What follows is the service's.

    def watch(
        self, before: Callable[[BaseException | None], None], after: Callable[[], None]
    ) -> None:
        """Be told of the error or none just before anybody can see the end, and just after.

        What a service says of itself has to be true for whoever has an edit's answer, so it is
        brought up to date before.
        """
        self._before, self._after = before, after

    def tell(self, progress: Progress) -> None:
        """Report progress, unless the edit has ended."""
        if self._on_progress is not None and not self.done():
            self._on_progress(progress)

    def fail(self, error: BaseException) -> bool:
        """End the edit with an error; false where it had ended."""
        return self._end(error, lambda: self.future.set_exception(error))

    def succeed(self, result: EditResult) -> bool:
        """End the edit with a result; false where it had ended."""
        return self._end(None, lambda: self.future.set_result(result))

    def _end(self, error: BaseException | None, publish: Callable[[], None]) -> bool:
        with self._lock:
            if self._has_ended:
                return False
            self._has_ended = True
        self._before(error)
        publish()
        self._after()
        return True

    def check(self) -> None:
        """Raise what ended the edit, if anything did.

        Raises:
            ServiceError: it was cancelled or its deadline passed.
        """
        if self.future.done():
            error = self.future.exception()
            raise error if isinstance(error, ServiceError) else Cancelled("the edit has ended")
