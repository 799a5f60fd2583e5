"""Where an engine set may be put: a place that holds files, and a folder that may be replaced."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ditrim.engines.sets.engine_set import read_manifest
from ditrim.engines.sets.manifest import MANIFEST_NAME
from ditrim.engines.sets.profiles import PLAN_ROLES
from ditrim.engines.sets.staging import longest_affix
from ditrim.plugins.errors import EngineSetError, UsageError

logger = logging.getLogger(__name__)

# What a set can hold besides what its manifest lists, when the manifest is damaged.
_KNOWN_NAMES = {
    MANIFEST_NAME,
    *(f"{role}.{ending}" for role in PLAN_ROLES for ending in ("onnx", "safetensors", "plan")),
}
# These hold no files that a person made.
_NO_PLACES = ("/proc", "/sys")


def check_place(target: Path) -> None:
    """Check that a folder of this name can be at this place at all.

    Raises:
        UsageError: the path is too long, or no files can be there.
    """
    if any(target.is_relative_to(place) for place in _NO_PLACES):
        raise UsageError(
            f"--output {target} is in a part of the system that holds no files; give a folder on "
            "a disk"
        )
    there = next(path for path in target.parents if _exists(path))
    most = os.pathconf(there, "PC_NAME_MAX") - longest_affix(target)
    for part in target.relative_to(there).parts:
        if len(os.fsencode(part)) > most:
            raise UsageError(
                f"--output: the name {part[:24]}... has {len(os.fsencode(part))} bytes; names of "
                f"up to {most} are possible there, so that the folder of a build fits beside it. "
                "Give a shorter one"
            )
    if len(os.fsencode(target)) > os.pathconf(there, "PC_PATH_MAX") - 2 * longest_affix(target):
        raise UsageError(
            f"--output: a path of {len(os.fsencode(target))} bytes is too long for this system; "
            "give a shorter one"
        )


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def check_replaceable(target: Path) -> None:
    """Check that a folder may be replaced: it is empty, or holds an engine set and nothing else.

    Raises:
        UsageError: names what is there.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UsageError(f"--output {target} is a file; give a folder")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    if MANIFEST_NAME not in names:
        raise UsageError(
            f"--output {target} exists and is not an engine set: it has no {MANIFEST_NAME}. It is "
            "never overwritten; choose another folder"
        )
    known = set(_KNOWN_NAMES)
    try:
        known |= {entry.path for entry in read_manifest(target).files}
    except EngineSetError as error:
        logger.info("%s", error)
    others = sorted(names - known)
    if others:
        raise UsageError(
            f"--output {target} holds files that are not part of an engine set "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), which replacing it "
            "would delete; move them away or choose another folder"
        )
