"""Traces that one run of the tests makes once, whichever file or worker needs them first.

A trace takes seconds and most tests that build a set trace the same few tiny models. So
`export_graph`, and the blocks of assembled graphs, are kept in a folder of the run, by all that
they depend on. The code is one version throughout a run, so it is no part of the key. Who imported
`export_graph` by its name, and processes that tests start, trace for themselves.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A model with more is traced each time: no folder for gigabytes.
MOST_BYTES = 128 << 20


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kept(folder: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` returned to the first who asked for the key."""
    path = folder / hashlib.sha256(key.encode()).hexdigest()
    with locked(path.with_suffix(".lock")):
        if path.is_file():
            return pickle.loads(path.read_bytes())
        made = make()
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(made))
        os.replace(part, path)
        return made


def _key_of(transformer: Any, point: Any, role: str, *more: Any) -> tuple[str, int]:
    """What a graph depends on, and how many bytes of weights it has."""
    import torch

    from ditrim.export.split import blocks_of

    blocks = blocks_of(transformer)
    others = blocks[point.front_depth :] if role == "front" else blocks[: point.front_depth]
    unused = {id(tensor) for block in others for tensor in block.state_dict(keep_vars=True).values()}
    digest, num_bytes = hashlib.sha256(), 0
    for name, tensor in transformer.state_dict(keep_vars=True).items():
        if id(tensor) in unused:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().tobytes())
        num_bytes += tensor.nbytes
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    kind = type(transformer).__name__
    return repr((kind, sorted(config.items()), point, role, more, digest.hexdigest())), num_bytes


def share_traces(folder: Path) -> Iterator[None]:
    """Let `export_graph` and `assemble_graph` look into a folder before they trace."""
    import onnx
    import onnx_ir as ir

    from ditrim.export import assemble, graph

    trace, trace_block = graph.export_graph, assemble._traced_once

    def export_graph(
        transformer: Any,
        point: Any,
        role: str,
        dtype: Any,
        *,
        scored: bool = True,
        detailed: bool = False,
    ) -> ir.Model:
        def make() -> Any:
            nonlocal model
            model = trace(transformer, point, role, dtype, scored=scored, detailed=detailed)
            return ir.to_proto(model).SerializeToString()

        model: ir.Model | None = None
        is_scored = scored and role == "back"
        key, num_bytes = _key_of(
            transformer, point, role, dtype, is_scored, detailed and is_scored
        )
        if num_bytes > MOST_BYTES:
            return trace(transformer, point, role, dtype, scored=scored, detailed=detailed)
        content = kept(folder, key, make)
        if model is not None:
            return model
        return ir.from_proto(onnx.ModelProto.FromString(content))

    def traced_once(key: Any, *arguments: Any) -> Any:
        def make() -> Any:
            found = trace_block(key, *arguments)
            return found.function.SerializeToString(), found.weights

        if key not in assemble._TRACED:
            content, weights = kept(folder, repr(key), make)
            function = onnx.FunctionProto.FromString(content)
            known = assemble._TracedKind(function=function, weights=weights)
            assemble._TRACED.setdefault(key, known)
        return trace_block(key, *arguments)

    graph.export_graph, assemble._traced_once = export_graph, traced_once
    try:
        yield
    finally:
        graph.export_graph, assemble._traced_once = trace, trace_block
