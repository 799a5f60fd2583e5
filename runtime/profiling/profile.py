"""What `profile-latency` measured: samples, what they say and how far they can be trusted, as a
file. Measuring is `profile_measure`'s.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ditrim.engines.cost.cost import Cost, ModelCost, Peak
from ditrim.plugins.errors import UsageError

FORMAT, VERSION = "ditrim-profile", 2
# What a row measures; `product` is a plain matrix product, the reference product.
PARTS = ("front", "back", "anchor", "selection", "gather", "rope", "scheduler", "step", "overhead")
PRODUCT = "product"
GRAPH_PARTS = ("front", "back", "anchor")
_COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Summary statistics of samples.

    Attributes:
        count: of samples.
        median, p90, p99, least, most: milliseconds; percentiles lie between samples where they fall
            between them, so that p99 of few samples is close to the largest.
        spread: (p90 - p10) / median.
        low, high: interval of the median from order statistics, free of any distribution.
        coverage: what that interval holds the true median with, if samples are independent.
        noise: half the interval's width over the median.
    """

    count: int
    median: float
    p90: float
    p99: float
    least: float
    most: float
    spread: float
    low: float
    high: float
    coverage: float
    noise: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of ordered samples lies, linear between samples."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(ordered: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, coverage): the k-th smallest and k-th largest sample around the true median.

    The largest k whose coverage, 1 - 2 P(Binomial(n, 1/2) < k), is at least 95 %; with fewer than
    six samples there is none, and all of them are spanned.
    """
    count = len(ordered)
    tail, chosen, coverage = 0.0, 1, 1 - 2 * 0.5**count
    for k in range(1, count // 2 + 1):
        tail += math.comb(count, k - 1) * 0.5**count
        if 1 - 2 * tail < _COVERAGE:
            break
        chosen, coverage = k, 1 - 2 * tail
    return ordered[chosen - 1], ordered[count - chosen], max(0.0, coverage)


def statistics_of(samples: Sequence[float]) -> Statistics:
    """Return median, quantiles and the median's interval of samples in milliseconds."""
    ordered = sorted(samples)
    median = quantile(ordered, 0.5)
    low, high, coverage = median_interval(ordered)
    return Statistics(
        count=len(ordered),
        median=median,
        p90=quantile(ordered, 0.9),
        p99=quantile(ordered, 0.99),
        least=ordered[0],
        most=ordered[-1],
        spread=(quantile(ordered, 0.9) - quantile(ordered, 0.1)) / median,
        low=low,
        high=high,
        coverage=coverage,
        noise=(high - low) / 2 / median,
    )


