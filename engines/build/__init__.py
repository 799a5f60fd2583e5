"""From options to an engine set: `build_engine_set(BuildOptions(...))`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

__all__ = ["BuildOptions", "build_engine_set"]

_HOMES = {
    "BuildOptions": "ditrim.engines.build.options",
    "build_engine_set": "ditrim.engines.build.build",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
