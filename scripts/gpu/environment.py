"""The GPU, its driver, and the libraries that are there."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

from gpu.part import Context

_DISTRIBUTIONS = (
    "torch", "triton", "diffusers", "transformers", "accelerate", "onnx", "onnxruntime",
    "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "polygraphy",
    "numpy",
)  # fmt: skip


def environment(context: Context) -> None:
    """What is there."""
    record = context.record
    record.check("python is 3.11 or newer", sys.version_info >= (3, 11))
    versions = {name: _version(name) for name in _DISTRIBUTIONS}
    record.note(
        python=platform.python_version(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        libraries=versions,
        libnvinfer=ctypes.util.find_library("nvinfer") is not None,
        driver=_driver(),
        gpus=[],
    )
    if versions["torch"] is not None:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [_gpu(torch.cuda.get_device_properties(index)) for index in range(count)]
        record.note(torch_cuda=torch.version.cuda, gpus=gpus)
    if versions["onnxruntime"] or versions["onnxruntime-gpu"]:
        import onnxruntime

        record.note(onnxruntime_providers=onnxruntime.get_available_providers())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
    }
