"""`scripts/demo` and the environment that it makes, and `scripts/bench.py`."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
  "-m pytest "*) echo "pytest ${*:3}" >>"$STUB_LOG" ;;
  *) exit 99 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the files that the environment is made from, in a folder with a space."""
    folder = tmp_path / "check out"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/_bootstrap.sh", "scripts/demo", "scripts/demo.py", "scripts/test"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, folder / name)
    stub = tmp_path / "stub-python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return folder


def run_demo(
    checkout: Path, *arguments: str, script: str = "demo", **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DITRIM_")}
    stub = checkout.parent / "stub-python"
    return subprocess.run(
        [str(checkout / "scripts" / script), *arguments],
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
        f"{install} -e ROOT",
        "demo --output ROOT/demo-out",
    ]
    again = run_demo(checkout, "shift")
    assert again.stderr == "== using the environment .venv\n"
    assert logged(checkout) == ["demo --output ROOT/demo-out shift"]


def test_an_output_that_is_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--output", "taken"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("folder taken cannot be made: File exists")


def test_tests_add_their_tools_to_the_environment_of_the_demo(checkout: Path) -> None:
    run_demo(checkout)
    logged(checkout)
    assert run_demo(checkout, "-k", "session", script="test").returncode == 0
    install = "pip install --progress-bar off -c ROOT/constraints-cpu.txt"
    tools = [f"{install} torch", f"{install} -e ROOT[dev]"]
    assert logged(checkout) == [*tools, "pytest -k session"]
    assert run_demo(checkout).stderr == "== using the environment .venv\n"
    assert run_demo(checkout, "-x", script="test").stderr == "== using the environment .venv\n"
    assert logged(checkout) == ["demo --output ROOT/demo-out", "pytest -x"]


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


BENCH = ROOT / "scripts" / "bench.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/bench.py` as a module, its neighbours importable."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module("bench")


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_bench_compares_ways_that_agree_and_judges_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = run_bench(
        *("--quick", "--only", "wide", "--ways", "eager,fbc,onnxruntime"),
        *("--engines", str(tmp_path / "sets"), "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    assert result["machine"]["instruction_sets"]["torch"]
    case = result["cases"]["wide"]
    assert case["build_s"] > 0
    steps = {row["way"]: row for row in case["steps"]}
    assert set(steps) == {
        "diffusers eager",
        "ONNX Runtime, one graph",
        "ditrim, full context",
        "ditrim, anchor",
        "ditrim on torch, full context",
    }
    assert case["torch_backend"]["kept"] == 32
    assert case["torch_backend"]["predicted"] > 1
    edits = {row["way"]: row for row in case["edits"]["ways"]}
    # Float32's rounding for those that compute all, more for those that prune or reuse.
    for way in ("ONNX Runtime, one graph", "ditrim, full context"):
        assert 0 < edits[way]["quality"][0] < 1e-5, way
    assert edits["ditrim, ToPi"]["quality"][0] > 1e-4
    assert edits["ditrim, ToPi"]["kept_ratio"] == 0.5
    assert edits["ditrim, StepCache"]["computed"] < 4 == edits["ditrim, ToPi"]["computed"]
    assert [row["rung"] for row in case["rungs"]] == [8, 16, 24, 32, 40, 48, 56, 64]
    predicted = [row["predicted"] for row in case["rungs"]]
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[-1] == 1.0
    bounds = {row["bound"]: row for row in result["bounds"]}
    worst = min(row["of_predicted"]["median"] for row in case["rungs"])
    bound = bounds["speed-up of reduced steps, of the predicted"]
    assert bound["value"] == worst
    assert bound["is_met"] == (worst >= 0.95)
    assert bounds["full step against torch.compile"]["is_met"] is None  # it was left out
    full = {row["way"]: row["full_is_faster"] for row in case["steps"]}
    bound = bounds["full step against ONNX Runtime, one graph"]
    assert bound["value"] == full["ONNX Runtime, one graph"]["median"]

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    made = run_bench("--document", str(output), "--into", str(page))
    assert made.returncode == 0, made.stderr
    text = page.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n")
    assert text.endswith("<!-- bench: end -->\nafter\n")
    assert "old" not in text
    assert "| wide: full step against torch.compile | ≥ 1 | not measured |" in text


@pytest.mark.slow
def test_bench_edits_pictures_with_the_small_editor(bench: ModuleType, tmp_path: Path) -> None:
    from benchmarks import cases, measure, others

    case = cases.small_case("small-large", tmp_path / "sets", 2, 2)
    assert (case.size.num_reference, case.count) == (324, 2)
    ways = others.other_ways(case, ("eager", "fbc"), tmp_path, 2)
    ours = cases.our_schedules(case)
    steps = 20
    with measure.Progress() as progress:
        found = measure.measure_edits(case, [*ways, *ours], 2, steps, progress)
    rows = {row["way"]: row for row in found["ways"]}
    assert rows["diffusers eager"]["quality"] == [100.0, 100.0]
    assert rows["ditrim, full context"]["quality"][1] > 90
    assert 15 < rows["ditrim, ToPi"]["quality"][1] < 90
    assert 0 < rows["ditrim, ToPi"]["kept_ratio"] < 1
    caches = [rows[f"diffusers First-Block-Cache, {t:g}"] for t in others.FBC_THRESHOLDS]
    assert steps > caches[0]["computed"] > caches[1]["computed"] >= 1
    assert caches[0]["quality"][0] > caches[1]["quality"][0]
    # Caching by hooks is of its own copy: what stands beside it is still diffusers as it is.
    assert not case.transformer.is_cache_enabled


def test_bench_refuses_a_way_that_computes_something_else(bench: ModuleType) -> None:
    import torch

    from benchmarks import measure

    class Case:
        name, transformer = "case", 1.0

        def step(self, transformer: float) -> torch.Tensor:
            return torch.full((1, 4, 2), transformer)

    measure.check_agreement(Case(), {"near": 1.0 + 1e-4})
    with pytest.raises(SystemExit, match=r"case: far differs from diffusers by 0\.01, relative"):
        measure.check_agreement(Case(), {"near": 1.0, "far": 1.01})
    with pytest.raises(SystemExit, match="broken differs from diffusers by nan"):
        measure.check_agreement(Case(), {"broken": float("nan")})


@pytest.mark.parametrize(
    ("change", "bound", "is_met"),
    [
        ({"eager": 1.49}, "full step against diffusers eager", False),
        ({"eager": 1.5}, "full step against diffusers eager", True),
        ({"outside": 0.101}, "time outside the engines, of a step", False),
        ({"outside": 0.1}, "time outside the engines, of a step", True),
    ],
)
def test_bench_judges_by_the_bound_itself(
    bench: ModuleType, change: dict[str, float], bound: str, is_met: bool
) -> None:
    def found(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    case = {
        "steps": [
            {"way": "diffusers eager", "full_is_faster": found(change.get("eager", 2.0))},
            {"way": "ditrim, full context", "full_is_faster": found(1.0)},
        ],
        "outside_engines": {
            "ditrim, full context": found(0.01),
            "rung 8": found(change.get("outside", 0.02)),
        },
    }
    rows = {row["bound"]: row for row in bench.judge({"small": case})}
    assert rows[bound]["is_met"] is is_met


def test_bench_names_what_it_cannot_do(bench: ModuleType, tmp_path: Path) -> None:
    unknown = run_bench("--ways", "eager,tensorflow")
    assert unknown.returncode == 2
    assert "unknown 'tensorflow'; allowed: eager, compile, fbc, onnxruntime" in unknown.stderr
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert bench.main(["--document", str(other)]) == 2
    assert bench.main(["--document", str(tmp_path / "missing.json")]) == 2
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    from benchmarks import tables

    with pytest.raises(SystemExit, match="needs one line '<!-- bench: begin -->'"):
        tables.replace_section(page, "text")
    assert page.read_text() == "no marks\n"


def test_committed_tables_are_those_of_the_committed_figures(bench: ModuleType) -> None:
    from benchmarks import speed_tables

    folder = ROOT / "docs" / "measured"
    result = json.loads((folder / "performance-cpu.json").read_text())
    page = (folder / "performance.md").read_text()
    section = page.split("<!-- bench: begin -->")[1].split("<!-- bench: end -->")[0]
    assert section.strip() == speed_tables.document_text(result)
    assert bench.judge(result["cases"]) == result["bounds"]


def test_committed_tables_of_methods_are_those_of_the_committed_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the paired differences, which are not in the file."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "studies")
    import methods_tables

    from benchmarks.tables import markdown

    folder = ROOT / "docs" / "measured"
    found = json.loads((folder / "methods.json").read_text())
    page = (folder / "methods.md").read_text().replace("\\*", "*")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    labels = [label for label in found["methods"]["labels"] if label != methods_tables.FULL]
    made = markdown([methods_tables.table("", found["methods"], labels)]).splitlines()[2:]
    shown = [line for line in made if any(row.startswith(line[:-1]) for row in rows)]
    assert len(shown) > 10
