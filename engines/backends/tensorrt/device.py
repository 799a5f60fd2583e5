"""Streams, events, memory and graphs of one GPU: all of torch.cuda that the TensorRT runtime uses.

`Hardware` is the seam: a test puts threads in the place of streams, and everything above it runs
without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ditrim.plugins.errors import BackendError, DeviceError

# CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile.
_THREAD_LOCAL = 1


class CaptureError(Exception):
    """A call that could not be captured as a graph; it says why."""


class DriverGraph:
    """A CUDA graph of the driver, captured and launched without torch.

    A capture that fails through `torch.cuda.CUDAGraph` leaves torch's allocator believing, in the
    whole process, that one is underway (torch 2.11 and before, pytorch#180395). What is captured
    here allocates nothing, so that the allocator need not know.
    """

    def __init__(self, cuda: Any, stream: int, enqueue: Callable[[], bool]) -> None:
        """Capture what `enqueue` queues on a stream.

        Args:
            cuda: the driver's library.
            stream: its handle.
            enqueue: returns whether it could.

        Raises:
            CaptureError: it cannot be captured.
        """
        self._cuda, self._executable = cuda, ctypes.c_void_p()
        graph, handle = ctypes.c_void_p(), ctypes.c_void_p(stream)
        self._check("cuStreamBeginCapture_v2", handle, _THREAD_LOCAL)
        try:
            is_queued = enqueue()
        finally:
            # Always: it is what lets the stream out of the capture.
            code = cuda.cuStreamEndCapture(handle, ctypes.byref(graph))
        try:
            if not is_queued:
                raise CaptureError("the library does not run while a graph is captured")
            if code:
                raise CaptureError(f"capturing failed: cuStreamEndCapture said {code}")
            self._check(
                "cuGraphInstantiateWithFlags",
                ctypes.byref(self._executable),
                graph,
                ctypes.c_ulonglong(0),
            )
        finally:
            if graph:
                cuda.cuGraphDestroy(graph)

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            raise CaptureError(f"capturing failed: {function} said {code}")

    def launch(self, stream: int) -> None:
        """Queue the graph on a stream."""
        code = self._cuda.cuGraphLaunch(self._executable, ctypes.c_void_p(stream))
        if code:
            raise DeviceError(f"a CUDA graph could not be queued: cuGraphLaunch said {code}")

    def __del__(self) -> None:
        if self._executable:  # the driver lets it finish where it still runs
            self._cuda.cuGraphExecDestroy(self._executable)


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
        """The stream's CUDA handle, as TensorRT takes it."""
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

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory that starts at a multiple of 256 bytes.

        Raises:
            BackendError: there is not enough; says how much there is.
        """
        ...

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> Any:
        """Capture what `enqueue` queues on the stream as a graph, without running it.

        Raises:
            CaptureError: it cannot be captured.
        """
        ...

    def replay(self, graph: Any, stream: Any) -> None:
        """Queue a captured graph on a stream."""
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
        return int(stream.cuda_stream)

    def mark(self, stream: Any) -> Any:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def finish(self, event: Any) -> None:
        event.synchronize()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise BackendError(
                f"{num_bytes / 1e9:.2f} GB of GPU memory were asked for; {self.name} has "
                f"{free / 1e9:.2f} GB of {total / 1e9:.2f} GB left"
            ) from error

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> Any:
        return DriverGraph(ctypes.CDLL("libcuda.so.1"), self.handle(stream), enqueue)

    def replay(self, graph: Any, stream: Any) -> None:
        graph.launch(self.handle(stream))

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
