"""A profile as one self-contained page: tables and plots; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.engines.cost.flops import CallSize
from ditrim.runtime import page
from ditrim.runtime.profiling import text
from ditrim.runtime.profiling.profile import Profile
from ditrim.runtime.profiling.run_cost import (
    ReplayedRun,
    RunSchedule,
    ScheduleEstimate,
    StepTimes,
    estimate_schedule,
)
from ditrim.runtime.profiling.text import count, number, share

if TYPE_CHECKING:
    from ditrim.runtime.profiling.projection import ProfileComparison, Projection

TEMPLATE = Path(__file__).with_name("page.html")
_DEFAULT = RunSchedule(steps=40, interval=10, kept=0.5)
_COLOURS = {
    "FRONT": "#4269d0",
    "BACK": "#3a9e8f",
    "scoring": "#d63c4f",
    "selection": "#e07b00",
    "gather": "#a05bb5",
    "scheduler": "#8a6a4f",
    "runtime": "#777777",
}


def draw_page(
    profile: Profile,
    estimates: Sequence[ScheduleEstimate],
    replays: Sequence[ReplayedRun],
    projection: Projection | None,
    projected: Sequence[ScheduleEstimate],
    comparison: ProfileComparison | None,
) -> str:
    """The HTML of a profile's page.

    Args:
        profile: what was measured.
        estimates: of schedules that were asked for; without any, plots take 40 steps at interval
            10.
        replays: of a recorded run.
        projection, projected, comparison: shown where they are.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    by_geometry = {estimate.geometry: estimate for estimate in estimates}
    sections = []
    for index, geometry in enumerate(profile.geometries):
        estimate = by_geometry.get(geometry)
        is_asked = estimate is not None
        if estimate is None:
            schedule = estimates[0].schedule if estimates else _DEFAULT
            estimate = estimate_schedule(profile, geometry, schedule)
        sections.append(
            {
                "title": profile.size_text(geometry),
                "plots": draw_plots(profile, geometry, estimate, salt=f"profile {index}"),
                "schedule": _schedule([estimate], profile),
                "is_asked": is_asked,
            }
        )
    return page.render(
        TEMPLATE,
        profile=profile,
        facts=_facts(profile),
        groups=text.GROUPS,
        columns=text.COLUMNS,
        rows=text.table_rows(profile),
        sections=sections,
        replays="\n".join(text.replay_lines(replays)),
        projection=projection,
        projected_columns=text.PROJECTED,
        projection_rows=text.projection_rows(projection) if projection else [],
        projection_lines=text.projection_lines(projection) if projection else [],
        projected=_schedule(projected, projection.profile) if projection else "",
        compared_columns=text.COMPARED,
        comparison_rows=text.comparison_rows(comparison) if comparison else [],
        comparison_lines=text.comparison_lines(comparison) if comparison else [],
        share=share,
    )


def _schedule(estimates: Sequence[ScheduleEstimate], profile: Profile) -> str:
    return "\n".join(text.schedule_lines(estimates, profile))


def _facts(profile: Profile) -> list[tuple[str, str]]:
    engine, machine, peak = profile.engine, profile.machine, profile.peak
    products = [row for row in profile.rows if row.part == "product"]
    noise = ", ".join(f"+-{share(row.statistics.noise)}" for row in products) or "not measured"
    return [
        ("engine set", f"{engine['model']} {engine['identity'][:12]}, {engine['precision']}"),
        ("backend", f"{engine['backend']} {engine['backend_version']}"),
        (
            "machine",
            f"{machine['name']}, {count(machine['cores'], 'core')}, "
            f"{count(machine['threads'], 'thread')}",
        ),
        ("timed by", str(machine.get("timer", ""))),
        ("clocks", _spoken(machine.get("clocks"))),
        ("load", _spoken(machine.get("load"))),
        ("noise of a plain matrix product", noise),
        ("memory", str(machine.get("memory", ""))),
        (
            "peak",
            f"{number(peak.tflops) or '?'} TFLOP/s, {number(peak.gb_s) or '?'} GB/s: {peak.source}",
        ),
        ("rounds", f"{profile.settings['repeats']}, interleaved"),
        ("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        ("measured", profile.created),
    ]


def _spoken(value: Any) -> str:
    """Nested plain values in words: `before: mhz: 2596, 2596; after: ...`."""
    if isinstance(value, dict):
        separator = "; " if any(isinstance(item, dict) for item in value.values()) else ", "
        names = {"mhz": "MHz"}
        return separator.join(
            f"{names.get(key, key)}: {_spoken(item)}" for key, item in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_spoken, value))
    return "not known" if value is None else str(value)


def draw_plots(
    profile: Profile,
    geometry: tuple[int, int, int, int],
    estimate: ScheduleEstimate,
    salt: str,
) -> list[dict[str, str]]:
    """Latency against length, where a step's time goes, speed-up against the kept share, as SVG."""
    with page.drawing(salt):
        return [
            {"title": "Latency against length", "svg": _draw_latency(profile, geometry)},
            {"title": "Where a step's time goes", "svg": _draw_parts(profile, geometry)},
            {"title": "Speed-up against the kept share", "svg": _draw_speedup(estimate)},
        ]


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True)
    return figure, axes


