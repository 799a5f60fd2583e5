"""The TensorRT runtime: its decisions, and all of it over a stand-in library and GPU.

What runs here without a GPU is the real runtime: `attach`, the denoiser, profiles, contexts, the
arena, addresses, graphs and threads. What stands in is the library's own execution.
"""

from __future__ import annotations

import copy
import gc
import inspect
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorrt_stand_in as stand_in
import torch
from tensorrt_stand_in import ThreadHardware, make_library, stand_in_set
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim.runtime as ditrim
from ditrim.engines.backends.onnxruntime.engines import OnnxRuntimeEngines
from ditrim.engines.backends.tensorrt.contexts import (
    ARENA_STEP_BYTES,
    ArenaSize,
    BoundedCache,
    GraphBook,
    choose_profile,
)
from ditrim.engines.backends.tensorrt.device import CaptureError, DriverGraph
from ditrim.engines.backends.tensorrt.engines import TensorRTEngines
from ditrim.engines.load import load_engines
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.plugins.errors import (
    BackendError,
    DitrimError,
    EngineSetError,
    LadderError,
    UsageError,
)

FAMILY = "qwen-edit-2511"
POLICY = ditrim.ToPi(tau=0.6, interval=2)
Make = Callable[..., TensorRTEngines]


@pytest.fixture
def make(tiny_engine_sets: Any, tmp_path: Path) -> Make:
    """Make engines over the stand-ins; keywords are those of `stand_in_set` and of the engines."""

    def build(
        family: str = FAMILY,
        hardware: ThreadHardware | None = None,
        backend: str = "tensorrt-rtx",
        *,
        max_contexts: int = 16,
        cuda_graphs: Any = "auto",
        **changes: Any,
    ) -> TensorRTEngines:
        hardware = hardware or ThreadHardware()
        engine_set = stand_in_set(
            tiny_engine_sets(family), tmp_path / "set", backend=backend, **changes
        )
        return TensorRTEngines(
            engine_set,
            max_contexts=max_contexts,
            cuda_graphs=cuda_graphs,
            library=make_library(hardware, backend),
            hardware=hardware,
        )

    return build


@pytest.fixture
def truth(tiny_engine_sets: Any) -> Callable[[str], OnnxRuntimeEngines]:
    """ONNX Runtime's engines of the same weights, on one thread as the stand-in is."""
    from ditrim.engines.sets.engine_set import load_engine_set

    def load(family: str = FAMILY) -> OnnxRuntimeEngines:
        return OnnxRuntimeEngines(load_engine_set(tiny_engine_sets(family)), "cpu", threads=1)

    return load


def edit(engines: Any, arguments: dict[str, Any], family: str = FAMILY) -> torch.Tensor:
    """Latents of a pipeline call on engines."""
    pipe = tiny_pipeline(family)
    with small_pictures(), torch.no_grad(), ditrim.attach(pipe, engines, POLICY):
        return pipe(**copy.deepcopy(arguments)).images  # type: ignore[no-any-return]


def back_call(
    engines: TensorRTEngines, reference: int = 20, batch: int = 1, text: int = 5
) -> dict[str, Any]:
    """Random inputs and empty outputs of BACK."""
    generator = torch.Generator().manual_seed(reference)
    sizes = {"batch": batch, "noisy": 12, "reference": reference, "text": text, "rows": 12}
    spec = engines.engine_set.manifest.plans["back"]
    inputs = {}
    for item in spec.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in item.shape]
        inputs[item.name] = (
            torch.arange(12) if item.dtype == "int64" else torch.randn(shape, generator=generator)
        )
    outputs = {
        item.name: torch.empty([sizes[a] if isinstance(a, str) else a for a in item.shape])
        for item in spec.outputs
    }
    return {"role": "back", "inputs": inputs, "outputs": outputs}


# What is decided.


def test_the_least_recently_used_value_goes_first() -> None:
    cache: BoundedCache[str, int] = BoundedCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    assert cache.make_room() == [2]
    cache.put("c", 3)
    assert (cache.get("b"), list(cache)) == (None, [1, 3])
    cache.put("c", 4)  # the same key takes no second place
    assert list(cache) == [1, 4]


