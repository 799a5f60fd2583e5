"""TensorRT and TensorRT-RTX: the small editor as plans, and full-width blocks at every rung."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from gpu.clock import times_of
from gpu.part import CannotRunError, Context, need, need_gpu
from gpu.small import build, small_engine_set

# What TensorRT-RTX 1.7 has kernels for, by NVIDIA's own table.
RTX_CAPABILITIES = ((7, 5), (8, 6), (8, 9), (12, 0))
LAYERS, TOKENS, TEXT, NUM_RUNGS = 4, 4096, 512, 8
SHAPE_CHANGES = 200


def need_library(backend: str, context: Context) -> None:
    """Skip where TensorRT or TensorRT-RTX cannot be used."""
    need_gpu(context)
    if context.is_rehearsal:
        raise CannotRunError("plans cannot be rehearsed without a GPU")
    if backend == "tensorrt-rtx":
        need_served(torch.cuda.get_device_capability())
    need("diffusers", "pydantic", "polygraphy", backend.replace("-", "_"))
    from ditrim.engines.backends.tensorrt.library import open_library

    open_library(backend)


def need_served(capability: tuple[int, int]) -> None:
    """Skip where TensorRT-RTX has no kernels for the GPU."""
    if capability in RTX_CAPABILITIES:
        return
    served = ", ".join(f"{major}.{minor}" for major, minor in RTX_CAPABILITIES)
    raise CannotRunError(
        f"TensorRT-RTX 1.7 serves compute capability {served}, and this GPU has "
        f"{capability[0]}.{capability[1]}: the torch backend serves it, and TensorRT"
    )


def random_call(engines: Any, role: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `Engines.run` with random inputs of these sizes."""
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


def small_plans(backend: str, context: Context) -> None:
    """The small editor as plans: pictures, CUDA graphs, memory over changes of shape."""
    need_library(backend, context)
    from ditrim.engines.backends.tensorrt.engines import TensorRTEngines

    record = context.record
    for precision in ("bf16",) if context.is_quick else ("bf16", "fp16"):
        engine_set = small_engine_set(context, backend, precision)
    sizes = {"batch": 1, "noisy": 144, "text": 16, "rows": 1}
    outputs = {}
    for mode in ("off", "on", "auto"):
        engines = TensorRTEngines(engine_set, cuda_graphs=mode)
        torch.manual_seed(0)
        call = random_call(engines, "back", sizes | {"reference": 72})
        times: dict[str, Any] = times_of(
            functools.partial(engines.run, **call), context.device, 30, warm_ups=20
        )
        record.note("cuda_graphs", **{mode: times | {"stats": engines.stats()}})
        outputs[mode] = call["outputs"]["velocity"].clone()
    for mode in ("on", "auto"):
        error = float((outputs[mode] - outputs["off"]).abs().max() / outputs["off"].abs().max())
        # Not bit by bit: TensorRT-RTX compiles other kernels where nothing is captured.
        record.check(f"cuda_graphs {mode} gives the velocity of off to 2 %", error <= 0.02)
    _change_shapes(context, TensorRTEngines(engine_set), sizes)


def _change_shapes(context: Context, engines: Any, sizes: Mapping[str, int]) -> None:
    longest, free = engines.engine_set.manifest.ladder.longest, []
    for index in range(SHAPE_CHANGES):
        reference = 1 + index * 7 % longest
        engines.run(**random_call(engines, "back", {**sizes, "reference": reference}))
        if index in (SHAPE_CHANGES // 4, SHAPE_CHANGES - 1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
    lost = free[0] - free[1]
    context.record.note(
        "shape_changes",
        count=SHAPE_CHANGES,
        lost_bytes_after_the_first_quarter=lost,
        stats=engines.stats(),
    )
    context.record.check("shape changes lose less than 64 MB", lost < 64 << 20)


def stack_of_plans(backend: str, context: Context) -> None:
    """Full-width blocks as plans: FRONT, BACK at each rung, BACK with every noisy row scored."""
    need_library(backend, context)
    from ditrim.engines.load import load_engines

    record, repeats = context.record, 5 if context.is_quick else 20
    engine_set, seconds = build(
        context, "stack", model="qwen-edit", weights="random", num_layers=LAYERS,
        front_depth=1, layers=(2, 3), backend=backend, precision="bf16", max_batch=1,
        max_text_tokens=TEXT, granularity=64, rungs=2 if context.is_quick else NUM_RUNGS,
    )  # fmt: skip
    record.note(layers=LAYERS, build_seconds=seconds)
    engines = load_engines(engine_set, device="cuda")
    sizes = {"batch": 1, "noisy": TOKENS, "text": TEXT, "rows": 1}

    def timed(role: str, reference: int, rows: int = 1) -> float:
        call = random_call(engines, role, sizes | {"reference": reference, "rows": rows})
        engines.run(**call)
        outputs = call["outputs"].values()
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in outputs)
        record.check(f"{role} at {reference}, {rows} rows: finite", finite)
        run = functools.partial(engines.run, **call)
        times = times_of(run, context.device, repeats, warm_ups=15)
        record.note(role, **{str(reference): times})
        return times["median_ms"]

    timed("front", TOKENS)
    back = {rung: timed("back", rung) for rung in engine_set.manifest.ladder.rungs}
    anchor = timed("anchor", TOKENS, TOKENS)
    record.note(
        speedup={rung: round(back[TOKENS] / ms, 3) for rung, ms in back.items()},
        anchor_over_full=round(anchor / back[TOKENS], 3),
        stats=engines.stats(),
    )
    record.check("half the references are faster than all", back[TOKENS // 2] < back[TOKENS])
