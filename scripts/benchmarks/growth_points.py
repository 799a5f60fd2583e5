"""What one process of bench_growth.py measures: one point, so that its memory is its own.

Started with a task as JSON; prints its result as one line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from growth_process import (
    SETTLE_SECONDS,
    Peaks,
    Pulse,
    inputs_of,
    model_of,
    status_bytes,
    watch_memory,
)
from growth_runs import measure_requests, measure_rungs, measure_runtime, measure_steps


def main() -> int:
    task = json.loads(sys.argv[1])
    watch_memory(task["memory_limit_bytes"])
    import torch

    torch.set_num_threads(task["threads"])
    with torch.no_grad():
        result = TASKS[task["kind"]](task)
    print(json.dumps(result), flush=True)
    return 0


def measure_call(task: dict[str, Any]) -> dict[str, Any]:
    """Times and memory of a call's parts at one size, and what the cost model says of them."""
    from ditrim.engines.load import load_engines

    before = status_bytes("VmRSS")
    start = time.perf_counter()
    engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
    load_ms = (time.perf_counter() - start) * 1e3
    loaded = status_bytes("VmRSS")
    pulse = Pulse()
    small = {"noisy": 16, "references": [16], "text": 8, "batch": 1}
    _Call(engines, small, Peaks()).run(None)  # what the first call of a session does once
    peaks = Peaks()
    call = _Call(engines, task["point"], peaks)
    is_cold, ends = True, time.perf_counter() + task["budget_s"]
    for number in range(task["repeats"]):
        start = time.perf_counter()
        call.run(pulse)
        now = time.perf_counter()
        if number + 1 == task["repeats"] or now + (now - start) > ends:
            break
        if is_cold:  # the first round took its memory from the system: it counts where it is alone
            is_cold = False
            call.samples.clear()
    return {
        "load_ms": load_ms,
        "weights_bytes": loaded - before,
        "held_bytes": peaks.start_bytes,
        "product_ms": pulse.ms,
        "rounds": len(call.samples["front"]),
        "is_cold": is_cold,
        "num_kept": call.num_kept,
        "coverage_kept": call.coverage_kept,
        "influence_is_finite": call.influence_is_finite,
        "samples_ms": dict(call.samples),
        "added_bytes": peaks.added,
        "most_added_bytes": peaks.most_bytes,
        "model": model_of(engines.engine_set.manifest),
    }


