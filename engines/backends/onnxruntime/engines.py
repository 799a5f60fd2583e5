"""The ONNX Runtime backend: any machine's CPU, and CUDA with onnxruntime-gpu.

Inputs and outputs are bound by address, so hidden states go from FRONT to BACK without a copy.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditrim.engines.forking import check_not_forked
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.precision import PRECISIONS

if TYPE_CHECKING:
    import onnxruntime
    from onnxruntime import SessionOptions

logger = logging.getLogger(__name__)

# ONNX TensorProto element types.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
# Larger constants than this are not computed while a graph is loaded.
_FOLDED_BYTES = 65_536
_SPIN_US = 100


def session_options(path: Path, device: str = "cpu", threads: int = 0) -> SessionOptions:
    """Return the session options of a graph on a device.

    Args:
        path: of the graph.
        device: "cpu" or "cuda".
        threads: as in `OnnxRuntimeEngines`.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads wait briefly for the next operator. Two sessions run in turn on the same cores: longer
    # waits would slow the other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    if device == "cuda":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device == "cpu":
        # Sessions run in turn, so their activations share one arena. A pattern is remembered for
        # every length ever seen, and asks the arena for one block of all that it holds.
        _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
    if device == "cpu" and _is_stored_as_run(path):
        # Weights are laid out for the matrix product by all threads, not by one.
        options.add_session_config_entry("session.prepack.enable_parallel", "1")
        # A weight that the graph transposes goes to the product as it is, which lays it out
        # transposed; folded, it would be copied, and in memory twice.
        options.add_session_config_entry(
            "optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED_BYTES)
        )
    return options


def _cuda_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The CUDA provider's options.

    Its arena takes what is asked for and not the next power of two. A set in float32 is multiplied
    in float32; products of 16-bit numbers that are widened to be exact are so in TF32 too.
    """
    return {
        "device_id": device.index or 0,
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": int(dtype != torch.float32),
    }


def _left_to_cpu(sessions: Iterable[onnxruntime.InferenceSession]) -> str:
    """The operators that the CPU runs though a GPU was chosen, as the end of a sentence.

    Its inputs and outputs are copied. Computing shapes is meant to be there.
    """
    counts: Counter[str] = Counter()
    for session in sessions:
        if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
            return ""
        for part in session.get_provider_graph_assignment_info():
            if part.ep_name == "CPUExecutionProvider":
                counts.update(node.op_type for node in part.get_nodes())
    if not counts:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"; the CPU runs {counts.total()} nodes, whose tensors are copied: {kinds}"


@functools.cache
def _register_arena() -> None:
    """One arena for the CPU memory of every session of this process that asks for it."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    try:
        ort.create_and_register_allocator(memory, None)
    except Exception as error:  # its own classes; the application's arena is used then
        logger.info("ONNX Runtime's arena was there: %s", error)


def _is_stored_as_run(path: Path) -> bool:
    """Whether every weight beside a graph is float32; a cast of one has to be folded."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    external = (t for t in model.graph.initializer if t.data_location == t.EXTERNAL)
    return all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in external)


class OnnxRuntimeEngines:
    """FRONT and BACK of an engine set in ONNX Runtime sessions (see `Engines`)."""

    def __init__(self, engine_set: EngineSet, device: str = "auto", threads: int = 0) -> None:
        """Create the two sessions.

        Args:
            engine_set: built for the onnxruntime backend.
            device: "cpu", "cuda", "cuda:N", or "auto" (CUDA where its provider is there).
            threads: CPU threads of a graph; 0 means one a core.

        Raises:
            BackendError: the provider is not installed or cannot load the graphs.
        """
        import onnxruntime as ort

        self.engine_set = engine_set
        self.dtype = PRECISIONS[engine_set.manifest.precision].dtype
        self.device, self.choice = choose_device(device)
        provider: tuple[str, dict[str, Any]] = ("CPUExecutionProvider", {})
        if self.device.type == "cuda":
            provider = ("CUDAExecutionProvider", _cuda_options(self.device, self.dtype))
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for role in ("front", "back"):
            path = engine_set.path_of(role)
            try:
                options = session_options(path, self.device.type, threads)
                self._sessions[role] = ort.InferenceSession(
                    str(path), options, providers=[provider]
                )
            except Exception as error:
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot load {path}: {error}. "
                    f"Rebuild the set with: {engine_set.rebuild_command()}"
                ) from error
        if self.device.type == "cuda":
            self.choice += _left_to_cpu(self._sessions.values())
        self._input_names = {
            role: {value.name for value in session.get_inputs()}
            for role, session in self._sessions.items()
        }

    def run(
        self, role: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        check_not_forked()
        role = "back" if role == "anchor" else role  # one graph serves both
        session = self._sessions[role]
        binding = session.io_binding()
        names = self._input_names[role]
        device, index = self.device.type, self.device.index or 0
        for name, tensor in inputs.items():
            if name in names:
                binding.bind_input(
                    name,
                    device,
                    index,
                    _ELEMENT_TYPES[tensor.dtype],
                    tensor.shape,
                    _address(tensor),
                )
        for name, tensor in outputs.items():
            binding.bind_output(
                name, device, index, _ELEMENT_TYPES[tensor.dtype], tensor.shape, _address(tensor)
            )
        if device == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        session.run_with_iobinding(binding)

    def synchronize(self) -> None:
        """Return at once: ONNX Runtime returns when the outputs are written."""


def _address(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def choose_device(device: str) -> tuple[torch.device, str]:
    """The device that ONNX Runtime runs on for "auto", "cpu", "cuda" or "cuda:N", and why.

    Raises:
        UsageError: it is none of those.
        BackendError: a GPU was asked for, and cannot be used.
    """
    import onnxruntime as ort

    providers = ort.get_available_providers()
    has_cuda = "CUDAExecutionProvider" in providers and torch.cuda.is_available()
    if device == "auto":
        if has_cuda:
            return torch.device("cuda", 0), "CUDA: its provider and a GPU are there"
        reason = "no CUDA provider" if "CUDAExecutionProvider" not in providers else "no GPU"
        return torch.device("cpu"), f"CPU: {reason}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N") from error
    if chosen.type == "cpu":
        return torch.device("cpu"), "CPU: asked for"
    if chosen.type != "cuda":
        raise UsageError(f"device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if not has_cuda:
        raise BackendError(
            f"device {device!r} was asked for, but ONNX Runtime has no CUDA provider or torch sees "
            f"no GPU (providers: {', '.join(providers)}); install ditrim[gpu] and a CUDA build of "
            "torch, or use --device cpu"
        )
    return torch.device("cuda", chosen.index or 0), "CUDA: asked for"
