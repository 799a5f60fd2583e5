"""What `calibrate-cache` measures, fits and writes: the polynomial of a `TeaCache`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ditrim.engines.json_file import Count, Whole, check_header, parse_json, read_file, value_from
from ditrim.engines.sets.manifest import digest_of
from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.step_cache import (
    CacheMemory,
    FrontView,
    StepCache,
    TeaCache,
    relative_changes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.engines.sets.manifest import Manifest

FORMAT_VERSION = 1
_KIND = "ditrim step-cache calibration"
_SEAL = "sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePoint:
    """One step of a run.

    Attributes:
        step: of the guidance branch, from 1: the first one has none before it.
        front: relative change of FRONT's output since the step before.
        velocity: that of the velocity.
    """

    step: int
    front: float
    velocity: float


@dataclass(slots=True, eq=False)
class ChangeRecorder:
    """A cache that reuses nothing and notes how much each step changes.

    Attributes:
        tokens: whose change is noted, see `TeaCache`.
        points: an entry a step, batch entry and branch.
    """

    tokens: Literal["noisy", "joint"] = "noisy"
    points: list[ChangePoint] = field(default_factory=list)

    def look(self, memory: CacheMemory, front: FrontView) -> tuple[bool, CacheMemory]:
        return False, memory

    def remember(
        self, memory: CacheMemory | None, front: FrontView, velocity: Tensor
    ) -> CacheMemory:
        if self.tokens == "noisy":
            front = replace(front, reference=None)
        step = 0
        if memory is not None:
            step = memory.reuses + 1
            changes = relative_changes(front, memory.front)
            effects = relative_changes(FrontView(noisy=velocity), FrontView(noisy=memory.velocity))
            self.points += [
                ChangePoint(step=step, front=change, velocity=effect)
                for change, effect in zip(changes, effects, strict=True)
            ]
        return CacheMemory(front=front, velocity=velocity, reuses=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A polynomial through the points.

    Attributes:
        coefficients: highest power first.
        measured: least and largest change of FRONT's output.
        rms_error, max_error: of the predicted change of the velocity.
        r_squared: share of its variance that the polynomial explains.
    """

    coefficients: tuple[float, ...]
    measured: tuple[float, float]
    rms_error: float
    max_error: float
    r_squared: float


def check_enough(num_points: int, degree: int) -> None:
    """Raise `UsageError` where a polynomial would pass through all points, whatever they are."""
    if num_points < degree + 2:
        raise UsageError(
            f"{num_points} different points cannot tell how well a polynomial of degree {degree} "
            f"fits; it needs at least {degree + 2}: measure more samples or steps, or lower "
            "--degree"
        )


