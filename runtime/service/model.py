"""One model that a service has loaded: requests checked, pipelines attached, edits run."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import UsageError
from ditrim.runtime.attachment import Attachment, attach
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.editing.opening import ModelSource, open_model
from ditrim.runtime.editing.pipelines import EditRequest, prepare_request, region_from, run_edit
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy_text import PolicyChoice, policy_from_text
from ditrim.runtime.service.job import EditJob, EditResult, Progress
from ditrim.runtime.service.stages import Stages, light_copy

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.runtime.editing.result_size import ResultSize
    from ditrim.runtime.policy import Policy

logger = logging.getLogger(__name__)

_ATTACHMENTS = 16  # pipelines kept attached, each with a policy of its own; they hold no weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job that was checked against its model, ready to run.

    Attributes:
        edit: the request with steps and size decided.
        pipe: an attached pipeline; none where it is attached for this job alone.
        attachment: of it.
        choice: how the job is reduced.
        region: (height, width) bool of the first picture, or none.
    """

    edit: EditRequest
    pipe: Any
    attachment: Attachment | None
    choice: PolicyChoice
    region: Any = None


class LoadedModel:
    """Engines and the pipeline around them. Threads may share it."""

    def __init__(self, name: str, source: ModelSource) -> None:
        """Load a model.

        Args:
            name: that requests call it by.
            source: what to load.

        Raises:
            UsageError, EngineSetError, DitrimError: see `open_model`.
        """
        opened = open_model(source, lambda text: logger.info("%s: %s", name, text))
        self.name = name
        self.engines: Engines = opened.engines
        self.pipe: Any = opened.pipeline()
        self._lock = threading.Lock()
        self._attachments: OrderedDict[tuple[str, str | None], Attachment] = OrderedDict()
        # Compares the weights once; what is attached later was compared then.
        attach(copy.copy(self.pipe), self.engines, ToPi()).detach()

    @property
    def engine_set(self) -> EngineSet:
        """The engine set, or the description of the pipeline's own transformer."""
        return self.engines.engine_set

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the LoRAs that the engine set was built with."""
        return tuple(
            _stem(str(lora.get("file", "")))
            for lora in self.engine_set.manifest.source.get("loras") or []
        )

    def prepare(self, job: EditJob) -> PreparedJob:
        """Check a job against this model, before anything runs.

        Raises:
            UsageError: names what is wrong.
            LadderError: the engine set was not built for the result's size.
        """
        _check_prompts(job.edit)
        self._check_lora(job.lora)
        _check_masks(job)
        edit = prepare_request(self.pipe, self.engine_set, job.edit)
        if job.mask is not None:
            raise UsageError(
                f"{type(self.pipe).__name__} takes no mask; leave it out, or serve an inpainting "
                "pipeline"
            )
        choice = self._choice(job)
        if job.keep_region is not None:
            region = region_from(self.pipe, job.keep_region, edit)
            Denoiser(self.engines, choice.policy, cache=choice.cache, region=region)  # checks
            return PreparedJob(edit=edit, pipe=None, attachment=None, choice=choice, region=region)
        pipe, attachment = self._attached((job.policy, job.cache), choice)
        return PreparedJob(edit=edit, pipe=pipe, attachment=attachment, choice=choice)

    def run(self, prepared: PreparedJob, tell: Callable[[Progress], None]) -> EditResult:
        """Run a job in this thread.

        Args:
            prepared: from `prepare`.
            tell: called after each step; what it raises ends the edit.

        Raises:
            DitrimError: see `run_edit`.
        """
        if prepared.attachment is not None:
            return self._run(prepared.edit, prepared.pipe, prepared.attachment, tell)
        with self._attach(prepared.choice, prepared.region) as attachment:
            return self._run(prepared.edit, attachment.pipe, attachment, tell)

    def _run(
        self,
        edit: EditRequest,
        pipe: Any,
        attachment: Attachment,
        tell: Callable[[Progress], None],
    ) -> EditResult:
        stages = Stages(self.engines.synchronize)

        def on_step(done: int, total: int) -> None:
            steps = attachment.report.steps
            last = steps[-1] if steps else None
            kept = 1.0 if last is None else last.num_kept / max(last.num_reference, 1)
            role = "" if last is None else last.role
            tell(Progress(phase="step", done=done, total=total, role=role, kept=kept))

        start = time.perf_counter()
        with light_copy(pipe, stages) as light:
            image = run_edit(light, edit, on_step)
        seconds = time.perf_counter() - start
        report = attachment.report
        stages.add_report(report)
        return EditResult(
            image=image.convert("RGB"),
            edit=edit,
            model=self.name,
            report=report,
            seconds=seconds,
            queue_seconds=0.0,
            stages=stages.ms,
        )

    def warm_up(self, sizes: Sequence[ResultSize]) -> int:
        """Run every rung of the ladder once at every size, so that no request waits for it.

        Args:
            sizes: of results; none runs the pipeline's own for a square picture.

        Returns:
            how many short edits were run.
        """
        count = 0
        for size in sizes or (None,):
            for rung in self._rungs_at(size):
                self._run_short(size, ToPi(interval=2, min_kept=rung, max_kept=rung))
                count += 1
        return count

    def close(self) -> None:
        """Let go of everything; edits that run finish."""
        with self._lock:
            while self._attachments:
                self._attachments.popitem()[1].detach()

    def _rungs_at(self, size: ResultSize | None) -> list[int]:
        """The rungs that reduced steps can run at, one edit each; finds the reference's length."""
        report = self._run_short(size, ToPi(interval=2))
        longest = report.steps[0].num_reference
        ladder = self.engine_set.manifest.ladder
        return [rung for rung in ladder.rungs if rung <= ladder.rung_for(longest)]

    def _run_short(self, size: ResultSize | None, policy: Policy) -> Any:
        """An anchor and a reduced step."""
        from PIL import Image

        shape = (512, 512) if size is None else (size.width, size.height)
        request = EditRequest(
            images=(Image.new("RGB", shape, "grey"),), prompt="the", steps=2, size=size
        )
        request = prepare_request(self.pipe, self.engine_set, request)
        with attach(copy.copy(self.pipe), self.engines, policy, check_weights=False) as attachment:
            with light_copy(attachment.pipe, Stages(self.engines.synchronize)) as light:
                run_edit(light, request)
            return attachment.report

    def _attached(
        self, key: tuple[str, str | None], choice: PolicyChoice
    ) -> tuple[Any, Attachment]:
        """A copy of a pipeline that is attached with a policy, kept for the next job with it.

        The copy goes on working where the one that is kept is detached.
        """
        with self._lock:
            attachment = self._attachments.get(key)
            if attachment is None:
                attachment = self._attachments[key] = self._attach(choice)
            self._attachments.move_to_end(key)
            while len(self._attachments) > _ATTACHMENTS:
                self._attachments.popitem(last=False)[1].detach()
            return copy.copy(attachment.pipe), attachment

    def _attach(self, choice: PolicyChoice, region: Any = None) -> Attachment:
        return attach(
            copy.copy(self.pipe),
            self.engines,
            choice.policy,
            cache=choice.cache,
            region=region,
            check_weights=False,
        )

    def _choice(self, job: EditJob) -> PolicyChoice:
        choice = policy_from_text(job.policy, engine_set=self.engine_set)
        if job.cache is None:
            return choice
        if choice.cache is not None:
            raise UsageError("the policy names a step cache already; leave cache out")
        from ditrim.runtime.caches.calibration import step_cache_from

        return PolicyChoice(choice.policy, step_cache_from(job.cache, self.engine_set))

    def _check_lora(self, name: str | None) -> None:
        if name is not None and name not in self.loras:
            has = ", ".join(self.loras) or "none"
            raise UsageError(f"the model {self.name} has no LoRA {name!r}; it has: {has}")


def _check_prompts(edit: EditRequest) -> None:
    for name, text in (("prompt", edit.prompt), ("negative prompt", edit.negative_prompt)):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the {name} is not valid UTF-8: {error.reason}") from error
    if not edit.prompt.strip():
        raise UsageError("the prompt is empty: an edit needs an instruction")
    if not edit.images:
        raise UsageError("an edit needs at least one picture")


def _check_masks(job: EditJob) -> None:
    first: Image.Image = job.edit.images[0]
    if job.mask is not None and job.mask.size != first.size:
        raise UsageError(
            f"the mask is {job.mask.width}x{job.mask.height} pixels and the first picture "
            f"{first.width}x{first.height}: both need the same size"
        )


def _stem(file: str) -> str:
    return file.rsplit("/", 1)[-1].removesuffix(".safetensors")
