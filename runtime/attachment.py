"""Put an engine set into a diffusers pipeline, and take it out again."""

from __future__ import annotations

import functools
import inspect
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ditrim.engines.load import load_engines
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policy import Policy
from ditrim.runtime.report import RunReport
from ditrim.runtime.step_cache import Cache
from ditrim.runtime.topi import ToPi
from ditrim.runtime.transformer import EngineTransformer

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.engines.backend import Engines
    from ditrim.engines.engine_set import EngineSet

# Configuration that may differ between two checkpoints of the same transformer.
_IRRELEVANT = {"pooled_projection_dim"}
_PIPELINES = {"QwenImageEditPipeline", "QwenImageEditPlusPipeline", "FluxKontextPipeline"}


class Attachment:
    """An engine set at work in a pipeline; leaving the `with` block takes it out again."""

    def __init__(self, pipe: Any, transformer: EngineTransformer) -> None:
        self.pipe = pipe
        self.transformer = transformer
        self._original = pipe.transformer
        self._original_entry = pipe.config.get("transformer")
        self._scheduler = pipe.scheduler
        self._is_attached = True
        pipe.transformer = transformer
        # diffusers would write a pipeline without a transformer, and only warn.
        self._can_save = hasattr(pipe, "save_pretrained")
        if self._can_save:
            pipe.save_pretrained = _refuse_to_save
        _watch(self._scheduler, transformer)

    @property
    def report(self) -> RunReport:
        """What the current or last request did."""
        return self.transformer.report

    def detach(self) -> None:
        """Restore the pipeline exactly; a second call does nothing."""
        if not self._is_attached:
            return
        self._is_attached = False
        self.pipe.transformer = self._original
        if self._can_save:
            del self.pipe.save_pretrained
        if self._original_entry is not None:
            self.pipe.register_to_config(transformer=self._original_entry)
        _unwatch(self._scheduler, self.transformer)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise UsageError(
        "an engine set stands in for this pipeline's transformer and cannot be saved with it; "
        "detach it first (leave the `with` block, or call detach())"
    )


# Every pipeline sets the timesteps once a request and steps once a step: there a new request and
# the end of a step are noticed.
_WATCHED = ("set_timesteps", "step")


def _watch(scheduler: Any, transformer: EngineTransformer) -> None:
    """Let a transformer notice what a scheduler does; pipelines may share the scheduler."""
    watchers = getattr(scheduler.__dict__.get("set_timesteps"), "watchers", None)
    if watchers is not None:
        watchers.append(transformer)
        return
    watchers = [transformer]
    for name in _WATCHED:
        setattr(scheduler, name, _watched(scheduler, name, watchers))


def _watched(scheduler: Any, name: str, watchers: list[EngineTransformer]) -> Any:
    method = getattr(scheduler, name)

    @functools.wraps(method)  # pipelines look at its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        # Every pipeline served here divides them by 1000.
        times = (scheduler.timesteps.float() / 1000).tolist()
        for transformer in watchers:
            transformer.start_request()
            transformer.expect_times(times)
        return result

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        for transformer in watchers:
            if transformer.acts_on_steps and transformer.is_in_step:
                given = inspect.signature(method).bind(*args, **kwargs).arguments
                index = scheduler.step_index
                changed = transformer.finish_step(
                    given["sample"],
                    given["model_output"],
                    float(scheduler.sigmas[index - 1]),
                    float(scheduler.sigmas[index]),
                )
                if changed is not None:
                    result = _with_latents(result, changed)
            transformer.end_step()
        return result

    call = set_timesteps if name == "set_timesteps" else step
    call.watchers = watchers  # type: ignore[attr-defined]
    return call


def _with_latents(result: Any, latents: Tensor) -> Any:
    """A scheduler's result, a tuple or an output object, with other latents."""
    if isinstance(result, tuple):
        return (latents.to(result[0].dtype), *result[1:])
    result.prev_sample = latents.to(result.prev_sample.dtype)
    return result


def _unwatch(scheduler: Any, transformer: EngineTransformer) -> None:
    """Take one transformer off; the last one restores the scheduler's own methods."""
    watchers = scheduler.__dict__["set_timesteps"].watchers
    watchers.remove(transformer)
    if not watchers:
        for name in _WATCHED:
            delattr(scheduler, name)


