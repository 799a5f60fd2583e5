"""CUDA graphs of FRONT and BACK, one for each role and shape, a bounded number of them.

Replaces: some thousand kernel launches a call. Limits: weights have to stay where they are, so
offloading, and loading or switching a LoRA, need another capture; inputs are copied in.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class CudaGraphs:
    """Runs functions by their captured graphs; threads take turns."""

    def __init__(
        self, most: int, capture: Callable[[Callable[[], None]], Callable[[], None]] = capture
    ) -> None:
        """Keep up to `most` graphs; the least recently used one goes first."""
        self._most, self._capture = most, capture
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, _Captured] = OrderedDict()

    def run(
        self,
        graph: Graph,
        role: str,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Run a graph into `outputs`; the first call of a role and shape captures it."""
        key = (role, *((name, tuple(tensor.shape)) for name, tensor in sorted(inputs.items())))
        with self._lock:
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

    def forget(self) -> None:
        """Drop every graph, as after a change of the weights' places."""
        with self._lock:
            self._kept.clear()

    def _captured(
        self,
        graph: Graph,
        role: str,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> _Captured:
        own_inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        own_outputs = {name: torch.zeros_like(tensor) for name, tensor in outputs.items()}
        replay = self._capture(lambda: graph(role, own_inputs, own_outputs))
        return _Captured(replay, own_inputs, own_outputs)
