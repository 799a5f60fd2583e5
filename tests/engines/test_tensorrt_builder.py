"""Plans built for real by TensorRT-RTX, which needs no GPU for it, and what is said of failures."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ditrim.engines.backends.tensorrt.builder import (
    BuiltPlan,
    LibraryFacts,
    ask_library,
    build_plan,
    check_attention,
    choose_target,
    describe_target,
)
from ditrim.engines.backends.tensorrt.failures import explain_failure
from ditrim.engines.backends.tensorrt.library import Gpu, present_gpu
from ditrim.engines.backends.tensorrt.request import PlanRequest, Target
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets.profiles import is_scored
from ditrim.engines.sets.specs import TensorSpec
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.log_sum_exp import DOMAIN
from ditrim.plugins.onnx_function import OPSET, log_sum_exp_function

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") and importlib.util.find_spec("polygraphy")
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx and polygraphy are not installed")
no_gpu = pytest.mark.skipif(present_gpu() is not None, reason="there is a GPU, which changes it")

TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HEADS, HEAD_WIDTH = 2, 64
WIDTH = HEADS * HEAD_WIDTH
H100 = Gpu(name="NVIDIA H100", capability=(9, 0), num_bytes=80 << 30, driver="570.1")
T4 = Gpu(name="Tesla T4", capability=(7, 5), num_bytes=16 << 30, driver="570.1")


class Steps:
    """Remembers what a build says."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.updates: list[tuple[int, int, str]] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        self.updates.append((done, total, unit))


