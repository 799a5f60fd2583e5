"""Run engine sets: policies, sessions, the diffusers drop-in.

`import ditrim.runtime as ditrim` gives the public names; heavy libraries are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.engines.load import load_engines
    from ditrim.runtime.attachment import Attachment, attach, detach
    from ditrim.runtime.auto import Auto
    from ditrim.runtime.baselines import RandomDrop, ToMA, ToMeSD
    from ditrim.runtime.cache_calibration import load_tea_cache
    from ditrim.runtime.importance_merge import ImportanceMerge
    from ditrim.runtime.policy import FullContext, Policy
    from ditrim.runtime.report import RunReport, StepRecord
    from ditrim.runtime.session import EditSession, EditStep, SessionState
    from ditrim.runtime.step_cache import StepCache, TeaCache
    from ditrim.runtime.tokendrop import TokenDrop
    from ditrim.runtime.topi import CoverageToPi, ToPi
    from ditrim.runtime.transformer import EngineTransformer

__all__ = [
    "Attachment",
    "Auto",
    "CoverageToPi",
    "EditSession",
    "EditStep",
    "EngineTransformer",
    "FullContext",
    "ImportanceMerge",
    "Policy",
    "RandomDrop",
    "RunReport",
    "SessionState",
    "StepCache",
    "StepRecord",
    "TeaCache",
    "ToMA",
    "ToMeSD",
    "ToPi",
    "TokenDrop",
    "attach",
    "detach",
    "load_engines",
    "load_tea_cache",
]

_HOMES = {
    "Attachment": "ditrim.runtime.attachment",
    "Auto": "ditrim.runtime.auto",
    "CoverageToPi": "ditrim.runtime.topi",
    "EditSession": "ditrim.runtime.session",
    "EditStep": "ditrim.runtime.session",
    "EngineTransformer": "ditrim.runtime.transformer",
    "FullContext": "ditrim.runtime.policy",
    "ImportanceMerge": "ditrim.runtime.importance_merge",
    "Policy": "ditrim.runtime.policy",
    "RandomDrop": "ditrim.runtime.baselines",
    "RunReport": "ditrim.runtime.report",
    "SessionState": "ditrim.runtime.session",
    "StepRecord": "ditrim.runtime.report",
    "StepCache": "ditrim.runtime.step_cache",
    "TeaCache": "ditrim.runtime.step_cache",
    "ToMA": "ditrim.runtime.baselines",
    "ToMeSD": "ditrim.runtime.baselines",
    "ToPi": "ditrim.runtime.topi",
    "TokenDrop": "ditrim.runtime.tokendrop",
    "attach": "ditrim.runtime.attachment",
    "detach": "ditrim.runtime.attachment",
    "load_engines": "ditrim.engines.load",
    "load_tea_cache": "ditrim.runtime.cache_calibration",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