class _Call:
    """Runs the parts of a call, one after the other."""

    def __init__(self, engines: Any, point: dict[str, Any], peaks: Peaks) -> None:
        import torch

        from ditrim.runtime.denoising.calls import EngineCalls
        from ditrim.runtime.policies.topi import CoverageToPi, ToPi

        self.manifest = engines.engine_set.manifest
        self.peaks = peaks
        self.samples: defaultdict[str, list[float]] = defaultdict(list)
        with peaks.of("inputs"):
            self.inputs = inputs_of(self.manifest, point)
        self.calls = EngineCalls(engines)
        self.group = (torch.arange(point["batch"]), None)
        self.one_row = torch.zeros(1, dtype=torch.int64)
        self.all_rows = torch.arange(point["noisy"])
        self.policies = {
            "select": ToPi(ratio=0.5),
            "select, coverage": CoverageToPi(ratio=0.5),
        }
        self.num_kept = self.coverage_kept = 0
        self.influence_is_finite = False

    def run(self, pulse: Pulse | None) -> None:
        """Every part once."""
        import torch

        from ditrim.runtime.denoising.calls import Clock

        def timed(part: str, run: Callable[[Any], Any], lap: str) -> Any:
            if pulse is not None:
                pulse.beat()
            time.sleep(SETTLE_SECONDS)
            clock = Clock(None)
            with self.peaks.of(part):
                result = run(clock)
            if lap not in clock.parts:
                clock.lap(lap)
            self.samples[part].append(clock.parts[lap])
            if "gather" in clock.parts:
                self.samples["gather"].append(clock.parts["gather"])
            return result

        def back(graph: str, reduction: Any, rows: Any, clock: Any) -> Any:
            return self.calls.run_back(front, graph, reduction, rows, clock)

        front = timed(
            "front", lambda clock: self.calls.run_front(self.inputs, self.group, None, clock),
            "front",
        )  # fmt: skip
        timed("back", partial(back, "back", None, self.one_row), "back")
        scored = timed("anchor", partial(back, "anchor", None, self.all_rows), "back")
        influence = scored.influence
        self.influence_is_finite = bool(torch.isfinite(influence).all() and (influence > 0).all())
        view = self._view(influence)
        reductions = {
            part: timed(part, lambda _, policy=policy: policy.begin().select(view), "select")
            for part, policy in self.policies.items()
        }
        self.num_kept = reductions["select"].kept.shape[1]
        self.coverage_kept = reductions["select, coverage"].kept.shape[1]
        timed("reduced", partial(back, "back", reductions["select"], self.one_row), "back")
        if pulse is not None:
            pulse.beat()

    def _view(self, influence: Any) -> Any:
        from ditrim.runtime.policy import CallView

        return CallView(
            step=0,
            branch="cond",
            ladder=self.manifest.ladder,
            grids=self.inputs.grids,
            influence=influence,
        )


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

        plain, ort.SessionOptions = ort.SessionOptions, ProfiledOptions
        try:
            from ditrim.engines.load import load_engines

            engines = load_engines(task["engine"], device="cpu", threads=task["threads"])
        finally:
            ort.SessionOptions = plain
        call = _Call(engines, task["point"], Peaks())
        for _ in range(2):  # the first takes its memory from the system
            call.run(None)
        anchor = {part: call.samples[part][-1] for part in ("front", "back", "anchor", "reduced")}
        del call, engines
        gc.collect()  # a session writes its profile when it ends
        files = sorted(Path(folder).glob("profile*.json"))
        found = [operators_of(json.loads(path.read_text())) for path in files]
    merged: dict[str, dict[str, float]] = {}
    for table in found:
        for name, entry in table.items():
            into = merged.setdefault(name, {"ms": 0.0, "calls": 0, "largest_output_bytes": 0})
            into["ms"] += entry["ms"]
            into["calls"] += entry["calls"]
            into["largest_output_bytes"] = max(
                into["largest_output_bytes"], entry["largest_output_bytes"]
            )
    return {"sessions": len(found), "parts_ms": anchor, "operators": merged}


def operators_of(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Operator -> milliseconds, calls and bytes of its largest output, of one session's profile.

    Of the later half of the session's runs. The time of `Scan`, `Loop` and `If` contains that of
    the operators in them, which are listed too.
    """
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    first = runs[len(runs) // 2]
    found: dict[str, dict[str, float]] = {}
    for event in events:
        is_operator = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if not is_operator or event["ts"] < first:
            continue
        arguments = event["args"]
        entry = found.setdefault(
            arguments["op_name"], {"ms": 0.0, "calls": 0, "largest_output_bytes": 0}
        )
        entry["ms"] += event["dur"] / 1e3
        entry["calls"] += 1
        output = int(arguments.get("output_size", 0) or 0)
        entry["largest_output_bytes"] = max(entry["largest_output_bytes"], output)
    return found


def build(task: dict[str, Any]) -> dict[str, Any]:
    """Build a set of random weights, or keep the one that is there."""
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    values = dict(task["options"])
    values["layers"] = tuple(values["layers"])
    build_engine_set(BuildOptions(**values))
    return {}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "build": build,
    "call": measure_call,
    "operators": measure_operators,
    "requests": measure_requests,
    "rungs": measure_rungs,
    "runtime": measure_runtime,
    "steps": measure_steps,
}

if __name__ == "__main__":
    sys.exit(main())
