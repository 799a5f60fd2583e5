"""Put an engine set into a diffusers pipeline, and take it out again."""

from __future__ import annotations

import copy
import functools
import os
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from ditrim.engines.forking import check_not_forked
from ditrim.engines.load import load_engines
from ditrim.plugins.architectures.transformers import unwrapped
from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.step_cache import Cache
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.fit import check_live, check_pipeline, check_transformer, dtype_of
from ditrim.runtime.guidance_split import GuidanceSplit
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import Policy
from ditrim.runtime.refusals import refuse_method
from ditrim.runtime.report import RunReport
from ditrim.runtime.transformer import EngineTransformer, OpenRequest, engine_transformer
from ditrim.runtime.watched_scheduler import check_scheduler, watch_scheduler

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet


class Attachment:
    """An engine set at work in a pipeline; leaving the `with` block takes it out again."""

    def __init__(self, pipe: Any, transformer: EngineTransformer) -> None:
        self.pipe = pipe
        self.transformer = transformer
        self._original = pipe.transformer
        base: Any = type(pipe)
        self._original_class = base
        engines: Any = transformer.denoiser.engines
        self._held = engines if transformer.is_live else None
        config = getattr(pipe, "config", {})
        self._original_entry = config.get("transformer")
        self._is_attached = True
        if self._held is not None:
            self._held.hold()
        try:
            pipe.__class__ = _attached_class(base)
        except TypeError as error:
            if self._held is not None:
                self._held.release()
            raise UsageError(
                f"{self._original_class.__name__} cannot be attached to: instances of its class "
                f"cannot be changed ({error})"
            ) from error
        if self._held is None:
            pipe.transformer = transformer
        vars(pipe)[_STAND_IN] = transformer

    @property
    def report(self) -> RunReport:
        """Report of this thread's current or last request."""
        return self.transformer.report

    def request(self) -> AbstractContextManager[OpenRequest]:
        """Open a request for a loop of your own over `pipe.transformer` and `pipe.scheduler`.

        A pipeline's call opens its own. Inside the block, `pipe.scheduler` reports its steps to the
        policy, so take the scheduler there.

        Raises:
            UsageError: this thread is inside a request already, as where two generators take turns.
        """
        if self.transformer.opened_request() is not None:
            raise UsageError(
                "this thread is inside a request of this attachment already: end it first, or run "
                "each in a thread of its own"
            )
        if self._is_attached:
            _check_stand_in(self.pipe, self.transformer)
        return self.transformer.open_request()

    def detach(self) -> None:
        """Restore the pipeline exactly; a second call does nothing.

        Copies of the pipeline that were made while attached keep the engines.
        """
        if not self._is_attached:
            return
        self._is_attached = False
        pipe = self.pipe
        vars(pipe).pop(_STAND_IN, None)
        pipe.__class__ = self._original_class
        if self._held is not None:
            self._held.release()
            return
        pipe.transformer = self._original
        if self._original_entry is not None:
            pipe.register_to_config(transformer=self._original_entry)
        # diffusers renews its hooks after each call, and then hooked the stand-in.
        if getattr(pipe, "_all_hooks", None) and hasattr(self.transformer, "_hf_hook"):
            pipe.enable_model_cpu_offload(device=pipe._offload_device)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


# Where an attached pipeline keeps what takes its transformer's calls.
_STAND_IN = "_ditrim_stand_in"


def _stand_in(pipe: Any) -> EngineTransformer | None:
    stand_in = vars(pipe).get(_STAND_IN)
    return stand_in if isinstance(stand_in, EngineTransformer) else None


