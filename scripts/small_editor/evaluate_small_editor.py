#!/usr/bin/env python3
"""How much ToPi costs in fidelity on the small editor: against full context and random dropping.

Every held-out edit is made three times from the same noise: with the full context, with ToPi, and
with as many tokens dropped at random. PSNR is against the full-context picture of the same seed;
the difference to random dropping is paired, with a 95 % bootstrap interval, by category. A picture
equal to the full-context one counts as 100 dB. `evaluate-policies` compares any policies and more.

Example:
    python scripts/small_editor/evaluate_small_editor.py --engine engines-out/small --edits 64
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.runtime.evaluation.edits import scenes
from ditrim.runtime.metrics import mean_interval, psnr_db
from ditrim.runtime.small_editor import load_small_pipeline


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, required=True, help="engine set of the small editor")
    parser.add_argument("--edits", type=int, default=64, help="how many (default 64)")
    parser.add_argument(
        "--split",
        choices=("held-out", "train"),
        default="held-out",
        help="scenes to report on, or to tune on (default held-out)",
    )
    parser.add_argument("--tau", type=float, default=0.85)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise")
    parser.add_argument("--output", type=Path, help="write the JSON result there as well")
    return parser.parse_args()


def evaluate(
    engine: Path, edits: int, tau: float, interval: int, steps: int, seed: int, split: str
) -> dict[str, Any]:
    """Run all edits and gather the figures."""
    from rich.progress import track

    engines = load_engines(engine, device="cpu")
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    topi = ditrim.ToPi(tau=tau, interval=interval)
    policies: dict[str, Any] = {
        "full": ditrim.FullContext(),
        "topi": topi,
        "random": ditrim.RandomDrop(policy=topi),
    }
    rows = []
    examples = scenes(split, edits, seed)
    for index, example in enumerate(
        track(examples, "editing", transient=True, disable=not sys.stderr.isatty())
    ):
        pictures, reports = {}, {}
        for name, policy in policies.items():
            with ditrim.attach(pipe, engines, policy) as attachment:
                pictures[name] = pipe(
                    image=[Image.fromarray(picture) for picture in example.references],
                    prompt=example.prompt,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed * 100_003 + index),
                    output_type="np",
                ).images[0]
                reports[name] = attachment.report
        rows.append(
            {
                "category": example.category,
                "kind": example.kind,
                "num_reference": reports["topi"].steps[0].num_reference,
                "kept_ratio": reports["topi"].kept_ratio,
                "topi_db": psnr_db(pictures["topi"], pictures["full"], peak=1.0),
                "random_db": psnr_db(pictures["random"], pictures["full"], peak=1.0),
                "speedup": reports["full"].total_ms / reports["topi"].total_ms,
            }
        )
    result: dict[str, Any] = {
        "edits": edits,
        "tau": tau,
        "interval": interval,
        "steps": steps,
        "seed": seed,
        "split": split,
        "engine_identity": engines.engine_set.manifest.identity,
    }
    for name in ("all", *sorted({row["category"] for row in rows})):
        chosen = [row for row in rows if name in ("all", row["category"])]
        gain = np.array([row["topi_db"] - row["random_db"] for row in chosen])
        low, high = mean_interval(gain)
        result[name] = {
            "count": len(chosen),
            "topi_db": round(float(np.mean([row["topi_db"] for row in chosen])), 2),
            "random_db": round(float(np.mean([row["random_db"] for row in chosen])), 2),
            "gain_db": round(float(gain.mean()), 2),
            "gain_interval_db": [round(low, 2), round(high, 2)],
            "kept_ratio": round(float(np.mean([row["kept_ratio"] for row in chosen])), 3),
            "median_speedup": round(float(np.median([row["speedup"] for row in chosen])), 3),
        }
    return result


def main() -> int:
    arguments = parse_arguments()
    options = vars(arguments)
    output = options.pop("output")
    result = evaluate(**options)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
