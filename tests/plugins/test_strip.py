"""The graph that the tensorrt backend gets: the operator without its function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from ditrim.plugins.errors import UsageError
from ditrim.plugins.onnx_function import log_sum_exp_function
from ditrim.plugins.strip import scoring_graph_for_backend


def value(name: str, *axes: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)


def scoring_model(**attributes: float) -> onnx.ModelProto:
    """The operator at the top, in a branch, and beside another function and another domain."""
    other = helper.make_function(
        "other",
        "Twice",
        ["x"],
        ["y"],
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 23)],
    )
    score = helper.make_node("LogSumExp", ["q", "k", "b"], ["s"], "top", domain="ditrim")
    score.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    inner = helper.make_node("LogSumExp", ["q", "k", "b"], ["inner"], "inner", domain="ditrim")
    inner.attribute.append(helper.make_attribute("scale", 0.25))
    then = helper.make_graph([inner], "then", [], [value("inner", *"BHR")])
    plain = helper.make_node("Identity", ["s"], ["plain"])
    otherwise = helper.make_graph([plain], "else", [], [value("plain", *"BHR")])
    choose = helper.make_node("If", ["c"], ["chosen"], then_branch=then, else_branch=otherwise)
    twice = helper.make_node("Twice", ["chosen"], ["y"], domain="other")
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(
        [score, choose, twice],
        "scoring",
        [value("q", *"BHRD"), value("k", *"BHND"), value("b", *"BHN"), condition],
        [value("y", *"BHR")],
    )
    domains = (("", 23), ("ditrim", 1), ("other", 1))
    return helper.make_model(
        graph,
        functions=[log_sum_exp_function(), other],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains],
        ir_version=10,
    )


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def test_tensorrt_gets_a_copy_whose_nodes_name_the_plugin() -> None:
    model = scoring_model(scale=0.5)
    before = model.SerializeToString(deterministic=True)
    stripped = scoring_graph_for_backend(model, "tensorrt")
    assert model.SerializeToString(deterministic=True) == before
    assert [f.name for f in stripped.functions] == ["Twice"]
    top, choose, _ = stripped.graph.node
    inner = next(a.g.node[0] for a in choose.attribute if a.name == "then_branch")
    plugin = {"plugin_namespace": b"ditrim", "plugin_version": b"1", "aot": 1}
    assert attributes_of(top) == {"scale": 0.5, **plugin}
    assert attributes_of(inner) == {"scale": 0.25, **plugin}
    assert [n.op_type for n in stripped.graph.node] == ["LogSumExp", "If", "Twice"]
    onnx.checker.check_model(stripped)


def test_stripping_twice_changes_nothing() -> None:
    once = scoring_graph_for_backend(scoring_model(scale=0.5), "tensorrt")
    assert scoring_graph_for_backend(once, "tensorrt") == once


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_other_backends_keep_the_model_and_it_runs(backend: str) -> None:
    model = scoring_model(scale=0.5)
    kept = scoring_graph_for_backend(model, backend)
    assert kept is model
    session = onnxruntime.InferenceSession(
        kept.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    q = np.ones((1, 1, 1, 4), "f4")
    feeds = {"q": q, "k": q, "b": np.zeros((1, 1, 1), "f4")}
    assert session.run(None, {**feeds, "c": np.array(False)})[0].item() == pytest.approx(4.0)
    assert session.run(None, {**feeds, "c": np.array(True)})[0].item() == pytest.approx(2.0)


def test_a_node_inside_another_function_is_named_too() -> None:
    model = scoring_model(scale=0.5)
    node = helper.make_node("LogSumExp", ["x", "x", "x"], ["y"], domain="ditrim", scale=1.0)
    del model.functions[1].node[:]
    model.functions[1].node.append(node)
    stripped = scoring_graph_for_backend(model, "tensorrt")
    assert attributes_of(stripped.functions[0].node[0])["aot"] == 1


def test_a_node_without_a_scale_is_named() -> None:
    with pytest.raises(UsageError, match="node 'top' of ditrim::LogSumExp has no attribute scale"):
        scoring_graph_for_backend(scoring_model(), "tensorrt")
