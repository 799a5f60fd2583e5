"""Builds of engine sets without torch: everything is real but the two graphs.

As a script it is `build-engine` with such graphs: `fake_build.py [--at MOMENT --send SIGNAL] --
OPTIONS` sends itself the signal when the moment comes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ditrim.engines.build import build
from ditrim.engines.build.graphs import WrittenGraphs
from ditrim.engines.sets import staging
from ditrim.engines.sets.manifest import GraphSpec
from ditrim.engines.sets.specs import TensorSpec

OPTIONS = {"weights": "random", "max_noisy_tokens": 16, "max_reference_tokens": 24}
ARGUMENTS = [
    *("--weights", "random"),
    *("--max-noisy-tokens", "16"),
    *("--max-reference-tokens", "24"),
]
WEIGHT_BYTES = 4096


def write_graph(folder: Path, role: str, num_bytes: int = WEIGHT_BYTES) -> GraphSpec:
    """A graph with one external weight."""
    (folder / f"{role}.safetensors").write_bytes(np.zeros(num_bytes, np.uint8).tobytes())
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[num_bytes // 4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", f"{role}.safetensors"),
        ("offset", "0"),
        ("length", str(num_bytes)),
    ):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Add", ["noisy", "weight"], ["out"])],
        role,
        [helper.make_tensor_value_info("noisy", TensorProto.FLOAT, ["noisy", num_bytes // 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["noisy", num_bytes // 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph), str(folder / f"{role}.onnx"))
    return GraphSpec(
        file=f"{role}.onnx",
        inputs=(TensorSpec(name="noisy", dtype="float32", shape=("noisy", num_bytes // 4)),),
        outputs=(TensorSpec(name="out", dtype="float32", shape=("noisy", num_bytes // 4)),),
    )


def write_graphs(task: Any, folder: Path, progress: Any) -> WrittenGraphs:
    """In place of `build.write_graphs`; every other byte depends on the seed."""
    graphs = {}
    for role in ("front", "back"):
        progress.stage(f"Trace {role}")
        graphs[role] = write_graph(folder, role, int(os.environ.get("FAKE_BYTES", WEIGHT_BYTES)))
        progress.stage(f"Write {role}")
    config = {"num_layers": task.split.num_layers, "seed": task.source.seed}
    return WrittenGraphs(graphs=graphs, config=config, weights={}, merged_weights={})


def _signal_at(moment: str, number: int) -> None:
    """Arrange for this process to get a signal at a stage, or inside the swap."""

    def fire() -> None:
        os.kill(os.getpid(), number)

    if moment == "deleting the old set":
        rmtree = shutil.rmtree

        def rmtree_and_fire(path: Path, **kwargs: Any) -> None:
            if (Path(path) / "manifest.json").exists():
                shutil.rmtree = rmtree
                fire()
            rmtree(path, **kwargs)

        shutil.rmtree = rmtree_and_fire  # type: ignore[assignment]
    elif moment == "between two renames":
        staging._exchange = lambda left, right: False
        rename = os.rename

        def rename_and_fire(old: Path, new: Path) -> None:
            rename(old, new)
            fire()

        os.rename = rename_and_fire  # type: ignore[assignment]
    else:
        from ditrim.commands.console import Terminal

        stage = Terminal.stage

        def stage_and_fire(terminal: Terminal, name: str) -> None:
            stage(terminal, name)
            if name == moment:
                fire()

        Terminal.stage = stage_and_fire  # type: ignore[method-assign]


if __name__ == "__main__":
    from ditrim.commands.build_engine import main

    build.write_graphs = write_graphs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = sys.argv[1:]
    if arguments[0] == "--at":
        _signal_at(arguments[1], getattr(signal, arguments[3]))
        arguments = arguments[4:]
    sys.exit(main(arguments[1:]))
