"""Times of work on a device, and what the device can do at most."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def times_of(
    function: Callable[[], Any], device: str, repeats: int, warm_ups: int = 2
) -> dict[str, float]:
    """Measure the milliseconds of a call, one after the other without a wait between them.

    Args:
        function: what is called.
        device: "cuda" is timed by events on its stream, "cpu" by the monotonic clock.
        repeats: calls that are measured.
        warm_ups: calls before them.

    Returns:
        "median_ms", "least_ms" and "most_ms".
    """
    for _ in range(warm_ups):
        function()
    marks = [_mark(device)]
    for _ in range(repeats):
        function()
        marks.append(_mark(device))
    wait_for(device)
    values = [
        (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)
        for a, b in itertools.pairwise(marks)
    ]
    return {
        "median_ms": round(statistics.median(values), 4),
        "least_ms": round(min(values), 4),
        "most_ms": round(max(values), 4),
    }


def _mark(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def wait_for(device: str) -> None:
    """Wait until everything queued on a device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of one call with all that it queues, by the wall's clock; and its result."""
    wait_for(device)
    start = time.perf_counter()
    result = function()
    wait_for(device)
    return time.perf_counter() - start, result


def rates_of(device: str, repeats: int) -> tuple[float, float]:
    """Operations a second of a large bf16 matrix product, bytes a second of a large copy."""
    side, num_bytes = (8192, 1 << 30) if device == "cuda" else (64, 1 << 16)
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    result = torch.empty_like(square)
    product = times_of(lambda: torch.mm(square, square, out=result), device, repeats)
    block = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    copy = times_of(lambda: other.copy_(block), device, repeats)
    return 2 * side**3 / product["median_ms"] * 1e3, 2 * num_bytes / copy["median_ms"] * 1e3


def begin_peak(device: str) -> None:
    """Give cached memory back, and count the most that is held from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> dict[str, float]:
    """The most memory since `begin_peak`, in 10^9 bytes: in tensors, and taken from the device."""
    if device == "cpu":
        return {}
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def psnr(first: Any, second: Any) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1], in dB; 100 where they are equal."""
    error = float(((first.astype("float64") - second.astype("float64")) ** 2).mean())
    return round(min(100.0, -10 * math.log10(error)), 2) if error > 0 else 100.0
