"""Traces that one run of the tests makes once, whichever file or worker needs them first.

A trace takes seconds, and most tests that build a set or a graph trace the same few tiny models. So
the exporter's results are kept in a folder of the run by all that they depend on; the code is one
version throughout a run and no part of it. Processes that tests start trace for themselves.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ditrim.export import assemble, graph
from ditrim.plugins.architectures.transformers import blocks_of

# A model with more is traced each time: no folder for gigabytes.
MOST_BYTES = 128 << 20
# Diffusers' own notes in a configuration, which differ between processes and folders.
_PRIVATE = re.compile(r"\('_\w+', (\[[^\]]*\]|'[^']*')\)")


def export_graph(*arguments: Any, **options: Any) -> ir.Model:
    """`ditrim.export.graph.export_graph`, shared."""
    return graph.export_graph(*arguments, **options)


def kept(folder: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` returned to the first who asked for the key."""
    path = folder / hashlib.sha256(key.encode()).hexdigest()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return pickle.loads(path.read_bytes())
        made = make()
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(made))
        os.replace(part, path)
        return made


def kept_model(folder: Path, key: str, make: Callable[[], ir.Model]) -> ir.Model:
    """`kept` for a graph, which is one's own to change."""
    made: list[ir.Model] = []

    def serialized() -> bytes:
        made.append(make())
        return ir.to_proto(made[0]).SerializeToString()

    content = kept(folder, key, serialized)
    return made[0] if made else ir.from_proto(onnx.ModelProto.FromString(content))


def _key_of(transformer: Any, point: Any, role: str, *more: Any) -> tuple[str, int]:
    """What a graph depends on, and how many bytes of weights it has."""
    blocks = blocks_of(transformer)
    others = blocks[point.front_depth :] if role == "front" else blocks[: point.front_depth]
    unused = {id(value) for block in others for value in block.state_dict(keep_vars=True).values()}
    digest, num_bytes = hashlib.sha256(), 0
    for name, value in transformer.state_dict(keep_vars=True).items():
        if id(value) not in unused:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
            num_bytes += value.nbytes
    config = sorted((k, v) for k, v in transformer.config.items() if not k.startswith("_"))
    cut = point.front_depth if role == "front" else point
    key = repr((type(transformer).__name__, config, cut, role, more, digest.hexdigest()))
    return key, num_bytes


def _shapes(tensors: Mapping[str, Any]) -> list[Any]:
    return [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]


def share_traces(folder: Path) -> Iterator[None]:
    """Let `export_graph` and `assemble_graph` look into a folder before they trace."""
    trace, trace_block, trace_around = (
        graph.export_graph,
        assemble._traced_once,
        assemble._trace_around,
    )

    def shared_graph(
        transformer: Any,
        point: Any,
        role: str,
        dtype: torch.dtype,
        *,
        scored: bool = True,
        detailed: bool = False,
    ) -> ir.Model:
        def make() -> ir.Model:
            return trace(transformer, point, role, dtype, scored=scored, detailed=detailed)

        is_scored = scored and role == "back"
        key, num_bytes = _key_of(transformer, point, role, dtype, is_scored, is_scored and detailed)
        return make() if num_bytes > MOST_BYTES else kept_model(folder, key, make)

    def shared_block(key: Any, *arguments: Any) -> Any:
        def make() -> Any:
            found = trace_block(key, *arguments)
            return found.function.SerializeToString(), found.weights

        if key not in assemble._TRACED:
            content, weights = kept(folder, _PRIVATE.sub("", repr(key)), make)
            function = onnx.FunctionProto.FromString(content)
            known = assemble._TracedKind(function=function, weights=weights)
            assemble._TRACED.setdefault(key, known)
        return trace_block(key, *arguments)

    def shared_around(module: Any, inputs: Any, names: Any, output_names: Any) -> ir.Model:
        key = repr((
            (repr(module), [(block.kind, block.layer) for block in module.blocks]),
            (module.architecture, names, output_names),
            (_shapes(inputs), _shapes(dict(module.named_parameters()))),
        ))  # fmt: skip
        return kept_model(folder, key, lambda: trace_around(module, inputs, names, output_names))

    graph.export_graph, assemble._traced_once, assemble._trace_around = (
        shared_graph,
        shared_block,
        shared_around,
    )
    try:
        yield
    finally:
        graph.export_graph, assemble._traced_once, assemble._trace_around = (
            trace,
            trace_block,
            trace_around,
        )
