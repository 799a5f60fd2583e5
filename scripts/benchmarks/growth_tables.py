"""Markdown tables and the figure of what bench_growth.py measured.

Times are compared in units of a plain matrix product that was timed in the same process. An
exponent is the slope of log measured against log predicted, by least squares over an axis: 1 is
growth as predicted. "Last" is the slope between the two largest points, where constants weigh
least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

MB = 1e6
AXES = {
    "both": "G = C",
    "noisy": "G",
    "reference": "C",
    "text": "T",
    "batch": "B",
    "shared": "references of one total length",
    "added": "references of one length",
    "width": "G = C at d = 3072",
}
_CLEAR_SHARE = 0.03
STEP, ANCHOR, SCORING = "step", "anchor step", "scoring"
PARTS = {"front": "FRONT", "back": "BACK", "reduced": "reduced BACK", SCORING: SCORING}


def samples_of(entry: dict[str, Any], part: str) -> list[float]:
    """Milliseconds of a part in every round; of scoring, paired differences."""
    rounds = entry["samples_ms"]
    if part == STEP:
        return [a + b for a, b in zip(rounds["front"], rounds["back"], strict=True)]
    if part == ANCHOR:
        return [a + b for a, b in zip(rounds["front"], rounds["anchor"], strict=True)]
    if part == SCORING:
        return [a - b for a, b in zip(rounds["anchor"], rounds["back"], strict=True)]
    return rounds[part]


def median_ms(entry: dict[str, Any], part: str) -> float:
    """Over rounds."""
    return statistics.median(samples_of(entry, part))


def work_of(entry: dict[str, Any], part: str) -> float:
    """A part's time in plain matrix products of the same process."""
    return median_ms(entry, part) / entry["product_ms"]


def size_of(point: dict[str, Any]) -> Any:
    """The lengths of a call."""
    from ditrim.engines.cost.flops import CallSize

    return CallSize(
        num_noisy=point["noisy"],
        num_reference=sum(point["references"]),
        num_text=point["text"],
        batch=point["batch"],
    )


def cost_of(model: dict[str, Any]) -> Any:
    """The cost model of what was measured, as it is now."""
    from ditrim.engines.cost.cost import ModelCost

    return ModelCost(**model)


def flops_of(entry: dict[str, Any], part: str) -> int:
    """What the cost model counts."""
    cost, size = cost_of(entry["model"]), size_of(entry["point"])
    front, back = cost.front(size).flops, cost.back(size, num_rows=1).flops
    anchor = cost.back(size, num_rows=size.num_noisy).flops
    if part == "reduced":
        size = replace(size, num_reference=entry["num_kept"])
        return cost.back(size, num_rows=1).flops
    return {
        "front": front,
        "back": back,
        "anchor": anchor,
        STEP: front + back,
        ANCHOR: front + anchor,
        SCORING: anchor - back,
    }[part]


def run_flops(entry: dict[str, Any]) -> int:
    """What the cost model counts for a run of reduced steps and anchors."""
    cost, size = cost_of(entry["model"]), size_of(entry["point"])
    reduced = replace(size, num_reference=entry["num_kept"])
    anchors, others = entry["anchors"], entry["steps"] - entry["anchors"]
    return (
        entry["steps"] * cost.front(size).flops
        + anchors * cost.back(size, num_rows=size.num_noisy).flops
        + others * cost.back(reduced, num_rows=1).flops
    )


def predicted_bytes(entry: dict[str, Any]) -> int:
    """What `build-engine --dry-run` expects the graphs and what goes between them to take."""
    from ditrim.engines.cost.memory import activation_bytes, seam_bytes

    model, size = entry["model"], size_of(entry["point"])
    config, architecture, precision = model["config"], model["architecture"], model["precision"]

    def activations(layers: range, num_rows: int) -> int:
        return activation_bytes(
            config,
            architecture,
            layers,
            size,
            backend=model["backend"],
            precision=precision,
            num_rows=num_rows,
            num_scored=model["num_scored"],
        )

    front = activations(range(model["front_depth"]), 0)
    anchor = activations(range(model["front_depth"], model["num_layers"]), size.num_noisy)
    seam = seam_bytes(config, architecture, size, precision=precision)
    return max(front, anchor) + seam


def front_bytes(entry: dict[str, Any]) -> int:
    """What FRONT's first run took besides what was there."""
    added = entry["added_bytes"]["front"]
    return added["peak"] - added["before"]


