"""The torch backend by itself: graphs of a bounded number, scoring, and what a step waits for."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILY_NAMES, make_call, tiny_transformer
from tiny_pipelines import request, small_pictures, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import ditrim
from ditrim.engines.backends.torch.cuda_graphs import CudaGraphs
from ditrim.engines.backends.torch.scoring import can_use_kernel, score_with_kernel
from ditrim.plugins.errors import UsageError
from ditrim.plugins.reference import influence_reference

SPLIT: dict[str, Any] = {"front_depth": 1, "layers": (2, 3)}


def inputs_of(engines: Any, num_reference: int = 20, batch: int = 1) -> dict[str, torch.Tensor]:
    """Random tensors for FRONT."""
    sizes = {"batch": batch, "noisy": 20, "reference": num_reference, "text": 6, "rows": 20}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for spec in engines.engine_set.manifest.graphs["front"].inputs:
        shape = [sizes.get(axis, axis) for axis in spec.shape]
        made[spec.name] = torch.rand(shape, generator=generator)
    for part, length in (("noisy", 20), ("text", 6), ("reference", num_reference)):
        shape = [length, 8] if part != "reference" else [batch, length, 8]
        for name in ("cos", "sin"):
            made[f"{part}_rope_{name}"] = torch.rand(shape, generator=generator)
    return made


def outputs_of(engines: Any, role: str, num_reference: int = 20) -> dict[str, torch.Tensor]:
    graph = engines.engine_set.manifest.graphs["front" if role == "front" else "back"]
    sizes = {"batch": 1, "noisy": 20, "reference": num_reference, "text": 6}
    return {
        spec.name: torch.zeros([sizes.get(axis, axis) for axis in spec.shape])
        for spec in graph.outputs
    }


def run_step(engines: Any, role: str, num_kept: int) -> dict[str, torch.Tensor]:
    """FRONT, then BACK on the first so many reference tokens."""
    given, hidden = inputs_of(engines), outputs_of(engines, "front")
    engines.run("front", given, hidden)
    back = {name: tensor for name, tensor in given.items() if "_rope_" in name} | hidden
    for name in ("reference", "reference_rope_cos", "reference_rope_sin"):
        back[name] = back[name][:, :num_kept].contiguous()
    outputs = outputs_of(engines, role, num_kept)
    engines.run(role, back | {"score_rows": torch.arange(20)}, outputs)
    return outputs


# --- CUDA graphs, their capture replaced by a function that runs ----------------------------------


class Recorder:
    """Captures as a GPU does: what is queued runs again on the same tensors."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_graphs_give_the_same_and_are_captured_once_a_shape(family: str) -> None:
    pipe = tiny_pipeline(family)
    plain = ditrim.torch_engines(pipe, **SPLIT)
    graphed = ditrim.torch_engines(pipe, **SPLIT)
    recorder = Recorder()
    graphed._graphs = CudaGraphs(4, recorder)
    for role, num_kept in (("anchor", 20), ("back", 8), ("back", 12), ("back", 8), ("anchor", 20)):
        expected, found = run_step(plain, role, num_kept), run_step(graphed, role, num_kept)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor)
    # FRONT, the anchor and two lengths.
    assert recorder.captures == 4
    assert recorder.replays == 10
    run_step(graphed, "back", 5)  # one more: the least recently used goes
    assert recorder.captures == 5
    run_step(graphed, "back", 12)
    assert recorder.captures == 6
    assert len(graphed._graphs._kept) == 4


def test_graphs_are_captured_anew_when_a_lora_or_the_place_of_weights_changes() -> None:
    pipe = tiny_pipeline("qwen-edit")
    engines = ditrim.torch_engines(pipe, **SPLIT)
    recorder = Recorder()
    engines._graphs = CudaGraphs(4, recorder)
    run_step(engines, "back", 8)
    assert recorder.captures == 2
    run_step(engines, "back", 8)
    assert recorder.captures == 2
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.data = weight.data.clone()
    run_step(engines, "back", 8)
    assert recorder.captures == 4
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    run_step(engines, "back", 8)
    assert recorder.captures == 6
    layer: Any = pipe.transformer.transformer_blocks[0].attn.to_q
    layer.set_scale("default", 3.0)
    run_step(engines, "back", 8)
    assert recorder.captures == 8
    pipe.transformer.disable_adapters()
    run_step(engines, "back", 8)
    assert recorder.captures == 10


def test_graphs_of_a_caller_in_inference_mode_serve_others() -> None:
    engines = ditrim.torch_engines(tiny_pipeline("qwen-edit"), **SPLIT)
    recorder = Recorder()
    engines._graphs = CudaGraphs(4, recorder)
    with torch.inference_mode():
        expected = run_step(engines, "back", 8)
    found = run_step(engines, "back", 8)
    assert torch.equal(found["velocity"], expected["velocity"])
    assert recorder.captures == 2


