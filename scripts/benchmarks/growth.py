"""What one process of bench_growth.py measures: one point, so that its memory is its own.

A point of most axes is a profile, as `profile-latency` makes it; others are whole runs. Linux only.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.load import load_engines
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.runtime.denoising.calls import gather_rows
from ditrim.runtime.denoising.inputs import check_finite, check_inputs
from ditrim.runtime.policies.topi import CoverageToPi, ToPi
from ditrim.runtime.policy import CallView
from ditrim.runtime.profiling.machine import (
    begin_peak,
    describe_machine,
    peak_bytes,
    resident_bytes,
)
from ditrim.runtime.profiling.measure import (
    Geometry,
    Meter,
    grid_of,
    model_cost_of,
    profile_of,
    random_inputs,
)
from ditrim.runtime.profiling.product import plain_products
from ditrim.runtime.profiling.profile import PRODUCT
from ditrim.runtime.profiling.rounds import Rounds
from ditrim.runtime.session import EditSession
from ditrim.runtime.tokens.coverage import hilbert_order

CPU = torch.device("cpu")
Size = dict[str, int]  # noisy, reference, text, batch, references
SMALL = {"noisy": 16, "reference": 16, "text": 8, "batch": 1, "references": 1}
_GRAPH_PARTS = ("back", "anchor")
_WATCH_SECONDS = 0.02


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Measure what a task says, in this process."""
    watch_memory(task["memory_limit_bytes"])
    torch.set_num_threads(task["threads"])
    with torch.no_grad():
        return TASKS[task["kind"]](task)


def watch_memory(limit: int) -> None:
    """End this process, and say so, when it holds more than so many bytes; 0 is no limit."""

    def watch() -> None:
        while (held := resident_bytes()) <= limit:
            time.sleep(_WATCH_SECONDS)
        print(json.dumps({"stopped_at_bytes": held}), flush=True)
        os._exit(0)

    if limit:
        threading.Thread(target=watch, daemon=True).start()


def geometry_of(size: Size) -> Geometry:
    """The geometry of so many tokens; every reference has as many."""
    return Geometry(
        batch=size["batch"],
        num_text=size["text"],
        noisy_grid=grid_of(size["noisy"]),
        reference_grid=grid_of(size["reference"]),
        num_references=size["references"],
    )


def load(task: dict[str, Any]) -> Any:
    """Load the engine set of a task."""
    return load_engines(task["engine"], device="cpu", threads=task["threads"])


def product_ms(times: int = 9) -> float:
    """The median time of a plain matrix product by ONNX Runtime."""
    run, rounds = dict(plain_products("onnxruntime"))["onnxruntime"], Rounds(0)
    rounds.run(lambda: rounds.timed(PRODUCT, run), times, 1)
    return statistics.median(rounds.samples[PRODUCT])


def build(task: dict[str, Any]) -> dict[str, Any]:
    """Build a set of random weights, or keep the one that is there."""
    build_engine_set(BuildOptions(**task["options"] | {"layers": tuple(task["options"]["layers"])}))
    return {}