def slope(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Of log y on log x; none where x does not change or something is not above 0."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    if len(logs) < 2 or max(x for x, _ in logs) - min(x for x, _ in logs) < 1e-3:
        return None
    mean_x = statistics.fmean(x for x, _ in logs)
    mean_y = statistics.fmean(y for _, y in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum(
        (x - mean_x) ** 2 for x, _ in logs
    )


def measured(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that were not given up."""
    return [point for point in points if "stopped_at_bytes" not in point]


def exponents(points: Sequence[dict[str, Any]], part: str) -> tuple[float | None, float | None]:
    """Of a part's time against its operations: over the axis, and between the last two points.

    Scoring is a difference of two times: only points where it is no noise count.
    """
    pairs = [
        (flops_of(point, part), work_of(point, part))
        for point in measured(points)
        if part != SCORING or is_scoring_clear(point)
    ]
    return slope(pairs), slope(pairs[-2:])


def is_scoring_clear(entry: dict[str, Any]) -> bool:
    """Whether scoring takes so much of BACK that a difference tells it."""
    return median_ms(entry, SCORING) >= _CLEAR_SHARE * median_ms(entry, "back")


def memory_exponents(points: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The same of what a call adds to the resident memory, against the estimate."""
    pairs = [(predicted_bytes(point), point["most_added_bytes"]) for point in measured(points)]
    return slope(pairs), slope(pairs[-2:])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; a dash where there is none."""
    if value is None:
        return "-"
    if value and abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def size_text(num_bytes: float) -> str:
    """In MB, or in GB from one on."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / MB:.0f} MB"


def call_table(axis: str, points: Sequence[dict[str, Any]]) -> str:
    """Times of an axis; those of a step against its first point."""
    first, rows = points[0], []
    for point in points:
        if "stopped_at_bytes" in point:
            stop = f"given up at {size_text(point['stopped_at_bytes'])}"
            rows.append([point["value"], stop, *[""] * 9])
            continue
        predicted = flops_of(point, STEP) / flops_of(first, STEP)
        ratio = work_of(point, STEP) / work_of(first, STEP)
        rows.append(
            [
                point["value"],
                number(median_ms(point, STEP)),
                number(predicted),
                number(ratio),
                number(ratio / predicted),
                number(rate_of(point, STEP)),
                number(median_ms(point, SCORING)) if is_scoring_clear(point) else "noise",
                number(rate_of(point, SCORING)) if is_scoring_clear(point) else "",
                number(reduced_ratio(point)),
                number(point["product_ms"]),
                f"{point['rounds']}{', cold' if point['is_cold'] else ''}",
            ]
        )
    head = [AXES[axis], "step, ms", "predicted", "measured", "ratio", "rate",
            "scoring, ms", "rate", "half of C", "product, ms", "rounds"]  # fmt: skip
    return table(head, rows)


def rate_of(entry: dict[str, Any], part: str) -> float:
    """Operations a second, as a share of the plain product's."""
    from ditrim.runtime.profiling.product import PRODUCT_COST

    return flops_of(entry, part) / PRODUCT_COST.flops / work_of(entry, part)


def reduced_ratio(entry: dict[str, Any]) -> float:
    """What BACK at half of the references takes of BACK's time, over what is predicted."""
    measured_share = median_ms(entry, "reduced") / median_ms(entry, "back")
    return measured_share * flops_of(entry, "back") / flops_of(entry, "reduced")


def memory_table(axis: str, points: Sequence[dict[str, Any]]) -> str:
    """Memory of an axis; a graph's activations lie in the arena that the other one left."""
    rows = []
    for point in measured(points):
        predicted = predicted_bytes(point)
        most = point["most_added_bytes"]
        rows.append(
            [
                point["value"],
                size_text(front_bytes(point)),
                size_text(most),
                size_text(predicted),
                number(most / predicted),
                size_text(point["held_bytes"]),
                size_text(point["held_bytes"] + most),
            ]
        )
    head = [AXES[axis], "FRONT adds", "call adds", "estimate", "ratio", "held before", "process"]
    return table(head, rows)


def exponent_table(result: dict[str, Any]) -> str:
    """All axes, all parts."""
    rows = []
    for axis, title in AXES.items():
        points = measured(result.get(axis, []))
        if len(points) < 2:
            continue
        cells = [title, f"{points[0]['value']} to {points[-1]['value']}"]
        for part in PARTS:
            cells.append(_pair(exponents(points, part)))
        cells.append(_pair(memory_exponents(points)))
        rows.append(cells)
    return table(["axis", "values", *PARTS.values(), "memory"], rows)


def _pair(found: tuple[float | None, float | None]) -> str:
    if found[0] is None:
        return "-"
    return f"{found[0]:.2f} (last {number(found[1])})"


def runtime_rows(entry: dict[str, Any]) -> list[tuple[str, dict[int, float], float, float]]:
    """(part, milliseconds by length, exponent, exponent of the last two) against the length."""
    found = []
    for part, by_length in entry["samples_ms"].items():
        medians = {int(length): statistics.median(ms) for length, ms in by_length.items()}
        pairs = sorted(medians.items())
        found.append((part, medians, slope(pairs) or 0.0, slope(pairs[-2:]) or 0.0))
    return found


def runtime_table(entry: dict[str, Any]) -> str:
    """The runtime's own parts."""
    rows = runtime_rows(entry)
    lengths = sorted(rows[0][1])
    head = ["part", *(f"{length}, ms" for length in lengths), "exponent", "last"]
    return table(
        head,
        [
            [part, *(number(ms[length]) for length in lengths), f"{all_:.2f}", f"{last:.2f}"]
            for part, ms, all_, last in rows
        ],
    )


def steps_table(points: Sequence[dict[str, Any]]) -> str:
    """Runs of several lengths."""
    first, rows = points[0], []
    for point in points:
        predicted = run_flops(point) / run_flops(first)
        ratio = point["run_ms"] / point["product_ms"] / (first["run_ms"] / first["product_ms"])
        outside = None
        if "wall_ms" in point:
            outside = 100 * (1 - point["run_ms"] / point["wall_ms"])
        rows.append(
            [
                point["value"],
                point["anchors"],
                number(point["run_ms"]),
                number(predicted),
                number(ratio),
                number(ratio / predicted),
                "-" if outside is None else f"{outside:.1f} %",
                size_text(point["peak_bytes"] - point["held_bytes"]),
            ]
        )
    head = ["steps", "anchors", "run, ms", "predicted", "measured", "ratio",
            "outside model calls", "memory added"]  # fmt: skip
    return table(head, rows)


def memory_along(entry: dict[str, Any], what: str) -> str:
    """Resident memory after so many steps or requests, over what it was at the start."""
    marks = sorted((int(mark), value) for mark, value in entry["added_bytes"].items())
    head = [what, *(str(mark) for mark, _ in marks), "a piece, second half"]
    cells = ["resident, MB", *(f"{value / MB:+.2f}" for _, value in marks)]
    return table(head, [[*cells, f"{bytes_each(entry) / 1e3:+.2f} kB"]])


def bytes_each(entry: dict[str, Any]) -> float:
    """What a step or request left behind, on the mean over the later half of them."""
    marks = sorted((int(mark), value) for mark, value in entry["added_bytes"].items())
    last = marks[-1]
    middle = next(mark for mark in marks if mark[0] >= last[0] / 2)
    return (last[1] - middle[1]) / (last[0] - middle[0])


def rungs_table(points: Sequence[dict[str, Any]]) -> str:
    """Sets of several rungs."""
    return table(
        ["rungs", "load, ms", "step at half, ms", "step, products", "loaded", "after all rungs"],
        [
            [
                point["value"],
                number(statistics.median(point["load_ms"])),
                number(statistics.median(point["step_ms"])),
                number(statistics.median(point["step_ms"]) / point["product_ms"]),
                size_text(point["loaded_bytes"]),
                size_text(point["served_bytes"]),
            ]
            for point in points
        ],
    )


def operators_table(points: Sequence[dict[str, Any]]) -> str:
    """Operators of a call's five graph runs at the first and the last length."""
    first, last = points[0], points[-1]
    scale = last["value"] / first["value"]
    total = sum(entry["ms"] for entry in last["operators"].values())
    rows = []
    for name, entry in sorted(last["operators"].items(), key=lambda item: -item[1]["ms"]):
        before = first["operators"].get(name)
        if entry["ms"] < 0.002 * total:
            continue
        exponent = None
        if before and before["ms"] > 0 and scale > 1:
            exponent = math.log(entry["ms"] / before["ms"]) / math.log(scale)
        rows.append(
            [
                name,
                number(before["ms"] if before else None),
                number(entry["ms"]),
                number(exponent),
                size_text(before["largest_output_bytes"] if before else 0),
                size_text(entry["largest_output_bytes"]),
            ]
        )
    head = ["operator", f"{first['value']}, ms", f"{last['value']}, ms", "exponent",
            f"largest output, {first['value']}", f"{last['value']}"]  # fmt: skip
    return table(head, rows)


def document(result: dict[str, Any]) -> str:
    """All tables that the result has figures for."""
    parts = []
    axes = {axis: result[axis] for axis in AXES if result.get(axis)}
    if axes:
        parts += ["## Exponents", exponent_table(result)]
    for axis, points in axes.items():
        if "stopped_at_bytes" in points[0]:
            parts += [f"## {AXES[axis]}", "Every point was given up for its memory."]
            continue
        parts += [f"## {AXES[axis]}", call_table(axis, points), memory_table(axis, points)]
    if result.get("runtime"):
        parts += ["## Runtime, without the engines", runtime_table(result["runtime"])]
    if result.get("steps"):
        parts += ["## Steps", steps_table(result["steps"])]
        long_run = next((p for p in result["steps"] if p["added_bytes"]), None)
        if long_run:
            parts.append(memory_along(long_run, "steps"))
    if result.get("requests"):
        parts += ["## Requests", memory_along(result["requests"], "requests")]
    if result.get("rungs"):
        parts += ["## Rungs", rungs_table(result["rungs"])]
    if result.get("operators"):
        parts += ["## Operators", operators_table(result["operators"])]
    return "\n\n".join(parts)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What decides, for one line of JSON."""
    found: dict[str, Any] = {}
    for axis in AXES:
        points = measured(result.get(axis, []))
        if len(points) > 1:
            found[axis] = {
                part: _rounded(exponents(points, part)) for part in (STEP, ANCHOR, SCORING)
            }
            found[axis]["memory"] = _rounded(memory_exponents(points))
    if result.get("runtime"):
        found["runtime"] = {
            part: _rounded((all_, last)) for part, _, all_, last in runtime_rows(result["runtime"])
        }
    if result.get("steps"):
        pairs = [(run_flops(p), p["run_ms"] / p["product_ms"]) for p in result["steps"]]
        found["steps"] = {"run": _rounded((slope(pairs), slope(pairs[-2:])))}
        found["steps"]["bytes_each"] = [
            round(bytes_each(p)) for p in result["steps"] if p["added_bytes"]
        ]
    if result.get("requests"):
        found["requests"] = {"bytes_each": round(bytes_each(result["requests"]))}
    return found


def _rounded(found: tuple[float | None, float | None]) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in found]


def draw(result: dict[str, Any], target: Path) -> None:
    """Time against operations and memory against the estimate, every axis a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.6))
    axes = {axis: measured(result[axis]) for axis in AXES if result.get(axis)}
    for axis, points in axes.items():
        colour = None
        for part, style in ((STEP, "o-"), (SCORING, "s:")):
            shown = [point for point in points if part == STEP or is_scoring_clear(point)]
            (line,) = times.loglog(
                [flops_of(point, part) / 1e12 for point in shown],
                [work_of(point, part) for point in shown],
                style,
                markersize=4,
                color=colour,
                label=AXES[axis] if part == STEP else None,
            )
            colour = line.get_color()
        memory.loglog(
            [predicted_bytes(point) / 1e9 for point in points],
            [point["most_added_bytes"] / 1e9 for point in points],
            marker="o", markersize=4, label=AXES[axis],
        )  # fmt: skip
    product = 2 * 1024**3 / 1e12
    ends = [min(flops_of(p, SCORING) for ps in axes.values() for p in ps) / 1e12,
            max(flops_of(p, STEP) for ps in axes.values() for p in ps) / 1e12]  # fmt: skip
    times.loglog(ends, [end / product for end in ends], color="#999999", linewidth=1, zorder=0)
    sizes = [predicted_bytes(p) / 1e9 for ps in axes.values() for p in ps]
    memory.loglog([min(sizes), max(sizes)], [min(sizes), max(sizes)], color="#999999",
                  linewidth=1, zorder=0)  # fmt: skip
    times.set(
        xlabel="operations, 10^12, by the cost model",
        ylabel="time, in plain matrix products of 1024^3",
        title="full step (line), scoring (dots); grey: as fast as the product",
    )
    memory.set(
        xlabel="memory of a call by the estimate, GB",
        ylabel="measured, GB",
        title="memory of a call; grey: as estimated",
    )
    times.title.set_fontsize(10)
    memory.title.set_fontsize(10)
    times.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)
