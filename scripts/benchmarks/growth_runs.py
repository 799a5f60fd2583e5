"""Runs of bench_growth.py: the runtime without engines, whole requests, sets of several rungs."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from growth_process import (
    SETTLE_SECONDS,
    Pulse,
    grid_of,
    grids_of,
    inputs_of,
    model_of,
    rewind_peak,
    status_bytes,
)


def measure_runtime(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the runtime's own parts at several lengths, G = C, in turn."""
    from ditrim.engines.sets.engine_set import load_engine_set

    engine_set = load_engine_set(task["engine"])
    pulse = Pulse()
    parts = {length: _runtime_parts(engine_set, length, task) for length in task["lengths"]}
    samples: dict[str, dict[int, list[float]]] = {}
    for number in range(task["repeats"] + 1):
        for length, runs in parts.items():
            pulse.beat()
            for part, run in runs.items():
                time.sleep(SETTLE_SECONDS)
                start = time.perf_counter()
                run()
                elapsed = (time.perf_counter() - start) * 1e3
                if number:  # the first is a warm-up
                    samples.setdefault(part, {}).setdefault(length, []).append(elapsed)
    return {"product_ms": pulse.ms, "samples_ms": samples}


def _runtime_parts(
    engine_set: Any, length: int, task: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    import torch

    from ditrim.runtime.denoising.calls import gather_rows
    from ditrim.runtime.denoising.inputs import check_finite, check_inputs
    from ditrim.runtime.denoising.rope import rope_for
    from ditrim.runtime.policies.topi import CoverageToPi, ToPi
    from ditrim.runtime.policy import CallView
    from ditrim.runtime.tokens.coverage import hilbert_order

    manifest = engine_set.manifest
    point = {"noisy": length, "references": [length], "text": task["text"], "batch": 1}
    inputs = inputs_of(manifest, point)
    tables = inputs.make_rope()
    generator = torch.Generator().manual_seed(0)
    influence = torch.rand(1, length, generator=generator) ** 3
    view = CallView(
        step=0, branch="cond", ladder=manifest.ladder, grids=inputs.grids, influence=influence
    )
    hidden = torch.randn(1, length, task["width"], generator=generator)
    kept = torch.randperm(length, generator=generator)[: length // 2].sort().values[None]
    axes, half = manifest.transformer_config["axes_dims_rope"], tables.reference[0].shape[1]
    velocity = torch.randn_like(inputs.noisy_latents)
    halves = grid_of(length // 4)
    four = replace(view, grids=(inputs.grids[0], *[halves] * 4))
    topi, coverage = ToPi(tau=0.85), CoverageToPi(tau=0.85)
    return {
        "select, ToPi": lambda: topi.begin().select(view),
        "select, CoverageToPi": lambda: coverage.begin().select(view),
        "select, CoverageToPi, 4 references": lambda: coverage.begin().select(four),
        "Hilbert curve, once a geometry": lambda: hilbert_order(*inputs.grids[1]),
        f"gather half of the references, d = {task['width']}": lambda: gather_rows(hidden, kept),
        f"gather half of the RoPE rows, D/2 = {half}": lambda: [
            table.index_select(0, kept.flatten()) for table in tables.reference
        ],
        "RoPE tables, once a geometry": lambda: rope_for(
            "qwen", inputs.layout, task["text"], axes, torch.device("cpu")
        ),
        "checks, first step": lambda: check_inputs(inputs, engine_set, is_first=True),
        "checks, later steps": lambda: check_inputs(inputs, engine_set, is_first=False),
        "checks, anchor step": lambda: check_finite(inputs, velocity, influence, 0),
    }


def _requests(engines: Any) -> Callable[..., Iterator[Any]]:
    """Starts requests of given sizes on one session: (point, steps) -> its steps."""
    import torch

    from ditrim.runtime.policies.topi import ToPi
    from ditrim.runtime.session import EditSession

    manifest = engines.engine_set.manifest
    session = EditSession(engines, ToPi(ratio=0.5, interval=5))

    def start(point: dict[str, Any], num_steps: int) -> Iterator[Any]:
        inputs = inputs_of(manifest, point)
        grids = grids_of(point)
        return session.denoise(
            noisy=inputs.noisy_latents,
            noisy_grid=grids[0],
            references=list(inputs.reference_latents.split(point["references"], dim=1)),
            reference_grids=grids[1:],
            text_embeds=inputs.text_embeds,
            sigmas=torch.linspace(1.0, 0.0, num_steps + 1).tolist(),
        )

    start.session = session  # type: ignore[attr-defined]
    return start


def measure_steps(task: dict[str, Any]) -> dict[str, Any]:
    """A whole run of so many steps: its time, its operations, and memory along it."""
    from ditrim.engines.load import load_engines

    engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
    pulse, start_request = Pulse(), _requests(engines)
    for _ in start_request(task["point"], 6):
        pass  # an anchor and reduced steps: what a session does once
    gc.collect()
    held = status_bytes("VmRSS")
    rewind_peak()
    pulse.beat()
    start, memory, beats = time.perf_counter(), {}, 0.0
    for step in start_request(task["point"], task["steps"]):
        if step.index + 1 in task["marks"]:
            memory[step.index + 1] = status_bytes("VmRSS") - held
        if step.index % 20 == 19 and not task["marks"]:
            begun = time.perf_counter()
            pulse.beat()
            beats += time.perf_counter() - begun
    seconds = time.perf_counter() - start - beats
    report = start_request.session.report  # type: ignore[attr-defined]
    return {
        "product_ms": pulse.ms,
        "run_ms": report.total_ms,
        "wall_ms": seconds * 1e3,
        "steps": len(report.steps),
        "anchors": len(report.of_role("anchor")),
        "num_kept": next(record.num_kept for record in report.of_role("reduced")),
        "model": model_of(engines.engine_set.manifest),
        "held_bytes": held,
        "added_bytes": memory,
        "peak_bytes": status_bytes("VmHWM"),
    }


def measure_requests(task: dict[str, Any]) -> dict[str, Any]:
    """Memory along many requests, every one of another size, on one session."""
    from ditrim.engines.load import load_engines

    engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
    draw = random.Random(0)
    longest, start_request = task["longest"], _requests(engines)

    def some(most: int) -> int:
        return draw.randint(most // 4, most)

    def run_one() -> None:
        point = {
            "noisy": some(longest),
            "references": [some(longest // 2) for _ in range(draw.randint(1, 2))],
            "text": some(task["text"]),
            "batch": 1,
        }
        for _ in start_request(point, 4):
            pass

    largest = {
        "noisy": longest,
        "references": [longest // 2] * 2,
        "text": task["text"],
        "batch": 1,
    }
    for _ in start_request(largest, 4):
        pass  # the largest first: what comes after it needs no more
    gc.collect()
    held, memory = status_bytes("VmRSS"), {}
    for number in range(1, max(task["marks"]) + 1):
        run_one()
        if number in task["marks"]:
            gc.collect()
            memory[number] = status_bytes("VmRSS") - held
    return {"held_bytes": held, "added_bytes": memory}


def _run_step(request: Any, inputs: Any) -> None:
    request.begin_step(inputs.time)
    request.predict("cond", inputs)
    request.end_step()


def measure_rungs(task: dict[str, Any]) -> dict[str, Any]:
    """Load time, memory and step time of a set with so many rungs, after a step on each."""
    import torch

    from ditrim.engines.load import load_engines
    from ditrim.runtime.denoising.denoiser import Denoiser
    from ditrim.runtime.policies.topi import ToPi

    pulse = Pulse()
    before = status_bytes("VmRSS")
    engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
    loaded = status_bytes("VmRSS") - before
    inputs = inputs_of(engines.engine_set.manifest, task["point"])
    length = sum(task["point"]["references"])
    rungs = engines.engine_set.manifest.ladder.rungs
    for rung in rungs:
        request = Denoiser(engines, ToPi(tau=0.0, min_kept=rung, max_kept=rung)).begin()
        for _ in range(3):
            _run_step(request, inputs)
    served = status_bytes("VmRSS") - before
    half = length // 2
    policy = ToPi(tau=0.0, min_kept=half, max_kept=half, interval=10**6)
    request = Denoiser(engines, policy).begin()
    for _ in range(task["repeats"] + 2):
        pulse.beat()
        time.sleep(SETTLE_SECONDS)
        _run_step(request, inputs)
    steps = [record.total_ms for record in request.report.steps[2:]]
    del request, engines
    loads = []
    for _ in range(task["repeats"]):
        gc.collect()
        start = time.perf_counter()
        engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
        loads.append((time.perf_counter() - start) * 1e3)
        del engines
    assert torch.get_num_threads() == task["threads"]
    return {
        "product_ms": pulse.ms,
        "rungs": list(rungs),
        "load_ms": loads,
        "step_ms": steps,
        "loaded_bytes": loaded,
        "served_bytes": served,
    }
