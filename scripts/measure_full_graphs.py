#!/usr/bin/env python3
"""What the graphs of the released models cost at full size, without their weights.

For each model: a checkpoint in the released layout (index, shards of 5 GB, real headers) whose
tensors are holes in sparse files; FRONT and BACK assembled from it in a process of its own, timed
from its start, with its peak memory; the ONNX checker; TensorRT-RTX's parser, if it is installed.
Nothing is computed with the weights. Ends in one line of JSON.

Example:
    python scripts/measure_full_graphs.py --models qwen-edit,flux-kontext
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 5_000_000_000
MODELS = ("qwen-edit", "qwen-edit-2511", "flux-kontext")
LIMIT_SECONDS, LIMIT_BYTES = 60, 1_500_000_000


def write_sparse_checkpoint(model: str, folder: Path) -> dict[str, Any]:
    """A bfloat16 checkpoint in the released layout whose weights take no room on the disk."""
    from ditrim.export.checkpoint import INDEX_NAME
    from ditrim.export.family import FAMILIES
    from ditrim.export.transformer import empty_transformer

    family = FAMILIES[model]
    transformer: Any = empty_transformer(family, family.config, "the configuration")
    shards: list[dict[str, Any]] = [{}]
    ends = [0]
    for name, value in transformer.state_dict().items():
        num_bytes = value.numel() * 2
        if ends[-1] + num_bytes > SHARD_BYTES:
            shards.append({})
            ends.append(0)
        shards[-1][name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [ends[-1], ends[-1] + num_bytes],
        }
        ends[-1] += num_bytes
    weight_map = {}
    for number, (header, end) in enumerate(zip(shards, ends, strict=True), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": sum(ends)}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    transformer.save_config(folder)
    return {
        "num_parameters": sum(value.numel() for value in transformer.parameters()),
        "num_shards": len(shards),
        "weight_bytes": sum(ends),
    }


def assemble(model: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Both graphs, in this process; what `build-engine --graph-only` does of it."""
    start = time.monotonic()
    import torch

    from ditrim.export.assemble import assemble_graph, count_nodes, index_weights, write_linked
    from ditrim.export.checkpoint import find_checkpoint
    from ditrim.export.family import FAMILIES
    from ditrim.export.split import SplitPoint
    from ditrim.plugins.architectures import ARCHITECTURES

    family = FAMILIES[model]
    found = find_checkpoint(checkpoint)
    weights = index_weights(found)
    point = SplitPoint(
        num_layers=sum(ARCHITECTURES[family.architecture].depths.values()),
        front_depth=family.front_depth,
        representative_layers=family.representative_layers,
    )
    result: dict[str, Any] = {"index_seconds": round(time.monotonic() - start, 2), "roles": {}}
    for role in ("front", "back"):
        start = time.monotonic()
        graph = assemble_graph(
            family, found.config, point, role, dtype=torch.bfloat16, weights=weights
        )
        files = write_linked(graph, folder, role, weights)
        result["roles"][role] = {
            "seconds": round(time.monotonic() - start, 2),
            "num_nodes": count_nodes(graph),
            "num_nodes_written": len(graph.graph)
            + sum(len(function) for function in graph.functions.values()),
            "functions": [key[1] for key in graph.functions],
            "graph_bytes": (folder / files[0]).stat().st_size,
        }
    result["num_links"] = sum(path.stat().st_nlink > 1 for path in folder.iterdir())
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["cpu_seconds"] = round(time.process_time(), 2)
    return result


def check(folder: Path) -> dict[str, Any]:
    """The ONNX checker on both graphs, shapes and types inferred."""
    from ditrim.export.assemble import check_linked

    start = time.monotonic()
    for role in ("front", "back"):
        check_linked(folder / f"{role}.onnx", full_check=True)
    return {"is_valid": True, "seconds": round(time.monotonic() - start, 2)}


def parse(folder: Path) -> dict[str, Any]:
    """TensorRT-RTX's parser on both graphs, at full depth."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return {"skipped": "tensorrt-rtx is not installed: pip install tensorrt-rtx"}
    import onnx

    from ditrim.engines.backends.tensorrt.graph import graph_for_backend

    result: dict[str, Any] = {"version": trt.__version__, "roles": {}}
    for role in ("front", "back"):
        path = folder / f"{role}.onnx"
        model = graph_for_backend(onnx.load(path, load_external_data=False), "tensorrt-rtx")
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        start = time.monotonic()
        is_parsed = parser.parse(model.SerializeToString(), str(path))
        result["roles"][role] = {
            "is_parsed": is_parsed,
            "seconds": round(time.monotonic() - start, 2),
            "num_layers": network.num_layers,
            "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)],
        }
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


STAGES = {"check": check, "parse": parse}


def run_stage(*arguments: str) -> dict[str, Any]:
    """One stage in a process of its own; its result is its last line."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--stage", *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "wall_seconds": round(time.monotonic() - start, 2)}


def measure(model: str, root: Path) -> dict[str, Any]:
    """Measure assembling and loading of one model's graphs."""
    checkpoint, folder = root / f"{model}-checkpoint", root / model
    checkpoint.mkdir()
    folder.mkdir()
    result = write_sparse_checkpoint(model, checkpoint)
    print(f"{model}: {result['num_parameters'] / 1e9:.2f} G parameters", flush=True)
    assembled = run_stage("assemble", model, str(checkpoint), str(folder))
    print(
        f"  assembled in {assembled['wall_seconds']} s ({assembled['cpu_seconds']} s of CPU), "
        f"peak {assembled['peak_bytes'] / 1e9:.2f} GB",
        flush=True,
    )
    checked = run_stage("check", str(folder))
    print(f"  ONNX checker: valid, {checked['seconds']} s", flush=True)
    parsed = run_stage("parse", str(folder))
    print(f"  TensorRT-RTX: {parsed.get('skipped') or parsed['roles']}", flush=True)
    disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    is_within = (
        assembled["wall_seconds"] <= LIMIT_SECONDS and assembled["peak_bytes"] <= LIMIT_BYTES
    )
    return {
        **result,
        "assemble": assembled,
        "check": checked,
        "parse": parsed,
        "disk_bytes": disk,
        "is_within_limits": is_within,
    }


def main() -> int:
    """Parse arguments and measure; a stage prints its result and nothing else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}"
    )
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        name, *arguments = options.stage
        if name == "assemble":
            model, *paths = arguments
            result = assemble(model, *map(Path, paths))
        else:
            result = STAGES[name](*map(Path, arguments))
        print(json.dumps(result))
        return 0
    models = options.models.split(",")
    for model in models:
        if model not in MODELS:
            parser.error(f"--models: unknown model {model!r}; allowed: {', '.join(MODELS)}")
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as root:
        results = {model: measure(model, Path(root)) for model in models}
    loads.append(os.getloadavg()[0])
    is_parsed = all(
        role["is_parsed"]
        for result in results.values()
        for role in result["parse"].get("roles", {}).values()
    )
    from ditrim.runtime.profiling.machine import describe_machine

    machine = describe_machine(None, 0)
    document = {"models": results, "machine": machine, "load_average": loads}
    print(json.dumps(document))
    return 0 if is_parsed else 1


if __name__ == "__main__":
    sys.exit(main())