class _Attached:
    """What an attached pipeline does its own way; the rest is its class's.

    Everything hangs on the instance, so a light copy of the pipeline (`copy.copy`) with a scheduler
    of its own serves another thread.
    """

    @property
    def transformer(self) -> Any:
        """The pipeline's transformer, or what stands in for it.

        Where the engines run the pipeline's own, the stand-in is there inside a request only, so
        that LoRAs, offloading and quantisation are set up on the transformer itself.
        """
        stand_in = _stand_in(self)
        if stand_in is not None and stand_in.is_live and stand_in.opened_request() is not None:
            return stand_in
        return vars(self)["transformer"]

    @transformer.setter
    def transformer(self, value: Any) -> None:
        vars(self)["transformer"] = value

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts, with the transformer itself where the engines run it."""
        parts: dict[str, Any] = super().components  # type: ignore[misc]
        stand_in = _stand_in(self)
        if stand_in is not None and stand_in.is_live:
            parts["transformer"] = vars(self)["transformer"]
        return parts

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler; inside a request, a view of it that reports its steps."""
        plain, stand_in = vars(self)["scheduler"], _stand_in(self)
        if stand_in is None:
            return plain
        request = stand_in.opened_request()
        return plain if request is None else watch_scheduler(plain, request)

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        vars(self)["scheduler"] = value

    def __copy__(self) -> Any:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        vae = vars(self).get("vae")
        # `AutoencoderKLQwenImage` keeps the features of the picture that it is at in itself: two
        # threads in one would mix their pictures. A copy shares the weights. Offloading's hooks
        # know the VAE itself.
        if vae is not None and not hasattr(vae, "_hf_hook"):
            vars(other)["vae"] = copy.copy(vae)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = object.__new__(type(self))
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an engine set is attached to this pipeline, which cannot be pickled: detach it, and "
            "attach the engine set's folder in the other process"
        )


def _saving(plain: Any) -> Any:
    """A method that saves a pipeline whose transformer is its own, and refuses otherwise."""

    @functools.wraps(plain)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in = _stand_in(self)
        if stand_in is not None and not stand_in.is_live:
            raise UsageError(
                "an engine set stands in for this pipeline's transformer and cannot be saved with "
                "it; detach it first (leave the `with` block, or call detach())"
            )
        return plain(self, *args, **kwargs)

    return save


# Methods of a pipeline that say nothing to a transformer without adapters of its own, as an engine
# set's is, and would return as if they had worked.
_OF_ADAPTERS = ("set_adapters", "unfuse_lora", "set_lora_device")
_OF_IP_ADAPTERS = ("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter")


def _adapting(plain: Any, name: str) -> Any:
    """A method about adapters, which an engine set has none of; a text encoder may have some."""

    @functools.wraps(plain)
    def adapt(self: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in = _stand_in(self)
        is_set = stand_in is not None and not stand_in.is_live
        if is_set and (name in _OF_IP_ADAPTERS or not self.get_list_adapters()):
            refuse_method("pipe", name)
        return plain(self, *args, **kwargs)

    return adapt


def _check_stand_in(pipe: Any, stand_in: EngineTransformer) -> None:
    """Check that what stands in for a pipeline's transformer still does."""
    present = vars(pipe)["transformer"]
    if stand_in.is_live:
        live: Any = stand_in.denoiser.engines
        check_live(present, live.transformer)
    elif present is None or unwrapped(present) is not stand_in:
        raise UsageError(
            "the pipeline's transformer was exchanged while an engine set is attached, and would "
            "run in its place: detach first, and attach again"
        )


@functools.cache
def _attached_class(base: Any) -> type[Any]:
    """A pipeline's class whose calls are requests of the engine set that is attached."""

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        transformer = _stand_in(self)
        if transformer is None:
            return base.__call__(self, *args, **kwargs)
        _check_stand_in(self, transformer)
        if transformer.acts_on_steps:
            check_scheduler(vars(self)["scheduler"], transformer.denoiser.policy)
        with transformer.open_request():
            return base.__call__(self, *args, **kwargs)

    members: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__call__": call,
    }
    # diffusers would write a pipeline without a transformer, and only warn.
    members |= {
        name: _saving(getattr(base, name))
        for name in ("save_pretrained", "push_to_hub")
        if hasattr(base, name)
    }
    members |= {
        name: _adapting(getattr(base, name), name)
        for name in (*_OF_ADAPTERS, *_OF_IP_ADAPTERS)
        if hasattr(base, name)
    }
    return type(base.__name__, (_Attached, base), members)