def test_the_smallest_profile_that_holds_the_length_is_chosen(make: Make) -> None:
    plan = make().engine_set.manifest.plans["back"]
    rungs = [profile.reference.most for profile in plan.profiles]
    assert len(rungs) == 8

    def chosen(**axes: int) -> int:
        sizes = {"batch": 1, "noisy": 12, "text": 5, "rows": 1, **axes}
        return choose_profile(plan, sizes, "back", lambda **kw: f"build-engine {kw}")

    assert [chosen(reference=rung) for rung in rungs] == list(range(8))
    assert [chosen(reference=rung + 1) for rung in rungs[:-1]] == list(range(1, 8))
    for axes, message in (
        ({"reference": 65}, r"reference tokens: 65 .* back plan hold \(64\).*max_reference_to.*65"),
        ({"reference": 8, "text": 33}, r"text tokens: 33 .*\(32\).*max_text_tokens': 33"),
        ({"reference": 8, "batch": 5}, r"a batch of 5 .*\(4\).*max_batch': 5"),
        ({"reference": 8, "rows": 65}, r"scored rows: 65 .*\(64\).*max_noisy_tokens': 65"),
        ({"reference": 0}, r"reference tokens: 0 is no length .* \(1 to 64\)"),
    ):
        with pytest.raises(LadderError, match=message):
            chosen(**axes)


def actions(book: GraphBook[str], addresses: tuple[int, ...], count: int) -> str:
    """First letters of what a book says for calls in a row."""
    said = ""
    for _ in range(count):
        action = book.next_action(addresses)
        said += action[0]
        if action == "capture":
            book.keep(addresses, "graph")
    return said


def test_graphs_are_bounded_and_go_when_the_arena_moves() -> None:
    book: GraphBook[str] = GraphBook(most_graphs=2)
    for address in range(3):
        assert actions(book, (address,), 3) == "ecr"
    assert len(book) == 2
    assert actions(book, (0,), 1) == "c"  # was displaced
    book.clear()
    assert len(book) == 0
    assert actions(book, (0,), 3) == "ecr"  # a plain call comes first again


