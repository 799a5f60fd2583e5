"""Where an edit's time goes, around its transformer and inside it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.runtime.report import RunReport

_OF_RECORDS = ("front", "back", "select", "gather", "other")


class Stages:
    """Milliseconds by stage of one edit."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """Take what waits for the device."""
        self.ms: dict[str, float] = {}
        self._synchronize = synchronize

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts to a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self._synchronize()
            self.ms[stage] = self.ms.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
            return result

        return run

    def add_report(self, report: RunReport) -> None:
        """Add what the transformer's calls took."""
        for record in report.steps:
            for stage in _OF_RECORDS:
                spent = getattr(record, f"{stage}_ms")
                self.ms[stage] = self.ms.get(stage, 0.0) + spent


@contextmanager
def light_copy(pipe: Any, stages: Stages) -> Iterator[Any]:
    """A copy of an attached pipeline that shares its weights and nothing that a call writes to.

    Args:
        pipe: attached; shared by threads.
        stages: told how long text and VAE take.
    """
    light = copy.copy(pipe)
    parts = vars(light)
    parts["scheduler"] = copy.deepcopy(parts["scheduler"])
    parts["encode_prompt"] = stages.timed("text", light.encode_prompt)
    vae = parts["vae"]  # the copy's own, but with the hooks of offloading
    if not hasattr(vae, "_hf_hook"):
        for name in ("encode", "decode"):
            vars(vae)[name] = stages.timed(f"vae_{name}", getattr(vae, name))
    try:
        yield light
    finally:  # they hold methods of their own: nothing is left for the garbage collector
        parts.clear()
        if not hasattr(vae, "_hf_hook"):
            for name in ("encode", "decode"):
                vars(vae).pop(name, None)