def _legend_above(axes: Any, columns: int) -> None:
    """Where no line can run through it."""
    axes.legend(
        frameon=False,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        columnspacing=1.2,
        handlelength=1.5,
    )


def _draw_latency(profile: Profile, geometry: tuple[int, int, int, int]) -> str:
    batch, noisy, num_text, _ = geometry
    figure, axes = _figure(3.6)
    backs = profile.backs(geometry)
    xs = [row.num_kept for row in backs]
    statistics = [row.statistics for row in backs]
    axes.fill_between(
        xs,
        [item.low for item in statistics],
        [item.high for item in statistics],
        color=_COLOURS["BACK"],
        alpha=0.2,
        lw=0,
    )
    axes.plot(
        xs, [item.median for item in statistics], "o-", ms=4, color=_COLOURS["BACK"], label="BACK"
    )
    for part, label, colour in (
        ("anchor", "BACK, scored", _COLOURS["scoring"]),
        ("front", "FRONT", _COLOURS["FRONT"]),
    ):
        row = profile.find(part, geometry)
        if row is not None:
            found = row.statistics
            errors = [[found.median - found.low], [found.high - found.median]]
            axes.errorbar(
                [row.num_kept], [found.median], errors, fmt="D", ms=5, color=colour, label=label
            )
    cost = profile.model_cost
    lengths = sorted({max(1, round(xs[-1] * step / 60)) for step in range(61)})
    bounds = [
        profile.peak.roofline_ms(
            cost.back(
                CallSize(num_noisy=noisy, num_reference=length, num_text=num_text, batch=batch),
                num_rows=1,
            )
        )
        for length in lengths
    ]
    if None not in bounds:
        axes.plot(lengths, bounds, "--", color=page.FAINT, label="roofline of BACK")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("reference tokens that BACK runs on")
    axes.set_ylabel("ms: median and its interval")
    _legend_above(axes, 2)
    return page.svg(figure)


def step_parts(
    profile: Profile, geometry: tuple[int, int, int, int]
) -> dict[str, dict[str, float]]:
    """Kind of step -> part -> milliseconds, for a full step, an anchor and each rung."""
    times = StepTimes(profile, geometry)
    shared = {"FRONT": times.front, "scheduler": times.scheduler, "runtime": times.overhead}
    found = {
        "full context": {**shared, "BACK": times.full_back},
        "anchor": {
            **shared,
            "BACK": min(times.full_back, times.anchor_back),
            "scoring": max(0.0, times.anchor_back - times.full_back),
            "selection": times.selection,
        },
    }
    for row in reversed(profile.backs(geometry)):
        if row.num_kept < geometry[3]:
            gather = profile.find("gather", geometry, row.num_kept)
            found[f"reduced, {row.num_kept}"] = {
                **shared,
                "BACK": row.statistics.median,
                "gather": 0.0 if gather is None else gather.statistics.median,
            }
    return found


def _draw_parts(profile: Profile, geometry: tuple[int, int, int, int]) -> str:
    steps = step_parts(profile, geometry)
    figure, axes = _figure(1.2 + 0.27 * len(steps))
    names = list(steps)[::-1]
    ends = dict.fromkeys(names, 0.0)
    for part, colour in _COLOURS.items():
        widths = [steps[name].get(part, 0.0) for name in names]
        if any(widths):
            axes.barh(
                names, widths, left=[ends[n] for n in names], color=colour, label=part, height=0.7
            )
        for name, width in zip(names, widths, strict=True):
            ends[name] += width
    axes.bar_label(
        axes.containers[-1], [number(ends[name]) for name in names], padding=3, fontsize=9
    )
    axes.margins(x=0.1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms, medians; reduced steps by their reference tokens")
    _legend_above(axes, 4)
    return page.svg(figure)


def _draw_speedup(estimate: ScheduleEstimate) -> str:
    from matplotlib.ticker import PercentFormatter

    figure, axes = _figure(3.6)
    shares = [point[0] for point in estimate.curve]
    axes.plot(
        shares, [p[1] for p in estimate.curve], color=_COLOURS["BACK"], label="by the profile"
    )
    axes.plot(shares, [p[2] for p in estimate.curve], "--", color=page.FAINT, label="by operations")
    axes.axhline(1.0, color=page.FAINT, lw=1)
    low, middle, high = estimate.speedup
    axes.errorbar(
        [estimate.schedule.kept],
        [middle],
        [[max(0.0, middle - low)], [max(0.0, high - middle)]],
        fmt="o",
        ms=5,
        color=_COLOURS["scoring"],
        label="at most kept, by tau" if estimate.schedule.kept_is_bound else "kept share asked for",
    )
    if estimate.break_even_kept is not None and estimate.break_even_kept < 1:
        axes.axvline(
            estimate.break_even_kept, color=_COLOURS["selection"], lw=1, label="break-even"
        )
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(
        f"reference tokens kept; {estimate.schedule.steps} steps, "
        f"{estimate.schedule.anchors_in_words()}"
    )
    axes.set_ylabel("times as fast as the full context")
    _legend_above(axes, 2)
    return page.svg(figure)
