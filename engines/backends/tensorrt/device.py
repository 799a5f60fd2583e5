"""Streams, events, memory and graphs of one GPU: all of torch.cuda that the TensorRT runtime uses.

`Hardware` is the seam: a test puts threads in the place of streams, and everything above it runs
without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ditrim.plugins.errors import BackendError


class CaptureError(Exception):
    """A call that could not be captured as a graph; it says why."""


class Hardware(Protocol):
    """A GPU, or what stands for one.

    Attributes:
        device: where tensors live.
        name: for people.
        alignment: bytes; tensors begin at a multiple of it.
    """

    device: torch.device
    name: str
    alignment: int

    def session_stream(self) -> Any:
        """A context manager that gives the stream of the calling thread's session.

        What the caller queued before comes first; what it queues after the block comes later.
        """
        ...

    def handle(self, stream: Any) -> int:
        """What TensorRT calls the stream."""
        ...

    def mark(self, stream: Any) -> Any:
        """An event at this place of a stream."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream wait for an event; the host goes on."""
        ...

    def finish(self, event: Any) -> None:
        """Let the host wait for an event."""
        ...

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        """Time between two events, or none where the second has not happened yet."""
        ...

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory that starts at a multiple of 256 bytes.

        Raises:
            BackendError: there is not enough; says how much there is.
        """
        ...

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> Any:
        """What `enqueue` queues on the stream as a graph, which is not run.

        Raises:
            CaptureError: it cannot be captured.
        """
        ...

    def replay(self, graph: Any, stream: Any) -> None:
        """Queue a graph."""
        ...

    def synchronize(self) -> None:
        """Let the host wait for what the calling thread queued."""
        ...


class CudaHardware:
    """An NVIDIA GPU through torch (see `Hardware`).

    A thread whose current stream is torch's default one gets a stream of its own: TensorRT would
    wait for the whole device on the default stream, which cannot be captured either.
    """

    alignment = 256

    def __init__(self, ordinal: int) -> None:
        """Open a GPU.

        Raises:
            BackendError: torch sees no such GPU.
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if ordinal >= count:
            raise BackendError(
                f"device cuda:{ordinal} was asked for, and torch {torch.__version__} sees "
                f"{count} GPUs; install a CUDA build of torch, or choose another --device"
            )
        self.device = torch.device("cuda", ordinal)
        self.name = torch.cuda.get_device_name(self.device)
        self._own = threading.local()

    @contextmanager
    def session_stream(self) -> Iterator[Any]:
        """See `Hardware.session_stream`."""
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream(self.device)
            if caller != torch.cuda.default_stream(self.device):
                yield caller
                return
            if not hasattr(self._own, "stream"):
                self._own.stream = torch.cuda.Stream(self.device)
            own = self._own.stream
            own.wait_stream(caller)
            try:
                yield own
            finally:
                # Tensors of the caller may be freed after this: its stream reuses them in order.
                caller.wait_stream(own)

    def handle(self, stream: Any) -> int:
        """See `Hardware.handle`."""
        return int(stream.cuda_stream)

    def mark(self, stream: Any) -> Any:
        """See `Hardware.mark`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """See `Hardware.wait`."""
        stream.wait_event(event)

    def finish(self, event: Any) -> None:
        """See `Hardware.finish`."""
        event.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float | None:
        """See `Hardware.elapsed_ms`."""
        return float(start.elapsed_time(end)) if end.query() else None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `Hardware.allocate`."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise BackendError(
                f"{num_bytes / 1e9:.2f} GB of GPU memory were asked for; {self.name} has "
                f"{free / 1e9:.2f} GB of {total / 1e9:.2f} GB left"
            ) from error

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> Any:
        """See `Hardware.capture`."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                # Other threads may allocate meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    is_queued = enqueue()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise CaptureError(f"capturing failed: {str(error).splitlines()[0]}") from error
        if not is_queued:
            raise CaptureError("the library does not run while a graph is captured")
        return graph

    def replay(self, graph: Any, stream: Any) -> None:
        """See `Hardware.replay`."""
        with torch.cuda.stream(stream):
            graph.replay()

    def synchronize(self) -> None:
        """See `Hardware.synchronize`."""
        torch.cuda.current_stream(self.device).synchronize()
