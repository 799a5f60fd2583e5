#!/usr/bin/env python3
"""Traced graphs against assembled ones in ONNX Runtime, side by side in one run.

A random Qwen-Image-Edit of d = 1024 (6 blocks, front depth 1, 2 scored layers) is written as a
checkpoint, and BACK and FRONT are made of it in both forms: traced block by block, weights written
beside the graph; and assembled, blocks as ONNX functions and weights in the checkpoint's own file.
Compared: the time and memory of loading, nodes before and after ONNX Runtime's own optimisation,
the time of a call, and the outputs. Loads are processes of their own; both forms take turns, so
that what slows the machine slows both. Figures are medians, ratios are assembled / traced. Ends in
one line of JSON.

Example:
    python scripts/studies/compare_graphs.py --repeats 7
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ditrim.runtime.profiling.machine import describe_machine, memory_of_process

NUM_LAYERS, FRONT_DEPTH, LAYERS = 6, 1, (3, 4)
CONFIG: dict[str, Any] = {
    "num_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 512,
}
FORMS = ("traced", "assembled")
ROLES = ("front", "back")
STORED = {"fp32": "float32", "bf16": "bfloat16"}


def make_graphs(root: Path, stored: str) -> dict[str, Any]:
    """Both forms of both graphs, in float32, from a checkpoint in another dtype if asked for."""
    import torch

    from ditrim.export.assemble import assemble_graph, index_weights, write_linked
    from ditrim.export.checkpoint import find_checkpoint
    from ditrim.export.family import FAMILIES
    from ditrim.export.graph import export_graph, write_graph
    from ditrim.export.split import SplitPoint
    from ditrim.export.transformer import load_transformer

    family = FAMILIES["qwen-edit"]
    dtype = getattr(torch, STORED[stored])
    made: Any = load_transformer(family, "random", dtype, config=CONFIG)
    made.save_pretrained(root / "checkpoint")
    del made
    found = find_checkpoint(root / "checkpoint")
    transformer: Any = load_transformer(family, found, torch.float32)
    point = SplitPoint(num_layers=NUM_LAYERS, front_depth=FRONT_DEPTH, representative_layers=LAYERS)
    result: dict[str, Any] = {"num_parameters": sum(p.numel() for p in transformer.parameters())}
    for form in FORMS:
        (root / form).mkdir()
    start = time.monotonic()
    for role in ROLES:
        write_graph(export_graph(transformer, point, role, torch.float32), root / "traced", role)
    result["traced_seconds"] = round(time.monotonic() - start, 2)
    del transformer
    start = time.monotonic()
    weights = index_weights(found)
    for role in ROLES:
        model = assemble_graph(
            family, found.config, point, role, dtype=torch.float32, weights=weights
        )
        write_linked(model, root / "assembled", role, weights)
    result["assembled_seconds"] = round(time.monotonic() - start, 2)
    return result


def open_session(path: Path, threads: int) -> Any:
    """A session with the options of the onnxruntime backend."""
    import onnxruntime as ort

    from ditrim.engines.backends.onnxruntime.engines import session_options

    options = session_options(path, "cpu", threads)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def load(path: Path, threads: int) -> dict[str, Any]:
    """Load a graph, in a process of its own."""
    import onnxruntime  # noqa: F401

    before = memory_of_process()["rss"]
    start = time.perf_counter()
    session = open_session(path, threads)
    seconds = time.perf_counter() - start
    after = memory_of_process()
    assert session.get_inputs()
    return {"seconds": seconds, "before": before, **after}


def optimised_nodes(path: Path) -> dict[str, int]:
    """Count each operator in the graph that ONNX Runtime runs."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(f"{folder}/optimised.onnx", load_external_data=False)
    assert not model.functions
    return dict(collections.Counter(node.op_type for node in model.graph.node).most_common())


def written_nodes(path: Path) -> int:
    """Nodes in the file, each function once."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return len(model.graph.node) + sum(len(function.node) for function in model.functions)


def random_inputs(session: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of these sizes; the same for every session with the same inputs."""
    generator = np.random.default_rng(0)
    inputs = {}
    for item in session.get_inputs():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in item.shape]
        if item.name == "score_rows":
            inputs[item.name] = np.arange(shape[0], dtype=np.int64)
        else:
            inputs[item.name] = generator.standard_normal(shape, dtype=np.float32)
    return inputs