def fit_polynomial(points: Sequence[ChangePoint], degree: int = 4) -> Fit:
    """Least squares: from the change of FRONT's output to that of the velocity.

    Raises:
        UsageError: too few points, or too few that differ, or values that are not finite.
    """
    changes = np.array([point.front for point in points], dtype=np.float64)
    effects = np.array([point.velocity for point in points], dtype=np.float64)
    if not np.isfinite(changes).all() or not np.isfinite(effects).all():
        raise UsageError("a run's changes are not finite: its velocities hold NaN or overflow")
    check_enough(len(np.unique(changes)), degree)
    with warnings.catch_warnings():
        warnings.simplefilter("error", np.exceptions.RankWarning)
        try:
            coefficients = np.polyfit(changes, effects, degree)
        except np.exceptions.RankWarning as error:
            raise UsageError(
                f"the points lie too close for a polynomial of degree {degree}; lower --degree, "
                "or measure more samples"
            ) from error
    errors = effects - np.polyval(coefficients, changes)
    spread = float(((effects - effects.mean()) ** 2).sum())
    return Fit(
        coefficients=tuple(float(value) for value in coefficients),
        measured=(float(changes.min()), float(changes.max())),
        rms_error=float(np.sqrt((errors**2).mean())),
        max_error=float(np.abs(errors).max()),
        r_squared=1.0 - float((errors**2).sum()) / spread if spread > 0 else 1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCalibration:
    """Result of a calibration.

    Attributes:
        model: the engine set's.
        front_depth: K; another K has another FRONT.
        weights: see `weights_digest`.
        engine_identity: of the engine set that was measured.
        precision: of that set.
        tokens: whose change was measured.
        num_steps: denoising steps a run.
        num_samples: runs.
        seed: of samples and noise.
        points: what was measured.
        fit: the polynomial.
    """

    model: str
    front_depth: Whole
    weights: str
    engine_identity: str
    precision: str
    tokens: Literal["noisy", "joint"]
    num_steps: Count
    num_samples: Count
    seed: Whole
    points: tuple[ChangePoint, ...]
    fit: Fit

    def cache(self, threshold: float, max_reuses: int | None = None) -> TeaCache:
        """A `TeaCache` of this polynomial."""
        return TeaCache(
            threshold=threshold,
            coefficients=self.fit.coefficients,
            max_reuses=max_reuses,
            tokens=self.tokens,
            measured=self.fit.measured,
        )

    def to_json(self) -> str:
        """The text of a calibration file, with the hash of its own content."""
        content = {"kind": _KIND, "format_version": FORMAT_VERSION, **asdict(self)}
        content["points"] = [[p.step, p.front, p.velocity] for p in self.points]
        return json.dumps(content | {_SEAL: digest_of(content)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CacheCalibration:
        """Parse and check the text of a calibration file.

        Raises:
            UsageError: it is something else, of another format version, or was cut or changed.
        """
        content = parse_json(text)
        header: dict[str, str | int] = {"kind": _KIND, "format_version": FORMAT_VERSION}
        fields = check_header(content, "file of calibrate-cache", header)
        seal = fields.pop(_SEAL, None)
        if seal != digest_of(header | fields):
            raise UsageError("it is damaged or was edited: its content does not match its sha256")
        points = value_from(list[tuple[int, float, float]], fields.get("points"), where="points")
        names = ("step", "front", "velocity")
        fields["points"] = [dict(zip(names, point, strict=True)) for point in points]
        calibration = value_from(cls, fields)
        calibration.cache(threshold=1.0)  # checks the polynomial
        return calibration


def save_calibration(calibration: CacheCalibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration file; beside its target, then moved there."""
    from ditrim.engines.files import write_file

    write_file(path, calibration.to_json().encode())


def load_calibration(path: str | os.PathLike[str]) -> CacheCalibration:
    """Read a calibration file.

    Raises:
        UsageError: it cannot be read or is damaged; names it.
    """
    remedy = "make one with calibrate-cache"
    return read_file(path, CacheCalibration.from_json, what="cache calibration", remedy=remedy)


def load_tea_cache(
    path: str | os.PathLike[str],
    engine_set: EngineSet,
    *,
    threshold: float,
    max_reuses: int | None = None,
) -> TeaCache:
    """A `TeaCache` from a file of `calibrate-cache`, for an engine set.

    Any engine set of the same weights and front depth will do: the backend, the precision and the
    ladder play no part.

    Raises:
        UsageError: the file cannot be read, is damaged, or is of another model.
    """
    calibration, manifest = load_calibration(path), engine_set.manifest
    here = (manifest.model, manifest.front_depth, weights_digest(manifest))
    if here != (calibration.model, calibration.front_depth, calibration.weights):
        weights = "" if here[2] == calibration.weights else " of other weights"
        raise UsageError(
            f"{path} was measured on {calibration.model} with front depth "
            f"{calibration.front_depth}; {engine_set.folder} holds {manifest.model} with front "
            f"depth {manifest.front_depth}{weights}. Measure this one with: "
            f"calibrate-cache --engine {engine_set.folder} --output <file>"
        )
    return calibration.cache(threshold, max_reuses)


def step_cache_from(text: str, engine_set: EngineSet) -> StepCache | TeaCache:
    """A step cache as a person types it: a threshold, or a file of `calibrate-cache` and one.

    Args:
        text: "0.08" for a `StepCache`, "cache.json:0.05" for a `TeaCache`.
        engine_set: what the file must have been measured on.

    Raises:
        UsageError: it is neither; see also `load_tea_cache`.
    """
    name, _, number = text.rpartition(":")
    try:
        threshold = float(number)
    except ValueError as error:
        raise UsageError(
            f"a step cache is a threshold, as 0.08, or a file of calibrate-cache and a threshold, "
            f"as cache.json:0.05; got {text!r}"
        ) from error
    if not name:
        return StepCache(threshold=threshold)
    return load_tea_cache(name, engine_set, threshold=threshold)


def weights_digest(manifest: Manifest) -> str:
    """SHA-256 over a model's configuration and the content of its weights."""
    source = manifest.source
    files = source.get("files") or {}
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    content = {
        "config": dict(manifest.transformer_config),
        "weights": sorted(hashes.values()) or source.get("seed"),
    }
    return digest_of(content)
