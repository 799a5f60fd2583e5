#!/usr/bin/env python3
"""What step caching costs in fidelity on the small editor, and what it saves.

Thresholds are chosen on training scenes: FRONT's outputs of full-context runs are recorded, and
each threshold is the one whose decisions on them reuse the wished share of the steps. Then every
held-out edit is made from the same noise with the full context and with each policy and cache;
PSNR is against the full-context picture of the same seed, times are of the transformer, medians of
the ratio edit by edit. A picture equal to the full-context one counts as 100 dB. "fewer steps" is
the full context without a cache in as many steps as a cache would leave.

Example:
    calibrate-cache --engine engines-out/small --output small-cache.json
    python scripts/studies/compare_caches.py --engine engines-out/small \\
        --calibration small-cache.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.runtime.caches.calibration import load_tea_cache
from ditrim.runtime.caches.step_cache import (
    Cache,
    CacheMemory,
    FrontView,
    StepCache,
    relative_changes,
)
from ditrim.runtime.metrics import mean_interval, psnr_db
from ditrim.runtime.small_editor import load_small_pipeline
from ditrim.runtime.small_editor.scenes import (
    CATEGORIES,
    EditExample,
    held_out_edits,
    sample_edit,
)

_TUNING_WORD = 0x70E


class FrontRecorder:
    """A cache that reuses nothing and keeps every step's views and velocities."""

    def __init__(self) -> None:
        self.views: list[FrontView] = []
        self.velocities: list[torch.Tensor] = []

    def look(self, memory: CacheMemory, front: FrontView) -> tuple[bool, CacheMemory]:
        return False, memory

    def remember(
        self, memory: CacheMemory | None, front: FrontView, velocity: torch.Tensor
    ) -> CacheMemory:
        self.views.append(front)
        self.velocities.append(velocity)
        return CacheMemory(front=front, velocity=velocity)


def interval_of(values: Sequence[float]) -> list[float]:
    """95 % bootstrap interval of the mean."""
    return [round(bound, 2) for bound in mean_interval(values)]


def edit(
    pipe: Any,
    engines: Any,
    example: EditExample,
    policy: Any,
    cache: Cache | None,
    steps: int,
    seed: int,
) -> tuple[np.ndarray, Any]:
    """One edit: the picture and its report."""
    with ditrim.attach(pipe, engines, policy, cache=cache, timing=True) as attachment:
        picture = pipe(
            image=[Image.fromarray(reference) for reference in example.references],
            prompt=example.prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        return picture, attachment.report


def record_training(pipe: Any, engines: Any, count: int, steps: int) -> list[FrontRecorder]:
    """Full-context runs of training scenes."""
    runs = []
    for index in range(count):
        example = sample_edit(
            np.random.default_rng([index, _TUNING_WORD]),
            category=CATEGORIES[index % len(CATEGORIES)],
            split="train",
        )
        recorder = FrontRecorder()
        edit(pipe, engines, example, ditrim.FullContext(), recorder, steps, index)
        runs.append(recorder)
    return runs


def reused_share(cache: Cache, runs: Sequence[FrontRecorder], interval: int | None) -> float:
    """Share of recorded steps that a cache would reuse; every `interval`-th is an anchor."""
    reused = total = 0
    for run in runs:
        memory: CacheMemory | None = None
        for step, (view, velocity) in enumerate(zip(run.views, run.velocities, strict=True)):
            total += 1
            is_anchor = interval is not None and step % interval == 0
            if memory is not None and not is_anchor:
                is_reused, memory = cache.look(memory, view)
                if is_reused:
                    reused += 1
                    continue
            memory = cache.remember(memory, view, velocity)
    return reused / total


def tune(
    make: Callable[[float], Cache],
    runs: Sequence[FrontRecorder],
    interval: int | None,
    share: float,
) -> float:
    """The threshold that reuses a share of the recorded steps, by bisection."""
    low, high = 1e-4, 10.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        if reused_share(make(middle), runs, interval) < share:
            low = middle
        else:
            high = middle
    return float(f"{math.sqrt(low * high):.4g}")


def correlations(runs: Sequence[FrontRecorder], lags: Sequence[int]) -> dict[str, Any]:
    """Pearson's r between the change of FRONT's output and that of the velocity, by lag."""
    result: dict[str, Any] = {}
    for lag in lags:
        found: dict[str, list[float]] = {"noisy": [], "joint": [], "reference": [], "velocity": []}
        for run in runs:
            for step in range(lag, len(run.views)):
                now, before = run.views[step], run.views[step - lag]
                assert now.reference is not None
                assert before.reference is not None
                pairs = {
                    "noisy": (FrontView(noisy=now.noisy), FrontView(noisy=before.noisy)),
                    "joint": (now, before),
                    "reference": (
                        FrontView(noisy=now.reference),
                        FrontView(noisy=before.reference),
                    ),
                    "velocity": (
                        FrontView(noisy=run.velocities[step]),
                        FrontView(noisy=run.velocities[step - lag]),
                    ),
                }
                for name, pair in pairs.items():
                    found[name].append(relative_changes(*pair)[0])
        entry: dict[str, float] = {
            f"mean_{name}_change": round(float(np.mean(values)), 4)
            for name, values in found.items()
        }
        for name in ("noisy", "joint"):
            entry[f"r_{name}"] = round(float(np.corrcoef(found[name], found["velocity"])[0, 1]), 3)
        result[f"lag {lag}"] = entry
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, required=True, help="engine set of the small editor")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="from calibrate-cache, on that engine set"
    )
    parser.add_argument("--edits", type=int, default=32, help="held-out edits (default 32)")
    parser.add_argument(
        "--tune-edits", type=int, default=16, help="training scenes for the thresholds (default 16)"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.7],
        help="shares of reused steps (default 0.25 0.5 0.7)",
    )
    parser.add_argument("--tau", type=float, default=0.85)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise")
    parser.add_argument("--output", type=Path, help="write the JSON result there as well")
    return parser.parse_args()


