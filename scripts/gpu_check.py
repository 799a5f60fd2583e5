#!/usr/bin/env python3
"""Prove this repository on an NVIDIA GPU, and say in one JSON document what was measured.

Every part runs in a process of its own and stands alone: one that cannot run says why, one that
fails or hangs does not stop the others. A part is "ok" only when its checks ran and held. Without a
GPU everything but the environment is skipped, and the exit code is 0; a failed part makes it 1.

Parts:
  environment                 GPU, driver and libraries that are there
  kernel-accuracy             the Triton scoring kernel against float64
  kernel-speed                its time against what the GPU's matrix products and memory allow
  onnxruntime-cuda            the small editor on ONNX Runtime's CUDA provider, against its CPU
  tensorrt-rtx, tensorrt      the small editor built and run, against ONNX Runtime on the CPU;
                              CUDA graphs; memory over 200 changes of shape
  block-stack                 Qwen-Image-Edit blocks of full width in torch, eager and compiled
  block-stack-tensorrt-rtx, block-stack-tensorrt
                              the same depth and width as plans: each rung, and what scoring adds

Examples:
    python scripts/gpu_check.py --output docs/gpu/h200-2026-11-21.json
    python scripts/gpu_check.py --quick --only kernel-accuracy --only kernel-speed
"""

from __future__ import annotations

import argparse
import ctypes.util
import datetime as dt
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engines", "export", "plugins", "runtime")
DISTRIBUTIONS = (
    "torch", "triton", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "polygraphy", "numpy",
)  # fmt: skip
# All of it; parts get what is left.
BUDGET_SECONDS = 480
# Qwen-Image-Edit at 1024 x 1024 with one reference.
HEADS, WIDTH, TOKENS, TEXT = 24, 128, 4096, 512
STACK_LAYERS = 4
STACK_RUNGS = tuple(range(512, TOKENS + 1, 512))
SHAPE_CHANGES = 200
# They separate a wrong tensor from rounding: copying the source gives 13 dB.
LEAST_PSNR_DB = {"fp32": 50.0, "fp16": 35.0, "bf16": 25.0}
_NO_GPU = "no CUDA device"


class CannotRunError(Exception):
    """A part that cannot run here; it says why."""


@dataclass(frozen=True)
class Context:
    """Options that every part gets.

    Attributes:
        is_quick: measure less.
        folder: for what it builds.
    """

    is_quick: bool
    folder: Path


# What parts are made of.