def compare_calls(root: Path, role: str, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """The time of a call in both forms, in turn, and how far the outputs are apart."""
    sessions = {form: open_session(root / form / f"{role}.onnx", threads) for form in FORMS}
    result: dict[str, Any] = {}
    for rows in (1, tokens) if role == "back" else (1,):
        sizes = {"batch": 1, "noisy": tokens, "reference": tokens, "text": 64, "rows": rows}
        inputs = random_inputs(sessions["traced"], sizes)
        outputs = {form: session.run(None, inputs) for form, session in sessions.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for index in range(repeats):
            for form in FORMS if index % 2 else FORMS[::-1]:
                start = time.perf_counter()
                sessions[form].run(None, inputs)
                times[form].append(time.perf_counter() - start)
        pairs = zip(times["assembled"], times["traced"], strict=True)
        result[f"{rows} rows scored" if role == "back" else "call"] = {
            **{form: summary(values) for form, values in times.items()},
            "ratio": summary([one / other for one, other in pairs]),
            "largest_difference": max(
                float(np.abs(one - other).max() / np.abs(other).max())
                for one, other in zip(outputs["assembled"], outputs["traced"], strict=True)
            ),
        }
    return result


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and most of some values."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def run_stage(*arguments: object) -> Any:
    """A stage in a process of its own; its result is its last line."""
    command = [sys.executable, __file__, "--stage", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(root: Path, stored: str, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure load and run of every form of one checkpoint's graphs."""
    result = run_stage("make", root, stored)
    print(f"made: {result}", flush=True)
    result["roles"] = {}
    for role in ROLES:
        loads: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        for index in range(repeats):
            for form in FORMS if index % 2 else FORMS[::-1]:
                loads[form].append(run_stage("load", root / form / f"{role}.onnx", threads))
        nodes = {form: run_stage("nodes", root / form / f"{role}.onnx") for form in FORMS}
        found: dict[str, Any] = {"nodes": {}, "load": {}}
        for form in FORMS:
            operators = nodes[form].pop("optimised")
            found["nodes"][form] = nodes[form] | {"optimised": sum(operators.values())}
            found["nodes"][form]["operators"] = operators
            found["load"][form] = {
                "seconds": summary([item["seconds"] for item in loads[form]]),
                **{
                    f"{key}_mb": round(statistics.median(item[key] for item in loads[form]) / 1e6)
                    for key in ("before", "peak", "rss", "of_files")
                },
            }
        pairs = zip(loads["assembled"], loads["traced"], strict=True)
        ratios = [one["seconds"] / other["seconds"] for one, other in pairs]
        found["load"]["ratio"] = summary(ratios)
        found["calls"] = run_stage("calls", root, role, tokens, repeats, threads)
        result["roles"][role] = found
        print(f"{role}: {json.dumps(found)}", flush=True)
    return result


def run_as_stage(name: str, arguments: list[str]) -> Any:
    """Run one stage in this process and return its result."""
    path = Path(arguments[0])
    if name == "make":
        return make_graphs(path, arguments[1])
    if name == "load":
        return load(path, int(arguments[1]))
    if name == "nodes":
        return {"written": written_nodes(path), "optimised": optimised_nodes(path)}
    tokens, repeats, threads = map(int, arguments[2:])
    return compare_calls(path, arguments[1], tokens, repeats, threads)


def main() -> int:
    """Parse arguments and compare; a stage prints its result and nothing else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=512, help="noisy, and of the reference")
    parser.add_argument("--threads", type=int, default=0, help="0 means one a core")
    parser.add_argument(
        "--stored", choices=list(STORED), default="fp32", help="dtype of the checkpoint's weights"
    )
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(run_as_stage(options.stage[0], options.stage[1:])))
        return 0
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as root:
        result = compare(
            Path(root), options.stored, options.tokens, options.repeats, options.threads
        )
    loads.append(os.getloadavg()[0])
    settings = {"config": CONFIG, "tokens": options.tokens, "repeats": options.repeats}
    machine = describe_machine(None, options.threads)
    document = {"settings": settings, **result, "machine": machine, "load_average": loads}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
