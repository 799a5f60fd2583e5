from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ditrim.engines.backends.tensorrt.builder import LibraryFacts
from ditrim.engines.backends.tensorrt.library import check_target
from ditrim.engines.build import build, source
from ditrim.engines.build.build import build_engine_set, run_build
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets import engine_set as engine_set_module
from ditrim.engines.sets import identity
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.plugins.errors import CheckpointError, DitrimError, EngineSetError, UsageError

Process = Callable[..., subprocess.CompletedProcess[str]]


class Notes:
    """Remembers what a build says."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        assert 0 <= done <= total

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def options(engine_folder: Path, fake: ModuleType) -> BuildOptions:
    """Options of the set in `engine_folder`."""
    return BuildOptions(output=str(engine_folder), **fake.OPTIONS)


def test_unchanged_build_is_reused(options: BuildOptions, engine_folder: Path) -> None:
    before = (engine_folder / "manifest.json").stat()
    result = run_build(options)
    assert result.is_reused
    assert result.seconds < 2
    assert (engine_folder / "manifest.json").stat().st_ino == before.st_ino
    assert not run_build(replace(options, force=True)).is_reused


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": "qwen-edit-2511"},
        {"precision": "fp16"},
        {"front_depth": 9},
        {"layers": (35, 37)},
        {"num_layers": 30},
        {"config": {"in_channels": 32}},
        {"ladder": (8, 24), "max_reference_tokens": None},
        {"granularity": 2},
        {"max_noisy_tokens": 17},
        {"max_text_tokens": 9},
        {"max_batch": 3},
    ],
)
def test_changed_option_is_never_reused(
    options: BuildOptions, engine_folder: Path, change: dict[str, Any]
) -> None:
    notes = Notes()
    assert not run_build(replace(options, **change), progress=notes).is_reused
    assert notes.notes == [f"{engine_folder} was built from other inputs; building it anew"]


def test_changed_library_or_source_is_never_reused(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("library_versions", {"torch": "0"}),
        ("source_digest", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(identity, name, lambda *arguments, value=value: value)
            assert not run_build(options).is_reused
            assert run_build(options).is_reused


def test_set_of_another_backend_version_is_built_again(
    options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditrim.engines.sets import engine_set

    for module in (identity, build, engine_set):
        monkeypatch.setattr(module, "backend_version", lambda backend: "99.0")
    result = run_build(options)
    assert not result.is_reused
    assert result.engine_set.manifest.backend_version == "99.0"


def test_damaged_set_is_built_again_and_says_why(
    options: BuildOptions, engine_folder: Path
) -> None:
    os.truncate(engine_folder / "back.safetensors", 7)
    notes = Notes()
    assert not run_build(options, progress=notes).is_reused
    assert "back.safetensors has 7 bytes, expected 4096" in notes.notes[0]
    (engine_folder / "manifest.json").write_text("{")
    assert not run_build(options).is_reused
    load_engine_set(engine_folder, verify="hashes")


def test_changed_weights_of_the_set_are_found_when_asked(
    options: BuildOptions, engine_folder: Path
) -> None:
    (engine_folder / "back.safetensors").write_bytes(b"\1" * 4096)
    assert run_build(options).is_reused
    assert not run_build(replace(options, verify="hashes")).is_reused


def test_touched_checkpoint_is_hashed_again_and_reused(
    fake_graphs: ModuleType, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pipeline"
    subprocess.run(["cp", "-r", str(pipeline_folder), str(copy)], check=True)
    options = BuildOptions(weights=str(copy), output=str(tmp_path / "set"), max_noisy_tokens=16)
    weights = sorted((copy / "transformer").glob("*.safetensors"))
    hashed: list[str] = []
    original = source._hash_stably
    monkeypatch.setattr(
        source, "_hash_stably", lambda path, tell: hashed.append(path.name) or original(path, tell)
    )
    assert not run_build(options).is_reused
    assert len(hashed) == len(weights) > 1
    hashed.clear()
    assert run_build(options).is_reused
    assert hashed == []
    os.utime(weights[0])
    assert run_build(options).is_reused
    assert hashed == [weights[0].name]
    hashed.clear()
    assert run_build(options).is_reused  # the new status was noted in the manifest
    assert hashed == []
    load_engine_set(tmp_path / "set", verify="hashes")
    status = weights[0].stat()
    data = bytearray(weights[0].read_bytes())
    data[-1] ^= 1
    weights[0].write_bytes(data)
    os.utime(weights[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # only ctime tells
    assert not run_build(options).is_reused


def test_checkpoint_that_changes_during_the_build_replaces_nothing(
    fake_graphs: ModuleType, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pipeline"
    subprocess.run(["cp", "-r", str(pipeline_folder), str(copy)], check=True)

    def touch_and_write(plan: Any, folder: Path, progress: Any) -> Any:
        os.utime(next((copy / "transformer").glob("*.safetensors")))
        return fake_graphs.write_graphs(plan, folder, progress)

    monkeypatch.setattr(build, "write_graphs", touch_and_write)
    with pytest.raises(CheckpointError, match="changed while the engine set was built; nothing"):
        build_engine_set(BuildOptions(weights=str(copy), output=str(tmp_path / "set")))
    assert os.listdir(tmp_path) == ["pipeline"]


def test_folder_that_is_no_engine_set_is_never_overwritten(
    fake_graphs: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"is not an engine set: it has no manifest\.json\. It is"):
        build_engine_set(BuildOptions(output=str(tmp_path), **fake_graphs.OPTIONS))
    (tmp_path / "manifest.json").write_text("{}")  # of a browser extension, perhaps
    with pytest.raises(UsageError, match=r"not part of an engine set \(thesis\.txt\)"):
        build_engine_set(BuildOptions(output=str(tmp_path), **fake_graphs.OPTIONS))
    with pytest.raises(UsageError, match=r"thesis\.txt is a file; give a folder"):
        build_engine_set(BuildOptions(output=str(tmp_path / "thesis.txt"), **fake_graphs.OPTIONS))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_failure_keeps_the_previous_set(
    options: BuildOptions, engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: Any, folder: Path, progress: Any) -> Any:
        raise RuntimeError("exporter")

    monkeypatch.setattr(build, "write_graphs", fail)
    with pytest.raises(RuntimeError, match="exporter"):
        build_engine_set(replace(options, seed=5))
    assert load_engine_set(engine_folder, verify="hashes").manifest.source["seed"] == 0
    assert os.listdir(engine_folder.parent) == [engine_folder.name]


def test_target_behind_a_link_is_replaced_where_it_is(
    options: BuildOptions, tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to("set")
    result = run_build(replace(options, output=str(tmp_path / "current"), seed=3))
    assert result.engine_set.folder == tmp_path / "current"
    assert (tmp_path / "current").is_symlink()
    assert load_engine_set(tmp_path / "set").manifest.source["seed"] == 3


KILL_MOMENTS = [
    "Fingerprint",
    "Trace front",
    "Write back",
    "Verify",
    "Place",
    "between two renames",
    "deleting the old set",
]


@pytest.mark.parametrize("moment", KILL_MOMENTS)
def test_killed_build_leaves_a_whole_set_and_the_next_one_cleans_up(
    engine_folder: Path, build_process: Process, moment: str
) -> None:
    killed = build_process("--output", engine_folder, "--seed", "7", moment=moment)
    assert killed.returncode == -signal.SIGKILL
    seed = load_engine_set(engine_folder, verify="hashes").manifest.source["seed"]
    assert seed == (7 if moment == "deleting the old set" else 0)
    built = build_process("--output", engine_folder, "--seed", "8", "--json")
    assert built.returncode == 0, built.stderr
    assert load_engine_set(engine_folder, verify="hashes").manifest.source["seed"] == 8
    assert os.listdir(engine_folder.parent) == [engine_folder.name]


def test_killed_first_build_leaves_nothing_loadable(tmp_path: Path, build_process: Process) -> None:
    killed = build_process("--output", tmp_path / "set", moment="Place")
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(DitrimError, match="does not exist"):
        load_engine_set(tmp_path / "set")
    assert build_process("--output", tmp_path / "set").returncode == 0
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(("send", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("moment", ["Trace front", "Place", "deleting the old set"])
def test_interrupted_build_says_so_and_leaves_one_whole_set(
    engine_folder: Path, build_process: Process, moment: str, send: str, code: int
) -> None:
    stopped = build_process(
        "--output", engine_folder, "--seed", "7", "--json", moment=moment, send=send
    )
    assert stopped.returncode == code
    answer = json.loads(stopped.stdout.splitlines()[-1])
    assert answer["ok"] is False
    assert answer["exit_code"] == code
    assert "nothing is left half done" in answer["error"]
    assert "Traceback" not in stopped.stderr
    seed = load_engine_set(engine_folder, verify="hashes").manifest.source["seed"]
    assert seed == (7 if moment == "deleting the old set" else 0)
    assert os.listdir(engine_folder.parent) == [engine_folder.name]


def test_full_disk_is_a_clear_error(small_disk: Path, build_process: Process) -> None:
    folder = small_disk / "set"
    assert build_process("--output", folder).returncode == 0
    environment = {**os.environ, "FAKE_BYTES": "3000000"}
    full = build_process("--output", folder, "--seed", "1", "--json", env=environment)
    assert full.returncode == 1
    assert "the disk is full; free some space" in json.loads(full.stdout)["error"]
    assert str(folder) in json.loads(full.stdout)["error"]
    assert "Traceback" not in full.stderr
    assert load_engine_set(folder, verify="hashes").manifest.source["seed"] == 0
    assert os.listdir(small_disk) == ["set"]


def test_file_size_limit_is_a_clear_error(tmp_path: Path, build_process: Process) -> None:
    import resource

    limited = build_process(
        "--output",
        tmp_path / "set",
        "--json",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert limited.returncode == 1
    assert "the file is larger than this system allows" in json.loads(limited.stdout)["error"]
    assert os.listdir(tmp_path) == []


def test_read_only_disk_is_a_clear_error_but_allows_reuse(
    small_disk: Path, build_process: Process
) -> None:
    folder = small_disk / "set"
    assert build_process("--output", folder).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    changed = build_process("--output", folder, "--seed", "1", "--json")
    assert changed.returncode == 1
    assert "it is on a read-only file system; choose" in json.loads(changed.stdout)["error"]
    assert str(small_disk) in json.loads(changed.stdout)["error"]
    assert "Traceback" not in changed.stderr
    same = build_process("--output", folder, "--json")
    assert json.loads(same.stdout)["is_reused"] is True


def test_two_builds_at_once_end_in_one_whole_set(tmp_path: Path, fake: ModuleType) -> None:
    script = Path(fake.__file__)
    command = [sys.executable, str(script), "--", *fake.ARGUMENTS, "--output", str(tmp_path / "s")]
    processes = [
        subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert all(answer["ok"] for answer in answers)
    assert sum(not answer["is_reused"] for answer in answers) == 1
    assert os.listdir(tmp_path) == ["s"]


def test_reuse_imports_nothing_heavy_and_takes_under_two_seconds(engine_folder: Path) -> None:
    code = (
        "import sys; from ditrim.commands.build_engine import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'}; "
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "--weights", "random", "--output", str(engine_folder)]
    command += ["--max-noisy-tokens", "16", "--max-reference-tokens", "24", "--json"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - start
    answer, heavy = done.stdout.splitlines()
    assert json.loads(answer)["is_reused"] is True
    assert heavy == "[]"
    assert seconds < 2


@pytest.mark.slow
def test_real_build_is_whole_runs_and_repeats(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import onnxruntime

    options = BuildOptions(
        weights=str(pipeline_folder),
        output=str(tmp_path / "set"),
        max_noisy_tokens=16,
        max_reference_tokens=24,
        max_text_tokens=8,
    )
    notes = Notes()
    result = run_build(options, progress=notes)
    assert notes.stages == [
        "Fingerprint",
        "Import torch and diffusers",
        "Load weights",
        "Trace front",
        "Write front",
        "Trace back",
        "Write back",
        "Verify",
        "Place",
    ]
    assert run_build(options).is_reused
    engine_set = load_engine_set(tmp_path / "set", verify="hashes")
    manifest = engine_set.manifest
    assert manifest == result.engine_set.manifest
    assert manifest.source["kind"] == "folder"
    assert (manifest.num_layers, manifest.front_depth) == (3, 1)
    assert manifest.transformer_config["attention_head_dim"] == 16
    for role in ("front", "back"):
        session = onnxruntime.InferenceSession(str(engine_set.path_of(role)))
        graph = manifest.graphs[role]
        assert [item.name for item in session.get_inputs()] == [item.name for item in graph.inputs]
        assert [list(item.shape) for item in session.get_outputs()] == [
            list(item.shape) for item in graph.outputs
        ]
        sizes = {"batch": 1, "noisy": 4, "reference": 5, "text": 3, "rows": 2}
        inputs = {
            item.name: np.zeros([sizes.get(axis, axis) for axis in item.shape], item.dtype)
            for item in graph.inputs
        }
        for spec, output in zip(graph.outputs, session.run(None, inputs), strict=True):
            assert output.shape == tuple(sizes.get(axis, axis) for axis in spec.shape)
            assert np.isfinite(output).all()


@pytest.mark.slow
def test_real_build_interrupted_while_tracing_leaves_the_previous_set(
    engine_folder: Path, tiny_config: dict[str, Any]
) -> None:
    config = [item for key in tiny_config for item in ("--config", f"{key}={tiny_config[key]}")]
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ditrim.commands.build_engine import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--weights", "random", *config]
    process = subprocess.Popen(
        [*command, "--output", str(engine_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Trace front"):
            break
    assert len(list(engine_folder.parent.glob(".set.building-*"))) == 1
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "error: interrupted; nothing is left half done" in rest
    assert "Traceback" not in rest
    assert load_engine_set(engine_folder, verify="hashes").manifest.source["seed"] == 0
    assert os.listdir(engine_folder.parent) == [engine_folder.name]


HAS_RTX = importlib.util.find_spec("tensorrt_rtx") and importlib.util.find_spec("polygraphy")
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx and polygraphy are not installed")


def tiny_plans(folder: Path, family: str, **change: Any) -> BuildOptions:
    """Options of plans of a tiny checkpoint, which is written."""
    from tiny import tiny_transformer

    tiny_transformer(family).save_pretrained(folder / "checkpoint")
    options: dict[str, Any] = {
        "model": family,
        "weights": str(folder / "checkpoint"),
        "backend": "tensorrt-rtx",
        "front_depth": 1,
        "layers": (2, 3),
        "ladder": (16, 32, 64),
        "max_noisy_tokens": 64,
        "max_text_tokens": 32,
        "output": str(folder / "set"),
    }
    return BuildOptions(**options | change)


@needs_rtx
@pytest.mark.slow
def test_plans_of_a_model_that_is_built_nowhere_else(tmp_path: Path) -> None:
    options = tiny_plans(tmp_path, "qwen-edit-2511")
    notes = Notes()
    result = run_build(options, progress=notes)
    manifest = load_engine_set(tmp_path / "set", verify="hashes").manifest
    assert manifest == result.engine_set.manifest
    assert {path.name for path in (tmp_path / "set").iterdir()} == {
        "manifest.json",
        "front.plan",
        "back.plan",
    }
    assert manifest.precision == "bf16"
    assert [graph.file for graph in manifest.graphs.values()] == ["front.plan", "back.plan"]
    for role, spec in manifest.plans.items():
        assert [profile.reference.most for profile in spec.profiles] == [16, 32, 64]
        assert spec.device_memory_bytes is not None
        assert (spec.inputs, spec.outputs) == (
            manifest.graphs[role].inputs,
            manifest.graphs[role].outputs,
        )
    assert "score_rows" in [item.name for item in manifest.plans["back"].inputs]
    assert manifest.target["weights"] == "included"
    assert notes.stages[1] == "Check the builder"
    assert "Build back plan: Parse" in notes.stages
    # The weights are the checkpoint's own until the plan is built; nothing of them is left behind.
    weights = next((tmp_path / "checkpoint").glob("*.safetensors"))
    assert weights.stat().st_nlink == 1
    again = run_build(options)
    assert again.is_reused
    assert again.seconds < 2
    os.truncate(tmp_path / "set" / "front.plan", 100)
    with pytest.raises(DitrimError, match=r"front\.plan has 100 bytes, expected"):
        load_engine_set(tmp_path / "set")


@needs_rtx
@pytest.mark.slow
def test_separate_anchor_is_a_third_plan_and_the_reduced_one_scores_nothing(
    tmp_path: Path,
) -> None:
    options = tiny_plans(tmp_path, "qwen-edit", separate_anchor=True, ladder=(64,))
    manifest = run_build(options).engine_set.manifest
    assert list(manifest.plans) == ["front", "back", "anchor"]
    names = {role: [item.name for item in spec.inputs] for role, spec in manifest.plans.items()}
    assert "score_rows" in names["anchor"]
    assert "score_rows" not in names["back"]
    assert [item.name for item in manifest.plans["back"].outputs] == ["velocity"]
    assert manifest.graphs["back"].file == "anchor.plan"
    assert manifest.target["separate_anchor"] is True


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_graph_only_links_the_weights_and_needs_no_library_of_plans(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(backend: str) -> str:
        assert backend == "onnxruntime"
        return "1.23.0"

    for module in (identity, build, engine_set_module):
        monkeypatch.setattr(module, "backend_version", version)
    precision = "fp32" if backend == "onnxruntime" else "bf16"
    options = tiny_plans(
        tmp_path, "qwen-edit", backend=backend, graph_only=True, precision=precision
    )
    manifest = run_build(options).engine_set.manifest
    assert (manifest.plans, manifest.target) == ({}, {})
    weights = next((tmp_path / "checkpoint").glob("*.safetensors"))
    assert weights.samefile(tmp_path / "set" / weights.name)
    entry = next(item for item in manifest.files if item.path == weights.name)
    assert entry.sha256 == next(iter(manifest.source["files"].values()))["sha256"]
    assert {item.path for item in manifest.files} == {"front.onnx", "back.onnx", weights.name}
    assert run_build(options).is_reused


@needs_rtx
def test_reuse_of_plans_imports_nothing_heavy(
    tmp_path: Path, fake_graphs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_plans(plan: Any, facts: Any, graphs: Any, folder: Path, progress: Any) -> Any:
        return graphs, {}, {}

    monkeypatch.setattr(build, "_build_plans", fake_plans)
    monkeypatch.setattr(build, "ask_library", lambda target: facts_of_nothing())
    options = BuildOptions(
        backend="tensorrt-rtx", output=str(tmp_path / "set"), **fake_graphs.OPTIONS
    )
    assert not run_build(options).is_reused
    code = (
        "import sys; from ditrim.commands.build_engine import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'onnx', 'numpy', 'tensorrt_rtx', 'polygraphy'}; "
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *fake_graphs.ARGUMENTS, "--backend", "tensorrt-rtx"]
    command += ["--output", str(tmp_path / "set"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, heavy = done.stdout.splitlines()
    assert json.loads(answer)["is_reused"] is True
    assert heavy == "[]"


def facts_of_nothing() -> LibraryFacts:
    return LibraryFacts(version="", polygraphy="", capabilities=(), default_capabilities=())


def test_plans_of_tensorrt_need_a_gpu_before_anything_is_read(
    tmp_path: Path, fake_graphs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "backend_version", lambda backend: "10.16.1.11")
    monkeypatch.setattr(build, "present_gpu", lambda: None)
    options = BuildOptions(backend="tensorrt", output=str(tmp_path / "set"), **fake_graphs.OPTIONS)
    with pytest.raises(DitrimError, match="builds on the GPU that will run the plans"):
        run_build(options)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("send", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_plan_leaves_the_previous_set_and_no_builder(
    engine_folder: Path, tmp_path: Path, send: int, code: int
) -> None:
    options = tiny_plans(tmp_path, "qwen-edit", output=str(engine_folder))
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ditrim.commands.build_engine import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = shlex.split(options.command())[1:]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Build front plan: Cloning"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    start = time.monotonic()
    process.send_signal(send)
    rest = process.stderr.read()
    assert process.wait(30) == code
    assert time.monotonic() - start < 15  # most of it Python's own end, with torch loaded
    assert "nothing is left half done" in rest
    assert "Traceback" not in rest
    assert not Path(f"/proc/{children[0]}").exists()
    assert load_engine_set(engine_folder, verify="hashes").manifest.source["seed"] == 0
    assert not list(engine_folder.parent.glob(".set.building-*"))


def test_graphs_for_a_library_that_is_not_there_are_built_and_say_what_they_are(
    fake_graphs: ModuleType, tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    options = BuildOptions(
        backend="tensorrt", graph_only=True, output=str(tmp_path / "set"), **fake_graphs.OPTIONS
    )
    manifest = run_build(options).engine_set.manifest
    assert (manifest.backend, manifest.backend_version) == ("tensorrt", "")
    assert run_build(options).is_reused
    with pytest.raises(EngineSetError, match=r"set of tensorrt holds graphs only \(--graph-only\)"):
        check_target(manifest)
    with pytest.raises(DitrimError, match=r"'tensorrt' is not installed; install it with: pip"):
        run_build(replace(options, graph_only=False))
