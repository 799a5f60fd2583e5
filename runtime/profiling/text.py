"""A profile and what follows from it, for a terminal and as plain values."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ditrim.runtime.profiling.profile import PRODUCT, Profile, Row, describe_row, ratios_of
from ditrim.runtime.profiling.projection import ProfileComparison, Projection
from ditrim.runtime.profiling.run_cost import ReplayedRun, ScheduleEstimate

WIDTH, _TABLE_WIDTH = 100, 250  # of lines; tables take what they need
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
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{value} {noun}{'s' * (value != 1)}"


def share(value: float | None) -> str:
    """A share in percent; empty where there is none."""
    return "" if value is None else f"{100 * value:.{1 if abs(value) < 0.0995 else 0}f} %"


def table_rows(profile: Profile) -> list[list[str]]:
    """The cells of a profile's table; a row that is too noisy shows that in place of digits."""
    return [
        _profile_cells(row, describe_row(profile, row))
        for row in profile.rows
        if row.part != PRODUCT
    ]


def _profile_cells(row: Row, entry: dict[str, Any]) -> list[str]:
    is_noisy = entry["is_noisy"]

    def shown(key: str) -> str:
        return "" if is_noisy else number(entry[key])

    def portion(key: str) -> str:
        return "" if is_noisy else share(entry[key])

    return [
        *_size_cells(row),
        str(entry["tokens"]),
        _NOISY if is_noisy else number(entry["median_ms"]),
        f"+-{share(entry['noise'])}",
        shown("p90_ms"),
        shown("p99_ms"),
        portion("spread"),
        shown("warmup_ms"),
        _in_units(row.flops, 1e9),
        shown("tflops"),
        portion("tflops_share"),
        _in_units(row.num_bytes, 1e6),
        shown("gb_s"),
        portion("gb_s_share"),
        portion("roofline_share"),
        _in_units(row.memory_bytes, 1e6),
    ]


def _in_units(value: float | None, unit: float) -> str:
    return number(value / unit) if value else ""


def _size_cells(row: Row) -> list[str]:
    sizes = (row.batch, row.num_noisy, row.num_text)
    return [row.part, *map(str, sizes), f"{row.num_kept}/{row.num_reference}"]


_SIZES = ("part", "B", "noisy", "text", "refs")
# Group -> its columns, as `table_rows` has them.
GROUPS: dict[str, tuple[str, ...]] = {
    "": (*_SIZES, "tokens"),
    "time, ms": ("ms", "+-", "p90", "p99", "spread", "first"),
    "operations": ("GFLOP", "TFLOP/s", "of peak"),
    "bytes": ("MB", "GB/s", "of peak"),
    "limit": ("roofline",),
    "memory": ("MB held",),
}
COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)
FIRST_COLUMNS = (*_SIZES, "ms", "+-", "p99", "TFLOP/s", "roofline", "MB held")


def profile_table(profile: Profile, *, is_wide: bool = False) -> str:
    """The table of a profile, with what it was measured on: within 100 columns, or all of it."""
    machine, peak = profile.machine, profile.peak
    columns = COLUMNS if is_wide else FIRST_COLUMNS
    places = [place for place, name in enumerate(COLUMNS) if name in columns]
    above = (
        f"{profile.engine['model']}, {profile.engine['precision']}, {profile.engine['backend']} "
        f"{profile.engine['backend_version']} on {machine['name']}, "
        f"{count(machine['threads'], 'thread')}; {machine['timer']}",
        f"peak {number(peak.tflops) or '?'} TFLOP/s, {number(peak.gb_s) or '?'} GB/s: "
        f"{peak.source}",
    )
    said = {
        "ms": f"median of {profile.settings['repeats']} interleaved rounds",
        "+-": f"its {_coverage(profile)} interval",
        "spread": "(p90 - p10) / median",
        "first": f"the first of {profile.settings['warmup']} warm-up rounds",
        "roofline": "share of the bound that the cost model sets",
    }
    below = ["; ".join(f"{name}: {text}" for name, text in said.items() if name in columns)]
    if not is_wide:
        below[0] += "; --wide shows every column"
    for geometry in profile.geometries:
        for name, item in ratios_of(profile, geometry).items():
            one = float(name == "scored")  # reported as the extra time
            figures = (
                f"{share(item.median - one)} [{share(item.low - one)}, {share(item.high - one)}]"
            )
            is_noisy = item.noise > profile.max_noise
            value = _RATIOS[name].format(_TOO_NOISY if is_noisy else figures)
            below.append(f"{profile.size_text(geometry)}: {value}")
    noisy = sum(row.statistics.noise > profile.max_noise for row in profile.rows)
    if noisy:
        below.append(
            f"{noisy} of {len(profile.rows)} rows are known no better than "
            f"+-{share(profile.max_noise)} and show no digits; raise --repeats or stop other work"
        )
    cells = [[row[place] for place in places] for row in table_rows(profile)]
    return "\n".join([broken(above), _rendered(columns, cells), broken(below)])


