"""Run engine sets: policies, sessions, the diffusers drop-in.

`import ditrim.runtime as ditrim` gives the public names; heavy libraries are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.engines.live import torch_engines
    from ditrim.engines.load import load_engines
    from ditrim.runtime.attachment import Attachment, attach, detach
    from ditrim.runtime.caches.calibration import load_tea_cache
    from ditrim.runtime.caches.step_cache import StepCache, TeaCache
    from ditrim.runtime.policies.auto import Auto
    from ditrim.runtime.policies.baselines import RandomDrop, ToMA, ToMeSD
    from ditrim.runtime.policies.importance_merge import ImportanceMerge
    from ditrim.runtime.policies.tokendrop import TokenDrop
    from ditrim.runtime.policies.topi import CoverageToPi, ToPi
    from ditrim.runtime.policy import FullContext, Policy
    from ditrim.runtime.report import RunReport, StepRecord
    from ditrim.runtime.session import EditSession, EditStep, SessionState
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
    "torch_engines",
]

_HOMES = {
    "Attachment": "ditrim.runtime.attachment",
    "Auto": "ditrim.runtime.policies.auto",
    "CoverageToPi": "ditrim.runtime.policies.topi",
    "EditSession": "ditrim.runtime.session",
    "EditStep": "ditrim.runtime.session",
    "EngineTransformer": "ditrim.runtime.transformer",
    "FullContext": "ditrim.runtime.policy",
    "ImportanceMerge": "ditrim.runtime.policies.importance_merge",
    "Policy": "ditrim.runtime.policy",
    "RandomDrop": "ditrim.runtime.policies.baselines",
    "RunReport": "ditrim.runtime.report",
    "SessionState": "ditrim.runtime.session",
    "StepRecord": "ditrim.runtime.report",
    "StepCache": "ditrim.runtime.caches.step_cache",
    "TeaCache": "ditrim.runtime.caches.step_cache",
    "ToMA": "ditrim.runtime.policies.baselines",
    "ToMeSD": "ditrim.runtime.policies.baselines",
    "ToPi": "ditrim.runtime.policies.topi",
    "TokenDrop": "ditrim.runtime.policies.tokendrop",
    "attach": "ditrim.runtime.attachment",
    "detach": "ditrim.runtime.attachment",
    "load_engines": "ditrim.engines.load",
    "load_tea_cache": "ditrim.runtime.caches.calibration",
    "torch_engines": "ditrim.engines.live",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
