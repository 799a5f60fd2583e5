"""`scripts/demo` and the environment that it makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Stands for a Python whose environments and installations are a log.
STUB = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python 3.12.0" ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo venv >>"$STUB_LOG" ;;
  "-m pip --version") ;;
  "-m pip "*) echo "pip ${*:4}" >>"$STUB_LOG"; [ ! -e "$STUB_LOG.fail" ] ;;
  "-c import sys; sys.exit(sys.version_info < (3, 11))") [ ! -e "$STUB_LOG.old" ] ;;
  *scripts/demo.py*) echo "demo ${*:2}" >>"$STUB_LOG" ;;
  *) exit 99 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the files that the environment is made from, in a folder with a space."""
    folder = tmp_path / "check out"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/_bootstrap.sh", "scripts/demo", "scripts/demo.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, folder / name)
    stub = tmp_path / "stub-python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return folder


def run_demo(
    checkout: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DITRIM_")}
    stub = checkout.parent / "stub-python"
    return subprocess.run(
        [str(checkout / "scripts" / "demo"), *arguments],
        cwd="/",
        env=kept
        | {"STUB_LOG": str(checkout.parent / "log"), "DITRIM_PYTHON": str(stub)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def logged(checkout: Path) -> list[str]:
    log = checkout.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.replace(str(checkout), "ROOT") for line in lines]


def test_environment_is_made_once_with_torch_first(checkout: Path) -> None:
    done = run_demo(checkout)
    assert done.returncode == 0, done.stderr
    assert "making the environment .venv with Python 3.12.0" in done.stderr
    install = "pip install --progress-bar off -c ROOT/constraints-cpu.txt"
    assert logged(checkout) == [
        "venv",
        f"{install} torch",
        f"{install} -e ROOT[dev]",
        "demo --output ROOT/demo-out",
    ]
    again = run_demo(checkout, "shift")
    assert again.stderr == "== using the environment .venv\n"
    assert logged(checkout) == ["demo --output ROOT/demo-out shift"]


def test_changed_constraints_are_installed_into_the_same_environment(checkout: Path) -> None:
    run_demo(checkout)
    logged(checkout)
    with open(checkout / "constraints-cpu.txt", "a") as file:
        file.write("numpy==2.3.0\n")
    assert run_demo(checkout).returncode == 0
    assert [line.split()[0] for line in logged(checkout)] == ["pip", "pip", "demo"]


def test_failed_installation_says_so_and_is_tried_again(checkout: Path) -> None:
    marker = checkout.parent / "log.fail"
    marker.touch()
    failed = run_demo(checkout)
    assert failed.returncode == 1
    assert "error: packages could not be installed (see above); run this again" in failed.stderr
    assert [line.split()[0] for line in logged(checkout)] == ["venv", "pip"]
    marker.unlink()
    assert run_demo(checkout).returncode == 0
    assert [line.split()[0] for line in logged(checkout)] == ["pip", "pip", "demo"]


def test_old_python_is_refused_with_the_version_that_is_needed(checkout: Path) -> None:
    (checkout.parent / "log.old").touch()
    done = run_demo(checkout)
    assert done.returncode == 1
    assert "is Python 3.12.0; ditrim needs Python 3.11 or newer" in done.stderr
    missing = run_demo(checkout, DITRIM_PYTHON="no-such-python")
    assert "DITRIM_PYTHON=no-such-python is not a program that can be run" in missing.stderr
    assert not (checkout / ".venv").exists()


def test_gpu_machine_is_told_that_torch_is_for_the_cpu(checkout: Path) -> None:
    tools = checkout.parent / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = run_demo(checkout, PATH=f"{tools}:{os.environ['PATH']}")
    assert "has an NVIDIA GPU; .venv gets torch for the CPU" in done.stderr
    assert "DITRIM_ENV=<folder>" in done.stderr


def test_own_environment_must_exist_and_have_the_package(checkout: Path) -> None:
    done = run_demo(checkout, DITRIM_ENV="/nowhere")
    assert done.returncode == 1
    assert "DITRIM_ENV=/nowhere has no bin/python" in done.stderr
    bin_folder = checkout.parent / "env" / "bin"
    bin_folder.mkdir(parents=True)
    shutil.copy(checkout.parent / "stub-python", bin_folder / "python")
    done = run_demo(checkout, DITRIM_ENV=str(bin_folder.parent))
    assert done.returncode == 1
    assert "does not have ditrim; install it there" in done.stderr


def test_demo_help_needs_no_environment(checkout: Path) -> None:
    done = run_demo(checkout, "--help", DITRIM_PYTHON="no-such-python")
    assert done.returncode == 0
    assert "strip.png     source | full context | pruned | kept-token mask" in done.stdout


@pytest.mark.slow
def test_demo_leaves_strip_and_report_and_builds_once(tmp_path: Path) -> None:
    out = tmp_path / "demo out"
    environment = {"DITRIM_ENV": sys.prefix, "DITRIM_DEMO_OUT": str(out)}

    def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "scripts" / "demo"), *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    unknown = demo("paint")
    assert unknown.returncode == 2
    assert "no sample 'paint'; there are: remove, recolour" in unknown.stderr

    first = demo()
    assert first.returncode == 0, first.stderr
    assert "$ build-engine --preset small" in first.stdout
    assert "$ edit-image --engine" in first.stdout
    assert Image.open(out / "strip.png").size[0] > 4 * 288
    report = json.loads((out / "report.json").read_text())
    counts = {"full": 0, "anchor": 4, "reduced": 36, "reuse": 0}
    assert report["run"]["calls_by_role"] == counts
    assert report["full_context"]["calls_by_role"]["full"] == 40
    assert report["comparison"]["psnr_db"] > 15
    assert 0 < report["kept_ratio"] < 1

    built = (out / "engine" / "manifest.json").stat().st_mtime_ns
    second = demo()
    assert second.returncode == 0, second.stderr
    assert (out / "engine" / "manifest.json").stat().st_mtime_ns == built
    again = json.loads((out / "report.json").read_text())
    assert again["comparison"]["psnr_db"] == report["comparison"]["psnr_db"]
    assert sorted(path.name for path in out.iterdir()) == [
        "edited.png",
        "engine",
        "report.json",
        "strip.png",
    ]
