"""Tables and the figure of what bench_growth.py measured: how fast figures grow.

Times are compared in units of a plain matrix product that was timed in the same process. An
exponent is the slope of log measured against log predicted, by least squares over an axis: 1 is
growth as predicted. "Last" is the slope between the two largest points, where constants weigh
least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.tables import MEGABYTE, Section, number, size_text
from ditrim.engines.cost.cost import Peak
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.memory import activation_bytes, seam_bytes
from ditrim.runtime.profiling.product import PRODUCT_COST
from ditrim.runtime.profiling.profile import Profile, Row

FORMAT, VERSION = "ditrim-growth", 2
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
PARTS = {"front": "FRONT", "back": "BACK", "reduced": "reduced BACK", SCORING: "scoring"}
Exponents = tuple[float | None, float | None]  # over an axis, between its last two points


class Point:
    """A call of one size: its profile, and the memory that it took."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry, self.value = entry, entry["value"]
        profile = entry["profile"]
        rows = tuple(
            Row(**row | {name: tuple(row[name]) for name in ("samples_ms", "warmup_ms")})
            for row in profile["rows"]
        )
        self.profile = Profile(**profile | {"peak": Peak(**profile["peak"]), "rows": rows})

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The rows of FRONT, BACK in full and reduced, and of the anchor."""
        [geometry] = self.profile.geometries
        backs = self.profile.backs(geometry)
        found = {"back": backs[-1], "reduced": backs[0]}
        for part in ("front", "anchor"):
            row = self.profile.find(part, geometry)
            assert row is not None
            found[part] = row
        return found

    def of(self, part: str, value: Callable[[Row], Any]) -> Any:
        """A value of a part; the sum of two rows, or for scoring their difference."""
        rows = {name: value(row) for name, row in self.rows.items()}
        if part == SCORING:
            return rows["anchor"] - rows["back"]
        if part in (STEP, ANCHOR):
            return rows["front"] + rows["back" if part == STEP else "anchor"]
        return rows[part]

    def flops(self, part: str) -> int:
        """Operations of a part by the cost model."""
        return int(self.of(part, lambda row: row.flops))

    def median_ms(self, part: str) -> float:
        """The median over rounds; of scoring, of paired differences."""
        rounds = range(len(self.rows["front"].samples_ms))
        return statistics.median(self.of(part, lambda row, i=i: row.samples_ms[i]) for i in rounds)

    def work(self, part: str) -> float:
        """A part's time in plain matrix products of the same process."""
        return self.median_ms(part) / float(self.entry["product_ms"])

    def rate(self, part: str) -> float:
        """Operations a second, as a share of the plain product's."""
        return self.flops(part) / PRODUCT_COST.flops / self.work(part)

    @property
    def is_scoring_clear(self) -> bool:
        """Whether scoring takes so much of BACK that a difference of times measures it."""
        return self.median_ms(SCORING) >= _CLEAR_SHARE * self.median_ms("back")

    @property
    def reduced_ratio(self) -> float:
        """BACK's time at half of the references over its full time, divided by the prediction."""
        measured_share = self.median_ms("reduced") / self.median_ms("back")
        return measured_share * self.flops("back") / self.flops("reduced")

    @property
    def predicted_bytes(self) -> int:
        """Bytes that `build-engine --dry-run` predicts for graphs and what goes between them."""
        engine, row = self.profile.engine, self.rows["front"]
        names = ("num_noisy", "num_reference", "num_text", "batch")
        size = CallSize(**{name: getattr(row, name) for name in names})
        model = engine["config"], engine["architecture"]
        depth, precision = engine["front_depth"], engine["precision"]
        options = {"backend": engine["backend"], "precision": precision}
        front = activation_bytes(*model, range(depth), size, **options)
        anchor = activation_bytes(
            *model,
            range(depth, engine["num_layers"]),
            size,
            **options,
            num_rows=size.num_noisy,
            num_scored=engine["num_scored"],
        )
        return max(front, anchor) + seam_bytes(*model, size, precision=precision)


