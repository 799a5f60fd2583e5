"""What is asked of a plan's builder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditrim.engines.backends.tensorrt.library import Gpu
from ditrim.engines.sets.profiles import ProfileSpec, shape_of
from ditrim.engines.sets.specs import TensorSpec

if TYPE_CHECKING:
    from ditrim.engines.sets.ladder import Ladder
    from ditrim.engines.sets.specs import Limits


TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


class PlanOptions(Protocol):
    """The options of a build that decide its plans; `BuildOptions` describes them."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[str, ...] | None: ...
    @property
    def allow_unfused(self) -> bool: ...
    @property
    def separate_anchor(self) -> bool: ...
    @property
    def weights_stripped(self) -> bool: ...
    @property
    def workspace(self) -> int | None: ...
    @property
    def optimization_level(self) -> int | None: ...
    @property
    def timing_cache(self) -> str | None: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def reference_ladder(self) -> Ladder: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The backend and GPU that plans are built for.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        capabilities: compute capabilities that were asked for; none means that of the GPU, or
            without one what TensorRT-RTX builds for by default.
        gpu: the GPU that is there.
        allow_unfused: whether attention may be without a fused kernel.
    """

    backend: str
    capabilities: tuple[str, ...] | None
    gpu: Gpu | None
    allow_unfused: bool = False

    def identity(self) -> dict[str, Any]:
        """The part of the target that a plan depends on."""
        if self.backend == "tensorrt":
            assert self.gpu is not None
            return {
                "gpu": self.gpu.name,
                "compute_capability": self.gpu.capability_name,
                "driver": self.gpu.driver,
            }
        here = None if self.gpu is None else [self.gpu.capability_name]
        return {"compute_capabilities": sorted(self.capabilities or ()) or here or "default"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A plan to build.

    Attributes:
        role: "front", "back" or "anchor".
        graph: the ONNX file; it is changed to what the library parses.
        plan: the file to write.
        inputs, outputs: the graph's tensors.
        profiles: optimisation profiles.
        target: what it is for.
        options: how to build it.
    """

    role: str
    graph: Path
    plan: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[ProfileSpec, ...]
    target: Target
    options: PlanOptions

    @property
    def is_scored(self) -> bool:
        """Whether the graph scores, and so needs the plugin with TensorRT."""
        return any(spec.name == "influence" for spec in self.outputs)

    def job(self) -> dict[str, Any]:
        """The job that the worker reads, as JSON-ready values."""
        options, gpu = self.options, self.target.gpu
        shapes = [
            {
                spec.name: [shape_of(spec, profile, which) for which in ("least", "best", "most")]
                for spec in self.inputs
            }
            for profile in self.profiles
        ]
        capabilities: Any = self.target.capabilities
        if capabilities is None and gpu is not None:
            capabilities = "current"
        needs_plugin = self.target.backend == "tensorrt" and self.is_scored
        rows = self.profiles[-1].rows
        return {
            "backend": self.target.backend,
            "graph": str(self.graph),
            "plan": str(self.plan),
            "profiles": shapes,
            "scored_rows": 1 if rows is None else rows.most,
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "allow_unfused": options.allow_unfused,
            "weights_stripped": options.weights_stripped,
            "capabilities": capabilities,
            "timing_cache": _timing_cache(options, gpu),
            "plugin_capability": gpu.capability if gpu is not None and needs_plugin else None,
        }


def _timing_cache(options: PlanOptions, gpu: Gpu | None) -> str | None:
    """The file that keeps kernel timings; a GPU of another kind has another."""
    if options.backend != "tensorrt" or options.timing_cache == "none":
        return None
    if options.timing_cache is not None:
        path = Path(options.timing_cache).expanduser()
    else:
        import platformdirs

        assert gpu is not None
        name = "-".join(gpu.name.split()) + f"-sm{''.join(map(str, gpu.capability))}.timing"
        path = Path(platformdirs.user_cache_dir("ditrim")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path.absolute())