class Driver:
    """Stands for the CUDA driver; `failing` functions return an error."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.called = failing, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            if name == "cuStreamEndCapture" and name not in self.failing:
                arguments[1]._obj.value = 7
            return 901 * (name in self.failing)

        return call


@pytest.mark.parametrize(
    ("failing", "is_queued", "message"),
    [
        ("cuStreamBeginCapture_v2", True, "cuStreamBeginCapture_v2 said 901"),
        ("cuStreamEndCapture", True, "cuStreamEndCapture said 901"),
        ("", False, "does not run while a graph is captured"),
        ("cuGraphInstantiateWithFlags", True, "InstantiateWithFlags said 901"),
    ],
)
def test_a_failed_capture_ends_and_leaves_nothing(
    failing: str, is_queued: bool, message: str
) -> None:
    driver = Driver(failing)
    with pytest.raises(CaptureError, match=message):
        DriverGraph(driver, 1, lambda: is_queued)
    has_begun = failing != "cuStreamBeginCapture_v2"
    assert ("cuStreamEndCapture" in driver.called) == has_begun
    has_graph = has_begun and failing != "cuStreamEndCapture"
    assert ("cuGraphDestroy" in driver.called) == has_graph
    driver = Driver()
    DriverGraph(driver, 1, lambda: True).launch(1)
    assert driver.called[-2:] == ["cuGraphDestroy", "cuGraphLaunch"]


def test_the_arena_takes_whole_steps() -> None:
    arena = ArenaSize()
    assert arena.needs_growth(0)
    assert arena.next_size(0) == arena.next_size(ARENA_STEP_BYTES) == ARENA_STEP_BYTES
    assert arena.next_size(ARENA_STEP_BYTES + 1) == 2 * ARENA_STEP_BYTES
    arena.replaced(ARENA_STEP_BYTES)
    assert not arena.needs_growth(ARENA_STEP_BYTES)
    assert arena.needs_growth(ARENA_STEP_BYTES + 1)
    assert arena.generation == 1


# All of it.


@pytest.mark.parametrize(
    ("family", "backend", "separate_anchor", "cuda_graphs"),
    [
        (FAMILY, "tensorrt-rtx", False, "auto"),
        (FAMILY, "tensorrt", True, "on"),
        ("flux-kontext", "tensorrt", False, "auto"),
        ("flux-kontext", "tensorrt-rtx", True, "off"),
    ],
)
def test_pictures_are_those_of_onnx_runtime(
    family: str, backend: str, separate_anchor: bool, cuda_graphs: str, make: Make, truth: Any
) -> None:
    engines = make(
        family, backend=backend, separate_anchor=separate_anchor, cuda_graphs=cuda_graphs
    )
    for index, changes in enumerate(({}, {"guided": True, "side": 64, "num_text": 9})):
        arguments = request(family, seed=index, steps=5, **changes)  # type: ignore[arg-type]
        expected = edit(truth(family), arguments, family)
        assert torch.equal(edit(engines, arguments, family), expected)
    stats = engines.stats()
    assert stats["contexts"] == stats["live_contexts"] > 1
    assert stats["arena_bytes"] == engines._hardware.allocated[-1]  # type: ignore[attr-defined]
    roles = {key.role for key in engines._contexts._items}
    assert roles == {"front", "back"} | ({"anchor"} if separate_anchor else set())


def test_a_session_runs_without_a_pipeline(make: Make, truth: Any) -> None:
    arguments: dict[str, Any] = {
        "noisy": torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(1)),
        "noisy_grid": (4, 5),
        "references": [torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(2))],
        "reference_grids": [(5, 4)],
        "text_embeds": torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(3)),
        "sigmas": [1.0, 0.8, 0.5, 0.2],
    }
    found, expected = (
        [step.latents for step in ditrim.EditSession(engines, POLICY).denoise(**arguments)]
        for engines in (make(), truth())
    )
    assert all(map(torch.equal, found, expected))
    assert len(found) == 4


def test_threads_take_turns_in_one_arena(make: Make, truth: Any) -> None:
    """The stand-in fails where two runs are in the arena at once."""
    requests = [request(FAMILY, seed=i, side=48 + 16 * (i % 2), steps=3) for i in range(4)]
    expected = [edit(truth(), arguments) for arguments in requests]
    for cuda_graphs in ("off", "on"):
        engines = make(cuda_graphs=cuda_graphs, max_contexts=3, backend="tensorrt")
        pipes = [tiny_pipeline(FAMILY) for _ in requests]
        barrier = threading.Barrier(len(requests))

        def work(
            index: int,
            engines: Any = engines,
            pipes: Any = pipes,
            barrier: threading.Barrier = barrier,
        ) -> list[torch.Tensor]:
            with ditrim.attach(pipes[index], engines, POLICY):
                barrier.wait(timeout=30)
                return [pipes[index](**copy.deepcopy(requests[index])).images for _ in range(2)]

        with small_pictures(), ThreadPoolExecutor(len(requests)) as pool:
            results = [future.result() for future in [pool.submit(work, i) for i in range(4)]]
        for found, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(one, wanted) for one in found)
        assert engines.stats()["evicted"] > 0


def test_the_stand_in_notices_runs_that_do_not_take_turns(make: Make) -> None:
    """The test above can fail: without the event, two streams are in the arena at once."""
    hardware = ThreadHardware()
    engines = make(hardware=hardware, cuda_graphs="off")
    hardware.wait = lambda stream, event: None  # type: ignore[method-assign]
    calls = [back_call(engines, 60, batch=4) for _ in range(2)]
    barrier = threading.Barrier(2)

    def work(index: int) -> str:
        for _ in range(500):
            try:
                barrier.wait(timeout=30)
                engines.run(**calls[index])
            except AssertionError as error:
                barrier.abort()
                return str(error)
            except threading.BrokenBarrierError:
                break
        return ""

    with ThreadPoolExecutor(2) as pool:
        found = {future.result() for future in [pool.submit(work, index) for index in range(2)]}
    assert "another run wrote into the arena" in found


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_graphs_of_calls_on_the_same_tensors_are_replayed(backend: str, make: Make) -> None:
    engines = make(backend=backend, cuda_graphs="on")
    call = back_call(engines)
    engines.run(**call)
    expected = {name: tensor.clone() for name, tensor in call["outputs"].items()}
    for _ in range(4):
        for tensor in call["outputs"].values():
            tensor.zero_()
        engines.run(**call)
        assert all(torch.equal(call["outputs"][name], expected[name]) for name in expected)
    stats = engines.stats()
    # TensorRT-RTX captures by itself.
    counts = (1, 1, 3) if backend == "tensorrt" else (5, 0, 0)
    assert (stats["enqueue"], stats["capture"], stats["replay"]) == counts
    # Other tensors are other addresses: the graph of the first must not serve them.
    other = back_call(engines)
    other["inputs"]["noisy"] += 1
    engines.run(**other)
    assert not torch.equal(other["outputs"]["velocity"], expected["velocity"])


def test_where_nothing_can_be_captured_calls_stay_plain(make: Make) -> None:
    engines = make(hardware=ThreadHardware(captures=False), backend="tensorrt", cuda_graphs="on")
    call = back_call(engines)
    for _ in range(4):
        engines.run(**call)
    stats = engines.stats()
    assert (stats["enqueue"], stats["capture"], stats["replay"]) == (4, 0, 0)
    assert "capturing failed: operation not" in stats["not_captured"]["back"]


def test_weights_that_are_streamed_are_never_captured(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in.ICudaEngine, "streamable_weights_size", 100)
    engines = make(cuda_graphs="on", backend="tensorrt")
    call = back_call(engines)
    for _ in range(3):
        engines.run(**call)
    stats = engines.stats()
    assert stats["not_captured"]["back"] == "its weights are streamed"
    assert stats["enqueue"] == 3


def test_rtx_compiles_beside_the_run_captures_and_keeps_its_kernels(
    make: Make, tmp_path: Path
) -> None:
    for cuda_graphs, strategy in (("auto", "WHOLE_GRAPH_CAPTURE"), ("off", "DISABLED")):
        engines = make(cuda_graphs=cuda_graphs)
        for engine in engines._library.module.engines:
            (config,) = engine._configs
            assert config.dynamic_shapes_kernel_specialization_strategy.name == "LAZY"
            assert config.cuda_graph_strategy.name == strategy
            config._cache._content += b"kernels of this run"
    engines.close()
    assert (tmp_path / "set" / "back.kernels").read_bytes() == b"kernels of this run"
    loaded = make()
    (config,) = loaded._library.module.engines[1]._configs
    assert config._cache._content == b"kernels of this run"
    make(backend="tensorrt").close()


def test_contexts_of_a_plan_change_their_shapes_unless_it_holds_a_plugin(make: Make) -> None:
    for changes, num_contexts in (
        ({"backend": "tensorrt-rtx"}, 1),
        ({"backend": "tensorrt", "separate_anchor": True}, 1),
        ({"backend": "tensorrt"}, 3),
        ({"backend": "tensorrt", "separate_anchor": True, "cuda_graphs": "on"}, 3),
    ):
        engines = make(**changes)  # type: ignore[arg-type]
        plain: dict[int, torch.Tensor] = {}
        for text in (5, 7, 9, 5, 7, 9):
            call = back_call(engines, 60, text=text)
            engines.run(**call)
            velocity = call["outputs"]["velocity"]
            assert torch.equal(velocity, plain.setdefault(text, velocity.clone()))
        assert engines.stats()["contexts"] == num_contexts


def test_contexts_are_bounded(make: Make) -> None:
    engines = make(max_contexts=2, backend="tensorrt")
    calls = [back_call(engines, reference) for reference in (10, 20, 30)]
    expected = []
    for call in calls:
        engines.run(**call)
        expected.append(call["outputs"]["velocity"].clone())
    assert engines.stats()["evicted"] == 1
    for call, velocity in zip(calls, expected, strict=True):
        engines.run(**call)
        assert torch.equal(call["outputs"]["velocity"], velocity)
    stats = engines.stats()
    assert (stats["contexts"], stats["evicted"], stats["live_contexts"]) == (6, 4, 2)


def test_the_arena_grows_and_old_graphs_are_forgotten(make: Make) -> None:
    hardware = ThreadHardware()
    engines = make(hardware=hardware, backend="tensorrt", cuda_graphs="on")
    small, large = back_call(engines, 10), back_call(engines, 60, batch=4)
    for _ in range(3):
        engines.run(**small)
    assert engines.stats()["replay"] == 1
    expected = small["outputs"]["velocity"].clone()
    engines.run(**large)
    assert len(hardware.allocated) == 2
    for _ in range(3):
        small["outputs"]["velocity"].zero_()
        engines.run(**small)  # a graph of the old arena would write where nothing is any more
        assert torch.equal(small["outputs"]["velocity"], expected)
    assert len(hardware.allocated) == 2


def test_too_little_memory_says_what_to_lower_and_engines_go_on(make: Make) -> None:
    hardware = ThreadHardware()
    engines = make(hardware=hardware)
    small, large = back_call(engines, 10), back_call(engines, 60, batch=4)
    engines.run(**small)
    hardware.free_bytes = hardware.allocated[-1]
    with pytest.raises(
        BackendError,
        match=r"no memory for the activations of the back plan at 4x12x.* are left\. Lower the res",
    ):
        engines.run(**large)
    expected = small["outputs"]["velocity"].clone()
    engines.run(**small)
    assert torch.equal(small["outputs"]["velocity"], expected)


def test_a_failing_library_is_quoted(make: Make) -> None:
    engines = make()
    call = back_call(engines)
    engines.run(**call)
    for engine in engines._library.module.engines:
        engine._fails = True
    with pytest.raises(
        BackendError, match=r"could not run the back plan at .*x.* \(enqueueV3: the kernel is on st"
    ):
        engines.run(**call)
    with pytest.raises(
        BackendError, match=r"profile \d was refused \(Error in set optimization profile async"
    ):
        engines.run(**back_call(engines, 60))
    engines = make(no_size=True)
    for _ in range(2):  # it is not kept as a size
        with pytest.raises(BackendError, match=r"not be computed .*\(no size of these shapes\)"):
            engines.run(**call)
    engines = make(no_context=True)
    with pytest.raises(
        BackendError, match=r"context could not be made .*OutOfMemory\)\. If memory .*max_contexts"
    ):
        engines.run(**call)


def test_lengths_that_no_profile_holds_name_the_rebuild_command(make: Make) -> None:
    engines = make()
    with pytest.raises(
        LadderError, match=r"tokens: 65 is more .* \(64\).*build-engine .*--max-reference-tokens 65"
    ):
        engines.run(**back_call(engines, 65))


def test_tensors_that_do_not_fit_are_refused_before_they_reach_an_address(make: Make) -> None:
    engines = make()
    good = back_call(engines)
    noisy = good["inputs"]["noisy"]
    wide = torch.empty(1, 12, noisy.shape[2] * 2)
    for change, message in (
        (
            {"noisy": noisy.half()},
            "noisy is torch.float16 on cpu .* takes contiguous torch.float32",
        ),
        ({"noisy": wide[..., ::2]}, r"noisy is torch.float32 .* strides \(\d+, \d+, 2\)"),
        ({"noisy": noisy[:, :, :-1]}, r"noisy has shape \(1, 12, 47\), expected .*noisy = 12, 48"),
        ({"text": torch.zeros(2, 5, 48)}, r"text has shape .*, expected \(batch = 1, text, 48"),
        ({"temb": None}, "back needs the input temb"),
    ):
        inputs = {k: v for k, v in (good["inputs"] | change).items() if v is not None}
        with pytest.raises(UsageError, match=message):
            engines.run("back", inputs, good["outputs"])
    with pytest.raises(UsageError, match="output velocity, for which no tensor was given"):
        engines.run("back", good["inputs"], {"influence": good["outputs"]["influence"]})
    short = good["outputs"] | {"velocity": torch.empty(1, 11, 16)}
    with pytest.raises(UsageError, match=r"velocity has shape \(1, 11, 16\), the plan writes"):
        engines.run("back", good["inputs"], short)
    odd = torch.empty(1 + good["outputs"]["velocity"].numel())[1:]
    odd = odd.view_as(good["outputs"]["velocity"])
    with pytest.raises(UsageError, match="velocity does not begin at a multiple of 64 bytes"):
        engines.run("back", good["inputs"], good["outputs"] | {"velocity": odd})


def test_an_input_inside_a_larger_tensor_is_copied_where_it_is_not_aligned(make: Make) -> None:
    engines = make()
    call = back_call(engines)
    engines.run(**call)
    expected = call["outputs"]["velocity"].clone()
    noisy = call["inputs"]["noisy"]
    shifted = torch.empty(noisy.numel() + 1)[1:].view_as(noisy).copy_(noisy)
    assert shifted.data_ptr() % 64
    call["inputs"]["noisy"] = shifted
    engines.run(**call)
    assert torch.equal(call["outputs"]["velocity"], expected)


def test_engines_that_go_wait_for_their_last_run(make: Make) -> None:
    hardware = ThreadHardware()
    engines = make(hardware=hardware)
    engines.run(**back_call(engines))
    last, finished = engines._last_use, list[Any]()
    hardware.finish = finished.append  # type: ignore[method-assign]
    del engines
    gc.collect()
    assert finished == [last]


def test_a_context_that_does_not_fit_the_arena_is_waited_for(make: Make) -> None:
    hardware = ThreadHardware()
    engines = make(hardware=hardware, backend="tensorrt", max_contexts=2)
    hardware.free_bytes = 0
    with pytest.raises(BackendError, match="no memory for the activations"):
        engines.run(**back_call(engines))
    assert [context.last_use for context in engines._contexts] == [engines._last_use]
    assert engines._last_use is not None


# Loading.


def test_plans_that_cannot_run_here_are_refused_with_the_reason(make: Make) -> None:
    again = r"Build it again with: build-engine .*--force"
    for changes, message in (
        ({"magic": "of another"}, rf"refuses the front plan .*Serialization assert.*{again}"),
        ({"faults": 3}, rf"stand-in GPU: version mismatch, unsupported cc\. .*{again}"),
        ({"profiles": []}, rf"front plan front.plan has 0 profiles, .* says 8\. {again}"),
        ({"inputs": []}, rf"front.plan has the tensors .*; the manifest says .*{again}"),
    ):
        with pytest.raises(EngineSetError, match=message):
            make(**changes)  # type: ignore[arg-type]


def test_a_plan_that_differs_from_the_manifest_is_refused(make: Make, tmp_path: Path) -> None:
    engines = make()
    path = tmp_path / "set" / "back.plan"
    text = path.read_text()
    for old, new, message in (
        ('["score_rows", "int64"', '["score_rows", "float32"', "score_rows is of .*FLOAT.* int64"),
        (
            '"reference": [[1, 57, 48]',
            '"reference": [[1, 50, 48]',
            "profile 7 takes reference from",
        ),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(EngineSetError, match=message):
            TensorRTEngines(
                engines.engine_set, library=engines._library, hardware=engines._hardware
            )
    path.unlink()
    with pytest.raises(EngineSetError, match=r"back.plan is missing or empty.*build-engine"):
        TensorRTEngines(engines.engine_set, library=engines._library, hardware=engines._hardware)


def test_a_stripped_plan_gets_its_weights_from_the_graphs_files(make: Make, truth: Any) -> None:
    engines = make(stripped=True, separate_anchor=True)
    arguments = request(FAMILY, steps=3)
    assert torch.equal(edit(engines, arguments), edit(truth(), arguments))


def test_a_stripped_plan_names_the_weight_that_does_not_fit(make: Make, tmp_path: Path) -> None:
    import onnx

    engine_set = make(stripped=True).engine_set
    path = tmp_path / "set" / "front.onnx"
    model = onnx.load(str(path), load_external_data=False)

    def load() -> None:
        hardware = ThreadHardware()
        TensorRTEngines(engine_set, library=make_library(hardware), hardware=hardware)

    weight = model.graph.initializer[0]
    name = weight.name
    plan = (tmp_path / "set" / "front.plan").read_text()
    # The plan keeps the graph that it was built from; the set's is changed below.
    (tmp_path / "kept").mkdir()
    for file in (path, path.with_suffix(".safetensors")):
        shutil.copy(file, tmp_path / "kept" / file.name)
    kept = str(tmp_path / "kept" / "front.onnx")
    (tmp_path / "set" / "front.plan").write_text(plan.replace(str(path), kept))
    path.unlink()
    with pytest.raises(
        EngineSetError, match=r"front.onnx, which says where the weights .* missing"
    ):
        load()
    del model.graph.initializer[0]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        EngineSetError, match=rf"lacks 1 weights .* \({re.escape(name)}\).*build-en"
    ):
        load()
    weight.ClearField("external_data")
    weight.data_location = weight.DEFAULT
    weight.raw_data = b"\0" * 4
    del weight.dims[:]
    model.graph.initializer.append(weight)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        BackendError, match=rf"refuses the weight {re.escape(name)}: the set holds 1"
    ):
        load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "runs on NVIDIA GPUs only; choose auto, cuda .*--backend onnxruntime"),
        ({"device": "gpu"}, "'gpu' is not one of auto, cuda, cuda:N"),
        ({"max_contexts": 1}, "max_contexts is 1; it must be a whole number, 2 or more"),
        ({"cuda_graphs": "maybe"}, "cuda_graphs is 'maybe'; allowed: auto, on, off"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(UsageError, match=message):
        TensorRTEngines(make().engine_set, **changes)


def test_without_a_gpu_loading_says_so(make: Make) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    engine_set = make().engine_set
    manifest = replace(engine_set.manifest, backend_version=rtx.__version__)
    with pytest.raises(EngineSetError, match="needs an NVIDIA GPU, and the CUDA driver shows none"):
        load_engines(EngineSet(folder=engine_set.folder, manifest=manifest))


# What the denoiser asks for.


class Broken:
    """Engines that write NaN into an output of anchor steps."""

    def __init__(self, engines: Any, output: str) -> None:
        self._engines, self._output = engines, output
        self.roles: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def run(self, role: str, inputs: Any, outputs: Any) -> None:
        self._engines.run(role, inputs, outputs)
        self.roles.append(role)
        if role == "anchor" and len(self.roles) > 2:
            outputs[self._output][..., 0] = float("nan")


@pytest.mark.parametrize("output", ["velocity", "influence"])
def test_what_is_not_finite_is_noticed_at_the_next_anchor(output: str, truth: Any) -> None:
    broken = Broken(truth(), output)
    with pytest.raises(DitrimError, match=f"the {output}.* of step 2 are not finite"):
        edit(broken, request(FAMILY, steps=5))
    assert broken.roles == ["front", "anchor", "front", "back", "front", "anchor"]


def test_latents_on_a_device_are_looked_at_on_anchor_steps(
    truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditrim.runtime.denoising import request as requests

    # On a GPU it does not look at the values of later steps.
    monkeypatch.setattr(requests, "check_inputs", lambda *_, **__: None)

    def spoil(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["latents"][:] = float("inf")
        return values

    with pytest.raises(UsageError, match="noisy_latents hold NaN or infinite values at step 2"):
        edit(truth(), request(FAMILY, steps=5) | {"callback_on_step_end": spoil})


# The real library has what the stand-in has.


def _parameters(text: str) -> list[list[str]]:
    """Parameter names of each signature in a pybind11 docstring."""
    text = re.sub(r"<[^>]*>", "", text)  # defaults
    return [
        re.findall(r"(\w+): ", signature)
        for signature in re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) ->", text, re.MULTILINE)
    ]


def test_tensorrt_rtx_has_every_name_that_the_stand_in_has() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    for kind in (
        stand_in.IRuntimeCache,
        stand_in.IRuntimeConfig,
        stand_in.IExecutionContext,
        stand_in.ICudaEngine,
        stand_in.Refitter,
    ):
        real = getattr(rtx, kind.__name__)
        for name, value in vars(kind).items():
            if name.startswith("_"):
                continue
            assert hasattr(real, name), f"{kind.__name__}.{name}"
            if inspect.isfunction(value):
                ours = list(inspect.signature(value).parameters)
                theirs = _parameters(getattr(real, name).__doc__)
                lengths = [len(names) for names in theirs]
                assert len(ours) in lengths, (kind.__name__, name, ours, theirs)
    module = make_library(ThreadHardware()).module
    for name in vars(module):
        if name == "engines":
            continue
        for member in getattr(getattr(module, name), "__members__", ()):
            assert member in getattr(rtx, name).__members__, f"{name}.{member}"
        assert hasattr(rtx, name)
    for name in ("deserialize_cuda_engine", "get_engine_validity"):
        assert hasattr(rtx.Runtime, name)
    for member, flag in stand_in.EngineInvalidityDiagnostics.__members__.items():
        assert int(rtx.EngineInvalidityDiagnostics.__members__[member]) == int(flag)
    assert hasattr(rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(rtx.IRuntimeConfig, "cuda_graph_strategy")


def test_tensorrt_rtx_itself_refuses_a_damaged_plan(make: Make, tmp_path: Path) -> None:
    """The real `Runtime` on a mapped file; without a GPU it gets as far as the file's header."""
    pytest.importorskip("tensorrt_rtx")
    from ditrim.engines.backends.tensorrt.library import open_library

    engines = make()
    (tmp_path / "set" / "front.plan").write_bytes(b"\0" * 4096)
    with pytest.raises(
        EngineSetError, match=r"refuses the front plan .*malformed engine.*build-en"
    ):
        TensorRTEngines(
            engines.engine_set,
            library=open_library("tensorrt-rtx"),
            hardware=engines._hardware,
        )


def test_torch_has_what_the_gpu_side_uses() -> None:
    for kind, names in (
        (torch.cuda.Event, ("record", "synchronize")),
        (torch.cuda.Stream, ("wait_stream", "wait_event", "synchronize")),
    ):
        assert all(hasattr(kind, name) for name in names)
