"""`scripts/gpu_check.py`: every part rehearsed on the CPU, and that nothing is "ok" for free."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SCRIPT = SCRIPTS / "gpu_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, its parts importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # An empty list of devices, so that this holds on a machine with a GPU too.
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd="/",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def texts(value: Any) -> list[str]:
    """Every text in a document, keys too."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def outcome(
    script: ModuleType, folder: Path, part: Callable[[Any], None], **options: Any
) -> dict[str, Any]:
    """What a part comes to, run in this process."""
    file = io.StringIO()
    context = script.Context(folder=folder, record=script.Record(file), **options)
    script.run_part(part, context)
    found: dict[str, Any] = importlib.import_module("gpu.part").outcome_of(
        file.getvalue().splitlines(), "it was stopped"
    )
    return found


# --- without a GPU --------------------------------------------------------------------------------


def test_without_a_gpu_every_part_but_the_environment_is_skipped(
    script: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "result.json"
    done = run_script("--output", str(output))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert list(document["parts"]) == list(script.PARTS)
    others = [name for name in script.PARTS if name != "environment"]
    assert document["summary"] == {"ok": ["environment"], "failed": [], "skipped": others}
    for name in others:
        assert document["parts"][name] == {"status": "skipped", "reason": "no CUDA device"}
    assert document["gpu"] is None
    assert document["parts"]["environment"]["measured"]["libraries"]["torch"]
    assert f"skipped {len(others)} of {len(script.PARTS)} parts" in done.stderr
    assert re.search(r"^environment +ok ", done.stderr, re.MULTILINE)  # the table at the end
    for text in texts(document):
        assert not re.search(r"(?<![\w<>])/\w", text), text


def test_one_part_comes_with_the_environment() -> None:
    done = run_script("--quick", "--only", "stack")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["command"] == "python scripts/gpu_check.py --only stack --quick"
    assert list(document["parts"]) == ["environment", "stack"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the parts would run")
def test_every_part_itself_says_that_there_is_no_gpu(script: ModuleType, tmp_path: Path) -> None:
    for name in script.PARTS:
        if name != "environment":
            found = outcome(script, tmp_path, script.part_named(name))
            assert found == {"status": "skipped", "reason": "no CUDA device"}


def test_the_parts_that_matter_most_fit_the_time_first(script: ModuleType) -> None:
    names = list(script.PARTS)
    assert names[:6] == [
        *("environment", "kernel-accuracy", "stack", "small-editor", "kernel-speed", "compiled")
    ]
    before_compiled = sum(script.PARTS[name][-1] for name in names[:5])
    assert script.BUDGET_SECONDS - before_compiled >= 30
    assert script.BUDGET_SECONDS <= 300


@pytest.mark.parametrize(
    ("capability", "is_served"),
    [((7, 5), True), ((8, 9), True), ((12, 0), True), ((9, 0), False), ((10, 0), False)],
)
def test_tensorrt_rtx_is_skipped_where_it_has_no_kernels(
    capability: tuple[int, int],
    is_served: bool,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    plans = importlib.import_module("gpu.plans")
    monkeypatch.setattr(plans, "need", lambda *_: pytest.fail("it is served"))
    for name in ("tensorrt-rtx", "block-stack-tensorrt-rtx"):
        if is_served:
            with pytest.raises(BaseException, match="it is served"):
                script.part_named(name)(script.Context(folder=tmp_path, record=None))
            continue
        found = outcome(script, tmp_path, script.part_named(name))
        assert found["status"] == "skipped"
        assert f"this GPU has {capability[0]}.{capability[1]}" in found["reason"]
        assert "7.5, 8.6, 8.9, 12.0" in found["reason"]


def test_a_missing_diffusers_is_one_sentence(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    for name in ("stack", "compiled", "small-editor", "onnxruntime-cuda"):
        found = outcome(script, tmp_path, script.part_named(name), is_rehearsal=True)
        assert found["status"] == "skipped"
        assert found["reason"].startswith("diffusers is not installed: carry its wheel")


# --- rehearsals -----------------------------------------------------------------------------------


@pytest.fixture
def rehearse(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs a part at toy size in this process."""
    # Generating code takes minutes; the tracing before it is what differs between models.
    compile_now = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_now)
    in_place = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", in_place)

    def run(name: str, **options: Any) -> dict[str, Any]:
        part = script.part_named(name)
        return outcome(script, tmp_path, part, is_rehearsal=True, **options)

    return run


def test_a_rehearsal_of_the_stack_measures_every_step_and_schedule(
    rehearse: Callable[..., dict[str, Any]],
) -> None:
    found = rehearse("stack")
    assert found["status"] == "ok", found
    measured = found["measured"]
    assert "left_out" not in measured
    assert measured["model"]["layers"] == measured["model"]["layers_of_the_model"] == 4
    for case, rungs in (("1 reference", 4), ("3 references", 2)):
        assert measured[case]["diffusers, eager"]["steps"]["full"]["flops"] > 0
        for mode in ("eager", "CUDA graphs"):
            way = measured[case][mode]
            assert {"full", "anchor", "front"} <= set(way["steps"])
            reduced = [name for name in way["steps"] if name.startswith("reduced")]
            assert len(reduced) == len(way["schedules"]) == rungs - 1
            assert {"scoring_ms", "selection_ms", "full_step_over_diffusers"} <= set(way)
            for step in reduced:
                assert way["steps"][step]["flops"] < way["steps"]["full"]["flops"]
            assert way["steps"]["anchor"]["flops"] > way["steps"]["full"]["flops"]
        assert measured[case]["eager"]["errors"]["diffusers"] <= 0.02
    for mode in ("eager", "CUDA graphs"):
        assert measured["1 reference"][mode]["run"]["kept"] == [12]
    # Both forms count the same blocks, and the torch backend leaves rows of the last one out.
    plain = measured["1 reference"]["diffusers, eager"]["steps"]["full"]["flops"]
    own = measured["1 reference"]["eager"]["steps"]["full"]["flops"]
    assert 0.8 < own / plain < 1


def test_schedules_are_computed_from_the_steps(script: ModuleType, tmp_path: Path) -> None:
    steps = importlib.import_module("gpu.steps")
    file = io.StringIO()
    context = script.Context(folder=tmp_path, record=script.Record(file), is_rehearsal=True)
    times = {"full": 100.0, "anchor": 110.0, "select": 2.0, "reduced 50": 60.0}
    bench = steps.Bench(context, None, "1 reference", "eager", times)
    steps.note_schedules(bench, [50, 75, 100], 105.0)
    written = json.loads(file.getvalue())["measured"]["1 reference"]["eager"]["schedules"]
    seconds = (4 * (110 + 2) + 36 * 60) / 1e3
    assert written == {
        "50": {
            "share": 0.5,
            "seconds": round(seconds, 3),
            "speedup_over_full_steps": round(4 / seconds, 3),
            "speedup_over_diffusers": round(4.2 / seconds, 3),
        }
    }


def test_a_part_whose_time_is_up_says_what_it_left_out(
    rehearse: Callable[..., dict[str, Any]],
) -> None:
    found = rehearse("stack", seconds=3.0)  # its margin
    left_out = found["measured"]["left_out"]
    assert "1 reference, eager: anchor" in left_out
    assert "1 reference, CUDA graphs" in left_out
    assert found["status"] == "ok"  # what it did run was right


def test_a_rehearsal_of_the_small_editor(rehearse: Callable[..., dict[str, Any]]) -> None:
    found = rehearse("small-editor")
    assert found["status"] == "ok", found
    assert min(found["measured"]["full context"]["psnr_db"]) > 40
    assert found["measured"]["ToPi"]["kept"]["here"][-1] < 144


@pytest.mark.slow
def test_a_rehearsal_of_compiled_blocks(rehearse: Callable[..., dict[str, Any]]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = rehearse("compiled", is_quick=True)
    torch._dynamo.reset()
    assert found["status"] == "ok", found
    measured = found["measured"]["1 reference"]
    for mode in ("compiled", "compiled, CUDA graphs"):
        assert {"full", "anchor", "reduced 12"} <= set(measured[mode]["steps"])
    assert measured["diffusers, compiled"]["steps"]["full"]["flops"] > 0
    # Plain, scoring, and the last one with and without scoring.
    assert measured["compiled"]["graphs_compiled"] <= 4


@pytest.mark.slow
def test_a_rehearsal_of_an_engine_set(rehearse: Callable[..., dict[str, Any]]) -> None:
    found = rehearse("onnxruntime-cuda")
    assert found["status"] == "ok", found
    assert found["measured"]["fp32"]["build_seconds"] > 0
    assert found["measured"]["fp32"]["ToPi"]["kept"]["here"] == [144, 112, 112]


# What a machine with torch lacks of this project, and the project itself.
BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "platformdirs", "polygraphy", "tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def others(things):
    return [thing for thing in things if "editable" not in repr(thing).lower()]

sys.meta_path[:] = [Missing(), *others(sys.meta_path)]
sys.path_hooks[:], sys.path[:] = others(sys.path_hooks), others(sys.path)
"""


@pytest.mark.slow
def test_a_rehearsal_from_the_door_on_a_bare_machine(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(BARE)
    names = ["kernel-accuracy", "small-editor", "kernel-speed"]
    done = run_script(
        *("--rehearse", *(word for name in names for word in ("--only", name))),
        PYTHONPATH=str(tmp_path),
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["summary"]["ok"] == ["environment", *names], document
    assert document["rehearsal"].startswith("on the CPU")
    assert document["parts"]["kernel-accuracy"]["measured"]["cases"]
    launches = document["parts"]["kernel-speed"]["measured"]["launches"]
    assert set(launches) == {"rows x keys", "references x rows"}


def test_plans_cannot_be_rehearsed(rehearse: Callable[..., dict[str, Any]]) -> None:
    for name in ("tensorrt", "block-stack-tensorrt-rtx"):
        assert rehearse(name)["reason"] == "plans cannot be rehearsed without a GPU"


# --- how a part ends ------------------------------------------------------------------------------


def fails(context: Any) -> None:
    context.record.note("eager", full=1)
    raise RuntimeError("out of paper")


@pytest.mark.parametrize(
    ("checks", "status", "reason"),
    [
        ({"a": True}, "ok", None),
        ({"a": True, "b": False}, "failed", "did not hold: b"),
        ({"a": 1.0}, "failed", "did not hold: a"),  # a number is no answer
        ({}, "failed", "it made no check"),
    ],
)
def test_a_part_is_ok_only_where_it_checked_something(
    checks: Any, status: str, reason: str | None, script: ModuleType, tmp_path: Path
) -> None:
    def part(context: Any) -> None:
        for name, held in checks.items():
            context.record.check(name, held)

    found = outcome(script, tmp_path, part)
    assert (found["status"], found.get("reason")) == (status, reason)


def test_a_part_that_raises_has_failed_and_keeps_what_it_measured(
    script: ModuleType, tmp_path: Path
) -> None:
    assert outcome(script, tmp_path, fails) == {
        "status": "failed",
        "reason": "RuntimeError: out of paper",
        "measured": {"eager": {"full": 1}},
    }


WRITES = """
import json, sys, time
place = sys.argv[sys.argv.index("--folder") + 1] + "/kernel-speed.jsonl"
file = open(place, "w")
for line in ({"measured": {"eager": {"full": 1}}}, {"checks": {"finite": True}},
             {"measured": {"eager": {"half": 2}}}):
    print(json.dumps(line), file=file, flush=True)
file.write('{"measured": {"ea')
file.flush()
"""


def test_a_part_that_dies_or_hangs_has_failed_and_keeps_what_it_measured(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = importlib.import_module("gpu.process")
    for ending, seconds, reason in (
        ("import os; os.abort()", 60, r"its process ended with -6"),
        ("time.sleep(60)", 5, r"it was not done after 5 s"),
        ("sys.exit('/a/machine/place: broken')", 60, r"ended with 1: .*broken"),
    ):
        path = tmp_path / "program.py"
        path.write_text(WRITES + ending)
        monkeypatch.setattr(process, "DOOR", path)
        found = process.run_apart("kernel-speed", seconds, [], tmp_path)
        assert found["status"] == "failed"
        assert re.search(reason, found["reason"])
        assert found["measured"] == {"eager": {"full": 1, "half": 2}}
        assert found["checks"] == {"finite": True}


def test_what_a_part_started_ends_with_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = importlib.import_module("gpu.process")
    path, mark = tmp_path / "program.py", tmp_path / "mark"
    later = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    path.write_text(f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {later!r}])")
    monkeypatch.setattr(process, "DOOR", path)
    process.run_apart("kernel-speed", 60, [], tmp_path)
    time.sleep(5)
    assert not mark.exists()


def test_places_of_the_machine_stay_out_of_the_document(script: ModuleType) -> None:
    text = "no file '/home/me/x/set/front.plan' (/opt/lib.so): rows/s, https://a.b/c, 3/4"
    assert script.without_paths({"a": [text]}) == {
        "a": ["no file '<path>/front.plan' (<path>/lib.so): rows/s, https://a.b/c, 3/4"]
    }