def points_of(entries: Sequence[dict[str, Any]]) -> list[Point]:
    """Points that were not given up."""
    return [Point(entry) for entry in entries if "stopped_at_bytes" not in entry]


def slope(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The slope of log y on log x; none where x does not change or something is not above 0."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    if len(logs) < 2 or max(x for x, _ in logs) - min(x for x, _ in logs) < 1e-3:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def fitted(pairs: Sequence[tuple[float, float]]) -> Exponents:
    """The exponents of measured against predicted."""
    return slope(pairs), slope(pairs[-2:])


def exponents(points: Sequence[Point], part: str) -> Exponents:
    """The exponents of a part's time against its operations.

    Scoring is a difference of two times: only points where it is no noise count.
    """
    shown = [point for point in points if part != SCORING or point.is_scoring_clear]
    return fitted([(point.flops(part), point.work(part)) for point in shown])


def memory_exponents(points: Sequence[Point]) -> Exponents:
    """The exponents of what a call adds to the resident memory, against the estimate."""
    return fitted([(p.predicted_bytes, p.entry["most_added_bytes"]) for p in points])


def sections(result: dict[str, Any]) -> Iterator[Section]:
    """All tables that the result has figures for."""
    axes = {axis: result[axis] for axis in AXES if result.get(axis)}
    if axes:
        yield _exponents({axis: points_of(entries) for axis, entries in axes.items()})
    for axis, entries in axes.items():
        if not (points := points_of(entries)):
            yield Section(title=AXES[axis], notes=("Every point was given up for its memory.",))
            continue
        yield _calls(axis, entries, points[0])
        yield _memory(axis, points)
    for axis, make in _OTHERS.items():
        if result.get(axis):
            yield from make(result[axis])


def _exponents(axes: dict[str, list[Point]]) -> Section:
    rows = []
    for axis, points in axes.items():
        if len(points) > 1:
            found = [*(exponents(points, part) for part in PARTS), memory_exponents(points)]
            values = f"{points[0].value} to {points[-1].value}"
            rows.append([AXES[axis], values, *map(_pair, found)])
    return Section(
        title="Exponents", columns=("axis", "values", *PARTS.values(), "memory"), rows=rows
    )


def _pair(found: Exponents) -> str:
    return "-" if found[0] is None else f"{found[0]:.2f} (last {number(found[1])})"


def _calls(axis: str, entries: Sequence[dict[str, Any]], first: Point) -> Section:
    """Times of an axis; those of a step against its first point."""
    columns = (AXES[axis], "step, ms", "predicted", "measured", "ratio", "rate", "scoring, ms",
               "rate", "half of C", "product, ms", "rounds")  # fmt: skip
    rows: list[list[object]] = []
    for entry in entries:
        if "stopped_at_bytes" in entry:
            stop = f"given up at {size_text(entry['stopped_at_bytes'])}"
            rows.append([entry["value"], stop, *[""] * (len(columns) - 2)])
            continue
        point = Point(entry)
        settings = point.profile.settings
        predicted = point.flops(STEP) / first.flops(STEP)
        ratio = point.work(STEP) / first.work(STEP)
        is_clear = point.is_scoring_clear
        rows.append(
            [
                point.value,
                *map(number, (point.median_ms(STEP), predicted, ratio, ratio / predicted)),
                number(point.rate(STEP)),
                number(point.median_ms(SCORING)) if is_clear else "noise",
                number(point.rate(SCORING)) if is_clear else "",
                number(point.reduced_ratio),
                number(entry["product_ms"]),
                f"{settings['repeats']}{'' if settings['warmup'] else ', cold'}",
            ]
        )
    return Section(title=AXES[axis], columns=columns, rows=rows)


def _memory(axis: str, points: Sequence[Point]) -> Section:
    """Memory of an axis; a graph's activations lie in the arena that the other one left."""
    rows = []
    for point in points:
        front, most, held = (
            point.entry[f"{name}_bytes"] for name in ("front_added", "most_added", "held")
        )
        predicted = point.predicted_bytes
        sizes = [size_text(value) for value in (front, most, predicted, held, held + most)]
        rows.append([point.value, *sizes[:3], number(most / predicted), *sizes[3:]])
    columns = (AXES[axis], "FRONT adds", "call adds", "estimate", "ratio", "held before", "process")
    return Section(columns=columns, rows=rows)


def runtime_rows(entry: dict[str, Any]) -> Iterator[tuple[str, dict[int, float], Exponents]]:
    """(part, milliseconds by length, exponents against the length)."""
    for part, by_length in entry["samples_ms"].items():
        medians = sorted((int(length), statistics.median(ms)) for length, ms in by_length.items())
        yield part, dict(medians), fitted(medians)


def _runtime(entries: Sequence[dict[str, Any]]) -> Iterator[Section]:
    found = list(runtime_rows(entries[0]))
    columns = ("part", *(f"{length}, ms" for length in found[0][1]), "exponent", "last")
    yield Section(
        title="Runtime, without the engines",
        columns=columns,
        rows=[
            [part, *map(number, medians.values()), *(f"{value or 0:.2f}" for value in both)]
            for part, medians, both in found
        ],
    )


def _steps(entries: Sequence[dict[str, Any]]) -> Iterator[Section]:
    """Runs of several lengths, and memory along the longest."""
    first, rows = entries[0], []
    for entry in entries:
        predicted = entry["flops"] / first["flops"]
        ratio = entry["run_ms"] / entry["product_ms"] / (first["run_ms"] / first["product_ms"])
        outside = 100 * (1 - entry["run_ms"] / entry["wall_ms"]) if "wall_ms" in entry else None
        rows.append(
            [
                entry["value"],
                entry["anchors"],
                *map(number, (entry["run_ms"], predicted, ratio, ratio / predicted)),
                "-" if outside is None else f"{outside:.1f} %",
                size_text(entry["peak_bytes"] - entry["held_bytes"]),
            ]
        )
    columns = ("steps", "anchors", "run, ms", "predicted", "measured", "ratio",
               "outside model calls", "memory added")  # fmt: skip
    yield Section(title="Steps", columns=columns, rows=rows)
    for entry in entries:
        if entry["added_bytes"]:
            yield _memory_along(entry, "steps")


def _requests(entries: Sequence[dict[str, Any]]) -> Iterator[Section]:
    yield _memory_along(entries[0], "requests", title="Requests")


def _memory_along(entry: dict[str, Any], what: str, title: str = "") -> Section:
    """Resident memory after so many steps or requests, over what it was at the start."""
    marks = _marks(entry)
    cells = [f"{value / MEGABYTE:+.2f}" for _, value in marks]
    return Section(
        title=title,
        columns=(what, *(str(mark) for mark, _ in marks), "a piece, second half"),
        rows=[["resident, MB", *cells, f"{bytes_each(entry) / 1e3:+.2f} kB"]],
    )


def _marks(entry: dict[str, Any]) -> list[tuple[int, int]]:
    return sorted((int(mark), value) for mark, value in entry["added_bytes"].items())


def bytes_each(entry: dict[str, Any]) -> float:
    """Bytes that a step or request left behind, mean over the later half of them."""
    marks = _marks(entry)
    last = marks[-1]
    middle = next(mark for mark in marks if mark[0] >= last[0] / 2)
    return (last[1] - middle[1]) / (last[0] - middle[0])


def _rungs(entries: Sequence[dict[str, Any]]) -> Iterator[Section]:
    """Yield the table of sets with several rungs."""
    columns = (
        "rungs", "load, ms", "step at half, ms", "step, products", "loaded", "after all rungs"
    )  # fmt: skip
    rows = []
    for entry in entries:
        load, step = (statistics.median(entry[name]) for name in ("load_ms", "step_ms"))
        memory = [size_text(entry[name]) for name in ("loaded_bytes", "served_bytes")]
        rows.append(
            [entry["value"], *map(number, (load, step, step / entry["product_ms"])), *memory]
        )
    yield Section(title="Rungs", columns=columns, rows=rows)


def _operators(entries: Sequence[dict[str, Any]]) -> Iterator[Section]:
    """Operators of a call's graph runs at the first and the last length."""
    first, last = entries[0], entries[-1]
    total = sum(entry["ms"] for entry in last["operators"].values())
    rows = []
    for name, entry in sorted(last["operators"].items(), key=lambda item: -item[1]["ms"]):
        if entry["ms"] < 0.002 * total:
            continue
        before = first["operators"].get(name, {"ms": None, "largest_output_bytes": 0})
        pairs = [(first["value"], before["ms"] or 0), (last["value"], entry["ms"])]
        sizes = [size_text(each["largest_output_bytes"]) for each in (before, entry)]
        rows.append([name, *map(number, (before["ms"], entry["ms"], slope(pairs))), *sizes])
    columns = ("operator", f"{first['value']}, ms", f"{last['value']}, ms", "exponent",
               f"largest output, {first['value']}", f"{last['value']}")  # fmt: skip
    yield Section(title="Operators", columns=columns, rows=rows)


_OTHERS: dict[str, Callable[[Sequence[dict[str, Any]]], Iterator[Section]]] = {
    "runtime": _runtime,
    "steps": _steps,
    "requests": _requests,
    "rungs": _rungs,
    "operators": _operators,
}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that decide, for one line of JSON."""
    found: dict[str, Any] = {}
    for axis in AXES:
        points = points_of(result.get(axis, []))
        if len(points) > 1:
            parts = {part: _rounded(exponents(points, part)) for part in (STEP, ANCHOR, SCORING)}
            found[axis] = {**parts, "memory": _rounded(memory_exponents(points))}
    if result.get("runtime"):
        rows = runtime_rows(result["runtime"][0])
        found["runtime"] = {part: _rounded(both) for part, _, both in rows}
    if steps := result.get("steps"):
        run = fitted([(entry["flops"], entry["run_ms"] / entry["product_ms"]) for entry in steps])
        each = [round(bytes_each(entry)) for entry in steps if entry["added_bytes"]]
        found["steps"] = {"run": _rounded(run), "bytes_each": each}
    if result.get("requests"):
        found["requests"] = {"bytes_each": round(bytes_each(result["requests"][0]))}
    return found


def _rounded(found: Exponents) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in found]


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw time against operations and memory against the estimate, every axis a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(11, 4.6))
    axes = {axis: points_of(result[axis]) for axis in AXES if result.get(axis)}
    everything = [point for points in axes.values() for point in points]
    for number_of_axis, (axis, points) in enumerate(axes.items()):
        colour = f"C{number_of_axis}"
        for part, style in ((STEP, "o-"), (SCORING, "s:")):
            shown = [point for point in points if part == STEP or point.is_scoring_clear]
            operations = [point.flops(part) / 1e12 for point in shown]
            work = [point.work(part) for point in shown]
            label = AXES[axis] if part == STEP else None
            times.loglog(operations, work, style, markersize=4, color=colour, label=label)
        sizes = [point.predicted_bytes / 1e9 for point in points]
        added = [point.entry["most_added_bytes"] / 1e9 for point in points]
        memory.loglog(sizes, added, "o-", markersize=4, color=colour)
    grey: dict[str, Any] = {"color": "#999999", "linewidth": 1, "zorder": 0}
    ends = [min(point.flops(SCORING) for point in everything) / 1e12,
            max(point.flops(STEP) for point in everything) / 1e12]  # fmt: skip
    times.loglog(ends, [end * 1e12 / PRODUCT_COST.flops for end in ends], **grey)
    ends = sorted(point.predicted_bytes / 1e9 for point in everything)
    memory.loglog(ends, ends, **grey)
    times.set(
        xlabel="operations, 10^12, by the cost model",
        ylabel="time, in plain matrix products of 1024^3",
    )
    memory.set(xlabel="memory of a call by the estimate, GB", ylabel="measured, GB")
    times.set_title("full step (line), scoring (dots); grey: as fast as the product", fontsize=10)
    memory.set_title("memory of a call; grey: as estimated", fontsize=10)
    times.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)
