#!/usr/bin/env python3
"""How long policies take to decide, for 4096 noisy and 8192 reference tokens of the real width.

What is timed is all that a policy adds to a step: choosing tokens, grouping them, TokenDrop's mask
and update; not the gather. The share is of a full step of Qwen-Image-Edit on this CPU, estimated
from its operations and the measured rate of plain matrix products: no step is faster, so no share
is larger. Influence and features are random.

Example:
    python scripts/bench_policies.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

import ditrim.runtime as ditrim
from benchmarks.tables import Section, number, show
from ditrim.engines.cost.cost import ModelCost
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.sets.ladder import Ladder
from ditrim.export.family import FAMILIES
from ditrim.runtime.policy import CallView, Reduction, StepView
from ditrim.runtime.profiling.machine import describe_machine
from ditrim.runtime.profiling.product import PRODUCT_COST, plain_products
from ditrim.runtime.profiling.rounds import Rounds

GRID = (64, 64)
NUM_NOISY, NUM_REFERENCE, NUM_TEXT, WIDTH, CHANNELS = 4096, 8192, 512, 3072, 64


def call_view(*, with_features: bool) -> CallView:
    """Return a call of random values at the benchmark's size."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(1, count, WIDTH, generator=generator) if with_features else None
        for count in (NUM_NOISY, NUM_REFERENCE)
    ]
    return CallView(
        step=10,
        branch="cond",
        ladder=Ladder.even(NUM_REFERENCE, granularity=64),
        grids=(GRID, GRID, GRID),
        noisy=features[0],
        reference=features[1],
        influence=torch.rand(1, NUM_REFERENCE, generator=generator) ** 3,
        reduction=Reduction(),
    )


def step_view() -> StepView:
    """Return a finished step of random values at the benchmark's size."""
    generator = torch.Generator().manual_seed(1)

    def noise(count: int) -> torch.Tensor:
        return torch.randn(1, count, CHANNELS, generator=generator)

    velocity = noise(NUM_NOISY)
    return StepView(
        step=10,
        ladder=Ladder.even(NUM_REFERENCE, granularity=64),
        grids=(GRID, GRID, GRID),
        latents=noise(NUM_NOISY),
        velocity=velocity,
        branches={"cond": velocity},
        sigma=0.8,
        next_sigma=0.7,
        reference=noise(NUM_REFERENCE),
    )


def decisions() -> dict[str, Callable[[], object]]:
    """Name -> what the policy does on one step."""
    plain, featured, step = (
        call_view(with_features=False),
        call_view(with_features=True),
        step_view(),
    )
    drop = ditrim.TokenDrop(dense_if_non_local=False)
    found: dict[str, Callable[[], object]] = {
        "topi, anchor": lambda: ditrim.ToPi().begin().select(plain),
        "coverage, anchor": lambda: ditrim.CoverageToPi().begin().select(plain),
        "random, anchor": lambda: ditrim.RandomDrop(policy=ditrim.ToPi()).begin().select(plain),
        "topi mode=merge, anchor": lambda: (
            ditrim.ToPi(ratio=0.5, mode="merge").begin().select(featured)
        ),
        "tokendrop, step": lambda: drop.begin().finish_step(step),
    }
    for scope in ("reference", "both"):
        tomesd = ditrim.ToMeSD(scope=scope)  # type: ignore[arg-type]
        toma = ditrim.ToMA(scope=scope)  # type: ignore[arg-type]
        found |= {
            f"tomesd scope={scope}, step": lambda p=tomesd: p.begin().regroup(featured),
            f"toma scope={scope}, step": lambda p=toma: p.begin().regroup(featured),
        }
    return found


def step_seconds() -> tuple[float, float]:
    """A full step at the measured product rate, and that rate in GFLOP/s."""
    rounds, products = Rounds(0), dict(plain_products("torch"))
    rounds.run(lambda: rounds.timed("torch", products["torch"]), 12, 0)
    rate = PRODUCT_COST.flops / min(rounds.samples["torch"]) * 1e3
    family = FAMILIES["qwen-edit"]
    cost = ModelCost(
        config=family.config,
        architecture="qwen",
        front_depth=10,
        num_layers=60,
        num_scored=3,
        precision="fp32",
    )
    size = CallSize(num_noisy=NUM_NOISY, num_reference=NUM_REFERENCE, num_text=NUM_TEXT)
    return (cost.front(size) + cost.back(size)).flops / rate, rate / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds, gflops = step_seconds()
    result: dict[str, object] = {
        "machine": describe_machine(None, torch.get_num_threads()),
        "full_step_s": round(seconds, 1),
        "gflop_s": round(gflops, 1),
    }
    rounds, rows, policies = Rounds(), [], decisions()
    parts = [partial(rounds.timed, name, decide) for name, decide in policies.items()]
    with torch.no_grad():
        rounds.run(lambda: rounds.turn(parts), repeats, 1)
    for name in policies:
        median = statistics.median(rounds.samples[name])
        share = f"{median / 1e3 / seconds:.5%}"
        result[name] = {"ms": round(median, 2), "share": share}
        rows.append((name, number(median), share))
    show([Section(columns=("decision", "ms", "share of a full step"), rows=rows)])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
