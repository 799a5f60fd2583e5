"""Rounds of measurements, and the description of the machine that they are taken on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditrim.runtime.profiling import machine
from ditrim.runtime.profiling.measure import Geometry
from ditrim.runtime.profiling.rounds import Rounds


def test_rounds_run_every_part_once_in_changing_order_and_keep_the_warmup_apart() -> None:
    rounds, taken = Rounds(0), []

    def one_round() -> None:
        order: list[str] = []
        rounds.turn([lambda part=part: order.append(part) for part in "abcdef"])
        rounds.add("a", rounds.number)
        taken.append("".join(order))

    told: list[tuple[int, str]] = []
    rounds.run(one_round, 3, 2, lambda done, word: told.append((done, word)))
    assert taken[0] == "abcdef"
    assert all(sorted(order) == list("abcdef") for order in taken)
    assert len(set(taken)) > 2
    assert (rounds.warmup["a"], rounds.samples["a"]) == ([1e-6, 1], [2, 3, 4])
    assert told == [(1, "warming up"), (2, "warming up"),
                    *((done, "measuring") for done in (3, 4, 5))]  # fmt: skip


@pytest.mark.parametrize(("budget_s", "warmup", "count"), [(0.0, 0, 1), (2.5, 1, 1), (60, 1, 3)])
def test_no_round_begins_that_would_end_after_the_budget(
    budget_s: float, warmup: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes a second; where the budget leaves only the first rounds, they count."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rounds = Rounds(0)

    def part() -> None:
        now[0] += 1.0

    rounds.run(lambda: rounds.timed("part", part), 3, 1, budget_s=budget_s)
    assert (len(rounds.warmup.get("part", ())), len(rounds.samples["part"])) == (warmup, count)
    assert rounds.samples["part"][0] == 1000


def test_geometry_of_several_references_has_the_tokens_of_all() -> None:
    geometry = Geometry(
        batch=1, num_text=8, noisy_grid=(4, 4), reference_grid=(2, 3), num_references=3
    )
    assert geometry.layout.grids == ((4, 4), (2, 3), (2, 3), (2, 3))
    assert geometry.key == (1, 16, 8, 18)


def test_machine_is_described_with_the_instruction_sets_of_its_cpu() -> None:
    found = machine.describe_machine(None, 3)
    assert (found["device"], found["threads"]) == ("cpu", 3)
    sets = found["instruction_sets"]
    assert sets["torch"] == torch.backends.cpu.get_cpu_capability()
    json.dumps(found, allow_nan=False)
    if sys.platform == "linux":
        assert sets["cpu"] == sorted(sets["cpu"])
    if sets["torch"] in ("AVX2", "AVX512"):
        assert "avx2" in sets["cpu"]


def test_instruction_sets_of_x86_and_arm_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(line: str) -> list[str] | None:
        monkeypatch.setattr(Path, "read_text", lambda self: f"processor : 0\n{line}\n")
        return machine.instruction_sets()["cpu"]

    assert flags("flags : fpu avx512_vnni avx2 amx_tile ht fma smep sme sev") == [
        "amx_tile", "avx2", "avx512_vnni", "fma"
    ]  # fmt: skip
    assert flags("Features\t: fp asimd smef16f32 sve2 crc32") == ["asimd", "smef16f32", "sve2"]
    assert flags("model name : without flags") is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_peak_is_of_what_was_held_since_it_began() -> None:
    program = (
        "from ditrim.runtime.profiling.machine import begin_peak, peak_bytes, resident_bytes\n"
        "large = bytes(b'x') * (300 << 20); del large\n"
        "begin_peak(); before = resident_bytes()\n"
        "small = bytes(b'x') * (100 << 20); del small\n"
        "print((peak_bytes() - before) >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 90 < int(done.stdout) < 150, done.stderr


def test_share_of_other_processes_leaves_out_this_one() -> None:
    others = machine.OtherProcesses()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    share = others.share()
    assert share is None or 0 <= share <= 1


def test_machine_is_described_without_loading_torch_at_import() -> None:
    program = (
        "import sys, ditrim.runtime.profiling.machine\n"
        "print({'torch', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
