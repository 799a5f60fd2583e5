"""What a part is told, and where it writes what it finds: line by line, so that nothing is lost."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

NO_GPU = "no CUDA device"
_DIFFUSERS = "diffusers is not installed: carry its wheel to this machine, or pip install diffusers"
# What a part leaves of its time, to write its last line.
_MARGIN_SECONDS = 3.0


class CannotRunError(Exception):
    """A part that cannot run here; it says why."""


class Record:
    """A file of JSON lines; each is written out at once."""

    def __init__(self, file: TextIO) -> None:
        """Write into an open file."""
        self._file = file

    def note(self, *place: str, **values: Any) -> None:
        """Write what was measured, at a place in the part's document."""
        for key in reversed(place):
            values = {key: values}
        self._write({"measured": values})

    def check(self, name: str, held: Any) -> None:
        """Write whether a check held; anything but True is a failure."""
        self._write({"checks": {name: held}})

    def end(self, status: str, reason: str | None = None) -> None:
        """Write the last line."""
        self._write({"end": status, "reason": reason})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a part is told.

    Attributes:
        folder: for what it builds.
        record: where it writes.
        is_quick: measure less.
        is_rehearsal: on the CPU and at toy size; times mean nothing.
        seconds: that it has, from when this was made.
    """

    folder: Path
    record: Record
    is_quick: bool = False
    is_rehearsal: bool = False
    seconds: float = 600.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def left(self) -> float:
        """Seconds that it still has."""
        return self._start + self.seconds - _MARGIN_SECONDS - time.monotonic()

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; where they are not, it says what was left out."""
        if self.left > seconds:
            return True
        self.record.note("left_out", **{what: f"{max(self.left, 0):.0f} s were left"})
        return False


Part = Callable[[Context], None]


def need(*modules: str) -> None:
    """Skip a part whose modules are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if "diffusers" in missing:
        raise CannotRunError(_DIFFUSERS)
    if missing:
        raise CannotRunError(f"not installed: {', '.join(missing)}")


def need_gpu(context: Context) -> Any:
    """Import torch, and see that there is a GPU unless this is a rehearsal."""
    need("torch")
    import torch

    if not context.is_rehearsal and not torch.cuda.is_available():
        raise CannotRunError(NO_GPU)
    return torch


def run_part(part: Part, context: Context) -> None:
    """Run a part and write how it ended."""
    try:
        part(context)
    except CannotRunError as skip:
        context.record.end("skipped", str(skip))
    except Exception as error:
        context.record.end("failed", f"{type(error).__name__}: {error}")
    else:
        context.record.end("done")


def outcome_of(lines: Iterable[str], otherwise: str) -> dict[str, Any]:
    """Say what a part came to: "ok" only where it made checks, all of them held, and it ended.

    Args:
        lines: that it wrote; a last one that was cut off is left out.
        otherwise: why it failed, if it did not write its end.
    """
    document: dict[str, Any] = {"measured": {}, "checks": {}, "end": "failed", "reason": otherwise}
    for line in lines:
        try:
            _merge(document, json.loads(line))
        except json.JSONDecodeError:
            break
    checks, reason = document["checks"], document["reason"]
    broken = [name for name in checks if checks[name] is not True]
    if document["end"] == "skipped":
        return {"status": "skipped", "reason": reason}
    if document["end"] == "done":
        reason = None if checks else "it made no check"
    if broken:
        reason = "; ".join(filter(None, (reason, f"did not hold: {', '.join(broken)}")))
    outcome = {"status": "ok"} if reason is None else {"status": "failed", "reason": reason}
    return outcome | {key: document[key] for key in ("checks", "measured") if document[key]}


def _merge(document: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value