def is_count(value: object) -> bool:
    """Whether it is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured thing at one size.

    Attributes:
        part: one of `PARTS`, or `PRODUCT`.
        batch, num_noisy, num_text: of the call.
        num_reference: C of the call.
        num_kept: reference tokens that this part ran on.
        samples_ms: one a repeat, in the order in which they were taken.
        flops, num_bytes: by the cost model; 0 where it says nothing.
        memory_bytes: while it first ran, after all shorter ones; see `Profile.machine["memory"]`.
        warmup_ms: of the rounds before those that count; the first has what a first call costs.
    """

    part: str
    batch: int
    num_noisy: int
    num_text: int
    num_reference: int
    num_kept: int
    samples_ms: tuple[float, ...]
    flops: int = 0
    num_bytes: int = 0
    memory_bytes: int | None = None
    warmup_ms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in (*PARTS, PRODUCT):
            raise UsageError(f"a row has the part {self.part!r}; known: {', '.join(PARTS)}")
        counts = ("batch", "num_noisy", "num_text", "num_reference", "num_kept")
        for name in (*counts, "flops", "num_bytes", "memory_bytes"):
            value = getattr(self, name)
            is_absent = name == "memory_bytes" and value is None
            if not is_absent and not is_count(value):
                raise UsageError(f"a row's {name} is {value!r}, not a whole number of at least 0")
        if self.num_kept > self.num_reference:
            raise UsageError(f"a row kept {self.num_kept} of {self.num_reference} tokens")
        if not self.samples_ms:
            raise UsageError(f"the row of {self.part} has no samples")
        for sample in (*self.samples_ms, *self.warmup_ms):
            if not is_positive(sample):
                raise UsageError(f"a sample of {self.part} is {sample!r}, no time above 0")

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """(batch, noisy, text, reference) tokens of the call."""
        return self.batch, self.num_noisy, self.num_text, self.num_reference

    @property
    def key(self) -> tuple[str, int, int, int, int, int]:
        """Identifies a row: part, geometry and kept tokens."""
        return (self.part, *self.geometry, self.num_kept)

    @property
    def statistics(self) -> Statistics:
        return statistics_of(self.samples_ms)

    @property
    def cost(self) -> Cost:
        """The cost by the cost model; weights' bytes are counted with the activations'."""
        return Cost(flops=self.flops, activation_bytes=self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything that was measured, and what it was measured on.

    Attributes:
        engine: model, architecture, config, front_depth, num_layers, num_scored, precision,
            backend, backend_version, identity, rungs, limits, granularity.
        machine: name, device, choice, threads, cores, timer, clocks, load, memory, versions.
        peak: what the device can do at most.
        settings: repeats, warmup, tau, max_noise, and resolutions: pixels ("1024x1024") by noisy
            tokens where they were asked for.
        created: UTC time, ISO 8601.
        rows: what was measured.
    """

    engine: Mapping[str, Any]
    machine: Mapping[str, Any]
    peak: Peak
    settings: Mapping[str, Any]
    created: str
    rows: tuple[Row, ...] = field(default=())

    @property
    def model_cost(self) -> ModelCost:
        """The cost model of the engine set."""
        engine = self.engine
        return ModelCost(
            config=engine["config"],
            architecture=engine["architecture"],
            front_depth=engine["front_depth"],
            num_layers=engine["num_layers"],
            num_scored=engine["num_scored"],
            precision=engine["precision"],
            backend=engine["backend"],
        )

    @property
    def geometries(self) -> list[tuple[int, int, int, int]]:
        """(batch, noisy, text, reference) of every size that was measured, in order."""
        return list(dict.fromkeys(row.geometry for row in self.rows if row.part != PRODUCT))

    def size_text(self, geometry: tuple[int, int, int, int]) -> str:
        """Return a geometry in words: batch, pixels and token counts."""
        batch, noisy, text, reference = geometry
        pixels = self.settings.get("resolutions", {}).get(str(noisy))
        picture = f"{pixels} pixels ({noisy} noisy tokens)" if pixels else f"{noisy} noisy"
        return f"batch {batch}, {picture}, {text} text and {reference} reference tokens"

    def find(
        self, part: str, geometry: tuple[int, int, int, int], num_kept: int | None = None
    ) -> Row | None:
        """A row, or none where it was not measured."""
        for row in self.rows:
            if row.part == part and row.geometry == geometry and num_kept in (None, row.num_kept):
                return row
        return None

    def backs(self, geometry: tuple[int, int, int, int]) -> list[Row]:
        """BACK unscored at every length that was measured, shortest first."""
        found = [row for row in self.rows if row.part == "back" and row.geometry == geometry]
        return sorted(found, key=lambda row: row.num_kept)

    @property
    def max_noise(self) -> float:
        """Largest noise, a share of the median, at which a row's figures are shown."""
        return float(self.settings["max_noise"])

    def to_json(self) -> str:
        """The text of a profile's file."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["statistics"] = [
            {"key": list(row.key), **_rounded(asdict(row.statistics))} for row in self.rows
        ]
        return json.dumps(content, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line a row: sizes, statistics, cost and what was achieved of the peak."""
        text = io.StringIO()
        writer: csv.DictWriter[str] | None = None
        for row in self.rows:
            entry = describe_row(self, row)
            if writer is None:
                writer = csv.DictWriter(text, list(entry), lineterminator="\n")
                writer.writeheader()
            writer.writerow({key: "" if value is None else value for key, value in entry.items()})
        return text.getvalue()


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in entry.items()
    }


