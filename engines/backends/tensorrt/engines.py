"""The TensorRT and TensorRT-RTX backends: plans on an NVIDIA GPU, by address.

Replaces: a buffer set for each context, and copies to and from them. A plan has a context for each
profile, whose shapes are set in place; or one for each set of shapes, where it embeds plugin code,
or where graphs are captured, which change with their context. Contexts share one activation arena,
so runs of all sessions take turns: a lock orders them on the host, an event on the device. Inputs
and outputs are the caller's own tensors. `contexts.py` decides, `device.py` touches CUDA.

**Not run on a GPU yet.** Limits: one request at a time makes progress on the device, however many
sessions share the engines. Trade-off: one arena in place of one for every context, which at 20 G
parameters would not fit.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditrim.engines.backends.tensorrt.contexts import (
    GRAPH_MODES,
    Action,
    Addresses,
    ArenaSize,
    BoundedCache,
    ContextKey,
    GraphBook,
    GraphMode,
    Shapes,
    axes_of,
    check_outputs,
    choose_profile,
)
from ditrim.engines.backends.tensorrt.device import CaptureError, CudaHardware, Hardware
from ditrim.engines.backends.tensorrt.library import (
    Library,
    check_target,
    log_captured,
    open_library,
)
from ditrim.engines.backends.tensorrt.plan import LoadedPlan, PlanLoader, said
from ditrim.engines.forking import check_not_forked
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.engines.sets.specs import TensorSpec
from ditrim.plugins.errors import BackendError, DeviceError, UsageError
from ditrim.plugins.precision import PRECISIONS

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Context:
    """An execution context.

    Attributes:
        native: the library's.
        book: its graphs; none where nothing is captured.
        shapes: of the inputs, as they are set; none where they were refused.
        num_bytes: of activations that it needs at these shapes.
        generation: of the arena that was set last; -1 before the first.
        addresses: of the tensors that were set last.
        last_use: event after its last work on a stream.
    """

    native: Any
    book: GraphBook[Any] | None
    shapes: Shapes | None = None
    num_bytes: int = 0
    generation: int = -1
    addresses: Addresses = ()
    last_use: Any = None


class TensorRTEngines:
    """The plans of an engine set, ready to run (see `Engines`)."""

    def __init__(
        self,
        engine_set: EngineSet,
        device: str = "auto",
        max_contexts: int = 16,
        cuda_graphs: GraphMode = "auto",
        *,
        library: Library | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        """Load every plan once.

        Args:
            engine_set: built for "tensorrt" or "tensorrt-rtx".
            device: "auto" (the first GPU), "cuda" or "cuda:N".
            max_contexts: execution contexts kept, the most recently used; at least 2.
            cuda_graphs: "on" captures and replays, "off" never does; "auto" is on for TensorRT-RTX,
                which captures by itself, and off for TensorRT, where every length takes a context
                of its own for it and what it saves is a launch or so a layer.
            library, hardware: in place of the installed library and of a GPU, to test.

        Raises:
            EngineSetError: the plans were built for another library, driver or GPU, or are damaged.
            BackendError: the library or a GPU is missing, or memory ran out.
        """
        manifest = engine_set.manifest
        if cuda_graphs not in GRAPH_MODES:
            raise UsageError(f"cuda_graphs is {cuda_graphs!r}; allowed: {', '.join(GRAPH_MODES)}")
        if isinstance(max_contexts, bool) or not isinstance(max_contexts, int) or max_contexts < 2:
            raise UsageError(
                f"max_contexts is {max_contexts!r}; it must be a whole number, 2 or more (FRONT "
                "and BACK)"
            )
        ordinal = _ordinal_of(device, manifest.backend)
        if library is None:
            check_target(manifest, ordinal=ordinal, folder=engine_set.folder)
            library = open_library(manifest.backend)
        self.engine_set = engine_set
        self.dtype = PRECISIONS[manifest.precision].dtype
        self._library = library
        self._hardware: Hardware = hardware if hardware is not None else CudaHardware(ordinal)
        self.device = self._hardware.device
        self._mode = cuda_graphs
        self._why_no_graphs: dict[str, str] = {}
        self._lock = threading.Lock()
        self._contexts: BoundedCache[ContextKey, _Context] = BoundedCache(max_contexts)
        self._arena = ArenaSize()
        self._buffer: torch.Tensor | None = None
        self._last_use: Any = None
        self._counts = {"contexts": 0, "evicted": 0, "enqueue": 0, "capture": 0, "replay": 0}
        with self._hardware.session_stream():
            # Kept: its runtime has to live as long as the plans.
            self._loader = PlanLoader(
                engine_set, library, self._hardware.name, captures=cuda_graphs != "off"
            )
            self._plans = {role: self._loader.load(role) for role in manifest.plans}
        self._process = os.getpid()
        captures = cuda_graphs == "on" or (cuda_graphs == "auto" and library.is_rtx)
        for role, plan in self._plans.items():
            if not library.is_rtx and captures and plan.unfit_for_graphs:
                self._why_no_graphs[role] = plan.unfit_for_graphs
        self.choice = (
            f"{self._hardware.name}, {library.backend} {library.version}; CUDA graphs "
            + ("on" if captures else "off")
        )

    def close(self) -> None:
        """Wait for the last run, keep compiled kernels, and let contexts and arena go."""
        with self._lock:
            if self._last_use is not None:
                self._hardware.finish(self._last_use)
            for plan in self._plans.values():
                self._loader.save_kernels(plan)
            self._contexts.clear()
            self._buffer, self._last_use = None, None
            self._arena.replaced(0)

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():  # else a fork's, or loading failed
            self.close()

    def run(
        self, role: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        """Queue the work and return; the caller's stream waits for it."""
        check_not_forked()
        plan = self._plan_of(role)
        tensors = {spec.name: inputs.get(spec.name) for spec in plan.spec.inputs}
        tensors |= {spec.name: outputs.get(spec.name) for spec in plan.spec.outputs}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        axes = axes_of(plan.spec, shapes, role)
        check_outputs(plan.spec, shapes, axes, role)
        for spec in (*plan.spec.inputs, *plan.spec.outputs):
            self._check_tensor(spec, given[spec.name], role)
        sizes = tuple(shapes[spec.name] for spec in plan.spec.inputs)
        key = ContextKey(
            role=plan.role,
            profile=choose_profile(plan.spec, axes, role, self.engine_set.rebuild_command),
            shapes=None if self._sets_in_place(plan) else sizes,
        )
        held = self._aligned(plan.spec, given, role)
        addresses = tuple(tensor.data_ptr() for tensor in held)
        with self._hardware.session_stream() as stream, self._lock:
            self._run_in_turn(plan, key, sizes, tuple(given), addresses, stream)

    def synchronize(self) -> None:
        """Wait for what the calling thread queued."""
        self._hardware.synchronize()

    def stats(self) -> dict[str, Any]:
        """Counts of contexts and runs, arena bytes, and why a plan's calls are not captured."""
        with self._lock:
            return {
                **self._counts,
                "live_contexts": len(self._contexts),
                "arena_bytes": self._arena.num_bytes,
                "arena_growths": self._arena.generation,
                "not_captured": dict(self._why_no_graphs),
            }

    def _captures(self, plan: LoadedPlan) -> bool:
        """Whether calls of a plan are captured here, and not by the library."""
        return (
            self._mode == "on"
            and plan.unfit_for_graphs is None
            and plan.role not in self._why_no_graphs
        )

    def _sets_in_place(self, plan: LoadedPlan) -> bool:
        return plan.changes_shapes and not self._captures(plan)

    def _plan_of(self, role: str) -> LoadedPlan:
        """Anchor steps run on the plan of their own where there is one."""
        return self._plans[role] if role in self._plans else self._plans["back"]

    def _check_tensor(self, spec: TensorSpec, tensor: torch.Tensor, role: str) -> None:
        dtype = getattr(torch, spec.dtype)
        if tensor.dtype != dtype or tensor.device != self.device or not tensor.is_contiguous():
            raise UsageError(
                f"{role}: {spec.name} is {tensor.dtype} on {tensor.device} with strides "
                f"{tensor.stride()}; the plan takes contiguous {dtype} on {self.device}"
            )

    def _aligned(
        self, spec: PlanSpec, given: Mapping[str, torch.Tensor], role: str
    ) -> list[torch.Tensor]:
        """The tensors, with copies of inputs that begin where no plan reads.

        Such is a part of a larger tensor, as the references behind the noisy latents. The caller's
        stream copies, and reuses the memory in order, so that the copies need no other owner.
        """
        held = []
        outputs = {tensor.name for tensor in spec.outputs}
        for name, tensor in given.items():
            if tensor.data_ptr() % self._hardware.alignment:
                if name in outputs:
                    raise UsageError(
                        f"{role}: the output {name} does not begin at a multiple of "
                        f"{self._hardware.alignment} bytes; give a tensor of its own"
                    )
                tensor = tensor.clone()
            held.append(tensor)
        return held

    # Running: everything below here holds the lock.

    def _run_in_turn(
        self,
        plan: LoadedPlan,
        key: ContextKey,
        shapes: Shapes,
        names: tuple[str, ...],
        addresses: Addresses,
        stream: Any,
    ) -> None:
        hardware = self._hardware
        if self._last_use is not None:
            hardware.wait(stream, self._last_use)  # the arena is another run's until then
        context = self._contexts.get(key)
        if context is None:
            context = self._make_context(plan, key, stream)
        if context.shapes != shapes:
            self._set_shapes(plan, context, key.role, shapes)
        self._fit_arena(context, key.role, shapes)
        if context.addresses != addresses:
            for name, address in zip(names, addresses, strict=True):
                if not context.native.set_tensor_address(name, address):
                    raise BackendError(f"{key.role}: the plan refuses an address for {name}")
            context.addresses = addresses
        action: Action = "enqueue" if context.book is None else context.book.next_action(addresses)
        if action == "capture":
            action = self._capture(context, key.role, addresses, stream)
        try:
            if context.book is None or action == "enqueue":
                self._enqueue(context, key.role, stream)
            else:
                hardware.replay(context.book.graph(addresses), stream)
        finally:
            self._last_use = context.last_use = hardware.mark(stream)
        self._counts[action] += 1

    def _enqueue(self, context: _Context, role: str, stream: Any) -> None:
        with log_captured() as lines:
            is_queued = context.native.execute_async_v3(self._hardware.handle(stream))
        if not is_queued:
            raise DeviceError(
                f"{self._library.backend} could not run the {role} plan at "
                f"{_shapes_text(context.shapes)}{said(lines)}"
            )

    def _capture(self, context: _Context, role: str, addresses: Addresses, stream: Any) -> Action:
        """Capture and keep a graph, or say why there will be none."""
        assert context.book is not None
        handle = self._hardware.handle(stream)
        try:
            with log_captured() as lines:
                graph = self._hardware.capture(
                    stream, lambda: bool(context.native.execute_async_v3(handle))
                )
        except CaptureError as error:
            self._why_no_graphs[role] = f"{error}{said(lines)}"
            logger.info("no CUDA graphs of %s: %s", role, self._why_no_graphs[role])
            context.book = None
            return "enqueue"
        context.book.keep(addresses, graph)
        return "capture"

    def _make_context(self, plan: LoadedPlan, key: ContextKey, stream: Any) -> _Context:
        for old in self._contexts.make_room():
            if old.last_use is not None:
                self._hardware.finish(old.last_use)  # a context may not go while it runs
            self._counts["evicted"] += 1
        problem = ""
        with log_captured() as lines:
            native = self._native_context(plan)
            if native is None:
                problem = "a context could not be made"
            else:
                try:
                    native.set_optimization_profile_async(
                        key.profile, self._hardware.handle(stream)
                    )
                except RuntimeError as error:
                    problem = f"profile {key.profile} was refused ({error})"
        if problem:
            raise BackendError(
                f"{self._library.backend}: {problem} for the {key.role} plan{said(lines)}. If "
                f"memory ran out: lower max_contexts (now {self._contexts.most}), the resolution "
                "or the batch, or move the text encoder and VAE off the GPU while the engines run"
            )
        # Choosing a profile may have queued a copy, which it has to outlive.
        self._last_use = self._hardware.mark(stream)
        book: GraphBook[Any] | None = GraphBook() if self._captures(plan) else None
        context = _Context(native=native, book=book, last_use=self._last_use)
        self._contexts.put(key, context)
        self._counts["contexts"] += 1
        return context

    def _set_shapes(self, plan: LoadedPlan, context: _Context, role: str, shapes: Shapes) -> None:
        """Set a context's shapes, and ask what it needs of the arena at them."""
        native, context.shapes = context.native, None
        with log_captured() as lines:
            problem = _shape_problem(plan, native, shapes)
            num_bytes = 0 if problem else int(native.update_device_memory_size_for_shapes())
            # It says 0 where it fails, too.
            if not problem and not num_bytes and said(lines):
                problem = "the memory for these shapes could not be computed"
        if problem:
            raise BackendError(
                f"{self._library.backend}: {problem} for the {role} plan at "
                f"{_shapes_text(shapes)}{said(lines)}"
            )
        context.shapes, context.num_bytes, context.generation = shapes, num_bytes, -1

    def _native_context(self, plan: LoadedPlan) -> Any:
        if plan.runtime_config is not None:
            return plan.engine.create_execution_context(plan.runtime_config)
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return plan.engine.create_execution_context(strategy)

    def _fit_arena(self, context: _Context, role: str, shapes: Shapes) -> None:
        """Give a context the arena, after making it as large as the context needs."""
        if self._arena.needs_growth(context.num_bytes):
            if self._last_use is not None:
                self._hardware.finish(self._last_use)
            for other in self._contexts:
                if other.book is not None:
                    other.book.clear()
            size = self._arena.next_size(context.num_bytes)
            # The old buffer goes first: both at once may not fit.
            self._buffer = None
            self._arena.replaced(0)
            try:
                self._buffer = self._hardware.allocate(size)
            except BackendError as error:
                raise BackendError(
                    f"no memory for the activations of the {role} plan at "
                    f"{_shapes_text(shapes)}: {error}. Lower the resolution, the number of "
                    "references or the batch, or move the text encoder and VAE off the GPU while "
                    "the engines run"
                ) from error
            self._arena.replaced(size)
        if context.generation != self._arena.generation:
            assert self._buffer is not None
            context.native.set_device_memory(self._buffer.data_ptr(), self._arena.num_bytes)
            context.generation = self._arena.generation


def _ordinal_of(device: str, backend: str) -> int:
    if device == "auto":
        return 0
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not one of auto, cuda, cuda:N") from error
    if chosen.type != "cuda":
        raise UsageError(
            f"device {device!r} was asked for, and a set of {backend} runs on NVIDIA GPUs only; "
            "choose auto, cuda or cuda:N, or build a set with --backend onnxruntime for a CPU"
        )
    return chosen.index or 0


def _shape_problem(plan: LoadedPlan, native: Any, shapes: Shapes) -> str:
    """Set a context's input shapes; returns what went wrong."""
    for spec, shape in zip(plan.spec.inputs, shapes, strict=True):
        if not native.set_input_shape(spec.name, shape):
            return f"the shape of {spec.name} was refused"
    try:
        unknown = native.infer_shapes()
    except RuntimeError as error:
        return f"shapes do not fit together ({error})"
    return f"shapes of {', '.join(unknown)} stay unknown" if unknown else ""


def _shapes_text(shapes: Shapes | None) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes or ())
