#!/usr/bin/env python3
"""Loading engine sets on a CPU: time and memory, against ONNX Runtime alone.

For the small editor and a random Qwen-Image-Edit of d = 1024 (8 blocks, front depth 1, 3 scored
layers), the latter in three forms: traced, assembled from a checkpoint in float32, and assembled
from one in bfloat16. Every load is a process of its own; in a repeat each variant has one turn:

- `load_engines` against two plain `InferenceSession`s with the same options, and with ONNX
  Runtime's own defaults;
- with `--tried`, the two plain sessions with one option changed at a time;
- a second `load_engines` in the same process: what it takes and what memory it adds;
- memory of the process: resident, its share of pages (PSS), private; the peak while loading.

Imports are left out of the times and stated apart. Medians of all but the first repeat, which warms
the page cache; ratios are pair by pair. Ends in one line of JSON.

Example:
    python scripts/bench_loading.py --repeats 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import Section, show
from ditrim.runtime.profiling.machine import describe_machine, memory_of_process

CONFIG: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 512,
}
WIDE: dict[str, Any] = {
    "model": "qwen-edit",
    "front_depth": 1,
    "layers": (4, 5, 6),
    "max_reference_tokens": 1024,
    "max_noisy_tokens": 1024,
    "max_text_tokens": 64,
}
NUM_LAYERS = 8
STORED = {"assembled-fp32": "float32", "assembled-bf16": "bfloat16"}
# One change each to the options of `load_engines`.
TRIED: dict[str, dict[str, Any]] = {
    "prepacking on one thread": {"entries": {"session.prepack.enable_parallel": "0"}},
    "no prepacking": {"entries": {"session.disable_prepacking": "1"}},
    "no arena": {"attributes": {"enable_cpu_mem_arena": False}},
    "initializers outside the arena": {
        "entries": {"session.use_device_allocator_for_initializers": "1"}
    },
    "no optimisation": {"attributes": {"graph_optimization_level": 0}},
    "basic optimisation": {"attributes": {"graph_optimization_level": 1}},
    "constants of any size folded": {
        "entries": {"optimization.constant_folding_max_output_size_in_bytes": "0"}
    },
}


def build_sets(root: Path) -> dict[str, Path]:
    """Build the sets that are missing."""
    import torch

    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions
    from ditrim.export.family import FAMILIES
    from ditrim.export.transformer import load_transformer

    sets = {"small": BuildOptions(preset="small", output=str(root / "small"))}
    sets["traced"] = BuildOptions(
        weights="random",
        num_layers=NUM_LAYERS,
        config=CONFIG,
        output=str(root / "traced"),
        **WIDE,
    )
    for name, dtype in STORED.items():
        checkpoint = root / f"checkpoint-{dtype}"
        if not checkpoint.is_dir():
            made: Any = load_transformer(
                FAMILIES["qwen-edit"],
                "random",
                getattr(torch, dtype),
                config=CONFIG | {"num_layers": NUM_LAYERS},
            )
            made.save_pretrained(checkpoint)
            del made
        sets[name] = BuildOptions(
            weights=str(checkpoint),
            graph_only=True,
            precision="fp32",
            output=str(root / name),
            **WIDE,
        )
    for options in sets.values():
        build_engine_set(options)
    return {name: Path(options.output or "") for name, options in sets.items()}


def added(before: dict[str, int]) -> dict[str, int]:
    """Return the memory added since before; of the peak, above what was resident."""
    now = memory_of_process()
    return {key: now[key] - before["rss" if key == "peak" else key] for key in now}


def load_ours(task: dict[str, Any]) -> dict[str, Any]:
    """`load_engines` twice, and the memory that each adds."""
    start = time.perf_counter()
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    import ditrim.engines.backends.onnxruntime.engines  # noqa: F401
    from ditrim.engines.load import load_engines

    result: dict[str, Any] = {"import_seconds": time.perf_counter() - start}
    before = memory_of_process()
    start = time.perf_counter()
    first = load_engines(task["folder"], device="cpu")
    result["seconds"] = time.perf_counter() - start
    result |= added(before)
    before = memory_of_process()
    start = time.perf_counter()
    second = load_engines(task["folder"], device="cpu")
    result["second_seconds"] = time.perf_counter() - start
    result["second_rss"] = added(before)["rss"]
    assert first is second
    return result


def load_plain(task: dict[str, Any]) -> dict[str, Any]:
    """Two sessions of ONNX Runtime, one after the other."""
    start = time.perf_counter()
    import onnxruntime as ort

    result: dict[str, Any] = {"import_seconds": time.perf_counter() - start}
    from ditrim.engines.backends.onnxruntime.engines import session_options

    paths = [Path(task["folder"]) / f"{role}.onnx" for role in ("front", "back")]
    made = [ort.SessionOptions() if task.get("defaults") else session_options(p) for p in paths]
    before = memory_of_process()
    start = time.perf_counter()
    sessions = []
    for path, options in zip(paths, made, strict=True):
        options.log_severity_level = 3
        for key, value in task.get("entries", {}).items():
            options.add_session_config_entry(key, value)
        for key, value in task.get("attributes", {}).items():
            if key == "graph_optimization_level":
                value = ort.GraphOptimizationLevel(value)
            setattr(options, key, value)
        sessions.append(ort.InferenceSession(str(path), options))
    result["seconds"] = time.perf_counter() - start
    return result | added(before)


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    """Load in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(
    folders: dict[str, Path], repeats: int, *, with_tried: bool
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by set and variant, one a repeat; the first repeat is left out."""
    from rich.progress import Progress

    variants: dict[str, dict[str, Any]] = {
        "load_engines": {"how": "ours"},
        "same options": {"how": "plain"},
        "defaults": {"how": "plain", "defaults": True},
    }
    if with_tried:
        variants |= {name: {"how": "plain"} | change for name, change in TRIED.items()}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {variant: [] for variant in variants} for name in folders
    }
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        count = (repeats + 1) * len(folders) * len(variants)
        bar = progress.add_task("loading", total=count)
        for repeat in range(repeats + 1):
            for name, folder in folders.items():
                # Every other repeat backwards: none always follows the same one.
                for variant in list(variants)[:: 1 if repeat % 2 else -1]:
                    result = run_child(variants[variant] | {"folder": str(folder)})
                    if repeat > 0:
                        found[name][variant].append(result)
                    progress.advance(bar)
    return found


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each variant of a set, and its times against ONNX Runtime alone."""
    summary: dict[str, Any] = {}
    plain = results["same options"]
    for variant, runs in results.items():
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, plain, strict=True)]
        row = {
            "ratio": round(statistics.median(ratios), 3),
            "least_ratio": round(min(ratios), 3),
            "most_ratio": round(max(ratios), 3),
        }
        for key in runs[0]:
            value = statistics.median(run[key] for run in runs)
            is_time = key.endswith("seconds")
            name = key.replace("seconds", "ms") if is_time else f"{key}_mb"
            row[name] = round(value * 1e3 if is_time else value / 1e6, 1)
        summary[variant] = row
    return summary


