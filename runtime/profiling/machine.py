"""The machine that something is measured on: its name, clocks, load, memory and versions."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ditrim.engines.backend import Engines

_PACKAGES = ("ditrim", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "tensorrt",
             "tensorrt-rtx")  # fmt: skip
_GPU_QUERY = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"


def describe_machine(engines: Engines, threads: int) -> dict[str, Any]:
    """Name, cores, clocks, load and versions; what cannot be read is none."""
    is_cuda = engines.device.type == "cuda"
    name = torch.cuda.get_device_name(engines.device) if is_cuda else processor_name()
    return {
        "name": name,
        "device": engines.device.type,
        "choice": engines.choice,
        "cores": os.cpu_count() or 1,
        "threads": threads or os.cpu_count() or 1,
        "timer": "CUDA events" if is_cuda else "monotonic clock",
        "memory": "the most that torch had allocated on the device"
        if is_cuda
        else "the most that the process had resident",
        "clocks": {"before": clocks(is_cuda)},
        "load": {"before": load_average()},
        "versions": library_versions(),
    }


def clocks(is_cuda: bool) -> dict[str, Any]:
    """Clock rates as the system tells them now."""
    if is_cuda:
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return {"nvidia-smi": f"not available: {type(error).__name__}"}
        first = done.stdout.splitlines()[0].split(",")
        return dict(zip(_GPU_QUERY.split(","), (item.strip() for item in first), strict=True))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"mhz": None}  # only Linux has it
    rates = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"mhz": [round(rate) for rate in rates]}


def load_average() -> float | None:
    """Runnable processes over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def processor_name() -> str:
    """What the CPU is called; its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # only Linux has it
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Of Python, and of what is installed of the packages that a measurement hangs on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def begin_peak(device: torch.device) -> None:
    """Begin a new peak of memory; see `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # only Linux has it; the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most since `begin_peak`: resident, or on a GPU allocated by torch; none if not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, ValueError, StopIteration):
        return None  # only Linux has it