def need(*modules: str) -> None:
    """Skip a part whose modules are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRunError(f"not installed: {', '.join(missing)}")


def need_gpu() -> Any:
    """Return torch; raise where it is missing or finds no GPU."""
    need("torch")
    import torch

    if not torch.cuda.is_available():
        raise CannotRunError(_NO_GPU)
    return torch


def gpu_times(function: Callable[[], Any], repeats: int, warm_ups: int = 3) -> dict[str, float]:
    """Median, least and most milliseconds of a call, by CUDA events."""
    import torch

    for _ in range(warm_ups):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {
        "median_ms": round(statistics.median(times), 4),
        "least_ms": round(min(times), 4),
        "most_ms": round(max(times), 4),
    }


def psnr(first: Any, second: Any) -> float:
    """Peak signal-to-noise ratio of two pictures in [0, 1], in dB; 100 where they are equal."""
    error = float(((first.astype("float64") - second.astype("float64")) ** 2).mean())
    return round(min(100.0, -10 * math.log10(error)), 2) if error > 0 else 100.0


# The parts. Each returns what it measured, with its checks: name -> whether it held.


def environment(context: Context) -> dict[str, Any]:
    """Report versions, machine and GPU."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "libraries": versions,
        "libnvinfer": ctypes.util.find_library("nvinfer") is not None,
        "gpus": [],
    }
    if versions["torch"] is not None:
        import torch

        found["torch_cuda"] = torch.version.cuda
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            found["gpus"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gb": round(properties.total_memory / 1e9, 1),
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    if versions["onnxruntime"] or versions["onnxruntime-gpu"]:
        import onnxruntime

        found["onnxruntime_providers"] = onnxruntime.get_available_providers()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        found["driver"] = done.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = None
    return found | {"checks": {"python is 3.11 or newer": sys.version_info >= (3, 11)}}


def random_scoring(shape: tuple[int, ...], dtype: Any, largest: float, seed: int) -> Any:
    """Queries, keys, a bias with some -inf, and the scale that makes logits about so large."""
    import torch

    batch, heads, rows, keys, width = shape
    random = torch.Generator("cuda").manual_seed(seed)
    made = functools.partial(torch.randn, generator=random, device="cuda")
    queries = made(batch, heads, rows, width).to(dtype)
    all_keys = made(batch, heads, keys, width).to(dtype)
    bias = made(batch, heads, keys) * largest / 4
    bias[torch.rand(bias.shape, generator=random, device="cuda") < 0.05] = -torch.inf
    return queries, all_keys, bias, largest / (4 * width**0.5)


def float64_error(found: Any, queries: Any, keys: Any, bias: Any, scale: float) -> Any:
    """Largest error against float64 and the largest logit, a few rows at a time."""
    import torch

    worst, largest = 0.0, 0.0
    for first in range(0, queries.shape[2], 256):
        rows = queries[:, :, first : first + 256].double()
        logits = scale * (rows @ keys.double().transpose(-1, -2)) + bias.double()[:, :, None, :]
        expected = torch.logsumexp(logits, dim=-1)
        largest = max(largest, float(logits[torch.isfinite(logits)].abs().max()))
        part = found[:, :, first : first + 256].double()
        if not torch.equal(torch.isneginf(part), torch.isneginf(expected)):
            return math.inf, largest
        finite = torch.isfinite(expected)
        worst = max(worst, float((part[finite] - expected[finite]).abs().max()))
    return worst, largest


def kernel_accuracy(context: Context) -> dict[str, Any]:
    """The scoring kernel over shapes, widths, dtypes and sizes of logits."""
    torch = need_gpu()
    need("triton")
    import numpy as np

    from ditrim.plugins.kernel import influence, log_sum_exp
    from ditrim.plugins.reference import influence_reference

    shapes = [
        (1, 2, 100, 333, 64), (2, 3, 1, 129, 128), (1, 4, 257, 515, 128), (1, 1, 64, 64, 16),
        (1, 2, 130, 70, 256), (3, 2, 33, 1000, 80), (1, HEADS, TOKENS, 2 * TOKENS + TEXT, WIDTH),
    ]  # fmt: skip
    rows, checks = [], {}
    for seed, shape in enumerate(shapes[: -1 if context.is_quick else None]):
        for dtype in (torch.bfloat16, torch.float16):
            for size in (10.0, 1000.0):
                given = random_scoring(shape, dtype, size, seed)
                error, largest = float64_error(log_sum_exp(*given), *given)
                # Float32 rounding of a logit, with room for the sums over channels and keys.
                bound = 4e-6 * (1 + largest)
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} logits to {size:g}"
                rows.append({"case": name, "error": error, "bound": bound})
                checks[name] = error <= bound
    queries, keys, _, _ = random_scoring((1, 4, 300, 900, 128), torch.bfloat16, 1.0, 99)
    values, start = torch.randn_like(keys), 600
    found = influence(queries, keys, keys[:, :, start:], values[:, :, start:], 128**-0.5)
    arrays = [tensor.double().cpu().numpy() for tensor in (queries, keys, values)]
    expected = influence_reference(*arrays, start, 128**-0.5)
    relative = float(np.abs(found.cpu().numpy() - expected).max() / np.abs(expected).max())
    checks["influence (Eq. 9) to 1e-4 relative"] = relative <= 1e-4
    worst = max(rows, key=lambda row: row["error"] / row["bound"])
    return {"cases": rows, "worst": worst, "influence_error": relative, "checks": checks}


def gpu_rates(repeats: int) -> tuple[float, float]:
    """Operations a second of a large bf16 matrix product, bytes a second of a large copy."""
    import torch

    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = gpu_times(lambda: square @ square, repeats)
    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(block)
    copy = gpu_times(lambda: other.copy_(block), repeats)
    return 2 * 8192**3 / product["median_ms"] * 1e3, 2 * block.nbytes / copy["median_ms"] * 1e3


