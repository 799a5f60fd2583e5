"""Run engine sets: `ditrim.attach`, `ditrim.EditSession`, policies and caches.

The public names are those of `ditrim.runtime`, imported when they are first asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Take a public name from `ditrim.runtime`."""
    import ditrim.runtime

    if name in ditrim.runtime.__all__:
        return getattr(ditrim.runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import ditrim.runtime

    return [*globals(), *ditrim.runtime.__all__]
