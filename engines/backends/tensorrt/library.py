"""TensorRT and TensorRT-RTX as one library: opened with its differences known, and its GPU checked.

Limits: a process works with one of the two. Both define the same C++ symbols, and Polygraphy binds
itself to one at its import. Nothing heavy is imported before `open_library` is called; the GPU is
asked through the driver's own library, so that an unchanged build is recognised without torch.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import BackendError, EngineSetError

if TYPE_CHECKING:
    from ditrim.engines.sets.manifest import Manifest

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LEAST_VERSIONS = {"tensorrt": (10, 9), "tensorrt-rtx": (1, 2)}
# TensorRT-RTX's default targets: every capability that it knows from Ampere on.
_RTX_DEFAULT_FROM = (8, 0)
_CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An imported library.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        module: `tensorrt` or `tensorrt_rtx`.
        version: the module's.
        is_rtx: whether it is TensorRT-RTX.
        logger: the one `ILogger` of this process; pass it wherever the library wants one.
    """

    backend: str
    module: Any
    version: str
    is_rtx: bool
    logger: Any

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as a tuple of integers, as (10, 9)."""
        return version_numbers(self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the CUDA driver shows.

    Attributes:
        name: as the driver spells it.
        capability: compute capability.
        num_bytes: of its memory.
        driver: the driver's version.
    """

    name: str
    capability: tuple[int, int]
    num_bytes: int
    driver: str

    @property
    def capability_name(self) -> str:
        """The compute capability as text, as "8.9"."""
        return capability_name(self.capability)


def capability_name(capability: tuple[int, int]) -> str:
    """A compute capability as "8.9"."""
    return f"{capability[0]}.{capability[1]}"


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.16.1.11" -> (10, 16, 1, 11)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


_opened: dict[str, Library] = {}


def open_library(backend: str) -> Library:
    """Import the library of a backend; the same object every time.

    Raises:
        BackendError: it is not installed, too old, cannot be loaded, or the other one is loaded in
            this process.
    """
    if backend in _opened:
        return _opened[backend]
    name, install = MODULES[backend], f"pip install 'ditrim[{backend}]'"
    for other, other_name in MODULES.items():
        if other != backend and other_name in sys.modules:
            raise BackendError(
                f"the backend {backend!r} was asked for, but {other_name} is loaded in this "
                "process, and the two cannot share one; start another process for it"
            )
    try:
        module = __import__(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise BackendError(f"{name} is installed incompletely ({error}): {install}") from error
        raise BackendError(
            f"the backend {backend!r} is not installed; install it with: {install}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{name} is installed and cannot be loaded: {error}. Install it again with: {install}"
        ) from error
    version = getattr(module, "__version__", "")
    least = LEAST_VERSIONS[backend]
    if version_numbers(version) < least:
        wanted = ".".join(map(str, least))
        raise BackendError(
            f"{name} is of version {version or 'unknown'}; ditrim needs {wanted} or newer: "
            f"{install}"
        )
    library = Library(
        backend=backend,
        module=module,
        version=version,
        is_rtx=backend == "tensorrt-rtx",
        logger=_make_logger(module),
    )
    _opened[backend] = library
    return library


# The one kind of message that is read besides complaints: the builder's figures of memory. Of all
# others it says tens of thousands.
_FIGURES = ("Total Activation Memory:", "Total Weights Memory:")
_captures: list[list[tuple[str, str]]] = []


def _make_logger(module: Any) -> Any:
    """An `ILogger` that speaks through Python's logging, and to whoever captures."""
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.DEBUG,
        "VERBOSE": logging.DEBUG - 1,
    }

    class ModuleLogger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # Called from C++, where nothing may be raised.
            name = severity.name
            level = levels.get(name, logging.DEBUG)
            if level >= logging.WARNING or any(figure in message for figure in _FIGURES):
                for lines in _captures:
                    lines.append((name, message))
            # A captured error comes out in an exception; saying it here too would say it twice.
            if level > logging.INFO and _captures:
                level = logging.INFO
            logger.log(level, "%s: %s", module.__name__, message)

    return ModuleLogger()