def kernel_speed(context: Context) -> dict[str, Any]:
    """Both launches of an anchor step at full size, against the GPU's own rates."""
    torch = need_gpu()
    need("triton")
    from ditrim.plugins.kernel import log_sum_exp

    repeats = 10 if context.is_quick else 50
    flops_per_s, bytes_per_s = gpu_rates(repeats)
    length = 2 * TOKENS + TEXT
    launches = {"rows x keys": (TOKENS, length), "references x rows": (TOKENS, TOKENS)}
    result: dict[str, Any] = {
        "matrix_product_tflops": round(flops_per_s / 1e12, 1),
        "copy_gb_per_s": round(bytes_per_s / 1e9, 1),
        "launches": {},
    }
    checks = {}
    for name, (rows, keys) in launches.items():
        given = random_scoring((1, HEADS, rows, keys, WIDTH), torch.bfloat16, 10.0, 0)
        found = log_sum_exp(*given)
        checks[f"{name}: finite"] = bool(torch.isfinite(found).all())
        times = gpu_times(functools.partial(log_sum_exp, *given), repeats)
        flops = 2 * HEADS * rows * keys * WIDTH
        num_bytes = HEADS * (2 * WIDTH * (rows + keys) + 4 * (rows + keys))
        bound_ms = max(flops / flops_per_s, num_bytes / bytes_per_s) * 1e3
        result["launches"][name] = times | {
            "tflops": round(flops / times["median_ms"] / 1e9, 1),
            "bound_ms": round(bound_ms, 4),
            "of_bound": round(bound_ms / times["median_ms"], 3),
        }
    states = [
        torch.randn(1, HEADS, length, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    ]
    attention = gpu_times(
        lambda: torch.nn.functional.scaled_dot_product_attention(*states), repeats
    )
    scoring = sum(item["median_ms"] for item in result["launches"].values())
    return result | {
        "attention_of_a_layer": attention,
        "scoring_of_attention": round(scoring / attention["median_ms"], 3),
        "checks": checks,
    }


def build(context: Context, name: str, **options: Any) -> Any:
    """Build an engine set; the seconds that it took come with it."""
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    start = time.perf_counter()
    engine_set = build_engine_set(BuildOptions(output=str(context.folder / name), **options))
    return engine_set, round(time.perf_counter() - start, 1)


def small_pictures(engines: Any, policy: Any, count: int, steps: int) -> tuple[list[Any], Any]:
    """Pictures of held-out edits on an engine set, and the last run's report."""
    import torch
    from PIL import Image

    import ditrim.runtime as ditrim
    from ditrim.runtime.small_editor import load_small_pipeline
    from ditrim.runtime.small_editor.scenes import held_out_edits

    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if engines.device.type == "cuda":
        pipe.to(engines.device)
    pictures = []
    with ditrim.attach(pipe, engines, policy, timing=True) as attachment:
        for index, example in enumerate(held_out_edits(count, seed=0)):
            made = pipe(
                image=[Image.fromarray(picture) for picture in example.references],
                prompt=example.prompt,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(index),
                output_type="np",
            )
            pictures.append(made.images[0])
        return pictures, attachment.report


def step_times(report: Any) -> dict[str, float]:
    """Median milliseconds of a step by role."""
    roles: dict[str, list[float]] = {}
    for record in report.steps[1:]:
        roles.setdefault(record.role, []).append(record.total_ms)
    return {role: round(statistics.median(times), 3) for role, times in roles.items()}


def small_editor(context: Context, backend: str, precision: str) -> tuple[dict[str, Any], Any]:
    """The small editor on a backend against ONNX Runtime's CPU in float32."""
    from ditrim.engines.load import load_engines
    from ditrim.runtime.policies.topi import ToPi
    from ditrim.runtime.policy import FullContext

    count, steps = (2, 10) if context.is_quick else (8, 40)
    policies = {"full context": FullContext(), "ToPi": ToPi(tau=0.85, interval=5)}
    truth, _ = build(context, "truth", preset="small", granularity=8)
    engine_set, seconds = build(
        context,
        f"{backend}-{precision}",
        preset="small",
        granularity=8,  # of both, so that both keep the same tokens
        backend=backend,
        precision=precision,
    )
    expected = load_engines(truth, device="cpu")
    engines = load_engines(engine_set, device="cuda")
    found: dict[str, Any] = {"build_seconds": seconds, "edits": count, "steps": steps}
    checks = {}
    for name, policy in policies.items():
        wanted, _ = small_pictures(expected, policy, count, steps)
        pictures, report = small_pictures(engines, policy, count, steps)
        values = [psnr(one, two) for one, two in zip(pictures, wanted, strict=True)]
        error = max(float(abs(a - b).max()) for a, b in zip(pictures, wanted, strict=True))
        found[name] = {"psnr_db": values, "largest_error": error, "step_ms": step_times(report)}
    least = LEAST_PSNR_DB[precision]
    worst = min(found["full context"]["psnr_db"])
    checks[f"{precision} full context: at least {least:g} dB"] = worst >= least
    return found | {"checks": checks, "choice": engines.choice}, engine_set


def onnxruntime_cuda(context: Context) -> dict[str, Any]:
    """Run the small editor with ONNX Runtime's CUDA provider."""
    need_gpu()
    need("diffusers", "onnxruntime")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise CannotRunError("onnxruntime has no CUDA provider; onnxruntime-gpu does")
    return small_editor(context, "onnxruntime", "fp32")[0]


def random_call(engines: Any, role: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `Engines.run` with random inputs of these sizes."""
    import torch

    manifest = engines.engine_set.manifest
    spec = manifest.plans.get(role) or manifest.graphs["front" if role == "front" else "back"]

    def made(item: Any) -> Any:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in item.shape]
        if item.dtype == "int64":
            return torch.arange(shape[0], device=engines.device)
        return torch.randn(shape, device=engines.device, dtype=getattr(torch, item.dtype))

    return {
        "role": role,
        "inputs": {item.name: made(item) for item in spec.inputs},
        "outputs": {item.name: made(item) for item in spec.outputs},
    }


def need_library(backend: str) -> None:
    """Skip where TensorRT or TensorRT-RTX cannot be used."""
    need_gpu()
    need("diffusers", "polygraphy", backend.replace("-", "_"))
    from ditrim.engines.backends.tensorrt.library import open_library

    open_library(backend)


def tensorrt_small(backend: str, context: Context) -> dict[str, Any]:
    """The small editor as plans: pictures, CUDA graphs, memory over changes of shape."""
    need_library(backend)
    import torch

    from ditrim.engines.backends.tensorrt.engines import TensorRTEngines

    precisions = ("bf16",) if context.is_quick else ("bf16", "fp16")
    found: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for precision in precisions:
        found[precision], engine_set = small_editor(context, backend, precision)
        checks |= found[precision].pop("checks")
    sizes = {"batch": 1, "noisy": 144, "text": 16, "rows": 1}
    found["cuda_graphs"] = {}
    outputs = {}
    for mode in ("off", "on", "auto"):
        engines = TensorRTEngines(engine_set, cuda_graphs=mode)
        torch.manual_seed(0)
        call = random_call(engines, "back", sizes | {"reference": 72})
        times = gpu_times(functools.partial(engines.run, **call), 30, warm_ups=20)
        found["cuda_graphs"][mode] = times | {"stats": engines.stats()}
        outputs[mode] = call["outputs"]["velocity"].clone()
    for mode in ("on", "auto"):
        error = float((outputs[mode] - outputs["off"]).abs().max() / outputs["off"].abs().max())
        # Not bit by bit: TensorRT-RTX compiles other kernels where nothing is captured.
        checks[f"cuda_graphs {mode} gives the velocity of off to 2 %"] = error <= 0.02
    engines = TensorRTEngines(engine_set)
    longest = engine_set.manifest.ladder.longest
    free = []
    for index in range(SHAPE_CHANGES):
        reference = 1 + index * 7 % longest
        engines.run(**random_call(engines, "back", sizes | {"reference": reference}))
        if index in (SHAPE_CHANGES // 4, SHAPE_CHANGES - 1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
    lost = free[0] - free[1]
    found["shape_changes"] = {
        "count": SHAPE_CHANGES,
        "lost_bytes_after_the_first_quarter": lost,
        "stats": engines.stats(),
    }
    checks["shape changes lose less than 64 MB"] = lost < 64 << 20
    return found | {"checks": checks}


def block_stack(context: Context) -> dict[str, Any]:
    """Blocks of full width in torch, at each rung's sequence length."""
    torch = need_gpu()
    need("diffusers")
    from diffusers import QwenImageTransformer2DModel

    repeats = 5 if context.is_quick else 20
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    model = QwenImageTransformer2DModel(num_layers=STACK_LAYERS).eval()
    side = math.isqrt(TOKENS)

    def step(rung: int, run: Any) -> Callable[[], Any]:
        arguments = {
            "hidden_states": torch.randn(1, TOKENS + rung, model.config.in_channels),
            "encoder_hidden_states": torch.randn(1, TEXT, model.config.joint_attention_dim),
            "timestep": torch.tensor([0.7]),
            "img_shapes": [[(1, side, side), (1, rung // side, side)]],
            "return_dict": False,
        }
        return lambda: run(**arguments)

    result: dict[str, Any] = {"layers": STACK_LAYERS, "eager": {}, "compiled": {}}
    checks = {}
    with torch.no_grad():
        rungs = (TOKENS // 2, TOKENS) if context.is_quick else STACK_RUNGS
        for rung in rungs:
            run = step(rung, model)
            checks[f"eager, rung {rung}: finite"] = bool(torch.isfinite(run()[0]).all())
            result["eager"][str(rung)] = gpu_times(run, repeats)
        if not context.is_quick:
            compiled = torch.compile(model)
            for rung in (TOKENS // 2, TOKENS):
                result["compiled"][str(rung)] = gpu_times(step(rung, compiled), repeats)
    full = result["eager"][str(TOKENS)]["median_ms"]
    result["speedup"] = {
        rung: round(full / times["median_ms"], 3) for rung, times in result["eager"].items()
    }
    return result | {"checks": checks}


def tensorrt_stack(backend: str, context: Context) -> dict[str, Any]:
    """The same blocks as plans: FRONT, BACK at each rung, BACK with every noisy row scored."""
    need_library(backend)
    import torch

    from ditrim.engines.load import load_engines

    repeats = 5 if context.is_quick else 20
    engine_set, seconds = build(
        context, "stack", model="qwen-edit", weights="random", num_layers=STACK_LAYERS,
        front_depth=1, layers=(2, 3), backend=backend, precision="bf16", max_batch=1,
        max_text_tokens=TEXT, granularity=64, rungs=2 if context.is_quick else len(STACK_RUNGS),
    )  # fmt: skip
    engines = load_engines(engine_set, device="cuda")
    sizes = {"batch": 1, "noisy": TOKENS, "text": TEXT, "rows": 1}
    result: dict[str, Any] = {"layers": STACK_LAYERS, "build_seconds": seconds, "back": {}}
    checks = {}

    def timed(role: str, reference: int, rows: int = 1) -> dict[str, float]:
        call = random_call(engines, role, sizes | {"reference": reference, "rows": rows})
        engines.run(**call)
        outputs = call["outputs"].values()
        name = f"{role} at {reference}, {rows} rows: finite"
        checks[name] = all(bool(torch.isfinite(tensor).all()) for tensor in outputs)
        return gpu_times(functools.partial(engines.run, **call), repeats, warm_ups=15)

    result["front"] = timed("front", TOKENS)
    for rung in engine_set.manifest.ladder.rungs:
        result["back"][str(rung)] = timed("back", rung)
    result["anchor"] = timed("anchor", TOKENS, TOKENS)
    full = result["back"][str(TOKENS)]["median_ms"]
    result["speedup"] = {
        rung: round(full / times["median_ms"], 3) for rung, times in result["back"].items()
    }
    result["anchor_over_full"] = round(result["anchor"]["median_ms"] / full, 3)
    half = result["back"][str(TOKENS // 2)]["median_ms"]
    checks["half the references are faster than all"] = half < full
    return result | {"stats": engines.stats(), "checks": checks}


PARTS: dict[str, tuple[Callable[[Context], dict[str, Any]], int]] = {
    "environment": (environment, 60),
    "kernel-accuracy": (kernel_accuracy, 120),
    "kernel-speed": (kernel_speed, 120),
    "onnxruntime-cuda": (onnxruntime_cuda, 150),
    "tensorrt-rtx": (functools.partial(tensorrt_small, "tensorrt-rtx"), 240),
    "tensorrt": (functools.partial(tensorrt_small, "tensorrt"), 240),
    "block-stack": (block_stack, 200),
    "block-stack-tensorrt-rtx": (functools.partial(tensorrt_stack, "tensorrt-rtx"), 240),
    "block-stack-tensorrt": (functools.partial(tensorrt_stack, "tensorrt"), 240),
}


# Running them.


def outcome_of(part: Callable[[Context], dict[str, Any]], context: Context) -> dict[str, Any]:
    """Run a part: "ok" only where it made checks and all of them held."""
    try:
        measured = dict(part(context) or {})
    except CannotRunError as skip:
        return {"status": "skipped", "reason": str(skip)}
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    checks = measured.pop("checks", {})
    if not checks:
        return {"status": "failed", "reason": "it made no check", "measured": measured}
    broken = [name for name, held in checks.items() if held is not True]
    outcome: dict[str, Any] = {"status": "failed" if broken else "ok"}
    if broken:
        outcome["reason"] = f"did not hold: {'; '.join(broken)}"
    return outcome | {"checks": checks, "measured": measured}


def run_part(name: str, seconds: float, is_quick: bool, folder: Path) -> dict[str, Any]:
    """A part in a process of its own; what ends the process is the part's failure."""
    result = folder / f"{name}.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name]
    command += ["--folder", str(folder), *(["--quick"] if is_quick else [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(seconds, 1), check=False
        )
        ending = f"its process ended with {done.returncode}: {done.stderr.strip()[-500:]}"
    except subprocess.TimeoutExpired:
        ending = f"it was not done after {seconds:.0f} s"
    if result.exists():
        outcome: dict[str, Any] = json.loads(result.read_text())
    else:
        outcome = {"status": "failed", "reason": ending}
    return outcome | {"seconds": round(time.monotonic() - start, 1)}


def is_without_gpu(parts: Mapping[str, Any]) -> bool:
    """Whether the environment was checked and has no GPU."""
    return parts.get("environment", {}).get("measured", {}).get("gpus") == []


def without_paths(value: Any) -> Any:
    """The same with places of this machine taken out of every text."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(?<![\w:/])/(?:[^\s/'\"<>:]+/)*([^\s/'\"<>:]+)", r"<path>/\1", value)


def commit() -> str | None:
    """The commit of this checkout, with a + where files were changed."""
    said = []
    for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")


def make_importable(folder: Path) -> None:
    """Let this process and its children import the checkout, installed or not."""
    links = folder / "links" / "ditrim"
    links.mkdir(parents=True)
    for package in PACKAGES:
        (links / package).symlink_to(ROOT / package)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(links.parent), inherited)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), metavar="PART", help="can be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument("--output", type=Path, help="write the JSON document there as well")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.part:
        context = Context(is_quick=arguments.quick, folder=arguments.folder)
        outcome = outcome_of(PARTS[arguments.part][0], context)
        text = json.dumps(outcome, default=str)
        (arguments.folder / f"{arguments.part}.json").write_text(text)
        return 0
    parts: dict[str, Any] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        make_importable(folder)
        # The environment comes in any case: figures say nothing without it.
        for part in dict.fromkeys(["environment", *(arguments.only or PARTS)]):
            left = BUDGET_SECONDS - (time.monotonic() - start)
            if is_without_gpu(parts):
                parts[part] = {"status": "skipped", "reason": _NO_GPU}
            elif left < 1:
                parts[part] = {"status": "skipped", "reason": "the time was used up"}
            else:
                seconds = min(PARTS[part][1], left)
                parts[part] = run_part(part, seconds, arguments.quick, folder)
            outcome = parts[part]
            print(f"{part}: {outcome['status']} {outcome.get('reason', '')}", file=sys.stderr)
    gpus = parts.get("environment", {}).get("measured", {}).get("gpus", [])
    options = [*(f"--only {part}" for part in arguments.only or ())]
    options += ["--quick"] if arguments.quick else []
    document = without_paths(
        {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "command": " ".join(["python scripts/gpu_check.py", *options]),
            "commit": commit(),
            "gpu": gpus[0]["name"] if gpus else None,
            "seconds": round(time.monotonic() - start, 1),
            "summary": {
                status: [name for name, part in parts.items() if part["status"] == status]
                for status in ("ok", "failed", "skipped")
            },
            "parts": parts,
        }
    )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    skipped = document["summary"]["skipped"]
    if skipped:
        print(f"skipped {len(skipped)} of {len(parts)} parts", file=sys.stderr)
    print(json.dumps(document))
    return 1 if document["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
