"""Files: written beside their target and moved there, and how large they are."""

from __future__ import annotations

import os
from pathlib import Path

from ditrim.plugins.errors import DitrimError


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its target, then move it there.

    Raises:
        DitrimError: it cannot be written; what stood at `path` stays.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name[:64]}.{os.getpid()}.partial")
    try:
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise DitrimError(f"{path} could not be written: {error.strerror}") from error


def format_bytes(num_bytes: float) -> str:
    """A size that a person can read, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