def describe_row(profile: Profile, row: Row) -> dict[str, Any]:
    """A row with its statistics, cost, and shares of the peak; none where there is no figure."""
    statistics, peak, cost = row.statistics, profile.peak, row.cost
    tflops = cost.flops / statistics.median / 1e9 if cost.flops else None
    gb_s = cost.num_bytes / statistics.median / 1e6 if cost.num_bytes else None
    roofline = peak.roofline_ms(cost) if cost.num_bytes else None
    entry = {
        "part": row.part,
        "batch": row.batch,
        "noisy": row.num_noisy,
        "text": row.num_text,
        "reference": row.num_reference,
        "kept": row.num_kept,
        "tokens": row.num_noisy + row.num_text + row.num_kept,
        **{f"{name}_ms": getattr(statistics, name) for name in ("median", "p90", "p99")},
        "low_ms": statistics.low,
        "high_ms": statistics.high,
        "warmup_ms": row.warmup_ms[0] if row.warmup_ms else None,
        "spread": statistics.spread,
        "noise": statistics.noise,
        "is_noisy": statistics.noise > profile.max_noise,
        "repeats": statistics.count,
        "flops": row.flops or None,
        "bytes": row.num_bytes or None,
        "tflops": tflops,
        "tflops_share": tflops / peak.tflops if tflops and peak.tflops else None,
        "gb_s": gb_s,
        "gb_s_share": gb_s / peak.gb_s if gb_s and peak.gb_s else None,
        "roofline_ms": roofline,
        "roofline_share": roofline / statistics.median if roofline else None,
        "memory_bytes": row.memory_bytes,
    }
    return _rounded(entry)


def noise_complaint(profile: Profile) -> str | None:
    """Return a complaint where a machine was too noisy to measure; none where it was not.

    The criterion: in more than half of the rows of FRONT, BACK and anchors, the interval of the
    median reaches further than `max_noise` of the median to each side.
    """
    noises = sorted(row.statistics.noise for row in profile.rows if row.part in GRAPH_PARTS)
    if not noises or quantile(noises, 0.5) <= profile.max_noise:
        return None
    busy = profile.machine.get("load", {}).get("before")
    load = "" if busy is None else f"; the load was {busy:.1f} on {profile.machine['cores']} cores"
    return (
        "this machine is too noisy to say anything: over half of the medians of FRONT, BACK and "
        f"anchor are known no better than +-{100 * quantile(noises, 0.5):.0f} % (limit "
        f"{100 * profile.max_noise:g} %){load}. Stop other work, raise --repeats "
        f"({profile.settings['repeats']}), or accept more with --max-noise"
    )


def paired_ratio(first: Row, second: Row) -> Statistics:
    """Return the ratio of the first to the second, paired by round: what slows a round cancels."""
    pairs = zip(first.samples_ms, second.samples_ms, strict=True)
    return statistics_of([a / b for a, b in pairs])


def ratios_of(profile: Profile, geometry: tuple[int, int, int, int]) -> dict[str, Statistics]:
    """Return ratios between rows of the same rounds.

    Returns:
        "scored": an anchor's BACK over the same length unscored. "outside": the share of a call
        that the runtime spends outside the two graphs.
    """
    found = {}
    back, anchor = profile.find("back", geometry, geometry[3]), profile.find("anchor", geometry)
    if back is not None and anchor is not None:
        found["scored"] = paired_ratio(anchor, back)
    overhead, step = profile.find("overhead", geometry), profile.find("step", geometry)
    if overhead is not None and step is not None:
        found["outside"] = paired_ratio(overhead, step)
    return found