def write_graph(
    path: Path, precision: str, *, scored: bool, hidden: int = 128
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A BACK of one attention, one MLP and, if it scores, Eq. 9; its inputs and outputs."""
    kind, generator = TYPES[precision], np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> onnx.TensorProto:
        values = generator.standard_normal((rows, columns), np.float32) * rows**-0.5
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        return numpy_helper.from_array(values.astype(dtype), name)

    def constant(name: str, *values: int) -> onnx.TensorProto:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    weights = [weight(name, WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")]
    weights += [weight("w1", WIDTH, hidden), weight("w2", hidden, WIDTH)]
    weights += [constant("heads", 0, 0, HEADS, HEAD_WIDTH), constant("joined", 0, 0, WIDTH)]
    nodes = [helper.make_node("Concat", ["noisy", "reference"], ["all"], axis=1)]
    for name, source in (("q", "noisy"), ("k", "all"), ("v", "all")):
        nodes += [
            helper.make_node("MatMul", [source, f"w{name}"], [f"{name}1"]),
            helper.make_node("Reshape", [f"{name}1", "heads"], [f"{name}2"]),
            helper.make_node("Transpose", [f"{name}2"], [name], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["a1"]),
        helper.make_node("Transpose", ["a1"], ["a2"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["a2", "joined"], ["a3"]),
        helper.make_node("MatMul", ["a3", "wo"], ["a4"]),
        helper.make_node("MatMul", ["a4", "w1"], ["m1"]),
        helper.make_node("Sigmoid", ["m1"], ["m2"]),
        helper.make_node("MatMul", ["m2", "w2"], ["velocity"]),
    ]
    inputs = {"noisy": ("batch", "noisy", WIDTH), "reference": ("batch", "reference", WIDTH)}
    outputs: dict[str, tuple[str | int, ...]] = {"velocity": ("batch", "noisy", WIDTH)}
    kinds = {"noisy": kind, "reference": kind, "velocity": kind}
    functions = []
    if scored:
        weights += [constant("last", -1), constant("axis_1", 1), constant("zero", 0)]
        weights += [constant("far", 1 << 40), constant("axis_2", 2)]
        nodes += [
            helper.make_node("Gather", ["q", "score_rows"], ["rows"], axis=2),
            helper.make_node("Shape", ["noisy"], ["num_noisy"], start=1, end=2),
            helper.make_node("Slice", ["k", "num_noisy", "far", "axis_2"], ["kr"]),
            helper.make_node("ReduceSum", ["k", "last"], ["b1"], keepdims=0),
            helper.make_node("Cast", ["b1"], ["b2"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["b2", "b2"], ["no_bias"]),
            helper.make_node(
                "LogSumExp", ["rows", "k", "no_bias"], ["n"], domain=DOMAIN, scale=0.1
            ),
            helper.make_node("Neg", ["n"], ["bias"]),
            helper.make_node("LogSumExp", ["kr", "rows", "bias"], ["c"], domain=DOMAIN, scale=0.1),
            helper.make_node("Exp", ["c"], ["received"]),
            helper.make_node("ReduceSum", ["received", "axis_1"], ["influence"], keepdims=0),
        ]
        inputs["score_rows"] = ("rows",)
        outputs["influence"] = ("batch", "reference")
        kinds |= {"score_rows": TensorProto.INT64, "influence": TensorProto.FLOAT}
        functions = [log_sum_exp_function()]

    def info(items: dict[str, Any]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(k, kinds[k], list(v)) for k, v in items.items()]

    graph = helper.make_graph(nodes, "back", info(inputs), info(outputs), weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    names = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32", kind: NAMES[precision]}

    def specs(items: dict[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=name, dtype=names[kinds[name]], shape=shape)
            for name, shape in items.items()
        )

    return specs(inputs), specs(outputs)


@pytest.fixture
def request_plan(tmp_path: Path) -> Callable[..., PlanRequest]:
    """Make a request for a plan of `write_graph`'s graph."""

    def make(
        *, precision: str = "bf16", role: str = "back", hidden: int = 128, **options: Any
    ) -> PlanRequest:
        options = {"rungs": 2, "max_reference_tokens": 64, "max_noisy_tokens": 64} | options
        asked = BuildOptions(
            backend="tensorrt-rtx", weights="random", precision=precision, max_batch=2, **options
        )
        scored = is_scored(role, separate_anchor=asked.separate_anchor)
        graph = tmp_path / f"{role}.onnx"
        inputs, outputs = write_graph(graph, precision, scored=scored, hidden=hidden)
        return PlanRequest(
            role=role,
            graph=graph,
            plan=tmp_path / f"{role}.plan",
            inputs=inputs,
            outputs=outputs,
            profiles=asked.profiles()[role],
            target=Target(backend="tensorrt-rtx", capabilities=asked.compute_capability, gpu=None),
            options=asked,
        )

    return make


def build(request: PlanRequest) -> BuiltPlan:
    return build_plan(request, Steps())


@needs_rtx
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_plan_with_scoring_is_built_without_a_gpu(
    request_plan: Callable[..., PlanRequest], precision: str
) -> None:
    request, steps = request_plan(precision=precision), Steps()
    built = build_plan(request, steps)
    assert request.plan.stat().st_size == built.num_bytes > 10_000
    assert built.num_attentions == 1
    assert built.spec.profiles == request.profiles
    assert built.spec.inputs == request.inputs
    # The library logs what the activations of each profile take.
    assert built.spec.device_memory_bytes is not None
    assert len(built.spec.device_memory_bytes) == 2
    assert 0 < built.spec.device_memory_bytes[0] <= built.spec.device_memory_bytes[1]
    assert steps.stages[0] == "Build back plan: Parse"
    assert steps.stages[-1] == "Build back plan: Write"
    assert len(steps.stages) > 3
    assert all(0 <= done <= total and unit == "steps" for done, total, unit in steps.updates)
    done = [done for done, _, _ in steps.updates]
    assert done == sorted(done)


@needs_rtx
def test_another_profile_costs_no_second_copy_of_the_weights(
    request_plan: Callable[..., PlanRequest],
) -> None:
    hidden = 65536
    weight_bytes = 2 * WIDTH * hidden * 2  # w1 and w2 in bf16
    one = build(request_plan(rungs=1, hidden=hidden, separate_anchor=True))
    three = build(request_plan(rungs=3, hidden=hidden, separate_anchor=True))
    assert weight_bytes > 30_000_000
    assert one.num_bytes > weight_bytes
    growth = (three.num_bytes - one.num_bytes) / 2
    print(f"a rung adds {growth / 1e6:.2f} MB to {one.num_bytes / 1e6:.1f} MB")
    assert growth < 0.1 * one.num_bytes
    assert three.weights_bytes == one.weights_bytes


@needs_rtx
def test_unfused_attention_fails_and_names_the_option_that_accepts_it(
    request_plan: Callable[..., PlanRequest],
) -> None:
    with pytest.raises(
        BackendError,
        match=r"TensorRT-RTX cannot build the back plan: it has no fused kernel .* in fp32.*"
        r"--allow-unfused.*It said: .*dedicated kernel",
    ):
        build(request_plan(precision="fp32"))
    built = build(request_plan(precision="fp32", allow_unfused=True))
    assert built.num_attentions == 1
    assert built.num_bytes > 10_000


@needs_rtx
@no_gpu
def test_stripped_plan_without_a_gpu_says_what_it_needs(
    request_plan: Callable[..., PlanRequest],
) -> None:
    with pytest.raises(BackendError, match=r"without weights: it wants to run code on a GPU"):
        build(request_plan(role="front", weights_stripped=True))


@needs_rtx
@no_gpu
def test_capabilities_that_are_named_are_built_for(
    request_plan: Callable[..., PlanRequest],
) -> None:
    assert build(request_plan(compute_capability=("8.9",), rungs=1)).num_bytes > 10_000
    target = Target(backend="tensorrt-rtx", capabilities=("9.9",), gpu=None)
    with pytest.raises(UsageError, match=r"--compute-capability 9\.9: TensorRT-RTX .* for 7\.5, 8"):
        ask_library(target)


@needs_rtx
def test_library_says_what_it_builds_for_by_default() -> None:
    target = Target(backend="tensorrt-rtx", capabilities=None, gpu=None)
    facts = ask_library(target)
    assert {"8.6", "8.9", "12.0"} <= set(facts.default_capabilities)
    assert "7.5" not in facts.default_capabilities
    described = describe_target(target, facts, BuildOptions(backend="tensorrt-rtx"))
    assert described == {
        "compute_capabilities": list(facts.default_capabilities),
        "gpu": None,
        "driver": None,
        "weights": "included",
        "separate_anchor": False,
    }


def test_library_without_attention_needs_unfused_attention_to_be_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts = LibraryFacts(
        version="10.9.0.34",
        polygraphy="0.53.6",
        capabilities=(),
        default_capabilities=(),
        missing_operators=("Attention", "RMSNormalization", "RotaryEmbedding"),
    )
    with pytest.raises(
        BackendError,
        match=r"TensorRT 10\.9\.0\.34 has no attention operator, .* from 10\.14 on\), or accept it "
        r"with --allow-unfused",
    ):
        check_attention(choose_target(BuildOptions(backend="tensorrt"), H100), facts)
    accepted = choose_target(BuildOptions(backend="tensorrt", allow_unfused=True), H100)
    assert accepted.identity() == choose_target(BuildOptions(backend="tensorrt"), H100).identity()
    check_attention(accepted, facts)
    assert "it may run unfused" in caplog.text
    caplog.clear()
    newer = replace(facts, version="10.14", missing_operators=("RMSNormalization",))
    check_attention(choose_target(BuildOptions(backend="tensorrt"), H100), newer)
    assert not caplog.text


@needs_rtx
def test_parser_of_tensorrt_rtx_lacks_no_operator() -> None:
    facts = ask_library(Target(backend="tensorrt-rtx", capabilities=None, gpu=None))
    assert facts.missing_operators == ()


@needs_rtx
def test_gpu_that_the_library_does_not_know_is_named_before_the_build() -> None:
    target = Target(backend="tensorrt-rtx", capabilities=None, gpu=H100)
    with pytest.raises(BackendError, match=r"NVIDIA H100 has 9\.0\. Use --backend tensorrt"):
        ask_library(target)


@needs_rtx
def test_graph_that_cannot_be_parsed_is_a_clear_error(
    request_plan: Callable[..., PlanRequest],
) -> None:
    request = request_plan(role="front")
    model = onnx.load(str(request.graph))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Frobnicate", ""
    request.graph.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match=r"its parser does not take the graph.*Frobnicate"):
        build(request)


