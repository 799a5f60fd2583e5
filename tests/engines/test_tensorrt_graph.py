"""Graphs as TensorRT and TensorRT-RTX get them: the same results, in a form that they take."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ditrim.engines.backends.tensorrt.builder import build_plan
from ditrim.engines.backends.tensorrt.graph import (
    NEW_OPERATORS,
    graph_for_backend,
    log_sum_exp_unrolled,
)
from ditrim.engines.backends.tensorrt.refit import weights_of
from ditrim.engines.backends.tensorrt.request import PlanRequest, Target
from ditrim.engines.build.build import run_build
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets.specs import TensorSpec
from ditrim.export.assemble import check_linked
from ditrim.plugins.blocks import RTX_MOST_BLOCKS, RTX_ROWS, num_row_blocks
from ditrim.plugins.log_sum_exp import DOMAIN
from ditrim.plugins.onnx_function import OPSET, log_sum_exp_function
from ditrim.plugins.reference import log_sum_exp_reference

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") and importlib.util.find_spec("polygraphy")
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt-rtx and polygraphy are not installed")


def scoring_model() -> onnx.ModelProto:
    """A call of the portable function, float32, head width 16."""
    shapes = {"q": ["b", "h", "r", 16], "k": ["b", "h", "n", 16], "bias": ["b", "h", "n"]}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "h", "r"])
    node = helper.make_node("LogSumExp", ["q", "k", "bias"], ["y"], domain=DOMAIN, scale=0.25)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        functions=[log_sum_exp_function()],
        opset_imports=opsets,
        ir_version=10,
    )


def run_model(model: onnx.ModelProto | Path, feed: Mapping[str, Any]) -> list[Any]:
    import onnxruntime

    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source).run(None, dict(feed))


@pytest.mark.parametrize("num_blocks", [1, 2, 8, 16])
def test_unrolled_scoring_agrees_with_the_float64_reference(num_blocks: int) -> None:
    model = graph_for_backend(scoring_model(), "tensorrt-rtx", num_blocks=num_blocks)
    onnx.checker.check_model(model)
    assert model.functions[0] == log_sum_exp_unrolled(num_blocks)
    assert not {item.op_type for item in model.functions[0].node} & {"Scan", "Loop"}
    generator, largest = np.random.default_rng(num_blocks), 0.0
    # One row, fewer rows than blocks, as many, more that do not divide evenly.
    for num_rows in (1, 3, 8, 9, 16, 45, 64):
        for magnitude in (1.0, 1e4):
            queries = generator.standard_normal((2, 3, num_rows, 16), np.float32) * magnitude
            keys = generator.standard_normal((2, 3, 9, 16), np.float32)
            bias = generator.standard_normal((2, 3, 9), np.float32) * magnitude
            bias[:, :, 0] = -np.inf
            bias[1, 2] = -np.inf  # a head whose every result is the logarithm of zero
            (found,) = run_model(model, {"q": queries, "k": keys, "bias": bias})
            expected = log_sum_exp_reference(queries, keys, bias, 0.25)
            assert found.shape == expected.shape
            is_nothing = np.isneginf(found)
            assert (is_nothing == (expected < -1e30)).all()
            error = np.abs(found[~is_nothing] - expected[~is_nothing]) / magnitude
            largest = max(largest, float(error.max()))
    print(f"{num_blocks} blocks: largest error {largest:.1e}")
    assert largest < 1e-5


def test_result_beyond_the_finite_spoils_no_later_block() -> None:
    model = graph_for_backend(scoring_model(), "tensorrt-rtx", num_blocks=4)
    queries = np.ones((1, 1, 8, 16), np.float32)
    queries[0, 0, 0], queries[0, 0, 1] = np.inf, np.nan
    keys, bias = np.ones((1, 1, 3, 16), np.float32), np.zeros((1, 1, 3), np.float32)
    (found,) = run_model(model, {"q": queries, "k": keys, "bias": bias})
    expected = log_sum_exp_reference(queries[:, :, 2:], keys, bias, 0.25)
    np.testing.assert_allclose(found[:, :, 2:], expected, rtol=1e-6)


def test_blocks_are_of_256_rows_where_there_are_enough_of_them() -> None:
    assert [num_row_blocks(rows) for rows in (1, 144, RTX_ROWS)] == [1, 1, 1]
    assert [num_row_blocks(rows) for rows in (257, 1024, 2048, 2049, 4096)] == [8, 8, 8, 9, 16]
    assert num_row_blocks(16 * RTX_ROWS) == num_row_blocks(100_000) == RTX_MOST_BLOCKS == 16


def test_portable_model_is_left_as_it_is() -> None:
    model = scoring_model()
    before = model.SerializeToString()
    for backend in ("tensorrt", "tensorrt-rtx"):
        graph_for_backend(model, backend)
    assert model.SerializeToString() == before


def test_graph_for_tensorrt_has_the_plugin_and_no_function() -> None:
    changed = graph_for_backend(scoring_model(), "tensorrt")
    assert not changed.functions
    (scored,) = (node for node in changed.graph.node if node.op_type == "LogSumExp")
    assert any(item.name == "aot" for item in scored.attribute)
    plain = scoring_model()
    del plain.functions[:]
    plain.graph.node[0].CopyFrom(helper.make_node("ReduceMax", ["q"], ["y"]))
    assert graph_for_backend(plain, "tensorrt") is plain
    assert graph_for_backend(plain, "tensorrt-rtx") is plain


def waits_for(nodes: list[onnx.NodeProto], value: str) -> set[str]:
    """Operators that a value is computed from."""
    wanted, found = {value}, set()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.add(node.op_type)
    return found


@pytest.fixture(scope="module")
def back_graph(
    pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """BACK of a tiny checkpoint, whose blocks are functions and score; and what to feed it."""
    options = BuildOptions(
        weights=str(pipeline_folder),
        graph_only=True,
        front_depth=1,
        layers=(1, 2),
        output=str(tmp_path_factory.mktemp("graph") / "set"),
        max_noisy_tokens=64,
        max_reference_tokens=64,
        max_text_tokens=8,
    )
    path = run_build(options).engine_set.folder / "back.onnx"
    sizes = {"batch": 2, "noisy": 23, "reference": 17, "text": 5, "rows": 11}
    generator = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for item in onnx.load(str(path), load_external_data=False).graph.input:
        dims = item.type.tensor_type.shape.dim
        shape = [sizes.get(axis.dim_param, axis.dim_value) for axis in dims]
        is_index = item.type.tensor_type.elem_type == TensorProto.INT64
        values = np.arange(shape[0]) * 2 if is_index else generator.standard_normal(shape)
        feed[item.name] = values.astype(np.int64 if is_index else np.float32)
    return path, feed


@pytest.mark.slow
def test_blocks_of_a_checkpoint_wait_for_their_scores_and_compute_the_same(
    back_graph: tuple[Path, dict[str, Any]],
) -> None:
    path, feed = back_graph
    model = onnx.load(str(path), load_external_data=False)
    changed = graph_for_backend(model, "tensorrt-rtx", num_blocks=4)
    onnx.save(changed, str(path.with_name("changed.onnx")))
    check_linked(path.with_name("changed.onnx"))
    scored = [item for item in changed.functions if "Scored" in item.name]
    assert len(scored) == 2  # the last block of BACK is another function
    for before in (item for item in model.functions if "Scored" in item.name):
        assert "LogSumExp" not in waits_for(list(before.node), before.output[0])
    for function in scored:
        assert "LogSumExp" in waits_for(list(function.node), function.output[0])
    plain, found = run_model(path, feed), run_model(path.with_name("changed.onnx"), feed)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@needs_rtx
@pytest.mark.slow
def test_operators_that_a_parser_lacks_are_of_older_ones_and_build(
    back_graph: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, feed = back_graph
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for body in (model.graph, *model.functions) for node in body.node]
    assert set(NEW_OPERATORS) <= {node.op_type for node in nodes}
    changed = graph_for_backend(model, "tensorrt-rtx", missing=NEW_OPERATORS)
    left = {
        node.op_type
        for body in (changed.graph, *changed.functions)
        for node in body.node
        if not node.domain
    }
    assert not left & set(NEW_OPERATORS)
    for owner in (changed, *changed.functions):
        assert {item.version for item in owner.opset_import if not item.domain} <= {20}
    # Operators of opset 23 are all there are: those that stay are in opset 20 what they were.
    for name in left:
        assert onnx.defs.get_schema(name, 20)
    target = path.with_name("older.onnx")
    onnx.save(changed, str(target))
    check_linked(target)
    for one, other in zip(run_model(path, feed), run_model(target, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    options = BuildOptions(
        backend="tensorrt-rtx",
        weights="random",
        precision="fp32",  # of which it has no fused attention: none is left that it could miss
        rungs=1,
        max_reference_tokens=64,
        max_noisy_tokens=64,
        max_text_tokens=8,
        max_batch=1,
        compute_capability=("8.9",),
    )
    built = build_plan(request_for(target, changed, options, tmp_path), Silent())
    assert built.num_attentions == 0
    assert built.num_bytes > 10_000


@needs_rtx
def test_the_parser_does_not_scale_queries_and_keys_in_16_bits(
    back_graph: tuple[Path, dict[str, Any]],
) -> None:
    """It multiplies both by the root of the node's scale in their own type: 1, or D^-0.25."""
    import tensorrt_rtx as rtx

    model = onnx.load(str(back_graph[0]), load_external_data=False)
    nodes = [node for body in (model.graph, *model.functions) for node in body.node]
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert attentions
    for attention in attentions:
        given = {item.name: helper.get_attribute_value(item) for item in attention.attribute}
        assert given["scale"] == 1.0
        factors = []
        one = onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["": {OPSET}]>
            g (bfloat16[1, 2, n, 128] q, bfloat16[1, 2, n, 128] k) => (bfloat16[1, 2, n, 128] y)
            {{ y = Attention (q, k, k) }}"""
        )
        one.graph.node[0].attribute.extend(attention.attribute)
        logger = rtx.Logger(rtx.Logger.ERROR)
        network = rtx.Builder(logger).create_network(0)
        parser = rtx.OnnxParser(network, logger)
        assert parser.parse(one.SerializeToString())
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            assert layer.type != rtx.LayerType.UNARY  # roots of the head width
            if layer.type == rtx.LayerType.CONSTANT:
                layer.__class__ = rtx.IConstantLayer
                factors.append(float(layer.weights.reshape(-1)[0]))
        assert factors == [1.0, 1.0]


@needs_rtx
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_every_weight_of_a_stripped_plan_is_an_initializer(
    backend: str, back_graph: tuple[Path, dict[str, Any]]
) -> None:
    """Those of a function are known by names that no initializer had."""
    import tensorrt_rtx as rtx

    class Silent(rtx.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            rtx.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None: ...

    path, feed = back_graph
    model = onnx.load(str(path), load_external_data=False)
    assert any(node.op_type == "Constant" for item in model.functions for node in item.node)
    changed = graph_for_backend(model, backend, num_blocks=2, is_stripped=True)
    assert not changed.functions
    assert not any(node.op_type == "Constant" for node in changed.graph.node)
    if backend == "tensorrt":  # nothing here parses its plugin
        return
    target = path.with_name("stripped.onnx")
    onnx.save(changed, str(target))
    check_linked(target)
    for one, other in zip(run_model(path, feed), run_model(target, feed), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    supplied = {weight.name for weight in weights_of(target)}
    for prepared, is_complete in ((path.with_name("plain.onnx"), False), (target, True)):
        logger = Silent()
        if not is_complete:
            onnx.save(graph_for_backend(model, backend, num_blocks=2), str(prepared))
        network = rtx.Builder(logger).create_network(0)
        parser = rtx.OnnxParser(network, logger)
        assert parser.parse_from_file(str(prepared))
        named = {
            layer.name
            for layer in (network.get_layer(index) for index in range(network.num_layers))
            if layer.type == rtx.LayerType.CONSTANT and network.mark_weights_refittable(layer.name)
        }
        assert len(named) > 10
        assert (named <= supplied) == is_complete


TWO_LAYERS = """
    {a}_all = Concat <axis = 1> ({a}, reference)
    {a}_q1 = MatMul ({a}, w_in)
    {a}_k1 = MatMul ({a}_all, w_in)
    {a}_q2 = Reshape ({a}_q1, heads)
    {a}_k2 = Reshape ({a}_k1, heads)
    {a}_q = Transpose <perm = [0, 2, 1, 3]> ({a}_q2)
    {a}_k = Transpose <perm = [0, 2, 1, 3]> ({a}_k2)
    {a}_o1 = Attention <scale: float = 1.0> ({a}_q, {a}_k, {a}_k)
    {a}_o2 = Transpose <perm = [0, 2, 1, 3]> ({a}_o1)
    {a}_o3 = Reshape ({a}_o2, joined)
    {b} = MatMul ({a}_o3, w_out)
    {a}_rows = Gather <axis = 2> ({a}_q, score_rows)
    {a}_kr = Slice ({a}_k, num_noisy, far, axis_2)
    {a}_b = ReduceSum <keepdims = 0> ({a}_k, last)
    {a}_bf = Cast <to = 1> ({a}_b)
    {a}_none = Sub ({a}_bf, {a}_bf)
    {a}_n = ditrim.LogSumExp <scale: float = 0.088> ({a}_rows, {a}_k, {a}_none)
    {a}_bias = Neg ({a}_n)
    {a}_c = ditrim.LogSumExp <scale: float = 0.088> ({a}_kr, {a}_rows, {a}_bias)
