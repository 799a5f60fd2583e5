"""Engines are loaded once and shared: by whom, for how long, and what a second session costs."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from tiny import tiny_transformer

from ditrim.engines import load
from ditrim.engines.backends.onnxruntime import engines as onnxruntime_backend
from ditrim.engines.backends.onnxruntime.engines import OnnxRuntimeEngines
from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.load import load_engines
from ditrim.engines.sets.engine_set import EngineSet, load_engine_set
from ditrim.engines.sets.staging import commit
from ditrim.plugins.errors import BackendError, EngineSetError
from ditrim.runtime.session import EditSession

# Opens a set twice, and says what each opening added to the memory of the process.
MEMORY = """
import json, sys
from pathlib import Path
import onnx
from ditrim.engines.load import load_engines

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024

folder, share = sys.argv[1], sys.argv[2] == "share"
held, sizes = [], [resident()]
for _ in range(3):
    held.append(load_engines(folder, device="cpu", share=share))
    sizes.append(resident())
held.clear()
sizes.append(resident())
print(json.dumps(sizes))
"""


@pytest.fixture
def folder(tiny_engine_sets: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny engine set that a test may change."""
    return Path(shutil.copytree(tiny_engine_sets("qwen-edit"), tmp_path / "set"))


def tensors(engines: Any, role: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs and empty outputs of a graph."""
    sizes = {"batch": 1, "noisy": 20, "reference": 30, "text": 6, "rows": 20}
    generator = torch.Generator().manual_seed(seed)
    spec = engines.engine_set.manifest.graphs[role]
    inputs, outputs = {}, {}
    for item in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in item.shape]
        inputs[item.name] = torch.randn(shape, generator=generator)
        if item.dtype == "int64":
            inputs[item.name] = torch.arange(shape[0])
    for item in spec.outputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in item.shape]
        outputs[item.name] = torch.full(shape, float("nan"))
    return inputs, outputs


def run(engines: Any, seed: int = 0) -> list[torch.Tensor]:
    """Everything that both graphs give for random inputs."""
    results = []
    for role in ("front", "back"):
        inputs, outputs = tensors(engines, role, seed)
        engines.run(role, inputs, outputs)
        results += outputs.values()
    return results


def test_every_way_to_open_a_set_gives_the_same_engines(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    first = load_engines(folder, device="cpu")
    assert load_engines(str(folder), device="cpu", verify="hashes") is first
    assert load_engines(tmp_path / "link", device="cpu") is first
    assert load_engines(load_engine_set(folder), device="cpu") is first
    sessions = [EditSession(folder, device="cpu") for _ in range(2)]
    assert all(session._denoiser.engines is first for session in sessions)


def test_names_of_one_device_share_and_other_options_do_not(folder: Path) -> None:
    first = load_engines(folder, device="cpu")
    if not torch.cuda.is_available():
        assert load_engines(folder, device="auto") is first
    other = load_engines(folder, device="cpu", threads=1)
    assert other is not first
    assert load_engines(folder, device="cpu", threads=1) is other
    own = load_engines(folder, device="cpu", share=False)
    assert own is not first
    assert load_engines(folder, device="cpu") is first
    copied = Path(shutil.copytree(folder, folder.with_name("copy")))
    assert load_engines(copied, device="cpu") is not first


def test_engines_are_freed_with_their_last_holder(folder: Path) -> None:
    holders = [EditSession(folder, device="cpu") for _ in range(2)]
    engines = weakref.ref(holders[0]._denoiser.engines)
    holders.pop()
    gc.collect()
    assert engines() is not None
    holders.clear()
    gc.collect()
    assert engines() is None
    assert not [key for key in load._TURNS if str(folder) in key]
    assert run(load_engines(folder, device="cpu"))


def test_a_set_built_again_in_its_place_is_loaded_again(folder: Path) -> None:
    old = load_engines(folder, device="cpu")
    expected = run(old)
    again = Path(shutil.copytree(folder, folder.with_name("again")))
    commit(again, folder)
    new = load_engines(folder, device="cpu")
    assert new is not old
    assert load_engines(folder, device="cpu") is new
    assert all(map(torch.equal, run(old), expected))


def test_a_weight_file_that_was_written_to_is_loaded_again(folder: Path) -> None:
    old = load_engines(folder, device="cpu")
    weights = next(folder.glob("back*.safetensors"))
    before = weights.stat()
    with open(weights, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_engines(folder, device="cpu") is not old
    with pytest.raises(EngineSetError, match=f"the file {weights.name} was changed"):
        load_engines(folder, device="cpu", verify="hashes")


def test_a_manifest_that_was_changed_in_memory_has_engines_of_its_own(folder: Path) -> None:
    first = load_engines(folder, device="cpu")
    manifest = replace(first.engine_set.manifest, options={"preset": ("small",)})
    other = load_engines(EngineSet(folder=folder, manifest=manifest), device="cpu")
    assert other is not first
    assert other.engine_set.manifest == manifest


def test_a_set_replaced_while_it_is_loaded_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Path(shutil.copytree(folder, folder.with_name("again")))
    make = load._load

    def load_slowly(*arguments: Any) -> Any:
        engines = make(*arguments)
        commit(again, folder)
        return engines

    with monkeypatch.context() as patch:
        patch.setattr(load, "_load", load_slowly)
        with pytest.raises(EngineSetError, match="was replaced or changed while it was loaded"):
            load_engines(folder, device="cpu")
    assert run(load_engines(folder, device="cpu"))


def test_a_set_between_the_renames_of_a_swap_is_put_back_and_loaded(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.previous"))
    assert run(load_engines(folder, device="cpu"))


def test_a_load_that_failed_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BackendError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(load, "_load", fail)
        with pytest.raises(BackendError, match="no memory"):
            load_engines(folder, device="cpu")
    assert run(load_engines(folder, device="cpu"))


_FORKING = """
import os, sys
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import BackendError
engines = load_engines(sys.argv[1], device="cpu", threads=2)
use = {"load": lambda: load_engines(sys.argv[1], device="cpu", threads=2),
       "run": lambda: engines.run("front", {}, {})}[sys.argv[2]]
child = os.fork()
if child == 0:
    try:
        use()
    except BackendError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("use", ["load", "run"])
def test_a_forked_child_is_told_to_be_spawned_and_never_hangs(folder: Path, use: str) -> None:
    command = [sys.executable, "-c", _FORKING, str(folder), use]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told, code = done.stdout.strip().splitlines()
    assert "spawn" in told
    assert code == "3"


def test_a_child_that_loads_after_the_fork_runs(folder: Path) -> None:
    script = _FORKING.replace("engines = ", "engines = None if os.environ.get('LATE') else ")
    command = [sys.executable, "-c", script, str(folder), "load"]
    environment = {**os.environ, "LATE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.split() == ["0"]


def test_threads_that_open_a_set_at_once_load_it_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = load._load

    def load_slowly(engine_set: EngineSet, options: dict[str, Any]) -> Any:
        made.append(options)
        time.sleep(0.2)
        return make(engine_set, options)

    monkeypatch.setattr(load, "_load", load_slowly)
    start, found = threading.Barrier(4), []

    def open_set() -> None:
        start.wait()
        found.append(load_engines(folder, device="cpu"))

    in_threads([open_set] * 4)
    assert len(made) == 1
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_threads_that_run_shared_engines_at_once_get_what_each_gets_alone(folder: Path) -> None:
    engines = load_engines(folder, device="cpu")
    expected = [run(load_engines(folder, device="cpu", share=False), seed) for seed in range(4)]
    assert not torch.equal(expected[0][0], expected[1][0])
    start, equal = threading.Barrier(4), []

    def run_often(seed: int) -> None:
        own = load_engines(folder, device="cpu")
        assert own is engines
        start.wait()
        for _ in range(25):
            equal.append(all(map(torch.equal, run(own, seed), expected[seed])))

    in_threads([lambda seed=seed: run_often(seed) for seed in range(4)])
    assert equal == [True] * 100


def in_threads(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_graphs_that_cannot_be_loaded_name_the_file_and_the_command(folder: Path) -> None:
    engine_set = load_engine_set(folder)
    graph = engine_set.path_of("back")
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BackendError, match=r"cannot load .*back\.onnx.*Rebuild the set with: "):
        OnnxRuntimeEngines(engine_set, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_no_weight_is_transposed_or_cast_at_every_call(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_backend, "_FOLDED_BYTES", 200)  # the weights are larger
    for stored in (torch.float32, torch.bfloat16):
        checkpoint, folder = tmp_path / f"{stored}-checkpoint", tmp_path / f"{stored}-set"
        tiny_transformer(family).to(stored).save_pretrained(checkpoint)
        build_engine_set(
            BuildOptions(
                model=family,
                weights=str(checkpoint),
                graph_only=True,
                precision="fp32",
                front_depth=1,
                layers=(2, 3),
                max_reference_tokens=64,
                max_noisy_tokens=64,
                max_text_tokens=32,
                output=str(folder),
            )
        )
        engines = load_engines(folder, device="cpu")
        for role in ("front", "back"):
            path = folder / f"{role}.onnx"
            options = onnxruntime_backend.session_options(path)
            options.optimized_model_filepath = str(tmp_path / "run.onnx")
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            graph = onnx.load(tmp_path / "run.onnx", load_external_data=False).graph
            constants = {tensor.name for tensor in graph.initializer}
            for node in graph.node:
                assert not node.input or set(node.input) - constants - {""}, node
            plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            inputs, outputs = tensors(engines, role, seed=1)
            engines.run(role, inputs, outputs)
            expected = plain.run(
                list(outputs), {name: tensor.numpy() for name, tensor in inputs.items()}
            )
            for tensor, other in zip(outputs.values(), expected, strict=True):
                torch.testing.assert_close(tensor, torch.from_numpy(other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_second_session_adds_less_than_a_fiftieth_of_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    build_engine_set(
        BuildOptions(
            model="qwen-edit",
            weights="random",
            num_layers=2,
            config={
                "num_attention_heads": 12,
                "attention_head_dim": 64,
                "axes_dims_rope": [16, 24, 24],
                "joint_attention_dim": 128,
            },
            front_depth=1,
            layers=(1,),
            max_reference_tokens=64,
            max_noisy_tokens=64,
            max_text_tokens=16,
            output=str(folder),
        )
    )
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights > 100e6

    def added(how: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), how],
            capture_output=True,
            text=True,
            check=True,
        )
        sizes = json.loads(done.stdout.splitlines()[-1])
        return [(b - a) / weights for a, b in pairwise(sizes)]

    first, second, third, freed = added("share")
    assert first > 0.9
    assert second < 0.02, f"{second:.1%} of the weights"
    assert third < 0.02, f"{third:.1%} of the weights"
    assert freed < -0.9
    # What is measured does see a second copy.
    assert added("alone")[1] > 0.9
