"""A profile and what follows from it, for a terminal and as plain values."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ditrim.runtime.profiling.profile import PRODUCT, Profile, Row, describe_row, ratios_of
from ditrim.runtime.profiling.projection import Comparison, Projection
from ditrim.runtime.profiling.run_cost import ReplayedRun, ScheduleEstimate

_WIDTH = 250  # tables take what they need
_NOISY = "noisy"
_RATIOS = {
    "scored": "what scoring adds to BACK: {}",
    "outside": "share of a call spent outside the graphs: {}",
}
_TOO_NOISY = "too noisy to say"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits; empty where there is none."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits}g}"))))
    return f"{value:,.{max(0, decimals)}f}"


def count(value: int, noun: str) -> str:
    """So many of something."""
    return f"{value} {noun}{'s' * (value != 1)}"


def share(value: float | None) -> str:
    """A share in percent; empty where there is none."""
    return "" if value is None else f"{100 * value:.{1 if abs(value) < 0.0995 else 0}f} %"


def table_rows(profile: Profile) -> list[list[str]]:
    """The cells of a profile's table; a row that is too noisy shows that in place of digits."""
    found = []
    for row in profile.rows:
        if row.part == PRODUCT:
            continue
        entry = describe_row(profile, row)
        is_noisy = entry["is_noisy"]

        def shown(key: str, entry: dict[str, Any] = entry, is_noisy: bool = is_noisy) -> str:
            return "" if is_noisy else number(entry[key])

        def portion(key: str, entry: dict[str, Any] = entry, is_noisy: bool = is_noisy) -> str:
            return "" if is_noisy else share(entry[key])

        found.append(
            [
                row.part,
                str(row.batch),
                str(row.num_noisy),
                str(row.num_text),
                f"{row.num_kept}/{row.num_reference}",
                str(entry["tokens"]),
                _NOISY if is_noisy else number(entry["median_ms"]),
                f"+-{share(entry['noise'])}",
                shown("p90_ms"),
                shown("p99_ms"),
                portion("spread"),
                shown("warmup_ms"),
                "" if row.flops == 0 else number(row.flops / 1e9),
                shown("tflops"),
                portion("tflops_share"),
                "" if row.num_bytes == 0 else number(row.num_bytes / 1e6),
                shown("gb_s"),
                portion("gb_s_share"),
                portion("roofline_share"),
                "" if row.memory_bytes is None else number(row.memory_bytes / 1e6),
            ]
        )
    return found


# Group -> its columns, as `table_rows` has them.
GROUPS: dict[str, tuple[str, ...]] = {
    "": ("part", "B", "noisy", "text", "refs", "tokens"),
    "time, ms": ("ms", "+-", "p90", "p99", "spread", "first"),
    "operations": ("GFLOP", "TFLOP/s", "of peak"),
    "bytes": ("MB", "GB/s", "of peak"),
    "limit": ("roofline",),
    "memory": ("MB held",),
}
COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)


def profile_table(profile: Profile) -> str:
    """The table of a profile, with what it was measured on."""
    machine, peak = profile.machine, profile.peak
    lines = [
        f"{profile.engine['model']}, {profile.engine['precision']}, {profile.engine['backend']} "
        f"{profile.engine['backend_version']} on {machine['name']}, "
        f"{count(machine['threads'], 'thread')}; {machine['timer']}",
        f"peak {number(peak.tflops) or '?'} TFLOP/s, {number(peak.gb_s) or '?'} GB/s: "
        f"{peak.source}",
        _rendered(COLUMNS, table_rows(profile)),
        "ms: median of "
        f"{profile.settings['repeats']} interleaved rounds, +-: its "
        f"{_coverage(profile)} interval; spread: (p90 - p10) / median; first: the first of "
        f"{profile.settings['warmup']} warm-up rounds; roofline: share of the bound that the cost "
        "model sets",
    ]
    for geometry in profile.geometries:
        for name, item in ratios_of(profile, geometry).items():
            one = float(name == "scored")  # told as what comes on top
            figures = (
                f"{share(item.median - one)} [{share(item.low - one)}, {share(item.high - one)}]"
            )
            is_noisy = item.noise > profile.max_noise
            said = _RATIOS[name].format(_TOO_NOISY if is_noisy else figures)
            lines.append(f"{profile.size_text(geometry)}: {said}")
    noisy = sum(row.statistics.noise > profile.max_noise for row in profile.rows)
    if noisy:
        lines.append(
            f"{noisy} of {len(profile.rows)} rows are known no better than "
            f"+-{share(profile.max_noise)} and show no digits; raise --repeats or stop other work"
        )
    return "\n".join(lines)


def _coverage(profile: Profile) -> str:
    return share(min(row.statistics.coverage for row in profile.rows))


