"""`scripts/bench_growth.py`: what its tables make of figures, and a run of it on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import QWEN_CONFIG

from ditrim.engines.cost.cost import Cost, ModelCost
from ditrim.engines.cost.flops import CallSize

ENGINE: dict[str, Any] = {
    "config": {**QWEN_CONFIG, "num_layers": 3},
    "architecture": "qwen",
    "front_depth": 1,
    "num_layers": 3,
    "num_scored": 1,
    "precision": "fp32",
    "backend": "onnxruntime",
}
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import growth_tables

    return growth_tables


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_growth.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def point(length: int, *, power: float = 1.0, product_ms: float = 10.0) -> dict[str, Any]:
    """A point at G = C whose times are powers of what the cost model counts."""
    cost = ModelCost(**ENGINE)
    size = CallSize(num_noisy=length, num_reference=length, num_text=8)
    half = replace(size, num_reference=length // 2)
    front, back = cost.front(size), cost.back(size, num_rows=1)
    anchor, reduced = cost.back(size, num_rows=length), cost.back(half, num_rows=1)

    def slow(flops: int) -> float:
        return product_ms * (flops / 1e6) ** power

    scored = slow(back.flops) + 100 * slow(anchor.flops - back.flops)

    def row(part: str, kept: int, work: Cost, ms: float) -> dict[str, Any]:
        lengths = {f"num_{name}": getattr(size, f"num_{name}") for name in ("noisy", "text")}
        samples = (ms, ms, ms + 8 * slow(work.flops))
        return {**lengths, "part": part, "batch": 1, "num_reference": length, "num_kept": kept,
                "samples_ms": samples, "warmup_ms": (), "flops": work.flops}  # fmt: skip

    rows = [
        row("front", length, front, slow(front.flops)),
        row("back", length // 2, reduced, slow(reduced.flops)),
        row("back", length, back, slow(back.flops)),
        row("anchor", length, anchor, scored),
    ]
    return {
        "value": length,
        "product_ms": product_ms,
        "held_bytes": 10**9,
        "front_added_bytes": 100 * length,
        "most_added_bytes": 0,
        "profile": {
            "engine": ENGINE,
            "machine": {},
            "peak": {"tflops": None, "gb_s": None, "source": ""},
            "settings": {"repeats": 3, "warmup": 1},
            "created": "",
            "rows": rows,
        },
    }


def points(tables: ModuleType, *entries: dict[str, Any], power: float = 1.0) -> list[Any]:
    """The points, each with memory as a power of the estimate."""
    made = tables.points_of(entries)
    for item in made:
        item.entry["most_added_bytes"] = round(1e6 * (item.predicted_bytes / 1e6) ** power)
    return made


def test_exponent_is_one_for_growth_as_predicted_and_two_for_its_square(
    tables: ModuleType,
) -> None:
    lengths = (64, 256, 1024)
    for power in (1.0, 2.0):
        axis = points(tables, *(point(length, power=power) for length in lengths), power=power)
        for part in ("front", "back", "reduced", tables.SCORING):
            assert tables.exponents(axis, part) == pytest.approx((power, power)), part
        assert tables.memory_exponents(axis) == pytest.approx((power, power), rel=1e-3)
    bends = points(tables, *(point(length) for length in lengths), point(4096, power=1.2))
    over_all, last = tables.exponents(bends, "front")
    assert 1 < over_all < last


def test_scoring_that_is_lost_in_noise_does_not_count(tables: ModuleType) -> None:
    entries = [point(length) for length in (64, 256, 1024)]
    *_, back, anchor = entries[0]["profile"]["rows"]
    anchor["samples_ms"] = [1.02 * value for value in back["samples_ms"]]
    axis = points(tables, *entries)
    assert tables.exponents(axis, tables.SCORING) == pytest.approx((1.0, 1.0))
    assert [item.is_scoring_clear for item in axis] == [False, True, True]


def test_slow_moment_of_the_machine_is_not_growth(tables: ModuleType) -> None:
    steady = points(tables, point(64), point(256))
    slowed = points(tables, point(64), point(256, product_ms=30.0))
    assert slowed[1].median_ms("front") == 3 * steady[1].median_ms("front")
    expected = tables.exponents(steady, tables.STEP)
    assert tables.exponents(slowed, tables.STEP) == pytest.approx(expected)


def test_axis_without_a_change_in_operations_has_no_exponent(tables: ModuleType) -> None:
    same = points(tables, point(64), point(64, power=1.1))
    assert tables.exponents(same, tables.STEP) == (None, None)


def test_bytes_left_behind_are_those_of_the_later_half(tables: ModuleType) -> None:
    caches_then_flat = {"10": 5_000_000, "50": 6_000_000, "100": 6_000_000}
    leaks = {"10": 5_000_000, "50": 6_000_000, "100": 6_500_000}
    assert tables.bytes_each({"added_bytes": caches_then_flat}) == 0
    assert tables.bytes_each({"added_bytes": leaks}) == 10_000


def test_points_that_were_given_up_are_named(tables: ModuleType) -> None:
    entries = [point(64), point(256), {"value": 1024, "stopped_at_bytes": 17e9}]
    points(tables, *entries)
    exponents, calls, memory = tables.sections({"both": entries})
    assert calls.rows[-1][:2] == [1024, "given up at 17.00 GB"]
    assert [row[0] for row in memory.rows] == [64, 256]
    assert exponents.rows[0][:3] == ["G = C", "64 to 256", "1.00 (last 1)"]


def test_committed_tables_are_those_of_the_committed_figures() -> None:
    measured = ROOT / "docs" / "measured"
    done = run_script("--document", measured / "growth.json")
    assert done.returncode == 0, done.stderr
    page = (measured / "growth.md").read_text()
    found = re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE)
    assert len(found) == 23
    for table in found:
        assert table in page


def test_operators_of_the_later_half_of_runs_are_summed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import growth

    def event(name: str, op_name: str, ts: int, dur: int, size: int) -> dict[str, Any]:
        arguments = {"op_name": op_name, "output_size": str(size)}
        return {"cat": "Node", "name": name, "ts": ts, "dur": dur, "args": arguments}

    def run(ts: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 10**6}

    events = [
        event("a_kernel_time", "MatMul", 11, 70_000, 256),
        run(10),
        event("a_kernel_time", "MatMul", 21, 2000, 64),
        event("b_kernel_time", "MatMul", 22, 3000, 128),
        event("b_fence_before", "MatMul", 23, 9000, 128),
        event("c_kernel_time", "Loop", 24, 500, 8),
        run(20),
    ]
    assert growth.operators_of([events]) == {
        "MatMul": {"ms": 5.0, "calls": 2, "largest_output_bytes": 128},
        "Loop": {"ms": 0.5, "calls": 1, "largest_output_bytes": 8},
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_process_over_the_memory_limit_ends_and_says_at_what(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from benchmarks import growth\n"
        "growth.watch_memory(100 << 20)\n"
        "held = bytearray(400 << 20)\n"
        "time.sleep(20)\n"
        "print('not stopped')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stopped_at_bytes"] > 100 << 20


def test_unknown_axis_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = run_script("--axes", "both,sideways", "--output", tmp_path / "out.json")
    assert done.returncode == 2
    assert "no axis sideways; there are: both, noisy, reference, text" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text(json.dumps({"settings": {"threads": 1, "quick": False}}))
    done = run_script("--axes", "both", "--threads", 2, "--quick", "--output", output)
    assert done.returncode == 1
    assert "give another --output" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_quick_run_measures_every_kind_of_axis_and_draws(tmp_path: Path) -> None:
    output, figure = tmp_path / "growth.json", tmp_path / "growth.png"
    done = run_script(
        *("--quick", "--axes", "both,runtime,steps,requests,operators", "--operators-at", "16"),
        *("--engine", tmp_path / "sets", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert set(summary) == {"both", "runtime", "steps", "requests"}
    result = json.loads(output.read_text())
    small, large = result["both"]
    assert (small["value"], large["value"]) == (16, 64)
    assert large["influence_is_finite"]
    assert large["held_bytes"] > 50e6
    assert large["most_added_bytes"] >= large["front_added_bytes"] >= 0
    profile = large["profile"]
    assert profile["engine"]["num_layers"] == 3
    assert profile["machine"]["instruction_sets"]["torch"]
    rows = {(row["part"], row["num_kept"]): row for row in profile["rows"]}
    assert {("front", 64), ("back", 32), ("back", 64), ("anchor", 64)} < set(rows)
    assert all(len(row["samples_ms"]) == profile["settings"]["repeats"] for row in profile["rows"])
    run, long_run = result["steps"][0], result["steps"][-1]
    assert (run["value"], run["anchors"]) == (5, 1)
    assert (long_run["value"], long_run["anchors"], long_run["num_kept"]) == (40, 8, 8)
    assert set(long_run["added_bytes"]) == {"20", "40"}
    assert set(result["requests"][0]["added_bytes"]) == {"4", "8"}
    assert result["operators"][0]["sessions"] == 2
    assert result["operators"][0]["operators"]["MatMul"]["ms"] > 0
    for part, by_length in result["runtime"][0]["samples_ms"].items():
        assert set(by_length) == {"16", "64"}, part

    drawn = run_script("--document", output, "--figure", figure)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.count("\n## ") >= 5
    assert figure.read_bytes().startswith(b"\x89PNG")
