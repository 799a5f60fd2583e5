"""Times single steps, scoring and whole edits of `bench.py`'s cases, round by round."""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cases import INTERVAL, Case, Ours, Way
from bench_others import product_runners

from ditrim.engines.cost.flops import call_flops, graph_products
from ditrim.plugins.layout import Layout
from ditrim.runtime.denoising.calls import Clock, EngineCalls
from ditrim.runtime.denoising.inputs import ModelInputs
from ditrim.runtime.denoising.rope import rope_for
from ditrim.runtime.metrics import psnr_db
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import FullContext, Policy
from ditrim.runtime.profiling.profile import statistics_of

STEPS = 40  # of the run that scoring is a share of
SETTLE_SECONDS = 0.02
BURST = {"small": 3, "wide": 1}
# The largest relative difference of a step from diffusers' own; float32 gives about 1e-5.
MOST_DIFFERENCE = 1e-3
FULL, ANCHOR = "ditrim, full context", "ditrim, anchor"
EAGER, COMPILED = "diffusers eager", "torch.compile"
ONE_GRAPH = "ONNX Runtime, one graph"


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar = Bar(console=self._console, transient=True, disable=not sys.stderr.isatty())
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """What is being done."""
        self._console.print(text, highlight=False)

    def begin(self, text: str, total: int) -> None:
        """A new stage."""
        self.say(text)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total)

    def advance(self) -> None:
        """One more thing done."""
        self._bar.advance(self._task)


def fixed_count(count: int) -> ToPi:
    """A policy for measuring: after one anchor, every step runs on `count` tokens."""
    return ToPi(tau=0.0, min_kept=count, max_kept=count, is_static=True)


class Idle:
    """How much of the cores other processes take, from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    def others_share(self) -> float | None:
        """Of all cores, 0 to 1; none where the system does not tell."""
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, own, every = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, busy - own) / every, 3) if every > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds that the cores were busy, with this process, and in all."""
        try:
            words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None  # only Linux has it
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
        times = os.times()
        idle = ticks[3] + ticks[4]  # and waiting for disks; what is stolen counts as busy
        return sum(ticks) - idle, times.user + times.system, sum(ticks)


class StepTimer:
    """Times single calls of one way, with what its engines took of them."""

    def __init__(self, case: Case, transformer: Any, burst: int) -> None:
        self.samples: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self._case, self._transformer, self._burst = case, transformer, burst

    def run(self) -> None:
        """One sample: a call, or the median of a burst after one that is not timed."""
        is_ours = isinstance(self._transformer, Ours)
        found: list[dict[str, float]] = []
        for number in range(self._burst + (self._burst > 1)):
            start = time.perf_counter()
            self._case.step(self._transformer)
            milliseconds = (time.perf_counter() - start) * 1e3
            one = {"ms": milliseconds}
            if is_ours:
                record = self._transformer.report.steps.pop()
                for part in ("front", "back", "select", "gather"):
                    one[part] = getattr(record, f"{part}_ms")
                one["outside"] = (milliseconds - record.front_ms - record.back_ms) / milliseconds
            if number > 0 or self._burst == 1:
                found.append(one)
        for key in found[0]:
            value = statistics.median(one[key] for one in found)
            (self.samples if key == "ms" else self.parts.setdefault(key, [])).append(value)

    def clear(self) -> None:
        """Forget the warm-up."""
        self.samples.clear()
        for values in self.parts.values():
            values.clear()