def _paired(
    rows: dict[str, list[dict[str, float]]], shares: list[float]
) -> dict[str, dict[str, Any]]:
    """Gains edit by edit of one variant over another."""
    paired: dict[str, dict[str, Any]] = {}
    for share in shares:
        for label, first, second in (
            ("noisy minus joint", "full + first-block", "full + first-block, joint"),
            ("teacache minus first-block", "full + teacache", "full + first-block"),
            ("first-block minus fewer steps", "full + first-block", "full, fewer steps"),
            ("topi: teacache minus first-block", "topi + teacache", "topi + first-block"),
        ):
            gain = [
                a["db"] - b["db"]
                for a, b in zip(
                    rows[f"{first} {share:g}"], rows[f"{second} {share:g}"], strict=True
                )
            ]
            paired[f"{label}, {share:g}"] = {
                "gain_db": round(float(np.mean(gain)), 2),
                "interval_db": interval_of(gain),
            }
    return paired


def _summary_of(
    name: str,
    share: float | None,
    threshold: float | None,
    rows: list[dict[str, float]],
    steps: int,
) -> dict[str, Any]:
    db = [row["db"] for row in rows]
    calls = float(np.mean([row["back_calls"] for row in rows]))
    return {
        "variant": name,
        "threshold": threshold,
        "wished_share": share,
        "reused_share": round(1 - calls / steps, 3),
        "back_calls": round(calls, 2),
        "mean_db": round(float(np.mean(db)), 2),
        "interval_db": interval_of(db),
        "least_db": round(float(np.min(db)), 2),
        "median_speedup": round(float(np.median([r["ratio"] for r in rows])), 3),
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Tune, run all edits, gather the figures."""
    from rich.progress import track

    engines = load_engines(args.engine, device="cpu", threads=args.threads)
    torch.set_num_threads(args.threads)
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    makers: dict[str, Callable[[float], Cache]] = {
        "first-block": lambda t: StepCache(threshold=t),
        "first-block, joint": lambda t: StepCache(threshold=t, tokens="joint"),
        "teacache": lambda t: load_tea_cache(args.calibration, engines.engine_set, threshold=t),
    }
    full, topi = ditrim.FullContext(), ditrim.ToPi(tau=args.tau, interval=args.interval)
    runs = record_training(pipe, engines, args.tune_edits, args.steps)
    # name -> policy, cache, wished share, threshold
    variants: dict[str, tuple[Any, Cache | None, float | None, float | None]] = {
        "full": (full, None, None, None),
        "topi": (topi, None, None, None),
    }
    for policy_name, policy, interval in (("full", full, None), ("topi", topi, args.interval)):
        for name, make in makers.items():
            if policy_name == "topi" and name == "first-block, joint":
                continue
            for share in args.shares:
                threshold = tune(make, runs, interval, share)
                cache = make(threshold)
                variants[f"{policy_name} + {name} {share:g}"] = (policy, cache, share, threshold)
    found = correlations(runs, (1, 3))
    del runs
    edit(pipe, engines, held_out_edits(1, seed=args.seed + 1)[0], full, None, 2, 0)  # warm-up
    steps_of = dict.fromkeys(variants, args.steps)
    for share in args.shares:
        name = f"full, fewer steps {share:g}"
        variants[name] = (full, None, share, None)
        steps_of[name] = round(args.steps * (1 - share))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    examples = held_out_edits(args.edits, seed=args.seed)
    for index, example in enumerate(
        track(examples, "editing", transient=True, disable=not sys.stderr.isatty())
    ):
        base, base_ms = None, 0.0
        for name, (policy, cache, _, _) in variants.items():
            seed = args.seed * 100_003 + index
            steps = steps_of[name]
            picture, report = edit(pipe, engines, example, policy, cache, steps, seed)
            if base is None:
                base, base_ms = picture, report.total_ms
            rows[name].append(
                {
                    "db": psnr_db(picture, base, peak=1.0),
                    "back_calls": report.back_calls,
                    "ratio": base_ms / report.total_ms,
                }
            )
    table = [
        _summary_of(name, share, threshold, rows[name], args.steps)
        for name, (_, _, share, threshold) in variants.items()
    ]
    return {
        "edits": args.edits,
        "tune_edits": args.tune_edits,
        "steps": args.steps,
        "threads": args.threads,
        "seed": args.seed,
        "tau": args.tau,
        "interval": args.interval,
        "engine_identity": engines.engine_set.manifest.identity,
        "correlations_on_training_scenes": found,
        "table": table,
        "paired": _paired(rows, args.shares),
    }


def main() -> int:
    args = parse_arguments()
    result = compare(args)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