def workers_of(pid: int) -> list[int]:
    """Building processes that a process started; it may have other children."""
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [
        child
        for child in children
        if b"tensorrt.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@needs_rtx
def test_interrupt_inside_the_builder_stops_it_at_once(
    request_plan: Callable[..., PlanRequest],
) -> None:
    class Interrupting(Steps):
        worker = 0

        def stage(self, name: str) -> None:
            super().stage(name)
            if len(self.stages) == 3:  # parsed, and inside the builder
                (self.worker,) = workers_of(os.getpid())
                self.start = time.monotonic()
                raise KeyboardInterrupt

    request, steps = request_plan(), Interrupting()
    with pytest.raises(KeyboardInterrupt):
        build_plan(request, steps)
    assert time.monotonic() - steps.start < 2
    assert not Path(f"/proc/{steps.worker}").exists()
    assert not request.plan.exists()


@needs_rtx
def test_build_that_runs_out_of_memory_says_what_to_lower(
    request_plan: Callable[..., PlanRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As much address space as the libraries take to load, and little more.
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -v 1200000\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    request = request_plan(role="front", hidden=1 << 18)  # 134 MB of weights
    monkeypatch.setattr(sys, "executable", str(limited))
    with pytest.raises(BackendError) as raised:
        build(request)
    assert "2 rungs up to 64 reference tokens" in str(raised.value), raised.value
    assert "lower --max-batch, --resolution" in str(raised.value)


@needs_rtx
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"was killed while it built the back plan, as the system does when mem"),
        (signal.SIGSEGV, r"TensorRT-RTX crashed while it built the back plan \(SIGSEGV\); this is"),
    ],
)
def test_builder_that_dies_is_an_error_and_not_the_end_of_the_process(
    request_plan: Callable[..., PlanRequest], number: int, message: str
) -> None:
    class Killing(Steps):
        def stage(self, name: str) -> None:
            super().stage(name)
            if len(self.stages) == 3:
                os.kill(workers_of(os.getpid())[0], number)

    with pytest.raises(BackendError, match=message) as raised:
        build_plan(request_plan(), Killing())
    if number == signal.SIGKILL:
        assert "2 rungs up to 64 reference tokens" in str(raised.value)
        assert "lower --max-batch, --resolution" in str(raised.value)