def _rendered(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=_WIDTH, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def schedule_lines(estimates: Sequence[ScheduleEstimate], profile: Profile) -> str:
    """What a schedule will cost at each size."""
    lines = []
    for estimate in estimates:
        schedule = estimate.schedule
        low, middle, high = estimate.speedup
        roles = ", ".join(f"{calls} {role}" for role, calls in estimate.roles.items() if calls)
        even = estimate.break_even_kept
        faster = "never faster than the full context, whatever is kept"
        if even is not None:
            faster = (
                "faster than the full context at every kept share"
                if even >= 1.0
                else f"faster than the full context while under {share(even)} are kept"
            )
        kept = f"{share(schedule.kept)} kept"
        if schedule.kept_is_bound:
            kept = f"at most {kept} (the bound of tau; kept= or --report tells a picture's own)"
        warmup = f", {schedule.warmup} warm-up steps" * (schedule.warmup > 0)
        branches = f", {schedule.branches} branches" * (schedule.branches > 1)
        lines += [
            f"{schedule.steps} steps, {schedule.anchors_in_words()}{warmup}{branches}, {kept}, "
            f"on {profile.machine['name']}: {profile.size_text(estimate.geometry)}",
            f"  {roles}: {number(estimate.run_ms[1] / 1e3)} s "
            f"[{number(estimate.run_ms[0] / 1e3)}, {number(estimate.run_ms[2] / 1e3)}], full "
            f"context {number(estimate.full_ms[1] / 1e3)} s",
            f"  speed-up {'at least ' * schedule.kept_is_bound}{middle:.2f} [{low:.2f}, "
            f"{high:.2f}], by operations {estimate.flops_speedup:.2f}; {faster}",
            f"  scoring and selection {share(estimate.anchor_share)} of the run; interval "
            f"{estimate.best_interval} comes within 2 % of a single anchor",
        ]
    return "\n".join(lines)


def replay_lines(replays: Sequence[ReplayedRun]) -> str:
    """A recorded run beside its price."""
    lines = []
    for item in replays:
        lines.append(
            f"recorded run: {number(item.recorded_ms)} ms in its calls, "
            f"{number(item.estimated_ms)} ms by the profile "
            f"({item.estimated_ms / item.recorded_ms - 1:+.0%}), {number(item.full_ms)} ms over "
            f"the full context; {share(item.kept)} kept"
        )
        lines += [f"  not the same: {text}" for text in item.differs]
    return "\n".join(lines)


def projection_dict(projection: Projection) -> dict[str, Any]:
    """Plain values of a projection."""
    return {
        "target": projection.target.name,
        "precision": projection.target.precision,
        "peak": asdict(projection.target.peak),
        "assumptions": list(projection.assumptions),
        "is_checked": projection.is_checked,
        "worst_error": projection.worst_error,
        "rows": [
            {
                **_named(item.row),
                "projected_ms": item.projected_ms,
                "low_ms": item.low_ms,
                "high_ms": item.high_ms,
                "roofline_share": item.share,
                "measured_ms": item.measured_ms,
                "error": item.error,
            }
            for item in projection.rows
        ],
    }


def projection_table(projection: Projection) -> str:
    """A projection with everything that it takes for granted."""
    target = projection.target
    rows = [
        [
            item.row.part,
            str(item.row.batch),
            str(item.row.num_noisy),
            str(item.row.num_text),
            f"{item.row.num_kept}/{item.row.num_reference}",
            number(item.projected_ms),
            f"{number(item.low_ms)} to {number(item.high_ms)}",
            share(item.share),
            number(item.measured_ms) or "-",
            "not checked" if item.error is None else f"{item.error:+.0%}",
        ]
        for item in projection.rows
    ]
    lines = [
        f"estimate for {target.name}, {target.precision}: {number(target.peak.tflops)} TFLOP/s, "
        f"{number(target.peak.gb_s)} GB/s ({target.peak.source})",
        _rendered(
            ("part", "B", "noisy", "text", "refs", "ms", "range", "roofline", "measured", "error"),
            rows,
        ),
        *(f"assumed: {text}" for text in projection.assumptions),
    ]
    if projection.worst_error is not None:
        lines.append(
            f"checked against the profile of that device: off by {share(projection.worst_error)} "
            "at most"
        )
    return "\n".join(lines)


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values of a comparison."""
    return {
        "drift": comparison.drift,
        "notes": list(comparison.notes),
        "only_here": [_named(row) for row in comparison.only_here],
        "only_there": [_named(row) for row in comparison.only_there],
        "rows": [
            {
                **_named(item.row),
                "ms": item.row.statistics.median,
                "other_ms": item.other.statistics.median,
                "ratio": item.ratio,
                "low": item.low,
                "high": item.high,
                "exceeds_noise": item.exceeds_noise,
            }
            for item in comparison.differences
        ],
    }


def comparison_table(comparison: Comparison) -> str:
    """Two profiles, with what lies beyond noise."""
    rows = [
        [
            item.row.part,
            str(item.row.batch),
            str(item.row.num_noisy),
            str(item.row.num_text),
            f"{item.row.num_kept}/{item.row.num_reference}",
            number(item.row.statistics.median),
            number(item.other.statistics.median),
            f"{item.ratio:.3f}",
            f"{item.low:.3f} to {item.high:.3f}",
            ("slower" if item.ratio > 1 else "faster") if item.exceeds_noise else "within noise",
        ]
        for item in comparison.differences
    ]
    lines = [
        _rendered(
            ("part", "B", "noisy", "text", "refs", "ms", "other", "ratio", "interval", ""), rows
        )
    ]
    if comparison.drift is not None:
        lines.append(
            f"the same matrix product took {comparison.drift:.3f} times as long here: the machine "
            "itself; what that alone explains is not called a difference"
        )
    lines += [f"differs: {text}" for text in comparison.notes]
    missing = len(comparison.only_here) + len(comparison.only_there)
    if missing:
        lines.append(f"{missing} rows are in one of the two only")
    return "\n".join(lines)


def _named(row: Row) -> dict[str, Any]:
    return {
        "part": row.part,
        "batch": row.batch,
        "noisy": row.num_noisy,
        "text": row.num_text,
        "reference": row.num_reference,
        "kept": row.num_kept,
    }