@contextmanager
def log_captured() -> Iterator[list[tuple[str, str]]]:
    """Collect the library's complaints and memory figures meanwhile, as (severity, message)."""
    lines: list[tuple[str, str]] = []
    _captures.append(lines)
    try:
        yield lines
    finally:
        # By identity: another thread may hold equal lines.
        _captures[:] = [item for item in _captures if item is not lines]


def rtx_capabilities(library: Library) -> tuple[tuple[int, int], ...]:
    """Compute capabilities that this TensorRT-RTX can build for, in order."""
    names = library.module.ComputeCapability.__members__
    found = (re.fullmatch(r"SM(\d+)(\d)", name) for name in names)
    return tuple(sorted((int(match[1]), int(match[2])) for match in found if match))


def rtx_default_capabilities(library: Library) -> tuple[tuple[int, int], ...]:
    """Those that TensorRT-RTX builds for when none is named."""
    return tuple(item for item in rtx_capabilities(library) if item >= _RTX_DEFAULT_FROM)


def present_gpu(ordinal: int = 0) -> Gpu | None:
    """The GPU of a CUDA ordinal, asked through the driver; none where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        logger.info("no GPU: %s", error)
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        logger.info("no GPU: the CUDA driver does not start")
        return None
    if ordinal >= count.value or cuda.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        logger.info("no GPU: the driver shows %d, asked for number %d", count.value, ordinal)
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    numbers = []
    for attribute in _CAPABILITY_ATTRIBUTES:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return Gpu(
        name=name.value.decode(),
        capability=(numbers[0], numbers[1]),
        num_bytes=memory.value,
        driver=_driver_version(cuda),
    )


def _driver_version(cuda: Any) -> str:
    """The kernel module's version, or where it is hidden the CUDA version that it offers."""
    try:
        match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _DRIVER_VERSION.read_text())
    except OSError:
        match = None
    if match:
        return match[1]
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


_ASK: Any = object()


def check_target(
    manifest: Manifest, *, ordinal: int = 0, folder: Path | None = None, gpu: Any = _ASK
) -> None:
    """Check that a set of plans was built for this library, GPU and driver.

    Args:
        manifest: of the set.
        ordinal: CUDA ordinal of the GPU that is to run it.
        folder: where the set is, for the rebuild command; none means where it was built.
        gpu: the GPU, if it is known already.

    Raises:
        EngineSetError: says what differs and how to build the set again.
    """
    from ditrim.engines.sets.command import rebuild_command

    target = manifest.target
    again = f"Build it again here with: {rebuild_command(manifest.options, folder)} --force"
    what = f"this engine set of {manifest.backend} {manifest.backend_version}".rstrip()
    if not manifest.plans:
        raise EngineSetError(
            f"{what} holds graphs only (--graph-only) and cannot run. Build its plans with: "
            f"{rebuild_command(manifest.options, folder, graph_only=None)} --force"
        )
    library = open_library(manifest.backend)
    if version_numbers(library.version) != version_numbers(manifest.backend_version):
        raise EngineSetError(
            f"{what} cannot run with version {library.version}, which is installed: a plan runs "
            f"with the version that built it. {again}"
        )
    gpu = present_gpu(ordinal) if gpu is _ASK else gpu
    if gpu is None:
        raise EngineSetError(
            f"{what} needs an NVIDIA GPU, and the CUDA driver shows none here. A set of the "
            "onnxruntime backend runs on any CPU"
        )
    built_for = ", ".join(target["compute_capabilities"])
    if gpu.capability_name not in target["compute_capabilities"]:
        raise EngineSetError(
            f"{what} was built for compute capability {built_for}; this GPU, {gpu.name}, has "
            f"{gpu.capability_name}. {again}"
        )
    if library.is_rtx:  # its kernels are compiled where the plan is loaded
        return
    if target["gpu"] != gpu.name:
        raise EngineSetError(
            f"{what} was built on {target['gpu']!r}; this GPU is {gpu.name!r}, for which other "
            f"kernels are fastest or possible. {again}"
        )
    if target["driver"] != gpu.driver:
        raise EngineSetError(
            f"{what} was built with driver {target['driver']}; here it is {gpu.driver}. {again}"
        )