def _coverage(profile: Profile) -> str:
    return share(min(row.statistics.coverage for row in profile.rows))


def _rendered(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=_TABLE_WIDTH, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def broken(lines: Iterable[str]) -> str:
    """Lines of text, those that are too long for a terminal broken."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2))
        for line in lines
    )


def schedule_lines(estimates: Sequence[ScheduleEstimate], profile: Profile) -> list[str]:
    """Return lines on the predicted time of a schedule at each size."""
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
            kept = f"at most {kept} (the bound of tau; kept= or --report gives a picture's own)"
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
    return lines


def replay_lines(replays: Sequence[ReplayedRun]) -> list[str]:
    """Return lines that compare recorded runs with the predicted times."""
    lines = []
    for item in replays:
        lines.append(
            f"recorded run: {number(item.recorded_ms)} ms in its calls, "
            f"{number(item.estimated_ms)} ms by the profile "
            f"({item.estimated_ms / item.recorded_ms - 1:+.0%}), {number(item.full_ms)} ms over "
            f"the full context; {share(item.kept)} kept"
        )
        lines += [f"  not the same: {text}" for text in item.differs]
    return lines


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


PROJECTED = (*_SIZES, "ms", "range", "roofline", "measured", "error")


def projection_rows(projection: Projection) -> list[list[str]]:
    """The cells of a projection's table, under `PROJECTED`."""
    return [
        [
            *_size_cells(item.row),
            number(item.projected_ms),
            f"{number(item.low_ms)} to {number(item.high_ms)}",
            share(item.share),
            number(item.measured_ms) or "-",
            "not checked" if item.error is None else f"{item.error:+.0%}",
        ]
        for item in projection.rows
    ]


def projection_lines(projection: Projection) -> list[str]:
    """The peak that a projection is for, what it takes for granted, and how far it was off."""
    peak, worst = projection.target.peak, projection.worst_error
    lines = [f"{number(peak.tflops)} TFLOP/s, {number(peak.gb_s)} GB/s ({peak.source})"]
    lines += [f"assumed: {text}" for text in projection.assumptions]
    if worst is not None:
        lines.append(f"checked against the profile of that device: off by {share(worst)} at most")
    return lines


def projection_table(projection: Projection) -> str:
    """A projection with everything that it takes for granted."""
    peak, *below = projection_lines(projection)
    above = f"estimate for {projection.target.name}, {projection.target.precision}: {peak}"
    table = _rendered(PROJECTED, projection_rows(projection))
    return "\n".join([broken([above]), table, broken(below)])


def comparison_dict(comparison: ProfileComparison) -> dict[str, Any]:
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


COMPARED = (*_SIZES, "ms", "other", "ratio", "interval", "")


def comparison_rows(comparison: ProfileComparison) -> list[list[str]]:
    """The cells of a comparison's table, under `COMPARED`."""
    return [
        [
            *_size_cells(item.row),
            number(item.row.statistics.median),
            number(item.other.statistics.median),
            f"{item.ratio:.3f}",
            f"{item.low:.3f} to {item.high:.3f}",
            ("slower" if item.ratio > 1 else "faster") if item.exceeds_noise else "within noise",
        ]
        for item in comparison.differences
    ]


def comparison_lines(comparison: ProfileComparison) -> list[str]:
    """Return lines on drift of the machine, unlike facts and rows that one profile lacks."""
    lines = []
    if comparison.drift is not None:
        lines.append(
            f"the same matrix product took {comparison.drift:.3f} times as long here: the machine "
            "itself; what that alone explains is not called a difference"
        )
    lines += [f"differs: {text}" for text in comparison.notes]
    missing = len(comparison.only_here) + len(comparison.only_there)
    if missing:
        lines.append(f"{missing} rows are in one of the two only")
    return lines


def comparison_table(comparison: ProfileComparison) -> str:
    """Two profiles, with what lies beyond noise."""
    table = _rendered(COMPARED, comparison_rows(comparison))
    return "\n".join([table, *filter(None, [broken(comparison_lines(comparison))])])


def _named(row: Row) -> dict[str, Any]:
    return {
        "part": row.part,
        "batch": row.batch,
        "noisy": row.num_noisy,
        "text": row.num_text,
        "reference": row.num_reference,
        "kept": row.num_kept,
    }