def attach(
    pipe: Any,
    engines: str | os.PathLike[str] | EngineSet | Engines,
    policy: Policy | None = None,
    *,
    cache: Cache | None = None,
    region: Tensor | None = None,
    device: str = "auto",
    threads: int = 0,
    timing: bool = False,
) -> Attachment:
    """Replace a pipeline's transformer by engines.

    Args:
        pipe: `QwenImageEditPipeline`, `QwenImageEditPlusPipeline`, `FluxKontextPipeline`, the small
            editor's pipeline, or one shaped like them. Its transformer may be None.
        engines: a folder, a loaded `EngineSet`, or what `load_engines` returned (to share).
        policy: defaults to `ToPi()`.
        device, threads: see `load_engines`; used only where `engines` is not loaded yet.
        cache, region, timing: see `Denoiser`.

    Returns:
        an `Attachment`, also a context manager.

    Raises:
        UsageError: the pipeline has another kind of transformer, or one configured differently, or
            a scheduler that the policy cannot work with.
        EngineSetError: see `load_engines`.
    """
    if not hasattr(pipe, "transformer") or not hasattr(pipe, "scheduler"):
        raise UsageError(
            f"{type(pipe).__name__} has no transformer and scheduler: attach takes a diffusers "
            "pipeline"
        )
    if isinstance(pipe.transformer, EngineTransformer):
        raise UsageError("an engine set is attached to this pipeline already; detach it first")
    if any(name in vars(pipe.scheduler) for name in _WATCHED) and not hasattr(
        vars(pipe.scheduler).get("set_timesteps"), "watchers"
    ):
        raise UsageError("the pipeline's scheduler has replaced methods; attach to a plain one")
    loaded: Any = engines
    if not hasattr(engines, "run"):
        loaded = load_engines(engines, device=device, threads=threads)
    _check_pipeline(pipe, loaded)
    if pipe.transformer is not None:
        _check_fit(pipe.transformer, loaded)
    transformer = EngineTransformer(
        loaded,
        policy if policy is not None else ToPi(),
        cache=cache,
        region=region,
        timing=timing,
    )
    if transformer.acts_on_steps:
        _check_scheduler(pipe.scheduler, policy)
    return Attachment(pipe, transformer)


def detach(pipe: Any, attachment: Attachment) -> None:
    """Take an engine set out of a pipeline; the same as `attachment.detach()`.

    Raises:
        UsageError: the attachment belongs to another pipeline.
    """
    if attachment.pipe is not pipe:
        raise UsageError("this attachment belongs to another pipeline")
    attachment.detach()


def _check_pipeline(pipe: Any, engines: Engines) -> None:
    """Models of one configuration but of other pipelines have other weights."""
    expected = engines.engine_set.manifest.pipeline_class
    names = {base.__name__ for base in type(pipe).__mro__}
    if names & _PIPELINES and expected not in names:
        raise UsageError(
            f"the pipeline is a {type(pipe).__name__}, the engine set holds a model for "
            f"{expected}; build one for this pipeline with build-engine --model"
        )


def _check_fit(transformer: Any, engines: Engines) -> None:
    """An engine set of another model must not run in silence."""
    manifest = engines.engine_set.manifest
    names = [base.__name__ for base in type(transformer).__mro__]
    if manifest.transformer_class not in names:
        raise UsageError(
            f"the pipeline's transformer is a {names[0]}, the engine set holds a "
            f"{manifest.transformer_class}"
        )
    for key, built in manifest.transformer_config.items():
        if key.startswith("_") or key in _IRRELEVANT or key not in transformer.config:
            continue
        given = transformer.config[key]
        if _plain(given) != _plain(built):
            raise UsageError(
                f"the pipeline's transformer has {key} = {given!r}, the engine set was built with "
                f"{built!r}; build one from these weights with: "
                f"{engines.engine_set.rebuild_command()}"
            )


def _check_scheduler(scheduler: Any, policy: Policy | None) -> None:
    """A policy that acts on steps knows Euler's step of the flow, and no other."""
    names = [base.__name__ for base in type(scheduler).__mro__]
    is_stochastic = bool(getattr(scheduler.config, "stochastic_sampling", False))
    if "FlowMatchEulerDiscreteScheduler" not in names or is_stochastic:
        raise UsageError(
            f"{type(policy).__name__} acts on the scheduler's steps and works with a "
            "FlowMatchEulerDiscreteScheduler without stochastic_sampling; the pipeline has a "
            f"{names[0]}{' with it' if is_stochastic else ''}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