def test_graphs_are_refused_where_hooks_exchange_weights_within_a_call() -> None:
    cpu = torch.device("cpu")
    kinds: list[Callable[[Any], None]] = [
        lambda own: own.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        lambda own: own.enable_group_offload(cpu, offload_type="leaf_level"),
    ]
    for change in kinds:
        pipe = tiny_pipeline("qwen-edit")
        change(pipe.transformer)
        engines = ditrim.torch_engines(pipe, **SPLIT)
        engines._graphs = CudaGraphs(4, Recorder())
        with pytest.raises(UsageError, match="leave cuda_graphs out"):
            run_step(engines, "back", 8)


# --- scoring --------------------------------------------------------------------------------------


def score_interpreted(seed: int) -> tuple[Any, Any, float]:
    """Score bfloat16 heads by the operator that GPUs run; what float64 says; the largest value."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (
        torch.randn(2, 3, length, 32, generator=generator).bfloat16() for length in (40, 70)
    )
    values = torch.randn(2, 3, 70, 32, generator=generator).bfloat16()
    scale = 32**-0.5
    found = score_with_kernel(queries, keys, keys[:, :, 50:], values[:, :, 50:], scale)
    arrays = [tensor.double().numpy() for tensor in (queries, keys, values)]
    return found.numpy(), influence_reference(*arrays, 50, scale), float(found.max())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_operator_of_gpus_scores_as_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, expected, largest = pool.submit(score_interpreted, 0).result()
    assert found.shape == (2, 20)
    assert np.abs(found - expected).max() < 1e-4 * largest


def test_the_operators_shape_is_known_without_running_it() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        queries, keys = torch.empty(2, 3, 40, 32), torch.empty(2, 3, 70, 32)
        found = score_with_kernel(queries, keys, keys[:, :, 50:], keys[:, :, 50:], 1.0)
    assert tuple(found.shape) == (2, 20)
    assert found.dtype == torch.float32


def test_the_kernel_is_for_gpus_and_16_bits() -> None:
    assert not can_use_kernel(torch.empty(1, dtype=torch.bfloat16), 128)


# --- what a step waits for ------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes operations that would make a program wait for its GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in self.NAMES or name.startswith("unique"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("role", ["back", "anchor"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_front_and_back_read_nothing_back(family: str, role: str) -> None:
    engines = ditrim.torch_engines(tiny_pipeline(family), **SPLIT)
    with Waits() as waits:
        run_step(engines, role, 8)
    assert waits.seen == []


def test_a_reduced_step_reads_its_time_and_compares_ids_and_nothing_else() -> None:
    pipe = tiny_pipeline("flux-kontext")
    waits, counts = Waits(), []

    def count(pipe: Any, step: int, t: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
        counts.append(len(waits.seen))
        return values

    policy = ditrim.ToPi(tau=0.5, interval=4)
    with ditrim.attach(pipe, ditrim.torch_engines(pipe, **SPLIT), policy), small_pictures(64):
        plan = request("flux-kontext") | {"callback_on_step_end": count}
        with waits:
            pipe(**plan)
    in_plain: list[int] = []
    plain = Waits()

    def count_plain(pipe: Any, step: int, t: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
        in_plain.append(len(plain.seen))
        return values

    with small_pictures(64), plain:
        pipe(**request("flux-kontext") | {"callback_on_step_end": count_plain})
    ours = np.diff(counts) - np.diff(in_plain)
    # On a CPU the timestep is read at every step, and the ids are compared; on a GPU the timestep
    # once a request (`Request.time_of`), and ids that are the same objects never (`Unchanged`).
    assert max(ours) <= 1 + 2


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_a_session_runs_on_a_transformer_alone(family: str) -> None:
    transformer = tiny_transformer(family)
    engines = ditrim.torch_engines(transformer, **SPLIT)
    call = make_call(family)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, call.num_noisy, 16, generator=generator)
    pooled = {"pooled_text": call.kwargs.get("pooled_projections"), "guidance": 2.5}
    session = ditrim.EditSession(engines, ditrim.ToPi(tau=0.5, interval=2))
    processors = [block.attn.processor for block in transformer.transformer_blocks]
    steps = list(
        session.denoise(
            noisy=noisy,
            noisy_grid=(4, 5),
            references=[torch.randn(1, 20, 16, generator=generator)],
            reference_grids=[(5, 4)],
            text_embeds=call.kwargs["encoder_hidden_states"],
            sigmas=[1.0, 0.75, 0.5, 0.25],
            **(pooled if family == "flux-kontext" else {}),
        )
    )
    assert [record.role for step in steps for record in step.records][:2] == ["anchor", "reduced"]
    assert bool(steps[-1].latents.isfinite().all())
    # Nothing stays behind between calls.
    assert processors == [block.attn.processor for block in transformer.transformer_blocks]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
