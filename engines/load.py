"""From a folder to engines that run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from ditrim.engines.engine_set import EngineSet, load_engine_set
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines


def load_engines(
    engine_set: EngineSet | str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int = 0,
    max_contexts: int = 16,
    cuda_graphs: Literal["auto", "on", "off"] = "auto",
    verify: Literal["sizes", "hashes"] = "sizes",
    allow_other_version: bool = False,
) -> Engines:
    """Load an engine set once; any number of sessions and threads can share the result.

    Args:
        engine_set: a folder, or what `load_engine_set` returned.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of a graph; 0 means one a core. ONNX Runtime only.
        max_contexts, cuda_graphs: see `TensorRTEngines`. TensorRT and TensorRT-RTX only.
        verify: check file sizes, or also every SHA-256.
        allow_other_version: accept another version of the backend than the set was built for.

    Raises:
        EngineSetError: the set is missing, damaged or made by another version.
        BackendError: its backend is not there or cannot run it.
    """
    if not isinstance(engine_set, EngineSet):
        engine_set = load_engine_set(
            engine_set, verify=verify, allow_other_version=allow_other_version
        )
    backend = engine_set.manifest.backend
    if backend == "onnxruntime":
        from ditrim.engines.onnxruntime import OnnxRuntimeEngines

        return OnnxRuntimeEngines(engine_set, device=device, threads=threads)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from ditrim.engines.tensorrt import TensorRTEngines

        return TensorRTEngines(
            engine_set, device=device, max_contexts=max_contexts, cuda_graphs=cuda_graphs
        )
    raise UsageError(
        f"{engine_set.folder} was built for the backend {backend!r}, which this version cannot "
        "run; known: onnxruntime, tensorrt, tensorrt-rtx"
    )
