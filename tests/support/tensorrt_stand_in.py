"""A library and a GPU that are not there: TensorRT's objects over ONNX Runtime, streams as threads.

A "plan" names an ONNX graph. Its context runs that graph when the stream's thread comes to it, on
the addresses that were set, and obeys the real library's rules: profile before shapes, shapes
inside the profile and never changed where the plan holds a plugin or a graph was captured, every
address set and aligned, an arena that is large enough and that nobody else writes meanwhile.
`test_tensorrt_runtime.py` checks that the real library has every name that is used here.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from ditrim.engines.backends.tensorrt.library import Library
from ditrim.engines.sets.engine_set import EngineSet, read_manifest
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.engines.sets.profiles import is_scored, ladder_profiles, plan_roles, shape_of
from ditrim.plugins.errors import BackendError

ALIGNMENT = 64
MAGIC = "stand-in plan"


# The GPU.


class ThreadStream:
    """A stream: a thread that does what was queued, in order."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None
        self.error: BaseException | None = None
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        if self.captured is not None:
            self.captured.append(work)
        else:
            self._queue.put(work)

    def drain(self) -> None:
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _work(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            except BaseException as error:
                self.error = self.error or error


class ThreadHardware:
    """Stands for a GPU (see `Hardware`).

    Args:
        free_bytes: how much can be allocated at once.
        captures: whether capturing works.
    """

    def __init__(self, *, free_bytes: int = 1 << 40, captures: bool = True) -> None:
        self.device = torch.device("cpu")
        self.name = "a stand-in GPU"
        self.alignment = ALIGNMENT
        self.free_bytes, self.captures = free_bytes, captures
        self.allocated: list[int] = []
        self._streams: dict[int, ThreadStream] = {}
        self._own = threading.local()

    @contextmanager
    def session_stream(self) -> Iterator[ThreadStream]:
        if not hasattr(self._own, "stream"):
            self._own.stream = ThreadStream()
            self._streams[id(self._own.stream)] = self._own.stream
        try:
            yield self._own.stream
        finally:
            self._own.stream.drain()

    def stream_of(self, handle: int) -> ThreadStream:
        return self._streams[handle]

    def handle(self, stream: ThreadStream) -> int:
        return id(stream)

    def mark(self, stream: ThreadStream) -> threading.Event:
        event = threading.Event()
        stream.submit(event.set)
        return event

    def wait(self, stream: ThreadStream, event: threading.Event) -> None:
        stream.submit(lambda: assert_(event.wait(30), "a stream waits for ever"))

    def finish(self, event: threading.Event) -> None:
        assert_(event.wait(30), "the host waits for ever")

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self.free_bytes:
            raise BackendError(f"{num_bytes} bytes were asked for; {self.free_bytes} are left")
        self.allocated.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def capture(self, stream: ThreadStream, enqueue: Callable[[], bool]) -> Any:
        from ditrim.engines.backends.tensorrt.device import CaptureError

        if not self.captures:
            raise CaptureError("capturing failed: operation not permitted")
        stream.captured = []
        assert_(enqueue(), "the library refuses while a graph is captured")
        graph, stream.captured = stream.captured, None
        return graph

    def replay(self, graph: list[Callable[[], None]], stream: ThreadStream) -> None:
        for work in graph:
            stream.submit(work)

    def synchronize(self) -> None:
        with self.session_stream():
            pass


def assert_(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# The library.


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT64 = range(5)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, MALFORMED_ENGINE = 1, 2, 32


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        self._content = bytes(blob)
        return self._content.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self._content or b"kernels"


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache


class Weights:
    def __init__(self, dtype: DataType, address: int, count: int) -> None:
        self.dtype, self.size = dtype, count
        self._address = address


_NUMPY = {"float32": np.float32, "int64": np.int64}
_KINDS = {"float32": DataType.FLOAT, "int64": DataType.INT64}
_ONNX_KINDS = {1: DataType.FLOAT, 7: DataType.INT64}


class IExecutionContext:
    """Runs the engine's graph by address."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._arena = (0, 0)
        self._is_fixed = False
        engine._live_contexts.append(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert_(not self._shapes, "the profile comes before the shapes")
        self._engine._hardware.stream_of(stream_handle)
        if profile_index >= self._engine.num_optimization_profiles or self._engine._fails:
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert_(not self._is_fixed, "a context changed its shapes")
        assert self._profile is not None
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        if self._engine._plan.get("no_size"):
            self._engine._logger.log(SimpleNamespace(name="ERROR"), "no size of these shapes")
            return 0
        return 256 * sum(math.prod(shape) for shape in self._shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert_(size >= self.update_device_memory_size_for_shapes(), "the arena is too small")
        self._arena = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert_(memory % ALIGNMENT == 0, f"{name} is not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        assert_(
            set(self._addresses) == {*engine._inputs, *engine._outputs}, "an address is missing"
        )
        assert_(self._arena[1] > 0, "a context has no memory")
        stream = engine._hardware.stream_of(stream_handle)
        if engine._fails:
            engine._logger.log(SimpleNamespace(name="ERROR"), "enqueueV3: the kernel is on strike")
            return False
        self._is_fixed |= engine._plan["holds_plugin"] or stream.captured is not None
        shapes, addresses, arena = dict(self._shapes), dict(self._addresses), self._arena

        def work() -> None:
            need, mine = self.update_device_memory_size_for_shapes(), id(work)
            ends = [ctypes.c_int64.from_address(arena[0] + at) for at in (0, need - need % 8 - 8)]
            for end in ends:
                end.value = mine
            engine._run(shapes, addresses)
            assert_(all(end.value == mine for end in ends), "another run wrote into the arena")

        stream.submit(work)
        return True


class ICudaEngine:
    """An ONNX graph with profiles."""

    streamable_weights_size = 0
    weight_streaming_budget_v2 = 0

    def __init__(self, plan: dict[str, Any], hardware: ThreadHardware, logger: Any) -> None:
        self._plan, self._hardware, self._logger = plan, hardware, logger
        self._inputs = {name: (dtype, shape) for name, dtype, shape in plan["inputs"]}
        self._outputs = {name: (dtype, shape) for name, dtype, shape in plan["outputs"]}
        self._live_contexts: list[IExecutionContext] = []
        self._configs: list[IRuntimeConfig] = []
        self._fails = False
        self._given: dict[str, bytes] | None = None
        self._session: Any = None
        if not plan["stripped"]:
            self._session = _session(plan["graph"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _KINDS[(self._inputs | self._outputs)[name][0]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

    def create_runtime_config(self) -> IRuntimeConfig:
        self._configs.append(IRuntimeConfig())
        return self._configs[-1]

    def create_execution_context(self, how: Any) -> IExecutionContext | None:
        strategy = how._strategy if isinstance(how, IRuntimeConfig) else how
        assert_(strategy == ExecutionContextAllocationStrategy.USER_MANAGED, "own memory")
        if self._plan.get("no_context"):
            self._logger.log(SimpleNamespace(name="ERROR"), "createExecutionContext: OutOfMemory")
            return None
        return IExecutionContext(self)

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        binding = self._session.io_binding()
        sizes: dict[str, int] = {}
        for name, (dtype, axes) in self._inputs.items():
            sizes |= {a: s for a, s in zip(axes, shapes[name], strict=True) if isinstance(a, str)}
            binding.bind_input(name, "cpu", 0, _NUMPY[dtype], shapes[name], addresses[name])
        unscored = np.zeros(1, np.int64)  # a plan without scoring: the graph here still has it
        for name in {item.name for item in self._session.get_inputs()} - set(self._inputs):
            binding.bind_cpu_input(name, unscored)
        for name, (dtype, axes) in self._outputs.items():
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
            binding.bind_output(name, "cpu", 0, _NUMPY[dtype], shape, addresses[name])
        self._session.run_with_iobinding(binding)


def _session(model: str | bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Refitter:
    """Takes the weights of a stripped engine by name and address."""

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._engine = engine
        self._model = onnx.load(engine._plan["graph"])
        self._wanted = {item.name: item for item in self._model.graph.initializer}
        self._given: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._wanted)

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._wanted if name not in self._given]

    def get_weights_prototype(self, name: str) -> Weights:
        tensor = self._wanted[name]
        return Weights(_ONNX_KINDS[tensor.data_type], 0, math.prod(tensor.dims))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        prototype = self.get_weights_prototype(name)
        if (weights.dtype, weights.size) != (prototype.dtype, prototype.size):
            return False
        size = {DataType.FLOAT: 4, DataType.INT64: 8}[weights.dtype]
        self._given[name] = ctypes.string_at(weights._address, weights.size * size)
        return True

    def refit_cuda_engine(self) -> bool:
        for name, tensor in self._wanted.items():
            dims, kind = list(tensor.dims), tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.raw_data = name, kind, self._given[name]
            tensor.dims.extend(dims)
        self._engine._session = _session(self._model.SerializeToString())
        return True


def make_library(hardware: ThreadHardware, backend: str = "tensorrt-rtx") -> Library:
    """A `Library` whose engines run on `hardware`; `module.engines` lists them."""
    is_rtx = backend == "tensorrt-rtx"
    engines: list[ICudaEngine] = []

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            plan = json.loads(bytes(serialized_engine))
            if plan["magic"] != MAGIC:
                self._logger.log(SimpleNamespace(name="ERROR"), "Serialization assertion failed")
                return None
            engines.append(ICudaEngine(plan, hardware, self._logger))
            return engines[-1]

    class RuntimeRtx(Runtime):
        def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
            faults = json.loads(bytes(buffer)).get("faults", 0)
            return (EngineValidity.INVALID if faults else EngineValidity.VALID), faults

    module = SimpleNamespace(
        Runtime=RuntimeRtx if is_rtx else Runtime,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=DynamicShapesKernelSpecializationStrategy,
        CudaGraphStrategy=CudaGraphStrategy,
        EngineValidity=EngineValidity,
        EngineInvalidityDiagnostics=EngineInvalidityDiagnostics,
        Weights=Weights,
        Refitter=Refitter,
        engines=engines,
    )
    from ditrim.engines.backends.tensorrt import library as tensorrt_library

    def log(severity: Any, message: str) -> None:
        for lines in tensorrt_library._captures:
            lines.append((severity.name, message))

    return Library(
        backend=backend,
        module=module,
        version="0.0",
        is_rtx=is_rtx,
        logger=SimpleNamespace(log=log),
    )


def stand_in_set(
    built: Path,
    folder: Path,
    *,
    backend: str = "tensorrt-rtx",
    separate_anchor: bool = False,
    stripped: bool = False,
    **changes: Any,
) -> EngineSet:
    """A set of stand-in plans in `folder`, over the graphs of a built onnxruntime set.

    Args:
        changes: keys of every plan file to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in built.iterdir():
        if path.suffix in (".onnx", ".safetensors") and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    manifest = read_manifest(built)
    plans = {}
    for role in plan_roles(separate_anchor=separate_anchor):
        graph = manifest.graphs["front" if role == "front" else "back"]
        scored = role == "front" or is_scored(role, separate_anchor=separate_anchor)
        spec = PlanSpec(
            file=f"{role}.plan",
            profiles=ladder_profiles(
                manifest.ladder, manifest.limits, role, separate_anchor=separate_anchor
            ),
            inputs=tuple(t for t in graph.inputs if scored or t.name != "score_rows"),
            outputs=tuple(t for t in graph.outputs if scored or t.name != "influence"),
        )
        plans[role] = spec
        plan = {
            "magic": MAGIC,
            "graph": str(folder / graph.file),
            "stripped": stripped,
            "holds_plugin": backend == "tensorrt" and role != "front" and scored,
            "inputs": [list(asdict(tensor).values()) for tensor in spec.inputs],
            "outputs": [list(asdict(tensor).values()) for tensor in spec.outputs],
            "profiles": [
                {
                    tensor.name: [
                        shape_of(tensor, profile, which) for which in ("least", "best", "most")
                    ]
                    for tensor in spec.inputs
                }
                for profile in spec.profiles
            ],
        }
        (folder / spec.file).write_text(json.dumps(plan | changes))
    target = {
        "compute_capabilities": ["8.9"],
        "gpu": None,
        "driver": None,
        "weights": "stripped" if stripped else "included",
        "separate_anchor": separate_anchor,
    }
    manifest = replace(manifest, backend=backend, plans=plans, target=target)
    return EngineSet(folder=folder, manifest=manifest)