@needs_rtx
def test_builder_dies_with_the_process_that_waits_for_it(
    request_plan: Callable[..., PlanRequest], tmp_path: Path
) -> None:
    job = request_plan().job()
    (tmp_path / "job.json").write_text(json.dumps(job))
    program = (
        "import json, sys\n"
        "from ditrim.engines.backends.tensorrt import builder as b\n"
        "class Steps:\n"
        "    def stage(self, name): print(name, flush=True)\n"
        "    def update(self, done, total, unit): pass\n"
        "class Request: role = 'back'\n"
        f"b._run_worker(json.load(open({str(tmp_path / 'job.json')!r})), Request(), Steps())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Build back plan: Parse\n"
        (worker,) = workers_of(process.pid)
        process.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    gone = not Path(f"/proc/{worker}").exists()
    assert gone or "State:\tZ" in Path(f"/proc/{worker}/status").read_text()


def test_tensorrt_needs_the_gpu_that_will_run_its_plans() -> None:
    with pytest.raises(BackendError, match=r"builds on the GPU that will run the plans, and the"):
        choose_target(BuildOptions(backend="tensorrt"), None)
    target = choose_target(BuildOptions(backend="tensorrt"), H100)
    assert target.identity() == {
        "gpu": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "570.1",
    }


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_gpu_too_old_for_the_precision_is_named(backend: str) -> None:
    with pytest.raises(BackendError, match=r"Tesla T4 has .* 7\.5 and no bf16; use --precision fp"):
        choose_target(BuildOptions(backend=backend), T4)
    assert choose_target(BuildOptions(backend=backend, precision="fp16"), T4).gpu is T4


def test_rtx_target_is_what_was_named_else_the_gpu_else_the_default() -> None:
    options = BuildOptions(backend="tensorrt-rtx")
    named = BuildOptions(backend="tensorrt-rtx", compute_capability=("12.0", "8.9"))
    assert choose_target(named, H100).identity() == {"compute_capabilities": ["12.0", "8.9"]}
    assert choose_target(options, H100).identity() == {"compute_capabilities": ["9.0"]}
    assert choose_target(options, None).identity() == {"compute_capabilities": "default"}


def request_for(tmp_path: Path, backend: str, gpu: Gpu | None, **options: Any) -> PlanRequest:
    asked = BuildOptions(backend=backend, **options)
    return PlanRequest(
        role="back",
        graph=tmp_path / "back.onnx",
        plan=tmp_path / "back.plan",
        inputs=(TensorSpec(name="noisy", dtype="bfloat16", shape=("batch", "noisy", 8)),),
        outputs=(TensorSpec(name="influence", dtype="float32", shape=("batch", "reference")),),
        profiles=asked.profiles()["back"],
        target=choose_target(asked, gpu),
        options=asked,
    )


def test_plugin_and_timing_cache_are_for_tensorrt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = request_for(tmp_path, "tensorrt", H100).job()
    assert job["plugin_capability"] == (9, 0)
    assert job["timing_cache"] == str(tmp_path / "cache/ditrim/NVIDIA-H100-sm90.timing")
    assert (tmp_path / "cache/ditrim").is_dir()
    given = request_for(tmp_path, "tensorrt", H100, timing_cache=str(tmp_path / "a/b.cache")).job()
    assert given["timing_cache"] == str(tmp_path / "a/b.cache")
    assert (
        request_for(tmp_path, "tensorrt", H100, timing_cache="none").job()["timing_cache"] is None
    )
    # TensorRT-RTX aborts the process when its parser meets a plugin.
    job = request_for(tmp_path, "tensorrt-rtx", None).job()
    assert (job["plugin_capability"], job["timing_cache"]) == (None, None)


def test_job_holds_the_shapes_of_every_profile(tmp_path: Path) -> None:
    job = request_for(
        tmp_path,
        "tensorrt-rtx",
        None,
        workspace=8 << 30,
        optimization_level=4,
        rungs=2,
        opt_batch=2,
    ).job()
    assert job["profiles"] == [{"noisy": [(1, 1, 8), (2, 4096, 8), (4, 4272, 8)]}] * 2
    assert (job["workspace"], job["optimization_level"]) == (8 << 30, 4)
    assert job["scored_rows"] == 4272
    assert json.loads(json.dumps(job))["backend"] == "tensorrt-rtx"


# Lines as the libraries log them.
FAILURES = [
    (
        "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 22.)",
        r"memory ran out\. Now: 8 rungs up to 4272 reference tokens, 4272 noisy and 2459 text "
        r"tokens, batch 4\. To use less, lower --max-batch, --resolution .*--rungs or --workspace",
    ),
    (
        "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
        "implementation for node {ForeignNode[a...b]}.)",
        r"found no implementation for a layer\. Often the workspace is too small: raise or leave",
    ),
    (
        "Error Code 4: Internal Error (Tensor volume exceeds 2147483647, dimensions are [1,2,3])",
        r"more elements than the library takes\. Now: .* To use less, lower --max-batch",
    ),
    (
        "Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm75, "
        "because the model contains HW-specific datatypes: b16.)",
        r"bf16 does not exist on a GPU that it is built for; use --precision fp16",
    ),
    (
        "Error Code 1: Cuda Runtime (In generateForCurrent (cudaError 35: CUDA driver version is "
        "insufficient for CUDA runtime version))",
        r"it needs a GPU, and the CUDA driver is missing or too old",
    ),
    ("Error Code 4: something new", r"cannot build the back plan\. It said: Error Code 4: someth"),
]


@pytest.mark.parametrize(("line", "message"), FAILURES)
def test_failures_of_the_builder_say_what_to_lower(tmp_path: Path, line: str, message: str) -> None:
    request = request_for(tmp_path, "tensorrt-rtx", None)
    text = explain_failure(["Invalid Engine.", line, line], "tensorrt-rtx", request)
    assert re.search(message, text), text
    assert text.count(line) == 1  # said once, and not the loader's own words
    assert "Invalid Engine" not in text


def test_missing_library_is_named_with_how_to_install_it() -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    with pytest.raises(BackendError, match=r"'tensorrt' is not installed; install it with: pip in"):
        ask_library(Target(backend="tensorrt", capabilities=None, gpu=H100))
