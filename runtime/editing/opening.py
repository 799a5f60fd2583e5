"""From what names a model to engines and the pipeline around them, as commands and services do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet

# What stands in place of an engine set's folder where a pipeline's own transformer runs.
TORCH = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Names what edits run on.

    Attributes:
        engine: folder of an engine set, or "torch" for the transformer of `pipeline` itself.
        pipeline: folder, hub id or (with "torch") "small"; none is where the engine set's weights
            came from.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; 0 means one a core.
        verify: how an engine set's files are checked, "sizes" or "hashes".
        scheduler: in place of the pipeline's, see `load_scheduler`.
        compile: with "torch", compile each kind of block.
        cuda_graphs: with "torch", how many CUDA graphs are kept.
    """

    engine: str
    pipeline: str | None = None
    device: str = "auto"
    threads: int = 0
    verify: Literal["sizes", "hashes"] = "sizes"
    scheduler: str | None = None
    compile: bool = False
    cuda_graphs: int = 0

    @property
    def is_torch(self) -> bool:
        """Whether a pipeline's own transformer runs; a folder of that name is an engine set."""
        return self.engine == TORCH and not os.path.isdir(TORCH)


@dataclass(slots=True)
class Opened:
    """Engines, and the pipeline that they run in, which is loaded when it is first asked for.

    Attributes:
        engines: ready to run.
    """

    engines: Engines
    _make: Callable[[], Any]
    _pipe: Any = None

    @property
    def engine_set(self) -> EngineSet:
        """The engine set that the engines run."""
        return self.engines.engine_set

    def pipeline(self) -> Any:
        """Load the pipeline around the engines with `load_pipeline`, on their device."""
        if self._pipe is None:
            self._pipe = self._make()
        return self._pipe


def open_model(source: ModelSource, on_stage: Callable[[str], None] = lambda text: None) -> Opened:
    """Load what a source names: an engine set, or with "torch" a pipeline's own transformer.

    Args:
        source: what to load.
        on_stage: told what is being loaded.

    Raises:
        UsageError, EngineSetError, DitrimError: see `load_engines`, `load_whole_pipeline`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    if source.is_torch:
        pipe = _whole_pipeline(source, on_stage)
        from ditrim.engines.live import torch_engines

        live = torch_engines(
            pipe, compile="blocks" if source.compile else None, cuda_graphs=source.cuda_graphs
        )
        return Opened(live, lambda: pipe)
    if source.compile or source.cuda_graphs:
        raise UsageError(
            f"--compile and --cuda-graphs are for --engine {TORCH}; an engine set is compiled "
            "already: leave them out"
        )
    on_stage(f"loading {source.engine}")
    from ditrim.engines.load import load_engines

    engines = load_engines(
        source.engine, device=source.device, threads=source.threads, verify=source.verify
    )

    def pipeline() -> Any:
        from ditrim.runtime.editing.pipelines import (
            component_dtype,
            load_pipeline,
            silence_libraries,
        )

        silence_libraries()
        pipe = load_pipeline(
            engines.engine_set,
            source.pipeline,
            dtype=component_dtype(engines),
            scheduler=source.scheduler,
        )
        return pipe.to(engines.device) if engines.device.type == "cuda" else pipe

    return Opened(engines, pipeline)


def _whole_pipeline(source: ModelSource, on_stage: Callable[[str], None]) -> Any:
    """Load a pipeline with its transformer, on its device."""
    import torch

    from ditrim.runtime.editing.pipelines import load_whole_pipeline, silence_libraries

    place = source.pipeline
    if place is None:
        raise UsageError(
            f"--engine {TORCH} runs a pipeline's own transformer: name the pipeline with "
            "--pipeline FOLDER|HUB-ID, or --pipeline small for the shipped editor"
        )
    if source.threads:
        torch.set_num_threads(source.threads)
    device = source.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device}: torch {torch.__version__} sees no GPU; use --device cpu, or "
            "install a build of torch for this GPU"
        )
    on_stage(f"loading {place}")
    silence_libraries()
    dtype = None if device == "cpu" else torch.bfloat16
    return load_whole_pipeline(place, dtype=dtype, scheduler=source.scheduler).to(device)
