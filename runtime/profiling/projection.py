"""A profile of one device as an estimate for another, and two profiles against each other.

A projection carries the achieved share of the roofline over: BACK that takes twice its bound here
is taken to take twice its bound there. That is an assumption, as good as the two libraries are
alike; where a profile of the other device is at hand, it is checked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditrim.engines.cost.cost import Cost, Peak
from ditrim.engines.cost.devices import DEVICES, device_named
from ditrim.engines.cost.flops import CallSize
from ditrim.plugins.errors import UsageError
from ditrim.runtime.profiling.file import load_profile
from ditrim.runtime.profiling.profile import GRAPH_PARTS, PRODUCT, Profile, Row

# Rates of the device table are for these.
_TABLE_PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionTarget:
    """The device that a profile is projected to.

    Attributes:
        name: for people.
        peak: what it can do at most.
        precision: of the engines there.
        measured: its own profile, where there is one.
    """

    name: str
    peak: Peak
    precision: str
    measured: Profile | None = None


def target_from(text: str, own: str, precision: str | None = None) -> ProjectionTarget:
    """Read `--project`: a device's name, or the file of a profile that was taken on one.

    Args:
        text: as given.
        own: precision of the profile that is projected.
        precision: "bf16" or "fp16"; none means the profile's own, or bf16 where that is fp32, for
            which the table has no rates.

    Raises:
        UsageError: there is no such device or file, or no peak is established for it.
    """
    if Path(text).suffix == ".json" or Path(text).is_file():
        measured = load_profile(text, "--project")
        if precision not in (None, measured.engine["precision"]):
            raise UsageError(
                f"--project {text} was measured in {measured.engine['precision']}; leave "
                "--precision out"
            )
        return ProjectionTarget(
            name=f"{measured.machine['name']} ({text})",
            peak=measured.peak,
            precision=measured.engine["precision"],
            measured=measured,
        )
    try:
        device = device_named(text)
    except UsageError as error:
        message = str(error).replace("--device", "--project")
        raise UsageError(f"{message} Or give a profile.json of it") from None
    chosen = precision or (own if own in _TABLE_PRECISIONS else "bf16")
    rate = device.peak_tflops(chosen)
    if not rate or device.bandwidth_gb_s is None:
        missing = "bandwidth" if rate else f"{chosen} rate"
        others = [
            name
            for name, other in DEVICES.items()
            if other.peak_tflops(chosen) and other.bandwidth_gb_s
        ]
        raise UsageError(
            f"--project {text}: no {missing} of {device.title} is established; devices with both: "
            f"{', '.join(others)}"
        )
    peak = Peak(tflops=rate, gb_s=device.bandwidth_gb_s, source=device.peak_source(chosen))
    return ProjectionTarget(name=device.title, peak=peak, precision=chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectedRow:
    """A row as it would be on another device.

    Attributes:
        row: as measured here, with samples, operations and bytes of the other device.
        low_ms, high_ms: with the largest and the smallest share of the roofline that any row of
            FRONT, BACK or anchors reached here, at the ends of its interval.
        share: of the roofline that this row reached here and is taken to reach there.
        measured_ms: there; none where it was not measured.
        error: projected / measured - 1.
    """

    row: Row
    low_ms: float
    high_ms: float
    share: float
    measured_ms: float | None
    error: float | None

    @property
    def projected_ms(self) -> float:
        """The projected median, milliseconds."""
        return self.row.statistics.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A profile's estimate for another device.

    Attributes:
        target: the device.
        rows: of FRONT, BACK and anchors.
        profile: as if measured there, for schedules.
        assumptions: what is taken for granted, sentences.
        is_checked: whether any row was measured there.
        worst_error: largest |projected / measured - 1|; none where nothing was measured.
    """

    target: ProjectionTarget
    rows: tuple[ProjectedRow, ...]
    profile: Profile
    assumptions: tuple[str, ...]

    @property
    def is_checked(self) -> bool:
        """Whether any row was measured on the target device."""
        return self.worst_error is not None

    @property
    def worst_error(self) -> float | None:
        """Largest |projected / measured - 1|; none where nothing was measured."""
        errors = [abs(row.error) for row in self.rows if row.error is not None]
        return max(errors, default=None)


