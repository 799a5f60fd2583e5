"""Run engine sets: policies, sessions, the diffusers drop-in.

`import ditrim.runtime as ditrim` gives the public names; heavy libraries are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.engines.load import load_engines
    from ditrim.runtime.attachment import Attachment, attach, detach
    from ditrim.runtime.policy import FullContext, Policy, RandomDrop, ToPi
    from ditrim.runtime.report import RunReport, StepRecord
    from ditrim.runtime.session import EditSession, EditStep, SessionState
    from ditrim.runtime.transformer import EngineTransformer

__all__ = [
    "Attachment",
    "EditSession",
    "EditStep",
    "EngineTransformer",
    "FullContext",
    "Policy",
    "RandomDrop",
    "RunReport",
    "SessionState",
    "StepRecord",
    "ToPi",
    "attach",
    "detach",
    "load_engines",
]

_HOMES = {
    "Attachment": "ditrim.runtime.attachment",
    "EditSession": "ditrim.runtime.session",
    "EditStep": "ditrim.runtime.session",
    "EngineTransformer": "ditrim.runtime.transformer",
    "FullContext": "ditrim.runtime.policy",
    "Policy": "ditrim.runtime.policy",
    "RandomDrop": "ditrim.runtime.policy",
    "RunReport": "ditrim.runtime.report",
    "SessionState": "ditrim.runtime.session",
    "StepRecord": "ditrim.runtime.report",
    "ToPi": "ditrim.runtime.policy",
    "attach": "ditrim.runtime.attachment",
    "detach": "ditrim.runtime.attachment",
    "load_engines": "ditrim.engines.load",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
