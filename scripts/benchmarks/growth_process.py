"""What every process of bench_growth.py needs: its memory, inputs, and a unit of time.

Reads /proc/self: Linux only.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

SETTLE_SECONDS = 0.005  # torch's threads spin for a while after their work
_WATCH_SECONDS = 0.02


def status_bytes(name: str) -> int:
    """A field of /proc/self/status: "VmRSS" now, "VmHWM" at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def rewind_peak() -> None:
    """Make the highest resident memory what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def watch_memory(limit: int) -> None:
    """End this process, and say so, when it holds more than so many bytes; 0 is no limit."""

    def watch() -> None:
        while True:
            held = status_bytes("VmRSS")
            if held > limit:
                print(json.dumps({"stopped_at_bytes": held}), flush=True)
                os._exit(0)
            time.sleep(_WATCH_SECONDS)

    if limit:
        threading.Thread(target=watch, daemon=True).start()


class Peaks:
    """What parts of a call add to the memory that was there before the first of them.

    Attributes:
        start_bytes: what was there.
        added: by part, of its first run, how much more was there `before` it and at its `peak`.
        most_bytes: the highest of all peaks.
    """

    def __init__(self) -> None:
        gc.collect()
        self.start_bytes = status_bytes("VmRSS")
        self.added: dict[str, dict[str, int]] = {}
        self.most_bytes = 0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Look at the memory while a part runs."""
        rewind_peak()
        before = status_bytes("VmRSS") - self.start_bytes
        yield
        peak = status_bytes("VmHWM") - self.start_bytes
        self.added.setdefault(part, {"before": before, "peak": peak})
        self.most_bytes = max(self.most_bytes, peak)


def grid_of(num_tokens: int) -> tuple[int, int]:
    """(height, width) as square as the number of tokens allows."""
    height = next(h for h in range(int(num_tokens**0.5), 0, -1) if num_tokens % h == 0)
    return height, num_tokens // height


def grids_of(point: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """(height, width) of the picture in the making and of each reference."""
    return grid_of(point["noisy"]), *(grid_of(length) for length in point["references"])


def inputs_of(manifest: Any, point: dict[str, Any]) -> Any:
    """Random inputs with as many references as the point says."""
    import torch

    from ditrim.plugins.layout import Layout
    from ditrim.runtime.denoising.rope import rope_for
    from ditrim.runtime.profiling.measure import Geometry, random_inputs

    grids = grids_of(point)
    geometry = Geometry(
        batch=point["batch"],
        num_text=point["text"],
        noisy_grid=grids[0],
        reference_grid=grid_of(sum(point["references"])),
    )
    cpu = torch.device("cpu")
    axes = manifest.transformer_config["axes_dims_rope"]
    layout = Layout.of_grids(grids)
    return replace(
        random_inputs(manifest, geometry, cpu),
        layout=layout,
        rope_key=("growth", grids, point["text"]),
        make_rope=lambda: rope_for("qwen", layout, point["text"], axes, cpu),
    )


def model_of(manifest: Any) -> dict[str, Any]:
    """What a set's operations and memory are counted from."""
    return {
        "config": dict(manifest.transformer_config),
        "architecture": manifest.architecture,
        "front_depth": manifest.front_depth,
        "num_layers": manifest.num_layers,
        "num_scored": len(manifest.representative_layers),
        "precision": manifest.precision,
        "backend": manifest.backend,
    }


class Pulse:
    """The time of a plain matrix product by ONNX Runtime, taken beside everything else."""

    def __init__(self) -> None:
        from ditrim.runtime.profiling.product import plain_products

        self._run = dict(plain_products("onnxruntime"))["onnxruntime"]
        self._samples: list[float] = []
        self._run()

    def beat(self) -> None:
        """Take it three times more."""
        time.sleep(SETTLE_SECONDS)
        for _ in range(3):
            start = time.perf_counter()
            self._run()
            self._samples.append((time.perf_counter() - start) * 1e3)

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self._samples)
