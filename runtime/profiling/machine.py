"""The machine that something is measured on: its name, instruction sets, clocks, load, memory and
versions; and the memory and time that this process and others take of it.

What psutil lacks is read from Linux's `/proc`, here and nowhere else. Importing this module
loads neither torch nor psutil.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ditrim.engines.backend import Engines

_PACKAGES = ("ditrim", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "tensorrt",
             "tensorrt-rtx")  # fmt: skip
_GPU_QUERY = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,driver_version"
# Flags of a CPU that decide which kernels run: vectors and matrices of x86, then of Arm.
_VECTOR_FLAGS = ("sse4", "avx", "fma", "f16c", "bmi2", "amx", "asimd", "sve", "sme_", "smef",
                 "smei", "bf16", "i8mm")  # fmt: skip


def describe_machine(engines: Engines | None, threads: int) -> dict[str, Any]:
    """The machine of these engines, or without any, its CPU; what cannot be read is none."""
    import torch

    is_cuda = engines is not None and engines.device.type == "cuda"
    name = torch.cuda.get_device_name(engines.device) if is_cuda and engines else processor_name()
    return {
        "name": name,
        "device": engines.device.type if engines else "cpu",
        "choice": engines.choice if engines else "CPU: measured without engines",
        "cores": os.cpu_count() or 1,
        "threads": threads or os.cpu_count() or 1,
        "instruction_sets": instruction_sets(),
        "timer": "CUDA events" if is_cuda else "monotonic clock",
        "memory": "the most that torch had allocated on the device"
        if is_cuda
        else "the most that the process had resident",
        "clocks": {"before": clocks(is_cuda)},
        "load": {"before": load_average()},
        "versions": library_versions(),
    }


def instruction_sets() -> dict[str, Any]:
    """The instruction sets of the CPU that decide which kernels run.

    Returns:
        "torch": the set that torch chose its kernels for, as "AVX512". "cpu": the flags of the
        processor's vector and matrix units ("avx512_vnni", "amx_tile"), none where not known.
    """
    import torch

    known = None
    for flags in (_cpuinfo("flags") or _cpuinfo("Features"))[:1]:  # every core has the same
        known = sorted(flag for flag in flags.split() if flag.startswith(_VECTOR_FLAGS))
    return {"torch": torch.backends.cpu.get_cpu_capability(), "cpu": known}


def clocks(is_cuda: bool) -> dict[str, Any]:
    """Current clock rates, as the system reports them."""
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
    import psutil

    try:
        return {"mhz": [round(rate.current) for rate in psutil.cpu_freq(percpu=True)]}
    except (AttributeError, NotImplementedError, OSError):
        return {"mhz": None}  # the system does not report it


def load_average() -> float | None:
    """Runnable processes over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def processor_name() -> str:
    """Return the CPU's name; its architecture where the system does not say."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpuinfo(key: str) -> list[str]:
    """The values of a key in /proc/cpuinfo, one a core; psutil has neither names nor flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []  # only Linux has it
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return [value.strip() for name, value in pairs if name.strip() == key]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a measurement depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident_bytes() -> int:
    """The memory that this process has resident."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_of_process() -> dict[str, int]:
    """The memory of this process in bytes.

    Returns:
        "rss": resident; "of_files": of mapped files in it; "pss": its share of pages; "private":
        pages that only it has; "peak": see `peak_bytes`.
    """
    import psutil

    memory = psutil.Process().memory_full_info()
    return {
        "rss": memory.rss,
        "of_files": memory.shared,
        "pss": memory.pss,
        "private": memory.uss,
        "peak": peak_bytes() or 0,
    }


def begin_peak(device: torch.device | None = None) -> None:
    """Reset the peak of memory that `peak_bytes` reads."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # only Linux has it; the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device | None = None, process: int | str = "self") -> int | None:
    """The most since `begin_peak`: resident in a process, or on a GPU allocated by torch.

    None if not known: psutil has no peak on Linux, and only Linux has `/proc`.
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, ValueError, StopIteration):
        return None


class OtherProcesses:
    """Measures how much of the cores other processes take, from when it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """The share of all cores, 0 to 1; none where no time has passed."""
        busy, own, every = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return round(max(0.0, busy - own) / every, 3) if every > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds that the cores were busy, with this process, and in all."""
        import psutil

        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # Guests are counted as users already; what is stolen counts as busy.
        every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        waiting = times.idle + getattr(times, "iowait", 0.0)
        return every - waiting, own.user + own.system, every
