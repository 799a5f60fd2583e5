"""Why a service did not finish an edit, as classes that a caller can tell apart.

What is wrong with a request itself is a `UsageError`, as everywhere in the runtime.
"""

from __future__ import annotations

import re

from ditrim.plugins.errors import DeviceError, DitrimError

# What torch and ONNX Runtime say where a device, not a request, is at fault.
_DEVICE_WORDS = re.compile(
    r"CUDA (error|failure|driver)|CUBLAS|CUDNN|cudaError|HIP error|device-side assert|NVML", re.I
)


class ServiceError(DitrimError):
    """An edit that a service accepted, or was asked to accept, and did not finish."""


class QueueFull(ServiceError):
    """Refuses an edit while as many wait as the service lets wait.

    Attributes:
        retry_after_s: seconds after which a place is likely to be free.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServiceError):
    """Ends an edit whose deadline passed, whether it waited or ran."""


class Cancelled(ServiceError):
    """Ends an edit whose caller cancelled it."""


class Unavailable(ServiceError):
    """Refuses an edit: the service has not started, is shutting down, or its device failed."""


class DeviceFailed(ServiceError):
    """Ends the edit during which the device failed; the service refuses what comes after it."""


class UnknownModel(ServiceError):
    """Refuses an edit for a model that the service does not serve."""


def is_memory_failure(error: BaseException) -> bool:
    """Whether an error means that memory ran out, so that a smaller edit may fit."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return re.search(r"out of memory|failed to allocate memory", str(error), re.I) is not None


def is_device_failure(error: BaseException) -> bool:
    """Whether an error means that the device cannot be trusted any more.

    Memory that ran out is none: the next edit may fit. Nor is a backend that refuses one request,
    or that cannot load another model.
    """
    if is_memory_failure(error):
        return False
    if isinstance(error, DitrimError):
        return isinstance(error, DeviceError)
    if type(error).__name__ == "AcceleratorError":  # torch's, which tests need not have a GPU for
        return True
    return _DEVICE_WORDS.search(str(error)) is not None  # ONNX Runtime's are plain exceptions
