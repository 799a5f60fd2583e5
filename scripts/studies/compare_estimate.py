#!/usr/bin/env python3
"""The estimate of `build-engine --dry-run` beside what is measured, without a GPU.

Random models of one to three blocks, some of them of the real width, each built in a process of its
own:

- TensorRT-RTX (in bf16): the size of every plan, its activation memory on every rung as the library
  states it when it builds, and the host memory of the builder;
- ONNX Runtime on the CPU (in float32): the size of the set, the host memory of the build, and the
  memory that FRONT and BACK take at every rung (peak of the resident set, its arena off);
- text encoders and VAE: parameters of the real modules, and the live tensors of the VAE at their
  peak, both on the meta device.

Error is estimated over measured, less 1, in percent. Nothing is timed.

Example:
    python scripts/studies/compare_estimate.py --cases rtx-qwen-1024 ort-qwen-1024
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ditrim.runtime.profiling.machine import (
    begin_peak,
    describe_machine,
    peak_bytes,
    resident_bytes,
)

_NARROW = {"num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 512}
_TINY = {**_NARROW, "num_attention_heads": 2}
_RTX = {"backend": "tensorrt-rtx", "precision": "bf16", "max_batch": 1}
_SHORT = {"max_noisy_tokens": 1024, "max_text_tokens": 128, "config": _NARROW}
_REAL = {**_RTX, "max_noisy_tokens": 4096, "max_text_tokens": 512, "ladder": (512, 4096)}
_NARROW_RTX = {**_RTX, **_SHORT, "num_layers": 3, "ladder": (512, 1024)}
_ORT = {**_SHORT, "num_layers": 4, "front_depth": 2, "ladder": (128, 512, 1024), "max_batch": 1}
_FLUX = {"model": "flux-kontext"}
CASES: dict[str, dict[str, Any]] = {
    "rtx-qwen-256": {**_NARROW_RTX, "config": _TINY, "ladder": (256, 512, 768, 1024)},
    "rtx-qwen-1024": {**_NARROW_RTX, "separate_anchor": True},
    "rtx-qwen-3072": {**_REAL, "num_layers": 3},
    "rtx-qwen-2511-3072": {**_REAL, "model": "qwen-edit-2511", "num_layers": 2},
    "rtx-flux-3072": {**_REAL, **_FLUX, "num_layers": 3},
    "rtx-qwen-3072-three-scored": {**_REAL, "num_layers": 4, "layers": (1, 2, 3)},
    "rtx-qwen-1024-two-scored": {**_NARROW_RTX, "num_layers": 4, "layers": (2, 3)},
    "rtx-flux-1024": {**_NARROW_RTX, **_FLUX, "max_batch": 2, "min_batch": 2, "opt_batch": 2},
    "ort-qwen-1024": _ORT,
    "ort-flux-1024": {
        **_ORT,
        **_FLUX,
        "layers": (3,),
        "config": {**_NARROW, "num_single_layers": 1, "num_layers": 3},
    },
    "ort-qwen-1024-batch-2": {**_ORT, "ladder": (512,), "max_batch": 2},
}


def options_of(name: str, output: str) -> Any:
    """The build options of a case."""
    from ditrim.engines.build.options import BuildOptions

    values = {"weights": "random", "output": output, **CASES[name]}
    if "num_layers" in values.get("config", {}):
        del values["num_layers"]
    return BuildOptions(**values)


def build_case(name: str) -> dict[str, Any]:
    """Build a case and read off what it took."""
    from ditrim.engines.build.build import build_engine_set

    with tempfile.TemporaryDirectory() as folder:
        options = options_of(name, f"{folder}/set")
        with children_watched() as peaks:
            engine_set = build_engine_set(options)
        manifest = engine_set.manifest
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured: dict[str, Any] = {
            "set": sum(entry.num_bytes for entry in manifest.files),
            "graphs_host": own,
        }
        if manifest.plans:
            measured["builder_host"] = max(peaks.values())
            for role, plan in manifest.plans.items():
                measured[f"{role}_file"] = (engine_set.folder / plan.file).stat().st_size
                measured[f"{role}_activations"] = list(plan.device_memory_bytes or ())
        else:
            for role in ("front", "back"):
                measured[f"{role}_activations"] = [
                    _child("--run", str(engine_set.path_of(role)), json.dumps(sizes))["bytes"]
                    for sizes in _sizes(options)
                ]
    return measured


@contextmanager
def children_watched() -> Iterator[dict[int, int]]:
    """Peaks of the resident sets of this process's children, by process.

    Read off each one's own status: `getrusage` counts what its parent had when it was started.
    """
    import psutil

    peaks: dict[int, int] = {}
    is_over = threading.Event()
    parent = psutil.Process()

    def watch() -> None:
        while not is_over.wait(0.02):
            with suppress(psutil.Error, OSError):  # a child that has just ended
                for child in parent.children():
                    if any("tensorrt.worker" in word for word in child.cmdline()):
                        peaks[child.pid] = peak_bytes(process=child.pid) or peaks.get(child.pid, 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        is_over.set()
        thread.join()


def _sizes(options: Any) -> Iterator[dict[str, int]]:
    limits = options.limits
    for rung in options.reference_ladder.rungs:
        yield {
            "batch": limits.batch,
            "noisy": limits.noisy,
            "reference": rung,
            "text": limits.text,
            "rows": limits.noisy,
        }


def run_graph(path: str, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes by which one call of a graph raises the peak of this process."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False  # as the runtime has it
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def inputs(lengths: dict[str, int]) -> dict[str, Any]:
        feed = {}
        for item in session.get_inputs():
            shape = [lengths.get(axis, axis) for axis in item.shape]
            is_index = item.type == "tensor(int64)"
            feed[item.name] = (
                np.arange(shape[0]) if is_index else np.full(shape, 0.1, dtype=np.float32)
            )
        return feed

    session.run(None, inputs(dict.fromkeys(sizes, 1)))
    feed = inputs(sizes)
    before = resident_bytes()
    begin_peak()
    session.run(None, feed)
    return {"bytes": (peak_bytes() or 0) - before}


def estimate_case(name: str) -> dict[str, Any]:
    """Return the estimate of a case, under the names of what is measured."""
    from ditrim.engines.build.source import planned_config
    from ditrim.engines.cost.devices import DEVICES
    from ditrim.engines.estimate.estimate import estimate

    options = options_of(name, "unused")
    plan = estimate(options, planned_config(options), DEVICES["rtx5090"])
    said: dict[str, Any] = {
        "set": plan.disk_bytes,
        "graphs_host": plan.build_graphs_bytes,
        "builder_host": plan.build_plans_bytes,
    }
    for item in plan.plans:
        said[f"{item.role}_file"] = item.file_bytes
        said[f"{item.role}_activations"] = list(item.activation_bytes)
    return said


def _child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _rows(case: str, said: dict[str, Any], measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for quantity, value in measured.items():
        many = isinstance(value, list)
        pairs = zip(said[quantity], value, strict=True) if many else [(said[quantity], value)]
        for index, (estimated, seen) in enumerate(pairs):
            yield {
                "case": case,
                "quantity": f"{quantity}[{index}]" if many else quantity,
                "estimated_bytes": estimated,
                "measured_bytes": seen,
                "error_percent": round(100 * (estimated / seen - 1), 1),
            }


def live_peak(make: Callable[[], Any], call: Callable[[Any], Any]) -> tuple[int, int]:
    """Parameters of a module, and the most bytes of tensors alive at once while it runs."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.now = self.peak = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf.untyped_storage())
            return result

        def add(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.known:
                return
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

        def drop(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    def fused(query: Any, *_: Any, **__: Any) -> Any:
        return torch.empty_like(query)

    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention
    with torch.device("meta"):
        module = make().to(torch.bfloat16).eval()
        live = Live()
        live.known |= {p.untyped_storage()._cdata for p in module.parameters()}
        live.known |= {b.untyped_storage()._cdata for b in module.buffers()}
        functional.scaled_dot_product_attention = fused
        try:
            with torch.no_grad(), live:
                call(module)
        finally:
            functional.scaled_dot_product_attention = plain
    return sum(p.numel() for p in module.parameters()), live.peak


def companion_rows(side: int) -> Iterator[dict[str, Any]]:
    """The VAE of each pipeline: what the estimate says beside what the module does."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    from ditrim.plugins.architectures import ARCHITECTURES

    def flux() -> Any:
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    def latents(*shape: int) -> Any:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    small = side // 8
    calls: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "qwen": (
            AutoencoderKLQwenImage,
            lambda vae: vae.decode(latents(1, 16, 1, small, small)),
        ),
        "flux": (flux, lambda vae: vae.decode(latents(1, 16, small, small))),
    }
    for architecture, (make, call) in calls.items():
        vae = ARCHITECTURES[architecture].companions[-1]
        count, peak = live_peak(make, call)
        said = {"parameters": vae.num_parameters, f"decode_{side}": 0}
        said[f"decode_{side}"] = vae.transient_bytes(side * side, 0)
        yield from _rows(f"vae-{architecture}", said, {"parameters": count, f"decode_{side}": peak})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--no-vae", action="store_true", help="leave out the VAEs")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(build_case(arguments.case)))
        return
    if arguments.run:
        print(json.dumps(run_graph(arguments.run[0], json.loads(arguments.run[1]))))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        new = list(_rows(name, estimate_case(name), _child("--case", name)))
        _show(new)
        rows += new
    if not arguments.no_vae:
        for side in (512, 1024):
            new = list(companion_rows(side))
            _show(new)
            rows += new
    print(
        json.dumps(
            {"command": "compare_estimate", "machine": describe_machine(None, 0), "rows": rows}
        )
    )


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sys.stderr.write(
            f"{row['case']:22} {row['quantity']:22} {row['estimated_bytes']:>15,} "
            f"{row['measured_bytes']:>15,} {row['error_percent']:>7.1f} %\n"
        )
    sys.stderr.flush()


if __name__ == "__main__":
    main()
