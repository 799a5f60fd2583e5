"""Run edits in a service: a bounded queue, workers, cancellation, deadlines, metrics.

Public names are imported when they are first asked for, so that `import` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.runtime.editing.opening import ModelSource
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.service.errors import (
        Cancelled,
        DeadlineExceeded,
        DeviceFailed,
        QueueFull,
        ServiceError,
        Unavailable,
        UnknownModel,
    )
    from ditrim.runtime.service.job import EditHandle, EditJob, EditResult, Progress
    from ditrim.runtime.service.metrics import ServiceMetrics
    from ditrim.runtime.service.service import EditService, ServiceOptions

__all__ = [
    "Cancelled",
    "DeadlineExceeded",
    "DeviceFailed",
    "EditHandle",
    "EditJob",
    "EditRequest",
    "EditResult",
    "EditService",
    "ModelSource",
    "Progress",
    "QueueFull",
    "ServiceError",
    "ServiceMetrics",
    "ServiceOptions",
    "Unavailable",
    "UnknownModel",
]

_SERVICE = "ditrim.runtime.service"
_HOMES = {
    "Cancelled": f"{_SERVICE}.errors",
    "DeadlineExceeded": f"{_SERVICE}.errors",
    "DeviceFailed": f"{_SERVICE}.errors",
    "EditHandle": f"{_SERVICE}.job",
    "EditJob": f"{_SERVICE}.job",
    "EditRequest": "ditrim.runtime.editing.pipelines",
    "EditResult": f"{_SERVICE}.job",
    "EditService": f"{_SERVICE}.service",
    "ModelSource": "ditrim.runtime.editing.opening",
    "Progress": f"{_SERVICE}.job",
    "QueueFull": f"{_SERVICE}.errors",
    "ServiceError": f"{_SERVICE}.errors",
    "ServiceMetrics": f"{_SERVICE}.metrics",
    "ServiceOptions": f"{_SERVICE}.service",
    "Unavailable": f"{_SERVICE}.errors",
    "UnknownModel": f"{_SERVICE}.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