def tables(result: dict[str, Any]) -> Iterator[Section]:
    """A table for each set."""
    columns = ("ms", "ratio", "rss_mb", "pss_mb", "private_mb", "peak_mb", "import_ms",
               "second_ms", "second_rss_mb")  # fmt: skip
    for name, rows in result["sets"].items():
        yield Section(
            title=f"{name}: medians of {result['repeats']} loads",
            columns=("variant", *columns),
            rows=[
                [variant, *(row.get(column, "") for column in columns)]
                for variant, row in rows.items()
            ],
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats (default 7)")
    parser.add_argument("--sets", help="which sets, comma-separated (default: all four)")
    parser.add_argument("--tried", action="store_true", help="also options that were tried")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("engines-out/bench-loading"),
        help="where the sets are built (4 GB)",
    )
    parser.add_argument("--output", type=Path, help="write the JSON result there as well")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; it must be 1 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.child is not None:
        load = {"ours": load_ours, "plain": load_plain}[arguments.child["how"]]
        print(json.dumps(load(arguments.child)))
        return 0
    print("building or reusing the engine sets", file=sys.stderr)
    folders = build_sets(arguments.folder)
    if arguments.sets is not None:
        unknown = set(arguments.sets.split(",")) - set(folders)
        if unknown:
            names = ", ".join(sorted(unknown))
            print(f"unknown sets: {names}; known: {', '.join(folders)}", file=sys.stderr)
            return 2
        folders = {name: folders[name] for name in arguments.sets.split(",")}
    found = measure(folders, arguments.repeats, with_tried=arguments.tried)

    result = {
        "sets": {name: summarise(results) for name, results in found.items()},
        "repeats": arguments.repeats,
        "machine": describe_machine(None, 0),
    }
    show(tables(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
