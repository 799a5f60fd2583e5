"""Reads a profile's file, and refuses what no later step could work with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

from ditrim.engines.cost.cost import Peak
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.parameters import check_sizes
from ditrim.engines.json_file import (
    NotEmpty,
    NotNegative,
    Positive,
    Whole,
    check_header,
    parse_json,
    read_file,
    value_from,
)
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import UsageError
from ditrim.plugins.precision import PRECISIONS
from ditrim.runtime.profiling.profile import (
    FORMAT,
    GRAPH_PARTS,
    VERSION,
    Profile,
    Row,
)

_MOST_LAYERS = 1000


# What later steps take from the parts of a profile that are plain mappings.
@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    model: str
    architecture: str
    config: dict[str, Any]
    front_depth: Whole
    num_layers: Whole
    num_scored: Whole
    precision: str
    backend: str
    backend_version: str
    identity: str
    rungs: list[Any]
    granularity: Whole
    limits: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    name: str
    device: str
    cores: Whole
    threads: Whole
    timer: str
    memory: str
    clocks: dict[str, Any]
    load: dict[str, NotNegative | None]
    versions: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    repeats: Whole
    warmup: Whole
    resolutions: dict[str, Any]
    max_noise: Positive
    tau: NotNegative


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    engine: _Engine
    machine: _Machine
    settings: _Settings
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    peak: Peak
    rows: Annotated[tuple[Row, ...], NotEmpty]


def load_profile(path: str | os.PathLike[str], option: str = "--profile") -> Profile:
    """Read a profile's file.

    Raises:
        UsageError: it is not there, truncated, no profile, or of another version.
    """
    remedy = "give a profile.json of profile-latency, or measure again"
    return read_file(path, _profile_from, what=option, remedy=remedy)


def _profile_from(text: str) -> Profile:
    content = parse_json(text)
    check_header(content, "profile of profile-latency", {"format": FORMAT, "version": VERSION})
    parts = value_from(_Parts, content, extra="ignore")
    figures = {key: content[key] for key in ("peak", "rows") if key in content}
    measured = value_from(_Figures, figures)
    profile = Profile(
        engine=content["engine"],
        machine=content["machine"],
        peak=measured.peak,
        settings=content["settings"],
        created=parts.created,
        rows=measured.rows,
    )
    for name, known in (("architecture", ARCHITECTURES), ("precision", PRECISIONS)):
        if (value := content["engine"][name]) not in known:
            raise UsageError(f"key 'engine.{name}' is {value!r}; it must be {' or '.join(known)}")
    try:
        check_sizes(parts.engine.config, parts.engine.architecture)
    except ValueError as error:
        raise UsageError(f"key 'engine.config': {error}") from None
    _check_complete(profile)
    return profile


def _check_complete(profile: Profile) -> None:
    """Check that a profile holds what every later step needs."""
    engine, repeats = profile.engine, profile.settings["repeats"]
    keys = set()
    for row in profile.rows:
        if row.key in keys:
            raise UsageError(f"the row {row.key} is there twice")
        keys.add(row.key)
        if len(row.samples_ms) != repeats:
            raise UsageError(
                f"the row {row.key} has {len(row.samples_ms)} samples of {repeats} rounds"
            )
    if not 0 < engine["front_depth"] < engine["num_layers"] <= _MOST_LAYERS:
        raise UsageError(f"engine.front_depth is {engine['front_depth']} of {engine['num_layers']}")
    if engine["num_scored"] > engine["num_layers"] - engine["front_depth"]:
        raise UsageError(
            f"engine.num_scored is {engine['num_scored']}, more than the layers of BACK"
        )
    if not profile.geometries:
        raise UsageError("it has no rows of the engine set")
    for geometry in profile.geometries:
        _check_geometry(profile, geometry)
    size = CallSize(num_noisy=1, num_reference=1, num_text=1)
    model = profile.model_cost
    for cost in (model.front(size), model.back(size, num_rows=1)):
        if min(cost.flops, cost.num_bytes) < 1:
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
