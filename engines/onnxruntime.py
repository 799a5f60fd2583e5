"""The ONNX Runtime backend: any machine's CPU, and CUDA with onnxruntime-gpu.

Inputs and outputs are bound by address, so hidden states go from FRONT to BACK without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ditrim.engines.engine_set import EngineSet
from ditrim.plugins.errors import BackendError, UsageError

if TYPE_CHECKING:
    import onnxruntime

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# ONNX TensorProto element types.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}


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
        self.dtype = _DTYPES[engine_set.manifest.precision]
        self.device, self.choice = _choose_device(device, ort.get_available_providers())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Two sessions run in turn on the same cores: idle threads that spin would slow the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider: tuple[str, dict[str, Any]] = ("CPUExecutionProvider", {})
        if self.device.type == "cuda":
            provider = ("CUDAExecutionProvider", {"device_id": self.device.index or 0})
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        for role in ("front", "back"):
            path = engine_set.path_of(role)
            try:
                self._sessions[role] = ort.InferenceSession(
                    str(path), options, providers=[provider]
                )
            except Exception as error:
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot load {path}: {error}. "
                    f"Rebuild the set with: {engine_set.rebuild_command()}"
                ) from error
        self._input_names = {
            role: {value.name for value in session.get_inputs()}
            for role, session in self._sessions.items()
        }

    def run(
        self, role: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        """See `Engines.run`."""
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
        """See `Engines.synchronize`; ONNX Runtime returns when the outputs are written."""


def _address(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _choose_device(device: str, providers: list[str]) -> tuple[torch.device, str]:
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
