"""Times single steps, scoring and whole edits of `bench.py`'s cases, round by round."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import INTERVAL, Case, Ours, Way
from benchmarks.others import product_runners
from ditrim.engines.cost.flops import call_flops, graph_products
from ditrim.runtime.metrics import psnr_db
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import FullContext, Policy
from ditrim.runtime.profiling.machine import OtherProcesses
from ditrim.runtime.profiling.measure import Geometry, Meter
from ditrim.runtime.profiling.profile import statistics_of
from ditrim.runtime.profiling.rounds import Rounds

STEPS = 40  # of the run that scoring is a share of
SETTLE_SECONDS = 0.02  # pause before a part, in which idle threads stop spinning
BURST = {"small": 3, "wide": 1}
# The largest relative difference of a step from diffusers' own; float32 gives about 1e-5.
MOST_DIFFERENCE = 1e-3
FULL, ANCHOR = "ditrim, full context", "ditrim, anchor"
EAGER, COMPILED = "diffusers eager", "torch.compile"
ONE_GRAPH = "ONNX Runtime, one graph"
TORCH_FULL, TORCH_HALF = "ditrim on torch, full context", "ditrim on torch, half"


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, text: str, total: int | None = None) -> None:
        """Start a stage and its bar."""
        self._bar.console.print(text, highlight=False)
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(text, total=total)

    def advance(self) -> None:
        """Move the bar on by one."""
        self._bar.advance(self._bar.task_ids[-1])


def fixed_count(count: int) -> ToPi:
    """A policy for measuring: after one anchor, every step runs on `count` tokens."""
    return ToPi(tau=0.0, min_kept=count, max_kept=count, is_static=True)


def time_step(rounds: Rounds, name: str, case: Case, transformer: Any, burst: int) -> None:
    """One sample of a way, and what its engines took of it.

    A call, or the medians of a burst of them after one that is not timed.
    """
    found: list[dict[str, float]] = []
    for number in range(burst + (burst > 1)):
        start = time.perf_counter()
        case.step(transformer)
        one = {"ms": (time.perf_counter() - start) * 1e3}
        if isinstance(transformer, Ours):
            record = transformer.report.steps.pop()
            one |= {part: getattr(record, f"{part}_ms") for part in ("select", "gather")}
            one["outside"] = (one["ms"] - record.front_ms - record.back_ms) / one["ms"]
        if number > 0 or burst == 1:
            found.append(one)
    for key in found[0]:
        rounds.add((name, key), statistics.median(one[key] for one in found))


@torch.no_grad()
def measure_steps(case: Case, ways: list[Way], repeats: int, progress: Progress) -> dict[str, Any]:
    """Single calls of every way, of an anchor and of every rung, and plain matrix products."""
    size, manifest = case.size, case.manifest
    rungs = [rung for rung in manifest.ladder.rungs if rung < size.num_reference]
    rungs.append(size.num_reference)
    burst = BURST["small" if case.is_picture else "wide"]
    policies: dict[str, Policy] = {
        FULL: FullContext(),
        ANCHOR: ToPi(interval=1),
        **{f"rung {rung}": fixed_count(rung) for rung in rungs},
    }
    transformers = {way.name: way.transformer for way in ways if way.counter is None}
    for name, policy in policies.items():
        transformers[name] = Ours(case.engines, policy)
    live = case.torch_engines()
    half = manifest.ladder.round_up(size.num_reference // 2)
    transformers[TORCH_FULL] = Ours(live, FullContext())
    transformers[TORCH_HALF] = Ours(live, fixed_count(half))
    for name, transformer in transformers.items():
        if is_reduced(name):
            case.step(transformer)  # the anchor before reduced steps
    check_agreement(case, transformers)
    front = graph_products(manifest.transformer_config, "qwen", range(0, 1), size, "front")
    back = graph_products(
        manifest.transformer_config, "qwen", range(1, manifest.num_layers), size, "back"
    )
    products = product_runners([*front, *back], torch.get_num_threads())
    rounds = Rounds(SETTLE_SECONDS)
    parts = [
        *(
            partial(time_step, rounds, name, case, transformer, burst)
            for name, transformer in transformers.items()
        ),
        *(partial(rounds.timed, (name, "ms"), run) for name, run in products.items()),
    ]
    progress.begin(f"{case.name}: single steps", repeats + 1)
    others = OtherProcesses()
    rounds.run(lambda: rounds.turn(parts), repeats, 1, lambda *_: progress.advance())
    others_share = others.share()
    samples = {name: rounds.samples[name, "ms"] for name in (*transformers, *products)}
    return {
        "rounds": repeats,
        "others_share": others_share,
        "calls_a_sample": burst,
        "steps": step_rows({name: samples[name] for name in transformers}),
        "rungs": rung_rows(case, rounds, rungs),
        "torch_backend": torch_row(case, rounds, half),
        "products": product_row(
            samples[FULL],
            {name: samples[name] for name in products},
            sum(product.flops for product in [*front, *back]),
        ),
        "scoring": scoring_row(case, rounds, rungs, 2 * repeats, progress),
        "outside_engines": {
            name: summary(rounds.samples[name, "outside"])
            for name in transformers
            if name == FULL or name.startswith("rung")
        },
    }


def check_agreement(case: Case, transformers: dict[str, Any]) -> None:
    """Every way must compute what diffusers computes, or its time means nothing."""
    wanted = case.step(case.transformer)
    for name, transformer in transformers.items():
        if is_reduced(name):
            continue
        difference = float((case.step(transformer) - wanted).norm() / wanted.norm())
        if not difference <= MOST_DIFFERENCE:
            raise SystemExit(
                f"{case.name}: {name} differs from diffusers by {difference:.2g}, relative; at "
                f"most {MOST_DIFFERENCE} is float32's rounding: it does not compute the same"
            )


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, spread and the interval of the median, rounded."""
    found = statistics_of(samples)
    names = ("median", "low", "high", "spread", "noise")
    return {name: float(f"{getattr(found, name):.4g}") for name in names} | {"count": found.count}


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, Any]:
    """Return the speed-up, paired round by round."""
    return summary([a / b for a, b in zip(slower, faster, strict=True)])