def attach(
    pipe: Any,
    engines: str | os.PathLike[str] | EngineSet | Engines | None = None,
    policy: Policy | None = None,
    *,
    cache: Cache | None = None,
    region: Tensor | None = None,
    device: str = "auto",
    threads: int = 0,
    timing: bool = False,
    check_weights: bool = True,
    guidance_group: Any = None,
) -> Attachment:
    """Let a pipeline's calls run reduced, on its own transformer or on an engine set.

    Args:
        pipe: `QwenImageEditPipeline`, `QwenImageEditPlusPipeline`, `FluxKontextPipeline`, their
            inpainting pipelines, the small editor's pipeline, or one shaped like them. Its
            transformer may be None.
        engines: a folder, a loaded `EngineSet`, or what `load_engines` or `torch_engines` returned
            (to share); none runs the pipeline's own transformer, without a build.
        policy: defaults to `ToPi()`.
        device, threads: see `load_engines`; used only where `engines` is not loaded yet.
        cache, region, timing: see `Denoiser`.
        check_weights: compare samples of every weight of the pipeline's transformer with those that
            the engine set was built from; false attaches whatever they are.
        guidance_group: a process group of two processes that make the same calls: rank 0 runs true
            guidance's "cond" branch, rank 1 "uncond" (see `GuidanceSplit`).

    Returns:
        an `Attachment`, also a context manager.

    Raises:
        UsageError: the pipeline has another kind of transformer, one configured differently, with
            other weights, adapters or caches, or a scheduler that the policy cannot work with.
        EngineSetError: see `load_engines`.
    """
    if not hasattr(pipe, "transformer") or not hasattr(pipe, "scheduler"):
        raise UsageError(
            f"{type(pipe).__name__} has no transformer and scheduler: attach takes a diffusers "
            "pipeline"
        )
    if _stand_in(pipe) is not None:
        raise UsageError("engines are attached to this pipeline already; detach them first")
    loaded = open_engines(pipe, engines, device=device, threads=threads)
    check_pipeline(pipe, loaded.engine_set)
    dtype = None
    if hasattr(loaded, "transformer"):
        check_live(pipe.transformer, loaded.transformer)
    elif pipe.transformer is not None:
        check_transformer(pipe.transformer, loaded.engine_set, check_weights=check_weights)
        dtype = dtype_of(pipe.transformer)
    denoiser = Denoiser(
        loaded,
        policy if policy is not None else ToPi(),
        cache=cache,
        region=region,
        timing=timing,
    )
    if denoiser.acts_on_steps:
        check_scheduler(pipe.scheduler, denoiser.policy)
    transformer = engine_transformer(denoiser, dtype)
    if guidance_group is not None:
        transformer.split = GuidanceSplit(guidance_group, denoiser)
    return Attachment(pipe, transformer)


def open_engines(pipe: Any, engines: Any, *, device: str = "auto", threads: int = 0) -> Any:
    """Engines from whatever names them; those of the pipeline's own transformer for none.

    Raises:
        UsageError: a policy stands where engines do.
        BackendError: this process was forked from one that had run engines.
    """
    check_not_forked()
    if hasattr(engines, "begin"):
        raise UsageError(
            f"the second argument of attach is {type(engines).__name__}, a policy: name it, as "
            "attach(pipe, policy=...)"
        )
    if engines is None:
        from ditrim.engines.live import torch_engines

        return torch_engines(pipe)
    if hasattr(engines, "run"):
        return engines
    return load_engines(engines, device=device, threads=threads)


def detach(pipe: Any, attachment: Attachment) -> None:
    """Take an engine set out of a pipeline; the same as `attachment.detach()`.

    Raises:
        UsageError: the attachment belongs to another pipeline.
    """
    if attachment.pipe is not pipe:
        raise UsageError("this attachment belongs to another pipeline")
    attachment.detach()