def check_model(target: ProjectionTarget, config: Mapping[str, Any]) -> None:
    """Refuse a target whose profile is of another transformer than this configuration's."""
    other = target.measured
    if other is not None and other.engine["config"] != config:
        raise UsageError(
            f"--project {target.name} was measured with another model "
            f"({other.engine['model']}); give a profile of the same one"
        )


def project(profile: Profile, target: ProjectionTarget) -> Projection:
    """Scale every row by the ratio of the rooflines.

    Raises:
        UsageError: this device's own peak is not established, or the other profile's model differs.
    """
    if profile.peak.tflops is None or profile.peak.gb_s is None:
        raise UsageError(
            f"no peak of {profile.machine['name']} in {profile.engine['precision']} is "
            "established, so that its share of the roofline is not known: nothing to project from"
        )
    other = target.measured
    check_model(target, profile.engine["config"])
    shares, ends = {}, []
    for row in profile.rows:
        roofline = profile.peak.roofline_ms(row.cost)
        if row.part in GRAPH_PARTS and roofline:
            statistics = row.statistics
            shares[row.key] = roofline / statistics.median
            ends += [roofline / statistics.high, roofline / statistics.low]
    least, most = min(ends), max(ends)
    projected, rows = [], []
    for row in profile.rows:
        if row.part == PRODUCT or row.part == "step":
            continue
        cost = _cost_there(profile, row, target.precision)
        if row.part not in GRAPH_PARTS:
            factor = 1.0
            if row.part == "gather" and target.peak.gb_s:
                factor = profile.peak.gb_s / target.peak.gb_s
                factor *= cost.num_bytes / max(row.num_bytes, 1)
            rows.append(_scaled(row, factor, cost))
            continue
        before = profile.peak.roofline_ms(row.cost)
        after = target.peak.roofline_ms(cost)
        assert before
        assert after
        there = _scaled(row, after / before, cost)
        rows.append(there)
        found = None if other is None else _same(other, row)
        measured = None if found is None else found.statistics.median
        projected.append(
            ProjectedRow(
                row=there,
                low_ms=after / most,
                high_ms=after / least,
                share=shares[row.key],
                measured_ms=measured,
                error=None if measured is None else there.statistics.median / measured - 1,
            )
        )
    return Projection(
        target=target,
        rows=tuple(projected),
        profile=replace(
            profile,
            engine={**profile.engine, "precision": target.precision},
            machine={**profile.machine, "name": target.name},
            peak=target.peak,
            rows=tuple(rows),
        ),
        assumptions=_assumptions(profile, target, least, most),
    )


def _assumptions(
    profile: Profile, target: ProjectionTarget, least: float, most: float
) -> tuple[str, ...]:
    found = [
        "FRONT, BACK and anchors reach the same share of the roofline there as here "
        f"({100 * least:.0f} to {100 * most:.0f} % over the measured rows, noise included; the "
        "range spans them)",
        "the kept gather follows the bandwidth; selection, scheduler and the runtime's own work "
        "take as long as here",
    ]
    if profile.machine["device"] == "cpu" and target.measured is None:
        found.append(
            "the profile is a CPU's: its shares are of rates that were measured there, while the "
            "other device's peaks are of its data sheet, which matrix products of this kind do not "
            "reach. Take it as a bound from below on the time"
        )
    if profile.engine["precision"] != target.precision:
        found.append(
            f"{target.precision} there against {profile.engine['precision']} here reaches the same "
            "share"
        )
    if target.measured is None:
        found.append("not checked: no second device was measured")
    return tuple(found)


def _cost_there(profile: Profile, row: Row, precision: str) -> Cost:
    """The cost of a row in another precision."""
    model = profile.model_cost.at(precision)
    size = CallSize(
        num_noisy=row.num_noisy,
        num_reference=row.num_kept,
        num_text=row.num_text,
        batch=row.batch,
    )
    if row.part == "front":
        return model.front(size)
    if row.part == "gather":
        return model.gather(size)
    if row.part in ("back", "anchor"):
        is_scored = row.flops != profile.model_cost.back(size).flops  # not where anchors are apart
        return model.back(size, num_rows=row.num_noisy if row.part == "anchor" else int(is_scored))
    return row.cost


