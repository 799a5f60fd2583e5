#!/usr/bin/env python3
"""Step times on a CPU, rung by rung, side by side in one run.

A random Qwen-Image-Edit of d = 1024 (8 blocks, front depth 1, 3 scored layers), G = C = 1024 and
64 text tokens. Every repeat runs every variant once, in turn, so that what slows the machine slows
all of them; figures are medians over repeats and ratios of them:

- a step at each rung against the full context, and against the unmodified diffusers transformer;
- the speed-up of a rung against what counting operations predicts;
- BACK at full length against plain matrix products of the same shapes on the same threads;
- scoring and selection, as a share of a 40-step run at interval 10;
- what the runtime adds outside the engines.

Example:
    python scripts/bench_cpu.py --repeats 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ditrim.engines.build import build_engine_set
from ditrim.engines.flops import CallSize, MatrixProduct, call_flops, graph_products
from ditrim.engines.load import load_engines
from ditrim.engines.options import BuildOptions
from ditrim.runtime.denoiser import Denoiser
from ditrim.runtime.model_inputs import ModelInputs
from ditrim.runtime.policy import FullContext
from ditrim.runtime.rope import qwen_rope
from ditrim.runtime.topi import ToPi

NUM_LAYERS, FRONT_DEPTH, LAYERS = 8, 1, (4, 5, 6)
CONFIG: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 512,
}
STEPS, INTERVAL = 40, 10


def fixed_count(count: int) -> ToPi:
    """A policy for measuring: after one anchor, every step runs on `count` tokens."""
    return ToPi(tau=0.0, min_kept=count, max_kept=count, is_static=True)


def step_runner(denoiser: Denoiser, inputs: ModelInputs) -> Callable[[], None]:
    """A function that makes one more step of a request."""

    def run() -> None:
        denoiser.predict("cond", inputs)

    return run


def product_runner(products: list[MatrixProduct]) -> Callable[[], None]:
    """A function that runs plain matrix products of these shapes.

    Buffers are shared by equal shapes, so that memory stays bounded; they are far larger than the
    caches, as the weights are.
    """
    buffers: dict[tuple[int, ...], torch.Tensor] = {}

    def buffer(*shape: int) -> torch.Tensor:
        return buffers.setdefault(shape, torch.randn(shape))

    calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for item in products:
        if item.is_batched:
            calls.append(
                (buffer(item.count, item.m, item.k), buffer(item.count, item.k, item.n), 1)
            )
        else:
            calls.append((buffer(item.m, item.k), buffer(item.k, item.n), item.count))

    def run() -> None:
        for left, right, count in calls:
            for _ in range(count):
                torch.matmul(left, right)

    return run


def measure(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every variant, a list over repeats; one warm-up each."""
    from rich.progress import Progress

    times: dict[str, list[float]] = {name: [] for name in variants}
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=(repeats + 1) * len(variants))
        for repeat in range(repeats + 1):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                if repeat > 0:
                    times[name].append((time.perf_counter() - start) * 1e3)
                progress.advance(task)
    return times


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats (default 7)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one a core")
    parser.add_argument("--tokens", type=int, default=1024, help="G and C (default 1024)")
    parser.add_argument("--text", type=int, default=64, help="T (default 64)")
    parser.add_argument("--output", type=Path, help="write the JSON result there as well")
    parser.add_argument(
        "--engine", type=Path, default=Path("engines-out/bench-cpu"), help="where the set is built"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    threads = arguments.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    tokens, text = arguments.tokens, arguments.text
    options = BuildOptions(
        model="qwen-edit",
        weights="random",
        num_layers=NUM_LAYERS,
        config=CONFIG,
        front_depth=FRONT_DEPTH,
        layers=LAYERS,
        max_reference_tokens=tokens,
        max_noisy_tokens=tokens,
        max_text_tokens=text,
        output=str(arguments.engine),
    )
    print("building or reusing the engine set", file=sys.stderr)
    engine_set = build_engine_set(options)
    engines = load_engines(engine_set, device="cpu", threads=threads)
    config = engine_set.manifest.transformer_config
    rungs = engine_set.manifest.ladder.rungs

    side = int(tokens**0.5)
    grids = [(1, side, tokens // side)] * 2
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2 * tokens, config["in_channels"], generator=generator)
    text_embeds = torch.randn(1, text, config["joint_attention_dim"], generator=generator)
    inputs = ModelInputs(
        noisy_latents=latents[:, :tokens],
        reference_latents=latents[:, tokens:],
        text_embeds=text_embeds,
        timestep=torch.tensor([0.7]),
        rope_key=("bench",),
        make_rope=lambda: qwen_rope(grids, text, config["axes_dims_rope"], torch.device("cpu")),
    )
    denoisers = {f"rung {rung}": Denoiser(engines, fixed_count(rung)) for rung in rungs}
    denoisers["full"] = Denoiser(engines, FullContext())
    denoisers["anchor"] = Denoiser(engines, ToPi(interval=1))

    transformer = diffusers_transformer(dict(config))
    size = CallSize(num_noisy=tokens, num_reference=tokens, num_text=text)
    back_layers = range(FRONT_DEPTH, NUM_LAYERS)
    products = graph_products(config, "qwen", back_layers, size, "back")
    variants = {name: step_runner(d, inputs) for name, d in denoisers.items()}
    variants["diffusers"] = lambda: diffusers_step(transformer, inputs, grids)
    variants["products"] = product_runner(products)
    for name, denoiser in denoisers.items():
        if name.startswith("rung"):
            denoiser.predict("cond", inputs)  # the anchor step before reduced ones
    times = measure(variants, arguments.repeats)
    result = summarise(times, denoisers, products, config, size, rungs)
    result |= {
        "threads": threads,
        "repeats": arguments.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "torch": torch.__version__,
            "onnxruntime": engine_set.manifest.backend_version,
        },
        "tokens": tokens,
        "text": text,
    }
    print_table(result)
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(line)
    return 0


def diffusers_transformer(config: dict[str, Any]) -> Any:
    """The unmodified class with random weights."""
    from diffusers import QwenImageTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        known = {k: v for k, v in config.items() if not k.startswith("_")}
        return QwenImageTransformer2DModel(**known).eval()


@torch.no_grad()
def diffusers_step(transformer: Any, inputs: ModelInputs, grids: list[Any]) -> None:
    """The same call of the unmodified transformer."""
    transformer(
        hidden_states=torch.cat([inputs.noisy_latents, inputs.reference_latents], dim=1),
        encoder_hidden_states=inputs.text_embeds,
        timestep=inputs.timestep,
        img_shapes=[grids],
        return_dict=False,
    )


def summarise(
    times: dict[str, list[float]],
    denoisers: dict[str, Denoiser],
    products: list[MatrixProduct],
    config: dict[str, Any],
    size: CallSize,
    rungs: tuple[int, ...],
) -> dict[str, Any]:
    """Medians and ratios."""
    median = {name: statistics.median(values) for name, values in times.items()}
    spread = {
        name: (max(values) - min(values)) / statistics.median(values)
        for name, values in times.items()
    }

    def flops(kept: int) -> int:
        return sum(call_flops(config, "qwen", FRONT_DEPTH, NUM_LAYERS, size, kept))

    table = []
    for rung in rungs:
        name = f"rung {rung}"
        predicted = flops(size.num_reference) / flops(rung)
        measured = median["full"] / median[name]
        table.append(
            {
                "rung": rung,
                "ms": round(median[name], 1),
                "spread": round(spread[name], 3),
                "speedup": round(measured, 3),
                "predicted": round(predicted, 3),
                "of_predicted": round(measured / predicted, 3),
                "against_diffusers": round(median["diffusers"] / median[name], 3),
            }
        )
    full_back = statistics.median(r.back_ms for r in denoisers["full"].report.steps[1:])
    back_flops = sum(p.flops for p in products)
    anchor_records = denoisers["anchor"].report.steps[1:]
    # Paired by repeat: an anchor step less the unscored step that ran beside it.
    scoring = statistics.median(a - f for a, f in zip(times["anchor"], times["full"], strict=True))
    select = statistics.median(r.select_ms for r in anchor_records)
    shares = {}
    for fraction in (0.5, 0.75):
        rung = min(r for r in rungs if r >= fraction * size.num_reference)
        anchors = STEPS // INTERVAL
        run = anchors * median["anchor"] + (STEPS - anchors) * median[f"rung {rung}"]
        shares[str(rung)] = round(anchors * scoring / run, 5)
    records = [r for name, d in denoisers.items() if name != "anchor" for r in d.report.steps[1:]]
    outside = statistics.median(
        (r.gather_ms + r.select_ms + r.other_ms) / r.total_ms for r in records
    )
    return {
        "full_ms": round(median["full"], 1),
        "diffusers_ms": round(median["diffusers"], 1),
        "full_against_diffusers": round(median["diffusers"] / median["full"], 3),
        "rungs": table,
        "worst_of_predicted": min(row["of_predicted"] for row in table),
        "back_ms": round(full_back, 1),
        "back_gflops_per_s": round(back_flops / full_back / 1e6, 1),
        "products_ms": round(median["products"], 1),
        "products_gflops_per_s": round(back_flops / median["products"] / 1e6, 1),
        "back_of_products_rate": round(median["products"] / full_back, 3),
        "scoring_and_selection_ms": round(scoring, 1),
        "selection_ms": round(select, 3),
        "scoring_and_selection_share_of_run": shares,
        "outside_engines_share": round(outside, 5),
    }


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    table = Table(title=f"one step, d = 1024, G = C = {result['tokens']}, medians")
    for column in ("reference tokens", "ms", "speed-up", "predicted", "ratio", "vs diffusers"):
        table.add_column(column, justify="right")
    for row in result["rungs"]:
        table.add_row(
            *(
                str(row[key])
                for key in (
                    "rung", "ms", "speedup", "predicted", "of_predicted", "against_diffusers",
                )
            )
        )  # fmt: skip
    console.print(table)
    for key in (
        "full_against_diffusers",
        "worst_of_predicted",
        "back_of_products_rate",
        "scoring_and_selection_share_of_run",
        "outside_engines_share",
    ):
        console.print(f"{key}: {result[key]}")


if __name__ == "__main__":
    sys.exit(main())