def measure_call(task: dict[str, Any]) -> dict[str, Any]:
    """The profile of a call at one size, with half of the references too; and its memory."""
    before, start = resident_bytes(), time.perf_counter()
    engines = load(task)
    load_ms, loaded = (time.perf_counter() - start) * 1e3, resident_bytes()
    # What the first call of a session does once.
    Meter(engines, [geometry_of(SMALL)], (), 0.0, parts=_GRAPH_PARTS).measure(1, 0)
    geometry = geometry_of(task["size"])
    rung = engines.engine_set.manifest.ladder.round_up(geometry.size.num_reference // 2)
    meter = Meter(engines, [geometry], (rung,), 0.0, parts=_GRAPH_PARTS, products_a_part=3)
    machine = describe_machine(engines, task["threads"])
    gc.collect()
    held = resident_bytes()
    meter.measure(task["repeats"] - 1, 1, budget_s=task["budget_s"])
    most = peak_bytes() or 0
    repeats = len(next(iter(meter.rounds.samples.values())))
    settings = {"repeats": repeats, "warmup": int(bool(meter.rounds.warmup)), "tau": 0.0}
    profile = profile_of(meter, {**settings, "max_noise": 0.1, "resolutions": {}}, machine)
    front = profile.find("front", geometry.key)
    product = max((row for row in profile.rows if row.part == PRODUCT), key=lambda row: row.batch)
    assert front is not None
    return {
        "load_ms": load_ms,
        "weights_bytes": loaded - before,
        "held_bytes": held,
        "front_added_bytes": (front.memory_bytes or 0) - held,
        "most_added_bytes": max(most, *(row.memory_bytes or 0 for row in profile.rows)) - held,
        "product_ms": product.statistics.median,
        "influence_is_finite": meter.is_finite,
        "profile": asdict(profile),
    }


def measure_runtime(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the runtime's own parts at several lengths, G = C, in turn."""
    engine_set = load_engine_set(task["engine"])
    parts = {
        (part, length): run
        for length in task["lengths"]
        for part, run in runtime_parts(engine_set, length, task).items()
    }
    rounds = Rounds()
    timers = [partial(rounds.timed, key, run) for key, run in parts.items()]
    rounds.run(lambda: rounds.turn(timers), task["repeats"], 1)
    samples: dict[str, dict[int, list[float]]] = {}
    for part, length in parts:
        samples.setdefault(part, {})[length] = rounds.samples[part, length]
    return {"product_ms": product_ms(), "samples_ms": samples}


def runtime_parts(
    engine_set: Any, length: int, task: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Return the parts that the runtime adds between the graphs, at a length."""
    manifest = engine_set.manifest
    size = {"noisy": length, "reference": length, "text": task["text"], "batch": 1, "references": 1}
    inputs = random_inputs(manifest, geometry_of(size), CPU)
    tables = inputs.make_rope()
    generator = torch.Generator().manual_seed(0)
    influence = torch.rand(1, length, generator=generator) ** 3
    view = CallView(
        step=0, branch="cond", ladder=manifest.ladder, grids=inputs.grids, influence=influence
    )
    hidden = torch.randn(1, length, task["width"], generator=generator)
    kept = torch.randperm(length, generator=generator)[: length // 2].sort().values[None]
    half = tables.reference[0].shape[1]
    velocity = torch.randn_like(inputs.noisy_latents)
    four = replace(view, grids=(inputs.grids[0], *[grid_of(length // 4)] * 4))
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
        "RoPE tables, once a geometry": inputs.make_rope,
        "checks, first step": lambda: check_inputs(inputs, engine_set, is_first=True),
        "checks, later steps": lambda: check_inputs(inputs, engine_set, is_first=False),
        "checks, anchor step": lambda: check_finite(inputs, velocity, influence, 0),
    }


def run_request(engines: Any, session: EditSession, size: Size, num_steps: int) -> Iterator[Any]:
    """The steps of a request of a size, on random inputs."""
    inputs = random_inputs(engines.engine_set.manifest, geometry_of(size), CPU)
    yield from session.denoise(
        noisy=inputs.noisy_latents,
        noisy_grid=inputs.grids[0],
        references=list(inputs.reference_latents.split(size["reference"], dim=1)),
        reference_grids=inputs.grids[1:],
        text_embeds=inputs.text_embeds,
        sigmas=torch.linspace(1.0, 0.0, num_steps + 1).tolist(),
    )


def measure_steps(task: dict[str, Any]) -> dict[str, Any]:
    """A whole run of so many steps: its time, its operations, and memory along it."""
    before = product_ms()  # first, so that its memory is let go before memory is looked at
    engines, size = load(task), task["size"]
    session = EditSession(engines, ToPi(ratio=0.5, interval=5))
    for _ in run_request(engines, session, size, 6):
        pass  # an anchor and reduced steps: what a session does once
    gc.collect()
    held, memory = resident_bytes(), {}
    begin_peak()
    start = time.perf_counter()
    for step in run_request(engines, session, size, task["steps"]):
        if step.index + 1 in task["marks"]:
            memory[step.index + 1] = resident_bytes() - held
    wall_ms = (time.perf_counter() - start) * 1e3
    peak = peak_bytes()
    report = session.report
    anchors = len(report.of_role("anchor"))
    kept = next(record.num_kept for record in report.of_role("reduced"))
    cost, call = model_cost_of(engines.engine_set.manifest), geometry_of(size).size
    return {
        "product_ms": statistics.mean((before, product_ms())),
        "run_ms": report.total_ms,
        "wall_ms": wall_ms,
        "anchors": anchors,
        "num_kept": kept,
        "flops": len(report.steps) * cost.front(call).flops
        + anchors * cost.back(call, num_rows=call.num_noisy).flops
        + (len(report.steps) - anchors)
        * cost.back(replace(call, num_reference=kept), num_rows=1).flops,
        "held_bytes": held,
        "added_bytes": memory,
        "peak_bytes": peak,
    }


def measure_requests(task: dict[str, Any]) -> dict[str, Any]:
    """Memory along many requests, every one of another size, on one session."""
    engines = load(task)
    session = EditSession(engines, ToPi(ratio=0.5, interval=5))
    draw, longest = random.Random(0), task["size"]["noisy"]

    def run_one(size: Size) -> None:
        for _ in run_request(engines, session, size, 4):
            pass

    def some(most: int) -> int:
        return draw.randint(most // 4, most)

    # The largest first: what comes after it needs no more.
    largest = {**task["size"], "reference": longest // 2, "references": 2}
    run_one(largest)
    gc.collect()
    held, memory = resident_bytes(), {}
    for number in range(1, max(task["marks"]) + 1):
        lengths = {name: some(largest[name]) for name in ("noisy", "reference", "text")}
        run_one({**largest, **lengths, "references": draw.randint(1, 2)})
        if number in task["marks"]:
            gc.collect()
            memory[number] = resident_bytes() - held
    return {"held_bytes": held, "added_bytes": memory}


def measure_rungs(task: dict[str, Any]) -> dict[str, Any]:
    """Load time, memory and step time of a set with so many rungs, after a call on each."""
    before = resident_bytes()
    engines = load(task)
    loaded = resident_bytes() - before
    geometry = geometry_of(task["size"])
    rungs, half = engines.engine_set.manifest.ladder.rungs, geometry.size.num_reference // 2
    meter = Meter(engines, [geometry], (*rungs, half), 0.0, parts=("back",), products_a_part=1)
    held = resident_bytes()
    meter.measure(task["repeats"], 2)
    served = loaded + resident_bytes() - held
    rows = {(row.part, row.num_kept): row.samples_ms for row in meter.rows()}
    fronts, backs = rows["front", geometry.size.num_reference], rows["back", half]
    product = statistics.median(rows[PRODUCT, 0])
    del meter, engines
    loads = Rounds()
    for _ in range(task["repeats"]):
        gc.collect()
        loads.timed("load", lambda: load(task).device)  # and let go again
    return {
        "product_ms": product,
        "rungs": list(rungs),
        "load_ms": loads.samples["load"],
        "step_ms": [a + b for a, b in zip(fronts, backs, strict=True)],
        "loaded_bytes": loaded,
        "served_bytes": served,
    }


def measure_operators(task: dict[str, Any]) -> dict[str, Any]:
    """Time and largest output of every kind of operator, by ONNX Runtime's own profiling."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:

        class ProfiledOptions(ort.SessionOptions):
            """What engines are created with, and profiling besides."""

            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = os.path.join(folder, "profile")

        geometry = geometry_of(task["size"])
        plain, ort.SessionOptions = ort.SessionOptions, ProfiledOptions
        try:
            engines = load(task)
        finally:
            ort.SessionOptions = plain
        half = geometry.size.num_reference // 2
        meter = Meter(engines, [geometry], (half,), 0.0, parts=_GRAPH_PARTS)
        meter.measure(2, 0)  # the first takes its memory from the system
        del meter, engines
        gc.collect()  # a session writes its profile when it ends
        sessions = [json.loads(path.read_text()) for path in Path(folder).glob("profile*.json")]
    return {"sessions": len(sessions), "operators": operators_of(sessions)}


def operators_of(sessions: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Operator -> milliseconds, calls and bytes of its largest output, of sessions' profiles.

    Of the later half of each session's runs. The time of `Scan`, `Loop` and `If` contains that of
    the operators in them, which are listed too.
    """
    found: dict[str, dict[str, float]] = {}
    for events in sessions:
        runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
        for event in events:
            is_operator = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if not is_operator or event["ts"] < runs[len(runs) // 2]:
                continue
            new = {"ms": 0.0, "calls": 0, "largest_output_bytes": 0}
            entry = found.setdefault(event["args"]["op_name"], new)
            entry["ms"] += event["dur"] / 1e3
            entry["calls"] += 1
            output = int(event["args"].get("output_size", 0) or 0)
            entry["largest_output_bytes"] = max(entry["largest_output_bytes"], output)
    return found


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "build": build,
    "call": measure_call,
    "operators": measure_operators,
    "requests": measure_requests,
    "rungs": measure_rungs,
    "runtime": measure_runtime,
    "steps": measure_steps,
}
