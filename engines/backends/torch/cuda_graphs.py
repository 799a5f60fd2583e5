"""CUDA graphs of FRONT and BACK, one for each role and shape, a bounded number of them.

Replaces: some thousand kernel launches a call. Limits: a graph reads weights where they lay when it
was captured, with the LoRAs of then, so what changes one of them makes all be captured anew;
inputs and outputs are copied.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditrim.plugins.errors import UsageError

# Hooks of diffusers on parts of a transformer that exchange weights within a call.
_EXCHANGING = {"group_offloading", "layerwise_casting"}
Graph = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], None]


@dataclass(slots=True)
class _Captured:
    """A graph and the tensors that it reads and writes."""

    replay: Callable[[], None]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record what a function queues on the GPU; returns what queues it again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up, outside of the capture
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def state_of(transformer: nn.Module) -> object:
    """Return what invalidates a captured graph: addresses of weights, LoRAs and their scales.

    Raises:
        UsageError: weights are exchanged within a call.
    """
    facts: list[object] = []
    module: Any
    for module in transformer.modules():
        if module is not transformer and _exchanges_weights(module):
            raise UsageError(
                "CUDA graphs read weights where they lie, and offloading by blocks or leaves and "
                "layerwise casting exchange them within a call: leave cuda_graphs out, or the other"
            )
        facts.append(id(module))
        facts += [_place(tensor) for tensor in module._parameters.values() if tensor is not None]
        own, kind = vars(module), type(module)  # asking a module for what it lacks is slow
        if hasattr(kind, "active_adapters") and hasattr(module, "scaling"):  # peft's layers
            facts += [
                tuple(module.active_adapters),
                tuple(sorted(module.scaling.items())),
                tuple(getattr(module, "merged_adapters", ())),
                bool(getattr(module, "disable_adapters", False)),
            ]
        processor = own.get("processor")
        if processor is not None:
            facts.append(str(getattr(processor, "_attention_backend", None)))
    return tuple(facts)


def _exchanges_weights(module: Any) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False)) or any(
        name in _EXCHANGING for name in hooks
    )


def _place(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of a quantised kind
        return id(tensor)


class CudaGraphs:
    """Runs functions by their captured graphs; threads take turns."""

    def __init__(
        self, most: int, capture: Callable[[Callable[[], None]], Callable[[], None]] = capture
    ) -> None:
        """Keep up to `most` graphs; the least recently used one goes first."""
        self._most, self._capture = most, capture
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, _Captured] = OrderedDict()
        self._state: object = None

    def run(
        self,
        graph: Graph,
        role: str,
        state: object,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Run a graph into `outputs`; the first call of a role and shape captures it.

        Args:
            graph: called with role, inputs and outputs.
            role: "front", "back" or "anchor".
            state: equal for as long as a captured graph is right; see `state_of`.
            inputs, outputs: on the device.
        """
        key = (role, *((name, tuple(tensor.shape)) for name, tensor in sorted(inputs.items())))
        with self._lock:
            if state != self._state:
                self._kept.clear()
                self._state = state
            captured = self._kept.get(key)
            if captured is None:
                captured = self._captured(graph, role, inputs, outputs)
                self._kept[key] = captured
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            for name, tensor in captured.inputs.items():
                tensor.copy_(inputs[name])
            captured.replay()
            for name, tensor in outputs.items():
                tensor.copy_(captured.outputs[name])

    def _captured(
        self,
        graph: Graph,
        role: str,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> _Captured:
        with torch.inference_mode(False):  # they are written in later calls, of any mode
            own_inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            own_outputs = {name: torch.zeros_like(tensor) for name, tensor in outputs.items()}
        replay = self._capture(lambda: graph(role, own_inputs, own_outputs))
        return _Captured(replay, own_inputs, own_outputs)
