"""`scripts/gpu_check.py`: what it says where there is no GPU, and that nothing is "ok" for free."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An empty list of devices, so that this holds on a machine with a GPU too.
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd="/",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def texts(value: Any) -> list[str]:
    """Every text in a document, keys too."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_without_a_gpu_every_part_but_the_environment_is_skipped(
    script: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "result.json"
    done = run_script("--output", str(output))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert list(document["parts"]) == list(script.PARTS)
    assert document["summary"] == {
        "ok": ["environment"],
        "failed": [],
        "skipped": [name for name in script.PARTS if name != "environment"],
    }
    for name, part in document["parts"].items():
        if name != "environment":
            assert part["reason"] == "no CUDA device"
            assert "measured" not in part
    assert document["gpu"] is None
    assert document["parts"]["environment"]["measured"]["libraries"]["torch"]
    assert "skipped 8 of 9 parts" in done.stderr
    for text in texts(document):
        assert not re.search(r"(?<![\w<>])/\w", text), text


def test_one_part_comes_with_the_environment() -> None:
    done = run_script("--quick", "--only", "block-stack")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["command"] == "python scripts/gpu_check.py --only block-stack --quick"
    assert list(document["parts"]) == ["environment", "block-stack"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the parts would run")
def test_every_part_itself_says_that_there_is_no_gpu(script: ModuleType, tmp_path: Path) -> None:
    context = script.Context(is_quick=True, folder=tmp_path)
    for name, (part, _) in script.PARTS.items():
        if name != "environment":
            assert script.outcome_of(part, context) == {
                "status": "skipped",
                "reason": "no CUDA device",
            }


def fails(message: str) -> Any:
    def part(context: Any) -> dict[str, Any]:
        raise RuntimeError(message)

    return part


@pytest.mark.parametrize(
    ("measured", "status", "reason"),
    [
        ({"checks": {"a": True}, "ms": 1}, "ok", None),
        ({"checks": {"a": True, "b": False}}, "failed", "did not hold: b"),
        ({"checks": {"a": 1.0}}, "failed", "did not hold: a"),  # a number is no answer
        ({"checks": {}, "ms": 1}, "failed", "it made no check"),
        ({"ms": 1}, "failed", "it made no check"),
        ({}, "failed", "it made no check"),
        (None, "failed", "it made no check"),
    ],
)
def test_a_part_is_ok_only_where_it_checked_something(
    measured: Any, status: str, reason: str | None, script: ModuleType, tmp_path: Path
) -> None:
    context = script.Context(is_quick=True, folder=tmp_path)
    outcome = script.outcome_of(lambda _: measured, context)
    assert (outcome["status"], outcome.get("reason")) == (status, reason)


def test_a_part_that_raises_has_failed(script: ModuleType, tmp_path: Path) -> None:
    context = script.Context(is_quick=True, folder=tmp_path)
    assert script.outcome_of(fails("out of paper"), context) == {
        "status": "failed",
        "reason": "RuntimeError: out of paper",
    }


def test_a_part_that_dies_or_hangs_has_failed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program, seconds, reason in (
        ("import os; os.abort()", 60, r"its process ended with -6"),
        ("import time; time.sleep(60)", 1, r"it was not done after 1 s"),
        ("import sys; sys.exit('/a/machine/place: broken')", 60, r"ended with 1: .*broken"),
    ):
        path = tmp_path / "program.py"
        path.write_text(program)
        monkeypatch.setattr(script, "__file__", str(path))
        outcome = script.run_part("kernel-speed", seconds, True, tmp_path)
        assert outcome["status"] == "failed"
        assert re.search(reason, outcome["reason"])


def test_places_of_the_machine_stay_out_of_the_document(script: ModuleType) -> None:
    text = "no file '/home/me/x/set/front.plan' (/opt/lib.so): rows/s, https://a.b/c, 3/4"
    assert script.without_paths({"a": [text]}) == {
        "a": ["no file '<path>/front.plan' (<path>/lib.so): rows/s, https://a.b/c, 3/4"]
    }
