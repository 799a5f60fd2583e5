"""A pipeline's scheduler during one call: the same state, its steps reported to a request.

Replaces: methods patched onto a scheduler, which copies of it inherited. Here nothing is written to
the scheduler: a view shares its `__dict__`, is an instance of its class, and lives as long as one
pipeline call. Copies of a view are plain schedulers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import UsageError
from ditrim.runtime.guidance_split import check_exchanged

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.runtime.policy import Policy
    from ditrim.runtime.transformer import OpenRequest


def watch_scheduler(scheduler: Any, opened: OpenRequest) -> Any:
    """A view of a scheduler that reports its timesteps and steps.

    Args:
        scheduler: of diffusers; its class is a plain one with a `__dict__`.
        opened: receives the requests that begin and the steps that end.
    """
    base: Any = type(scheduler)
    kind = _watched_class(base)
    view = object.__new__(kind)
    view.__dict__ = scheduler.__dict__
    view._plain, view._opened = scheduler, opened
    return view


@functools.cache
def _watched_class(base: Any) -> Any:
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        # Every pipeline served here divides them by 1000.
        self._opened.begin((self.timesteps.float() / 1000).tolist())
        return result

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_exchanged(self._opened.given)
        result = base.step(self, *args, **kwargs)
        opened = self._opened
        if not opened.is_in_step:
            return result
        if not opened.transformer.acts_on_steps:
            opened.request.end_step()
            return result
        given = inspect.signature(base.step).bind(self, *args, **kwargs).arguments
        index = self.step_index
        changed = opened.request.end_step(
            given["sample"],
            given["model_output"],
            float(self.sigmas[index - 1]),
            float(self.sigmas[index]),
        )
        return result if changed is None else _with_latents(result, changed)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)  # as `from_config` calls it: a plain one

    members = {
        "__new__": make,
        "__slots__": ("_opened", "_plain"),
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        # Pipelines look at their signatures.
        "set_timesteps": functools.wraps(base.set_timesteps)(set_timesteps),
        "step": functools.wraps(base.step)(step),
        "__copy__": lambda self: copy.copy(self._plain),
        "__deepcopy__": deepcopy,
        "__reduce_ex__": lambda self, protocol: self._plain.__reduce_ex__(protocol),
    }
    return type(base.__name__, (base,), members)


def _with_latents(result: Any, latents: Tensor) -> Any:
    """A scheduler's result, a tuple or an output object, with other latents."""
    if isinstance(result, tuple):
        return (latents.to(result[0].dtype), *result[1:])
    result.prev_sample = latents.to(result.prev_sample.dtype)
    return result


def check_scheduler(scheduler: Any, policy: Policy) -> None:
    """Check that a policy that acts on steps knows a scheduler's: Euler's step of the flow.

    Raises:
        UsageError: the scheduler is of another kind.
    """
    names = [base.__name__ for base in type(scheduler).__mro__]
    is_stochastic = bool(getattr(scheduler.config, "stochastic_sampling", False))
    if "FlowMatchEulerDiscreteScheduler" not in names or is_stochastic:
        raise UsageError(
            f"{type(policy).__name__} acts on the scheduler's steps and works with a "
            "FlowMatchEulerDiscreteScheduler without stochastic_sampling; the pipeline has a "
            f"{names[0]}{' with it' if is_stochastic else ''}"
        )