class CallTimer:
    """Times a function without arguments."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.samples: list[float] = []
        self._call = call

    def run(self) -> None:
        """One sample."""
        start = time.perf_counter()
        self._call()
        self.samples.append((time.perf_counter() - start) * 1e3)

    def clear(self) -> None:
        """Forget the warm-up."""
        self.samples.clear()


def run_rounds(
    timers: Sequence[StepTimer | CallTimer], rounds: int, warmup: int, told: Callable[[], None]
) -> None:
    """Every timer once a round, in an order drawn anew."""
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            if number == warmup:
                for timer in timers:
                    timer.clear()
            for timer in random.Random(number).sample(list(timers), len(timers)):
                time.sleep(SETTLE_SECONDS)
                timer.run()
                told()
    finally:
        gc.enable()


@torch.no_grad()
def measure_steps(case: Case, ways: list[Way], rounds: int, progress: Progress) -> dict[str, Any]:
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
        if name.startswith("rung"):
            case.step(transformers[name])  # the anchor before reduced steps
    check_agreement(case, transformers)
    steps = {name: StepTimer(case, found, burst) for name, found in transformers.items()}
    front = graph_products(manifest.transformer_config, "qwen", range(0, 1), size, "front")
    back = graph_products(
        manifest.transformer_config, "qwen", range(1, manifest.num_layers), size, "back"
    )
    products = {
        name: CallTimer(run)
        for name, run in product_runners([*front, *back], torch.get_num_threads()).items()
    }
    timers = [*steps.values(), *products.values()]
    progress.begin(f"{case.name}: single steps", (rounds + 1) * len(timers))
    idle = Idle()
    run_rounds(timers, rounds, 1, progress.advance)
    others_share = idle.others_share()
    return {
        "rounds": rounds,
        "others_share": others_share,
        "calls_a_sample": burst,
        "steps": step_rows(steps),
        "rungs": rung_rows(case, steps, rungs),
        "products": product_row(steps[FULL], products, sum(p.flops for p in [*front, *back])),
        "scoring": scoring_row(case, steps, rungs, rounds, progress),
        "outside_engines": {
            name: summary(timer.parts["outside"])
            for name, timer in steps.items()
            if name == FULL or name.startswith("rung")
        },
    }


def check_agreement(case: Case, transformers: dict[str, Any]) -> None:
    """Every way must compute what diffusers computes, or its time means nothing."""
    wanted = case.step(case.transformer)
    for name, transformer in transformers.items():
        if name.startswith("rung"):
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
    """How many times as fast, paired round by round."""
    return summary([a / b for a, b in zip(slower, faster, strict=True)])


def step_rows(steps: dict[str, StepTimer]) -> list[dict[str, Any]]:
    """The full-context ways and the anchor."""
    eager = steps.get(EAGER)
    return [
        {
            "way": name,
            "ms": summary(timer.samples),
            "against_eager": ratio(eager.samples, timer.samples) if eager else None,
            "full_is_faster": ratio(timer.samples, steps[FULL].samples),
        }
        for name, timer in steps.items()
        if not name.startswith("rung")
    ]


def rung_rows(case: Case, steps: dict[str, StepTimer], rungs: list[int]) -> list[dict[str, Any]]:
    """Measured speed-up over the full context against what counting operations predicts."""
    manifest, eager = case.manifest, steps.get(EAGER)

    def flops(kept: int) -> int:
        return sum(
            call_flops(manifest.transformer_config, "qwen", 1, manifest.num_layers, case.size, kept)
        )

    rows = []
    for rung in rungs:
        timer = steps[f"rung {rung}"]
        predicted = flops(case.size.num_reference) / flops(rung)
        measured = [a / b for a, b in zip(steps[FULL].samples, timer.samples, strict=True)]
        rows.append(
            {
                "rung": rung,
                "ms": summary(timer.samples),
                "speedup": summary(measured),
                "predicted": round(predicted, 4),
                "of_predicted": summary([value / predicted for value in measured]),
                "against_eager": ratio(eager.samples, timer.samples) if eager else None,
                "gather_ms": summary(timer.parts["gather"]) if rung < rungs[-1] else None,
            }
        )
    return rows


def product_row(full: StepTimer, products: dict[str, CallTimer], flops: int) -> dict[str, Any]:
    """The full step's rate against plain products of the same shapes, by the faster library."""
    medians = {name: statistics.median(timer.samples) for name, timer in products.items()}
    fastest = min(medians, key=lambda name: medians[name])
    rates = {name: round(flops / ms / 1e6, 1) for name, ms in medians.items()}
    return {
        "gflop": round(flops / 1e9, 2),
        "step_gflop_s": round(flops / statistics.median(full.samples) / 1e6, 1),
        "product_gflop_s": rates,
        "fastest": fastest,
        "step_of_products": ratio(products[fastest].samples, full.samples),
        "by_library": {
            name: ratio(timer.samples, full.samples) for name, timer in products.items()
        },
    }


def scoring_row(
    case: Case, steps: dict[str, StepTimer], rungs: list[int], rounds: int, progress: Progress
) -> dict[str, Any]:
    """Scoring, selection and gather as a share of a run of 40 steps with an anchor every 10.

    BACK scored and unscored run in turn on the same hidden states, first the one and then the
    other, so that their difference stands out of the noise.
    """
    calls, clock = EngineCalls(case.engines), Clock(None)
    size = case.size
    tensors = case.call["hidden_states"]
    inputs = ModelInputs(
        noisy_latents=tensors[:, : size.num_noisy],
        reference_latents=tensors[:, size.num_noisy :],
        text_embeds=case.call["encoder_hidden_states"],
        timestep=case.call["timestep"],
        rope_key=("bench",),
        make_rope=lambda: rope_for(
            "qwen",
            Layout.of_frames(case.grids),
            size.num_text,
            case.manifest.transformer_config["axes_dims_rope"],
            torch.device("cpu"),
        ),
    )
    front = calls.run_front(inputs, (torch.arange(1), None), None, clock)
    rows = {"back": torch.zeros(1, dtype=torch.int64), "anchor": torch.arange(size.num_noisy)}

    def back_ms(graph: str) -> float:
        own = Clock(None)
        calls.run_back(front, graph, None, rows[graph], own)
        return own.parts["back"]

    pairs = 2 * rounds
    progress.begin(f"{case.name}: scoring", pairs)
    differences, unscored = [], []
    time.sleep(SETTLE_SECONDS)
    for number in range(pairs + 1):
        order = ("back", "anchor") if number % 2 else ("anchor", "back")
        found = {graph: back_ms(graph) for graph in order}
        progress.advance()
        if number > 0:
            differences.append(found["anchor"] - found["back"])
            unscored.append(found["back"])
    scoring = statistics.median(differences)
    select = statistics.median(steps[ANCHOR].parts["select"])
    full = statistics.median(steps[FULL].samples)
    # Not the anchor's own median: the difference is known better than two medians are.
    anchor, anchors = full + scoring + select, STEPS // INTERVAL
    shares = {}
    for fraction in (0.5, 0.75):
        rung = min(r for r in rungs if r >= fraction * size.num_reference)
        timer = steps[f"rung {rung}"]
        gather = statistics.median(timer.parts["gather"])
        run = anchors * anchor + (STEPS - anchors) * statistics.median(timer.samples)
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
        "back_ms": summary(unscored),
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
    shuffled, idle = random.Random(0), Idle()
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
        "others_share": idle.others_share(),
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
                "quality": [
                    float(f"{function(quality[way.name]):.4g}")
                    for function in (statistics.mean, min if case.is_picture else max)
                ]
                if quality[way.name]
                else None,
            }
            for way in ways
        ],
    }


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
