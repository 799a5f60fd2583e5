"""Reads a profile's file, and refuses what no later step could work with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ditrim.engines.cost.cost import Peak
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.parameters import check_sizes
from ditrim.plugins.errors import UsageError
from ditrim.runtime.profiling.profile import (
    FORMAT,
    GRAPH_PARTS,
    VERSION,
    Profile,
    Row,
    is_count,
    is_positive,
)

_MOST_BYTES = 256 << 20
_MOST_LAYERS = 1000
_ENGINE_TYPES: dict[str, type] = {
    "model": str,
    "architecture": str,
    "config": dict,
    "front_depth": int,
    "num_layers": int,
    "num_scored": int,
    "precision": str,
    "backend": str,
    "backend_version": str,
    "identity": str,
    "rungs": list,
    "granularity": int,
    "limits": dict,
}
_MACHINE_TYPES: dict[str, type] = {
    "name": str,
    "device": str,
    "cores": int,
    "threads": int,
    "timer": str,
    "memory": str,
    "clocks": dict,
    "load": dict,
    "versions": dict,
}


def parse_json(text: str) -> Any:
    """Read JSON, without the NaN and Infinity that Python adds to it.

    Raises:
        ValueError: it is none; RecursionError: it is nested too deep.
    """

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is no number")
        return value

    return json.loads(text, parse_constant=finite, parse_float=finite)


def load_profile(path: str | os.PathLike[str], option: str = "--profile") -> Profile:
    """Read a profile's file.

    Raises:
        UsageError: it is not there, truncated, no profile, or of another version.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{option} {path} is larger than any profile ({_MOST_BYTES} bytes)")
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path} is no text: give a profile.json") from None
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{option} {path} is truncated or no JSON ({error}); measure again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{option} {path} is no profile of profile-latency")
    if content.get("version") != VERSION:
        raise UsageError(
            f"{option} {path} is a profile of version {content.get('version')!r}, this program "
            f"reads version {VERSION}; measure again"
        )
    try:
        return _profile_from(content)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{option} {path} is damaged: {missing}; measure again") from None


def _profile_from(content: Mapping[str, Any]) -> Profile:
    engine, machine, settings, peak = (
        _mapping(content[name], name) for name in ("engine", "machine", "settings", "peak")
    )
    _check_types("engine", engine, _ENGINE_TYPES)
    _check_types("machine", machine, _MACHINE_TYPES)
    _check_types("settings", settings, {"repeats": int, "warmup": int, "resolutions": dict})
    for name in ("max_noise", "tau"):
        if not (is_positive(settings[name]) or (name == "tau" and settings[name] == 0)):
            raise UsageError(f"settings.{name} is {settings[name]!r}")
    for name in ("tflops", "gb_s"):
        if peak[name] is not None and not is_positive(peak[name]):
            raise UsageError(f"peak.{name} is {peak[name]!r}")
    _check_types("peak", peak, {"source": str})
    for load in machine["load"].values():
        if load is not None and not (is_positive(load) or load == 0):
            raise UsageError(f"machine.load is {machine['load']!r}")
    if not isinstance(content["created"], str):
        raise UsageError(f"created is {content['created']!r}")
    profile = Profile(
        engine=engine,
        machine=machine,
        peak=Peak(**peak),
        settings=settings,
        created=content["created"],
        rows=_rows_from(content["rows"]),
    )
    _check_complete(profile)
    return profile


def _rows_from(entries: object) -> tuple[Row, ...]:
    if not isinstance(entries, list):
        raise UsageError(f"rows is {entries!r:.80}")
    allowed = {item.name for item in fields(Row)}
    rows: dict[object, Row] = {}
    for entry in entries:
        unknown = set(_mapping(entry, "a row")) - allowed
        if unknown:
            raise UsageError(f"a row has the unknown key {min(unknown)!r}")
        samples = {name: tuple(entry[name]) for name in ("samples_ms", "warmup_ms")}
        row = Row(**{**entry, **samples})
        if row.key in rows:
            raise UsageError(f"the row {row.key} is there twice")
        rows[row.key] = row
    if not rows:
        raise UsageError("it has no rows")
    return tuple(rows.values())


def _check_complete(profile: Profile) -> None:
    """What every later step needs."""
    engine, repeats = profile.engine, profile.settings["repeats"]
    for row in profile.rows:
        if len(row.samples_ms) != repeats:
            raise UsageError(
                f"the row {row.key} has {len(row.samples_ms)} samples of {repeats} rounds"
            )
    if not 0 < engine["front_depth"] < engine["num_layers"] <= _MOST_LAYERS:
        raise UsageError(f"engine.front_depth is {engine['front_depth']} of {engine['num_layers']}")
    try:
        check_sizes(engine["config"], engine["architecture"])
    except ValueError as error:
        raise UsageError(f"engine.config.{error}") from None
    if not profile.geometries:
        raise UsageError("it has no rows of the engine set")
    for geometry in profile.geometries:
        _check_geometry(profile, geometry)
    size = CallSize(num_noisy=1, num_reference=1, num_text=1)
    model = profile.model_cost
    for cost in (model.front(size), model.back(size, num_rows=1)):
        if not all(is_count(value) and value for value in (cost.flops, cost.num_bytes)):
            raise UsageError("engine.config is no transformer's")


def _check_geometry(profile: Profile, geometry: tuple[int, int, int, int]) -> None:
    rows = [row for row in profile.rows if row.geometry == geometry]
    if min(*geometry, *(row.num_kept for row in rows)) < 1:
        raise UsageError(f"a row of the size {geometry} has no tokens")
    for part in GRAPH_PARTS:
        if profile.find(part, geometry) is None:
            raise UsageError(f"{part} of the size {geometry} is missing")
    if profile.find("back", geometry, geometry[3]) is None:
        raise UsageError(f"back over all references of the size {geometry} is missing")


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{name} is {value!r:.80}")
    return value


def _check_types(name: str, content: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for key, kind in types.items():
        value = content[key]
        is_wrong = not isinstance(value, kind) or isinstance(value, bool)
        if is_wrong or (kind is int and value < 0):
            raise UsageError(f"{name}.{key} is {value!r:.80}")