"""


def wide_attention_model() -> onnx.ModelProto:
    """Two layers of nothing but scored attention, 24 heads of 128, between 64 channels."""
    layers = TWO_LAYERS.format(a="noisy", b="middle") + TWO_LAYERS.format(a="middle", b="velocity")
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        back (
            bfloat16[batch, noisy, 64] noisy, bfloat16[batch, reference, 64] reference,
            int64[rows] score_rows, bfloat16[64, 3072] w_in, bfloat16[3072, 64] w_out
        ) => (bfloat16[batch, noisy, 64] velocity, float[batch, 24, reference] influence)
        <int64[4] heads = {{0, 0, 24, 128}}, int64[3] joined = {{0, 0, 3072}},
         int64[1] last = {{-1}}, int64[1] axis_2 = {{2}}, int64[1] far = {{1099511627776}}>
        {{
            num_noisy = Shape <start = 1, end = 2> (noisy)
            {layers}
            influence = Add (noisy_c, middle_c)
        }}
        """
    )
    model.functions.append(log_sum_exp_function())
    onnx.checker.check_model(model)
    return model


class Silent:
    def stage(self, name: str) -> None: ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None: ...


def request_for(
    path: Path, model: onnx.ModelProto, options: BuildOptions, folder: Path
) -> PlanRequest:
    """A request for a plan of BACK."""
    names = {TensorProto.BFLOAT16: "bfloat16", TensorProto.FLOAT: "float32"}

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=item.name,
                dtype=names.get(item.type.tensor_type.elem_type, "int64"),
                shape=tuple(
                    axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim
                ),
            )
            for item in values
        )

    return PlanRequest(
        role="back",
        graph=path,
        plan=folder / "back.plan",
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output),
        profiles=options.profiles()["back"],
        target=Target(backend="tensorrt-rtx", capabilities=options.compute_capability, gpu=None),
        options=options,
    )


@needs_rtx
@pytest.mark.slow
def test_logits_of_one_block_of_one_layer_are_kept_at_a_time(tmp_path: Path) -> None:
    model = wide_attention_model()
    path = tmp_path / "back.onnx"
    path.write_bytes(model.SerializeToString())
    options = BuildOptions(
        backend="tensorrt-rtx",
        weights="random",
        rungs=1,
        max_reference_tokens=4096,
        max_noisy_tokens=4096,
        max_batch=1,
        compute_capability=("8.9",),
    )
    built = build_plan(request_for(path, model, options, tmp_path), Silent())
    assert built.spec.device_memory_bytes is not None
    (stated,) = built.spec.device_memory_bytes
    logits = 24 * 4096 * 8192 * 2
    tokens = 8192 * 3072 * 2
    # Logits are products of float32: of the keys, and of a block of queries.
    block, keys = 24 * RTX_ROWS * 8192 * 4, 2 * tokens
    print(f"{stated / 1e6:.0f} MB; all logits of a layer are {logits / 1e6:.0f} MB")
    assert block == logits / 8
    assert stated < block + keys + 8 * tokens < logits
