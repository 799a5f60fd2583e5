"""Graphs for the tensorrt backend: the scoring operator without its portable form.

TensorRT's ONNX parser inlines a model-local function in preference to a plugin of its name. For the
plugin to be used, the copy handed to TensorRT holds the operator without the function, and each of
its nodes says which plugin it is: the parser looks a plugin up by the node's `plugin_namespace` and
`plugin_version`, not by its domain, and takes the ahead-of-time form where `aot` is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import helper

from ditrim.plugins.errors import UsageError
from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME

BACKEND = "tensorrt"
PLUGIN_ATTRIBUTES: dict[str, str | int] = {
    "plugin_namespace": DOMAIN,
    "plugin_version": "1",
    "aot": 1,
}


def _every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the subgraphs they hold."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _every_node(attribute.g.node)
            for graph in attribute.graphs:
                yield from _every_node(graph.node)


def _is_scoring(domain: str, name: str) -> bool:
    return domain == DOMAIN and name == OP_NAME


def scoring_graph_for_backend(model: onnx.ModelProto, backend: str) -> onnx.ModelProto:
    """The model as `backend` scores with it.

    Args:
        model: a graph that may hold `ditrim::LogSumExp` and its function. It is left as it is.
        backend: for "tensorrt" a copy without the function, whose nodes name the plugin; for every
            other backend the model itself, with its function.

    Returns:
        The model or the copy. Weights in external data are not copied.

    Raises:
        UsageError: a node of the operator has no `scale`.
    """
    if backend != BACKEND:
        return model
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    functions = [f for f in stripped.functions if not _is_scoring(f.domain, f.name)]
    del stripped.functions[:]
    stripped.functions.extend(functions)
    bodies = [stripped.graph.node, *(function.node for function in stripped.functions)]
    for body in bodies:
        for node in _every_node(body):
            if _is_scoring(node.domain, node.op_type):
                _name_plugin(node)
    return stripped


def _name_plugin(node: onnx.NodeProto) -> None:
    names = {attribute.name for attribute in node.attribute}
    if "scale" not in names:
        raise UsageError(
            f"node {node.name!r} of {DOMAIN}::{OP_NAME} has no attribute scale; export again"
        )
    kept = [attribute for attribute in node.attribute if attribute.name not in PLUGIN_ATTRIBUTES]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in PLUGIN_ATTRIBUTES.items()
    )