def step_rows(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The full-context ways and the anchor."""
    eager = samples.get(EAGER)
    return [
        {
            "way": name,
            "ms": summary(taken),
            "against_eager": ratio(eager, taken) if eager else None,
            "full_is_faster": ratio(taken, samples[FULL]),
        }
        for name, taken in samples.items()
        if not is_reduced(name)
    ]


def is_reduced(name: str) -> bool:
    """Whether a way's steps run on fewer tokens."""
    return name == TORCH_HALF or name.startswith("rung")


def predicted_speedup(case: Case, kept: int) -> float:
    """The full step's operations over those of a reduced one."""
    manifest, size = case.manifest, case.size

    def flops(count: int) -> int:
        config, num_layers = manifest.transformer_config, manifest.num_layers
        return sum(call_flops(config, "qwen", 1, num_layers, size, count))

    return flops(size.num_reference) / flops(kept)


def torch_row(case: Case, rounds: Rounds, half: int) -> dict[str, Any]:
    """The torch backend: its full step against diffusers, its reduced one against operations."""
    full, reduced = (rounds.samples[name, "ms"] for name in (TORCH_FULL, TORCH_HALF))
    eager = rounds.samples.get((EAGER, "ms"))
    predicted = predicted_speedup(case, half)
    return {
        "kept": half,
        "ms": summary(full),
        "half_ms": summary(reduced),
        "against_eager": ratio(eager, full) if eager else None,
        "predicted": round(predicted, 4),
        "of_predicted": summary([a / b / predicted for a, b in zip(full, reduced, strict=True)]),
    }


def rung_rows(case: Case, rounds: Rounds, rungs: list[int]) -> list[dict[str, Any]]:
    """Measured speed-up over the full context against what counting operations predicts."""
    samples = rounds.samples
    eager = samples.get((EAGER, "ms"))
    rows = []
    for rung in rungs:
        taken, gather = (samples[f"rung {rung}", part] for part in ("ms", "gather"))
        predicted = predicted_speedup(case, rung)
        measured = [a / b for a, b in zip(samples[FULL, "ms"], taken, strict=True)]
        rows.append(
            {
                "rung": rung,
                "ms": summary(taken),
                "speedup": summary(measured),
                "predicted": round(predicted, 4),
                "of_predicted": summary([value / predicted for value in measured]),
                "against_eager": ratio(eager, taken) if eager else None,
                "gather_ms": summary(gather) if rung < rungs[-1] else None,
            }
        )
    return rows


def product_row(full: list[float], products: dict[str, list[float]], flops: int) -> dict[str, Any]:
    """The full step's rate against plain products of the same shapes, by the faster library."""
    medians = {name: statistics.median(taken) for name, taken in products.items()}
    fastest = min(medians, key=lambda name: medians[name])
    return {
        "gflop": round(flops / 1e9, 2),
        "step_gflop_s": round(flops / statistics.median(full) / 1e6, 1),
        "product_gflop_s": {name: round(flops / ms / 1e6, 1) for name, ms in medians.items()},
        "fastest": fastest,
        "step_of_products": ratio(products[fastest], full),
        "by_library": {name: ratio(taken, full) for name, taken in products.items()},
    }


def scoring_row(
    case: Case, rounds: Rounds, rungs: list[int], pairs: int, progress: Progress
) -> dict[str, Any]:
    """Scoring, selection and gather as a share of a run of 40 steps with an anchor every 10.

    BACK scored and unscored run in the same rounds on the same hidden states, so that their
    difference stands out of the noise.
    """
    size = case.size
    geometry = Geometry(
        batch=1,
        num_text=size.num_text,
        noisy_grid=case.grids[0][1:],
        reference_grid=case.grids[1][1:],
    )
    meter = Meter(case.engines, [geometry], (), tau=0.85, parts=("back", "anchor"))
    progress.begin(f"{case.name}: scoring", pairs + 1)
    meter.measure(pairs, 1, lambda *_: progress.advance())
    graphs = {row.part: row.samples_ms for row in meter.rows()}
    differences = [a - b for a, b in zip(graphs["anchor"], graphs["back"], strict=True)]

    def median(name: str, part: str) -> float:
        return statistics.median(rounds.samples[name, part])

    scoring, select, full = (
        statistics.median(differences), median(ANCHOR, "select"), median(FULL, "ms")
    )  # fmt: skip
    # Not the anchor's own median: the difference is known better than two medians are.
    anchor, anchors = full + scoring + select, STEPS // INTERVAL
    shares = {}
    for fraction in (0.5, 0.75):
        rung = min(r for r in rungs if r >= fraction * size.num_reference)
        gather = median(f"rung {rung}", "gather")
        run = anchors * anchor + (STEPS - anchors) * median(f"rung {rung}", "ms")
        work = anchors * (scoring + select) + (STEPS - anchors) * gather
        shares[str(rung)] = {
            "share": round(work / run, 6),
            "scoring": round(anchors * scoring / run, 6),
            "selection": round(anchors * select / run, 6),
            "gather": round((STEPS - anchors) * gather / run, 6),
        }
    spread = statistics_of([value + 1e3 for value in differences])  # they can lie around 0
    return {
        "pairs": pairs,
        "back_ms": summary(graphs["back"]),
        "scoring_ms": round(scoring, 3),
        "scoring_ms_interval": [round(spread.low - 1e3, 3), round(spread.high - 1e3, 3)],
        "selection_ms": round(select, 4),
        "shares": shares,
    }


def measure_edits(
    case: Case, ways: list[Way], runs: int, steps: int, progress: Progress
) -> dict[str, Any]:
    """Whole edits: seconds, steps that were computed, and how near to diffusers' own."""
    edits = {way.name: case.edit_with(way) for way in ways}
    runs = min(runs, case.count)
    progress.begin(f"{case.name}: whole edits of {steps} steps", runs)
    for way in ways:
        for _ in edits[way.name](0, 2):
            pass
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    quality: dict[str, list[float]] = {way.name: [] for way in ways}
    computed: dict[str, list[int]] = {way.name: [] for way in ways}
    kept: dict[str, list[float]] = {way.name: [] for way in ways if way.policy is not None}
    shuffled, others = random.Random(0), OtherProcesses()
    for number in range(runs):
        gc.collect()
        found, taken = edit_in_turn(
            {way.name: edits[way.name](number, steps) for way in ways}, shuffled
        )
        progress.advance()
        for way in ways:
            seconds[way.name].append(taken[way.name])
            computed[way.name].append(way.computed(steps))
            if way.policy is not None:
                kept[way.name].append(way.transformer.report.kept_ratio)
        if EAGER in found:
            for name, result in found.items():
                quality[name].append(distance(result, found[EAGER], is_picture=case.is_picture))
    return {
        "runs": runs,
        "steps": steps,
        "others_share": others.share(),
        "quality": "psnr_db" if case.is_picture else "relative_l2",
        "ways": [
            {
                "way": way.name,
                "s": summary(seconds[way.name]),
                "against_eager": ratio(seconds[EAGER], seconds[way.name])
                if EAGER in seconds
                else None,
                "computed": statistics.mean(computed[way.name]),
                "kept_ratio": round(statistics.mean(kept[way.name]), 4)
                if way.policy is not None
                else None,
                "quality": mean_and_worst(quality[way.name], is_picture=case.is_picture),
            }
            for way in ways
        ],
    }


def mean_and_worst(quality: list[float], *, is_picture: bool) -> list[float] | None:
    """Mean and worst of what `distance` measured; none where nothing was."""
    if not quality:
        return None
    functions = (statistics.mean, min if is_picture else max)
    return [float(f"{function(quality):.4g}") for function in functions]


def edit_in_turn(
    pending: dict[str, Iterator[Any]], shuffled: random.Random
) -> tuple[dict[str, Any], dict[str, float]]:
    """One edit by every way, piece by piece in turn: results, and seconds of each.

    What slows the machine for a while then slows all of them, however long an edit takes.
    """
    found: dict[str, Any] = {}
    taken = dict.fromkeys(pending, 0.0)
    while pending:
        for name in shuffled.sample(list(pending), len(pending)):
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            piece = next(pending[name], None)
            taken[name] += time.perf_counter() - start
            if piece is None:
                del pending[name]
            else:
                found[name] = piece
    return found, taken


def distance(found: Any, wanted: Any, *, is_picture: bool) -> float:
    """PSNR in dB of pictures in [0, 1]; of latents the relative L2 difference."""
    if is_picture:
        value = psnr_db(found, wanted, peak=1.0)
        assert value is not None
        return value
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