def _scaled(row: Row, factor: float, cost: Cost) -> Row:
    return replace(
        row,
        samples_ms=tuple(sample * factor for sample in row.samples_ms),
        flops=cost.flops,
        num_bytes=cost.num_bytes,
        memory_bytes=None,
    )


def _same(profile: Profile, row: Row) -> Row | None:
    return next((other for other in profile.rows if other.key == row.key), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A row in two profiles.

    Attributes:
        row: of this profile.
        other: of the other one.
        ratio: this median / the other; low, high: from the ends of both intervals.
        exceeds_noise: whether the interval does not hold 1, nor would if it were shifted by what
            the machine itself changed between the two (see `ProfileComparison.drift`).
    """

    row: Row
    other: Row
    ratio: float
    low: float
    high: float
    exceeds_noise: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileComparison:
    """Holds two profiles and the differences of their rows.

    Attributes:
        differences: rows that both have.
        only_here, only_there: rows that one of them has.
        drift: how many times as long the same matrix product took here as there, where both were
            measured on a CPU of the same name; else none.
        notes: what else differs between the two.
    """

    differences: tuple[Difference, ...]
    only_here: tuple[Row, ...]
    only_there: tuple[Row, ...]
    drift: float | None
    notes: tuple[str, ...]


def check_common_size(other: Profile, geometries: Collection[tuple[int, int, int, int]]) -> None:
    """Refuse a profile that has none of these sizes."""
    if not set(geometries) & set(other.geometries):
        there = "; ".join(map(other.size_text, other.geometries[:3]))
        raise UsageError(
            f"--compare: the two profiles have no size in common (the other has {there}); measure "
            "with the same --batch, --noisy, --text and --reference"
        )


def compare(profile: Profile, other: Profile) -> ProfileComparison:
    """This profile against another, row by row.

    Raises:
        UsageError: they have no row in common.
    """
    check_common_size(other, profile.geometries)
    theirs = {row.key: row for row in other.rows if row.part != PRODUCT}
    ours = {row.key: row for row in profile.rows if row.part != PRODUCT}
    common = [key for key in ours if key in theirs]
    drift = _drift(profile, other)
    return ProfileComparison(
        differences=tuple(_difference(ours[key], theirs[key], drift) for key in common),
        only_here=tuple(row for key, row in ours.items() if key not in theirs),
        only_there=tuple(row for key, row in theirs.items() if key not in ours),
        drift=drift,
        notes=tuple(_unlike(profile, other)),
    )


def _difference(row: Row, other: Row, drift: float | None) -> Difference:
    mine, theirs = row.statistics, other.statistics
    low, high = mine.low / theirs.high, mine.high / theirs.low
    shift = 1.0 if drift is None else drift
    ends = [low, low / shift, high, high / shift]
    return Difference(
        row=row,
        other=other,
        ratio=mine.median / theirs.median,
        low=low,
        high=high,
        exceeds_noise=min(ends) > 1.0 or max(ends) < 1.0,
    )


def _drift(profile: Profile, other: Profile) -> float | None:
    if profile.machine["name"] != other.machine["name"]:
        return None
    if profile.machine.get("threads") != other.machine.get("threads"):
        return None
    ratios = []
    for row in profile.rows:
        if row.part == PRODUCT and (found := _same(other, row)) is not None:
            ratios.append(row.statistics.median / found.statistics.median)
    return math.prod(ratios) ** (1 / len(ratios)) if ratios else None


def _unlike(profile: Profile, other: Profile) -> Sequence[str]:
    differences = []
    pairs = [(key, profile.machine.get(key), other.machine.get(key)) for key in ("name", "threads")]
    keys = ("model", "identity", "precision", "backend", "backend_version")
    pairs += [(key, profile.engine[key], other.engine[key]) for key in keys]
    names = sorted({*profile.machine["versions"], *other.machine["versions"]})
    pairs += [
        (name, *(one.machine["versions"].get(name, "none") for one in (profile, other)))
        for name in names
    ]
    for key, own, others in pairs:
        if own != others:
            differences.append(f"{key}: {str(own)[:40]} here, {str(others)[:40]} there")
    return differences
