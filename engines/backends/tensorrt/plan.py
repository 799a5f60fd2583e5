"""Plans as they are loaded: deserialized from a mapped file and compared with the manifest."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.engines.backends.tensorrt.library import Library, log_captured
from ditrim.engines.files import write_file
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.engines.sets.profiles import shape_of
from ditrim.plugins.errors import DitrimError, EngineSetError
from ditrim.plugins.precision import PRECISIONS

logger = logging.getLogger(__name__)

# Names of the manifest's element types in TensorRT's DataType.
_TYPES = {"int64": "INT64"} | {item.torch_name: item.tensorrt for item in PRECISIONS.values()}
_SEVERE = ("INTERNAL_ERROR", "ERROR", "WARNING")
_SHOWN_LINES = 4


@dataclass(slots=True)
class LoadedPlan:
    """The library's engine of a plan, and what ditrim knows of it.

    Attributes:
        role: of the plan.
        spec: the manifest's.
        engine: the library's.
        runtime_config: how its contexts are made; none with TensorRT.
        changes_shapes: whether a context may change its shapes. Those of a plan that embeds plugin
            code leak when they do (NVIDIA/TensorRT#4849).
        unfit_for_graphs: why nothing is captured, if so.
    """

    role: str
    spec: PlanSpec
    engine: Any
    runtime_config: Any
    changes_shapes: bool
    unfit_for_graphs: str | None = None


class PlanLoader:
    """Loads the plans of an engine set, with one runtime of the library."""

    def __init__(
        self,
        engine_set: EngineSet,
        library: Library,
        gpu_name: str,
        captures: bool,
    ) -> None:
        """Make the runtime.

        Args:
            engine_set: whose plans.
            library: that built them.
            gpu_name: for messages.
            captures: whether TensorRT-RTX captures CUDA graphs.
        """
        self.engine_set, self.library = engine_set, library
        self.gpu_name, self.captures = gpu_name, captures
        self._runtime = library.module.Runtime(library.logger)

    def load(self, role: str) -> LoadedPlan:
        """Load a plan and compare it with the manifest.

        Raises:
            EngineSetError: the library does not take it, or it is another than the manifest's.
            BackendError: it does not take its weights.
        """
        spec = self.engine_set.manifest.plans[role]
        path = self.engine_set.folder / spec.file
        engine = self._deserialize(role, path)
        _check_plan(self.library.module, engine, role, spec, self.engine_set)
        if self.engine_set.manifest.target.get("weights") == "stripped":
            from ditrim.engines.backends.tensorrt.refit import refit

            graph = path.with_suffix(".onnx")
            if role == "anchor" and not graph.exists():
                graph = graph.with_name("back.onnx")  # the same weights
            refit(self.library, engine, graph, self.engine_set)
        is_scored = any(tensor.name == "influence" for tensor in spec.outputs)
        return LoadedPlan(
            role=role,
            spec=spec,
            engine=engine,
            runtime_config=self._runtime_config(engine, role),
            changes_shapes=self.library.is_rtx or not is_scored,
            unfit_for_graphs=_unfit_for_graphs(self.library, engine),
        )

    def _deserialize(self, role: str, path: Path) -> Any:
        """A plan's engine; the file is mapped, so that its weights are not held on the host."""
        with _mapped(path, self.engine_set) as view, log_captured() as lines:
            reasons = _invalidity(self.library.module, self._runtime, view)
            engine = None if reasons else self._runtime.deserialize_cuda_engine(view)
        if engine is None:
            why = f": {', '.join(reasons)}" if reasons else ""
            raise EngineSetError(
                f"{self.library.backend} {self.library.version} refuses the {role} plan {path} "
                f"on {self.gpu_name}{why}{said(lines)}. It is damaged, too large for the "
                "memory that is free, or from another version, driver or GPU. Build it again with: "
                f"{self.engine_set.rebuild_command()} --force"
            )
        return engine

    def _runtime_config(self, engine: Any, role: str) -> Any:
        """TensorRT-RTX only: how contexts compile and keep kernels, as NVIDIA's sample has it.

        A new shape runs on general kernels while those of its own are compiled. The library
        captures its graphs itself: it knows when kernels were exchanged.
        """
        if not self.library.is_rtx:
            return None
        module = self.library.module
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.dynamic_shapes_kernel_specialization_strategy = (
            module.DynamicShapesKernelSpecializationStrategy.LAZY
        )
        if self.captures:
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache, path = config.create_runtime_cache(), self._kernels_of(role)
        if path.is_file() and not cache.deserialize(path.read_bytes()):
            logger.info("%s is of another library, driver or GPU; kernels are compiled", path)
        if not config.set_runtime_cache(cache):
            logger.warning("the %s plan keeps no compiled kernels: its cache was refused", role)
        return config

    def save_kernels(self, plan: LoadedPlan) -> None:
        """Keep what TensorRT-RTX compiled beside the plan; nothing where that cannot be written."""
        cache = None if plan.runtime_config is None else plan.runtime_config.get_runtime_cache()
        path = self._kernels_of(plan.role)
        content = b"" if cache is None else bytes(cache.serialize())
        if not content or (path.is_file() and path.read_bytes() == content):
            return
        try:
            write_file(path, content)
        except DitrimError as error:
            logger.info("compiled kernels are not kept: %s", error)

    def _kernels_of(self, role: str) -> Path:
        return self.engine_set.folder / f"{role}.kernels"


@contextmanager
def _mapped(path: Path, engine_set: EngineSet) -> Iterator[mmap.mmap]:
    if not path.is_file() or path.stat().st_size == 0:
        raise EngineSetError(
            f"engine set {engine_set.folder}: the plan {path.name} is missing or empty. Build it "
            f"again with: {engine_set.rebuild_command()} --force"
        )
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


def _invalidity(module: Any, runtime: Any, view: mmap.mmap) -> list[str]:
    """Why this library says that a plan cannot run here (TensorRT-RTX only)."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    validity, diagnostics = runtime.get_engine_validity(view)
    if validity != module.EngineValidity.INVALID:
        return []
    flags = module.EngineInvalidityDiagnostics.__members__.items()
    found = [name.lower().replace("_", " ") for name, flag in flags if diagnostics & int(flag)]
    return found or ["no reason given"]


def _check_plan(module: Any, engine: Any, role: str, spec: PlanSpec, engine_set: EngineSet) -> None:
    """Compare a plan with the manifest: what follows goes by address and is not checked again."""
    again = f"Build it again with: {engine_set.rebuild_command()} --force"
    where = f"the {role} plan {spec.file}"
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if names != expected:
        raise EngineSetError(
            f"{where} has the tensors {', '.join(sorted(names))}; the manifest says "
            f"{', '.join(sorted(expected))}. {again}"
        )
    modes = module.TensorIOMode
    for tensors, mode in ((spec.inputs, modes.INPUT), (spec.outputs, modes.OUTPUT)):
        for tensor in tensors:
            dtype = getattr(module.DataType, _TYPES[tensor.dtype])
            found = engine.get_tensor_dtype(tensor.name)
            if engine.get_tensor_mode(tensor.name) != mode or found != dtype:
                raise EngineSetError(
                    f"{where}: the tensor {tensor.name} is of {found}, the manifest says "
                    f"{tensor.dtype}, or it is no {mode.name.lower()}. {again}"
                )
    if engine.num_optimization_profiles != len(spec.profiles):
        raise EngineSetError(
            f"{where} has {engine.num_optimization_profiles} profiles, the manifest says "
            f"{len(spec.profiles)}. {again}"
        )
    for index, profile in enumerate(spec.profiles):
        for tensor in spec.inputs:
            shapes = engine.get_tensor_profile_shape(tensor.name, index)
            least, _, most = (tuple(int(size) for size in shape) for shape in shapes)
            if (least, most) != (
                shape_of(tensor, profile, "least"),
                shape_of(tensor, profile, "most"),
            ):
                raise EngineSetError(
                    f"{where}: profile {index} takes {tensor.name} from {least} to {most}, which "
                    f"is not what the manifest says. {again}"
                )


def _unfit_for_graphs(library: Library, engine: Any) -> str | None:
    if library.is_rtx:
        return "the library captures its own"
    total = int(engine.streamable_weights_size)
    if total > 0 and int(engine.weight_streaming_budget_v2) < total:
        return "its weights are streamed"
    return None


def said(lines: list[tuple[str, str]]) -> str:
    """Return the library's messages on a failure, as the end of a sentence."""
    severe = [message.strip() for severity, message in lines if severity in _SEVERE]
    return f" ({'; '.join(severe[-_SHOWN_LINES:])})" if severe else ""
