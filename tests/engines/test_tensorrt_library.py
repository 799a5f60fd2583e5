from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ditrim.engines.backends.tensorrt import library as module
from ditrim.engines.backends.tensorrt.library import Gpu, Library, check_target, version_numbers
from ditrim.engines.sets.command import options_in
from ditrim.engines.sets.engine_set import read_manifest
from ditrim.engines.sets.manifest import Manifest, PlanSpec
from ditrim.engines.sets.profiles import AxisRange, ProfileSpec
from ditrim.plugins.errors import BackendError, EngineSetError

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx is not installed")
ADA = Gpu(name="NVIDIA RTX 4090", capability=(8, 9), num_bytes=24 << 30, driver="570.1")


def library(backend: str, version: str) -> Library:
    return Library(
        backend=backend,
        module=None,
        version=version,
        is_rtx=backend == "tensorrt-rtx",
        logger=None,
    )


@pytest.fixture
def manifest(engine_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Of a set of plans that was built with TensorRT 10.16 on `ADA`."""
    monkeypatch.setattr(module, "open_library", lambda backend: library(backend, "10.16.1.11"))
    size = AxisRange(least=1, best=1, most=1)
    profile = ProfileSpec(batch=size, noisy=size, reference=size, text=size)
    plan = PlanSpec(file="back.plan", profiles=(profile,), inputs=(), outputs=())
    return replace(
        read_manifest(engine_folder),
        backend="tensorrt",
        backend_version="10.16.1.11",
        plans={"front": plan, "back": plan},
        target={
            "compute_capabilities": ["8.9"],
            "gpu": ADA.name,
            "driver": ADA.driver,
            "weights": "included",
            "separate_anchor": False,
        },
    )


def test_of_what_the_library_logs_complaints_and_figures_are_kept() -> None:
    base = type("ILogger", (), {})
    logger = module._make_logger(SimpleNamespace(ILogger=base, __name__="tensorrt"))
    with module.log_captured() as lines:
        for severity, message in (
            ("VERBOSE", "one of thousands"),
            ("INFO", "Total Weights Memory: 12 bytes"),
            ("WARNING", "a warning"),
            ("INFO", "something else"),
            ("ERROR", "an error"),
        ):
            logger.log(SimpleNamespace(name=severity), message)
    assert lines == [
        ("INFO", "Total Weights Memory: 12 bytes"),
        ("WARNING", "a warning"),
        ("ERROR", "an error"),
    ]


def test_plan_for_this_library_gpu_and_driver_is_accepted(manifest: Manifest) -> None:
    check_target(manifest, gpu=ADA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "NVIDIA L40S"}, r"was built on 'NVIDIA RTX 4090'; this GPU is 'NVIDIA L40S'"),
        ({"driver": "580.2"}, r"was built with driver 570\.1; here it is 580\.2"),
        ({"capability": (9, 0)}, r"for compute capability 8\.9; this GPU, NVIDIA RTX 4090, has 9"),
    ],
)
def test_plan_from_another_gpu_or_driver_is_refused_with_the_command(
    manifest: Manifest, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineSetError, match=message) as raised:
        check_target(manifest, gpu=replace(ADA, **change), folder=tmp_path / "moved")
    assert f"--output {tmp_path / 'moved'} --force" in str(raised.value)


def test_plan_from_another_version_is_refused(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_library", lambda backend: library(backend, "11.0.0.1"))
    with pytest.raises(EngineSetError, match=r"cannot run with version 11\.0\.0\.1, which is inst"):
        check_target(manifest, gpu=ADA)


def test_rtx_plan_runs_on_every_gpu_it_was_built_for_with_any_driver(manifest: Manifest) -> None:
    target = dict(manifest.target) | {
        "compute_capabilities": ["8.6", "8.9"],
        "gpu": None,
        "driver": None,
    }
    manifest = replace(manifest, backend="tensorrt-rtx", target=target)
    check_target(manifest, gpu=ADA)
    with pytest.raises(EngineSetError, match=r"for compute capability 8\.6, 8\.9; this GPU"):
        check_target(manifest, gpu=replace(ADA, capability=(9, 0)))


def test_machine_without_a_gpu_is_named(manifest: Manifest) -> None:
    with pytest.raises(EngineSetError, match=r"needs an NVIDIA GPU, .* onnxruntime backend runs"):
        check_target(manifest, gpu=None)


def test_set_of_graphs_only_says_how_to_build_the_plans(manifest: Manifest) -> None:
    command = "build-engine --model qwen-edit --backend tensorrt --graph-only --output x"
    graphs = replace(manifest, plans={}, target={}, options=options_in(command))
    with pytest.raises(EngineSetError, match=r"holds graphs only") as raised:
        check_target(graphs, gpu=ADA)
    assert "build-engine --model qwen-edit --backend tensorrt --output x --force" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.16.1.11", (10, 16, 1, 11)), ("1.7.1.post1", (1, 7, 1)), ("", ()), ("dev", ())],
)
def test_versions_are_compared_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert version_numbers(text) == numbers


@needs_rtx
def test_two_libraries_do_not_share_a_process() -> None:
    program = (
        "from ditrim.engines.backends.tensorrt.library import open_library\n"
        "library = open_library('tensorrt-rtx')\n"
        "assert library is open_library('tensorrt-rtx')\n"
        "print(library.is_rtx, library.numbers[:2] >= (1, 2))\n"
        "open_library('tensorrt')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True True\n"
    assert "tensorrt_rtx is loaded in this process, and the two cannot share one" in done.stderr


def test_old_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.8.0.43'")
    program = (
        "from ditrim.engines.backends.tensorrt.library import open_library\n"
        "try: open_library('tensorrt')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.startswith(
        "BackendError tensorrt is of version 10.8.0.43; ditrim needs 10.9"
    )
    assert "pip install 'ditrim[tensorrt]'" in done.stdout


def test_library_that_cannot_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    program = (
        "from ditrim.engines.backends.tensorrt.library import open_library\n"
        "try: open_library('tensorrt')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "BackendError tensorrt is installed and cannot be loaded: libnvinfer.so" in done.stdout


def test_gpu_is_asked_without_heavy_imports() -> None:
    program = (
        "import sys\n"
        "from ditrim.engines.backends.tensorrt.library import present_gpu\n"
        "print(present_gpu() is None or present_gpu().capability >= (3, 0))\n"
        "print(sorted({'torch', 'tensorrt', 'tensorrt_rtx', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n[]\n", done.stderr


def test_missing_library_says_how_to_install_it() -> None:
    if importlib.util.find_spec("tensorrt") is not None or "tensorrt_rtx" in sys.modules:
        pytest.skip("tensorrt is installed, or the other library is loaded")
    with pytest.raises(BackendError, match=r"'tensorrt' is not installed; install it with: pip in"):
        module.open_library("tensorrt")
