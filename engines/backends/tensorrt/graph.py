"""What a graph needs changed before TensorRT or TensorRT-RTX parses it, on a copy.

`tensorrt` scores with the plugin, so its copy holds the operator without the portable function.

`tensorrt-rtx` has no plugins and keeps a function, but not the one with a `Scan`: its parser reads
the first state variable of every `Scan` and fails where there is none (onnx-tensorrt throws in its
importer), and given one, TensorRT-RTX 1.7.1 crashes while it builds the loop. So the rows are
scored in unrolled blocks. Left to itself the library runs them side by side, and the scoring of all
layers too, and keeps all their logits; so each block waits for the one before, and what follows a
scored layer's attention waits for its scores. Trade-off: blocks make a plan larger, on every rung.

A parser that lacks an operator of opset 23 gets it as a function of older ones, in a graph of opset
20. Limits: whether a library fuses an attention that it gets like that is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx
from onnx import helper

from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME
from ditrim.plugins.onnx_function import (
    float_constant,
    function_of,
    int_constant,
    log_sum_exp_nodes,
    prepared_nodes,
)
from ditrim.plugins.strip import scoring_graph_for_backend

# What graphs hold of opset 23. `Attention` has an importer from TensorRT 10.14 on, the others from
# 10.15; the notes before that say opset 9 to 20 (onnx-tensorrt, Changelog.md and operators.md).
_PRIMITIVES_OPSET = 20
# As the exporter writes them.
_ATTRIBUTES = {
    "is_causal": 0,
    "softcap": 0.0,
    "qk_matmul_output_mode": 0,
    "axis": -1,
    "stash_type": 1,
    "interleaved": 1,
    "scale": 1.0,
}
_PRIMITIVES = {
    # As NVIDIA's notes on fused attention want it, softmax in between; the queries come scaled.
    "Attention": """(q, k, v) => (y) {
        keys_t = Transpose <perm = [0, 1, 3, 2]> (k)
        logits = MatMul (q, keys_t)
        weights = Softmax <axis = -1> (logits)
        y = MatMul (weights, v)
    }""",
    "RMSNormalization": """(x, weight) => (y) {
        x_f = Cast <to = 1> (x)
        squares = Mul (x_f, x_f)
        last_axis = Constant <value_ints = [-1]> ()
        mean = ReduceMean <keepdims = 1> (squares, last_axis)
        epsilon = Constant <value_float = EPSILON> ()
        more = Add (mean, epsilon)
        root = Sqrt (more)
        normal_f = Div (x_f, root)
        normal = CastLike (normal_f, x)
        y = Mul (normal, weight)
    }""",
    "RotaryEmbedding": """(x, cos, sin) => (y) {
        paired = Constant <value_ints = [0, 0, 0, -1, 2]> ()
        joined = Constant <value_ints = [0, 0, 0, -1]> ()
        around = Constant <value_ints = [1, 4]> ()
        pairs = Reshape (x, paired)
        first, second = Split <axis = -1, num_outputs = 2> (pairs)
        c = Unsqueeze (cos, around)
        s = Unsqueeze (sin, around)
        first_c = Mul (first, c)
        first_s = Mul (first, s)
        second_c = Mul (second, c)
        second_s = Mul (second, s)
        new_first = Sub (first_c, second_s)
        new_second = Add (first_s, second_c)
        rotated = Concat <axis = -1> (new_first, new_second)
        y = Reshape (rotated, joined)
    }""",
}
NEW_OPERATORS = tuple(_PRIMITIVES)


def log_sum_exp_unrolled(num_blocks: int = 1) -> onnx.FunctionProto:
    """`LogSumExp(queries, keys, bias; scale) -> result` without a loop; see `log_sum_exp`.

    Args:
        num_blocks: of rows, each scored after the one before. Rows that do not divide evenly are
            padded.
    """
    if num_blocks == 1:
        return function_of([*prepared_nodes(), *log_sum_exp_nodes("scaled", "result")])
    blocks = range(num_blocks)
    nodes = [
        *prepared_nodes(),
        float_constant("infinity", float("inf")),
        int_constant("zero", 0),
        int_constant("num_blocks", num_blocks),
        int_constant("most_padding", num_blocks - 1),
        helper.make_node("Shape", ["queries"], ["num_rows"], start=2, end=3),
        helper.make_node("Add", ["num_rows", "most_padding"], ["rows_up"]),
        helper.make_node("Div", ["rows_up", "num_blocks"], ["block"]),
        helper.make_node("Mul", ["block", "num_blocks"], ["padded_rows"]),
        helper.make_node("Sub", ["padded_rows", "num_rows"], ["num_padding"]),
        helper.make_node("Concat", ["zero", "num_padding"], ["pads"], axis=0),
        helper.make_node("Pad", ["scaled", "pads", "", "axis_2"], ["padded"]),
        helper.make_node(
            "Split", ["padded"], [f"rows_{i}" for i in blocks], axis=2, num_outputs=num_blocks
        ),
    ]
    for i in blocks:
        rows = f"rows_{i}"
        if i:
            nodes += _waiting_nodes(rows, f"result_{i - 1}", f"late_rows_{i}")
            rows = f"late_rows_{i}"
        nodes += log_sum_exp_nodes(rows, f"result_{i}", f"block_{i}_")
    results = [f"result_{i}" for i in blocks]
    nodes += [
        helper.make_node("Concat", results, ["padded_result"], axis=2),
        helper.make_node("Slice", ["padded_result", "zero", "num_rows", "axis_2"], ["result"]),
    ]
    return function_of(nodes)


def _waiting_nodes(value: str, source: str, result: str, prefix: str = "") -> list[onnx.NodeProto]:
    """`result` is `value` (B, H, n, D), and cannot be had before `source` (B, H, m) float32.

    To `value` is added whether `source` is beyond infinity: a zero, whatever `source` holds, that
    TensorRT-RTX does not foretell. Reads `last_axis` and `infinity`, with the prefix.
    """
    names = [f"{result}_{part}" for part in ("largest", "is_beyond", "is_beyond_u", "zero")]
    return [
        helper.make_node("ReduceMax", [source, f"{prefix}last_axis"], names[:1], keepdims=1),
        helper.make_node("Greater", [names[0], f"{prefix}infinity"], names[1:2]),
        helper.make_node("Unsqueeze", [names[1], f"{prefix}last_axis"], names[2:3]),
        helper.make_node("CastLike", [names[2], value], names[3:]),
        helper.make_node("Add", [value, names[3]], [result]),
    ]


def _is_scoring(node: onnx.NodeProto | onnx.FunctionProto) -> bool:
    name = node.op_type if isinstance(node, onnx.NodeProto) else node.name
    return (node.domain, name) == (DOMAIN, OP_NAME)


def _with_scores_first(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Let what follows each scored attention wait for its scores; the nodes in a valid order."""
    nodes = list(nodes)
    by_keys = {node.input[1]: node for node in nodes if _is_scoring(node)}
    scored = [n for n in nodes if n.op_type == "Attention" and n.input[1] in by_keys]
    for number, attention in enumerate(scored):
        # The call over all keys gives the normalisers of its rows, which are the other's keys.
        columns = by_keys[by_keys[attention.input[1]].input[0]]
        at = next(i for i, node in enumerate(nodes) if node is attention)
        wanted, before, after = set(columns.output), list[onnx.NodeProto](), nodes[at + 1 :]
        for node in reversed(after):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                before.insert(0, node)
        prefix = f"scored_{number}_"
        output, attention.output[0] = attention.output[0], f"{prefix}{attention.output[0]}"
        nodes = [
            *nodes[:at],
            *before,
            attention,
            int_constant(f"{prefix}last_axis", -1),
            float_constant(f"{prefix}infinity", float("inf")),
            *_waiting_nodes(attention.output[0], columns.output[0], output, prefix),
            *(node for node in after if not any(node is item for item in before)),
        ]
    return nodes


def _replace_operators(model: onnx.ModelProto, missing: Collection[str]) -> None:
    """Make operators calls of functions, in place, and the graph one of an older opset."""
    functions: dict[str, onnx.FunctionProto] = {}
    for body in (model.graph, *model.functions):
        for node in body.node:
            if node.domain or node.op_type not in missing:
                continue
            given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            # Attributes of functions are not relied on: one function for each value.
            epsilon = f"{given.pop('epsilon', 1e-5):.9g}"
            assert given.items() <= _ATTRIBUTES.items(), (node.name, given)
            assert "scale" in given or node.op_type != "Attention", node.name
            assert len(node.input) <= 3, node.name
            name = f"{node.op_type}Of{len(functions)}"
            text = _PRIMITIVES[node.op_type].replace("EPSILON", epsilon)
            known = functions.setdefault(
                text,
                onnx.parser.parse_function(
                    f'<opset_import: ["": {_PRIMITIVES_OPSET}], domain: "{DOMAIN}"> {name} {text}'
                ),
            )
            node.domain, node.op_type = DOMAIN, known.name
            del node.attribute[:]
    model.functions.extend(functions.values())
    for owner in (model, *model.functions):
        for item in owner.opset_import:
            if not item.domain:
                item.version = _PRIMITIVES_OPSET
        if functions and DOMAIN not in {item.domain for item in owner.opset_import}:
            owner.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def graph_for_backend(
    model: onnx.ModelProto,
    backend: str,
    *,
    num_blocks: int = 1,
    missing: Collection[str] = (),
    is_stripped: bool = False,
) -> onnx.ModelProto:
    """The graph as a backend's parser is to see it.

    Args:
        model: a graph of FRONT or BACK, its weights in external data. It is left as it is.
        backend: "tensorrt" or "tensorrt-rtx".
        num_blocks: of rows that are scored in turn with tensorrt-rtx; see `num_row_blocks`.
        missing: those of `NEW_OPERATORS` that its parser lacks.
        is_stripped: whether its plan gets its weights when it is loaded. Constants are weights,
            too; so every one becomes an initializer of the graph, which has no functions then.

    Returns:
        the model itself if nothing has to be changed, otherwise a copy.
    """
    is_scored = any(map(_is_scoring, model.functions))
    if not is_scored and not missing and not is_stripped:
        return model
    copy = onnx.ModelProto()
    if is_scored and backend == "tensorrt":
        copy = scoring_graph_for_backend(model, backend)
    else:
        copy.CopyFrom(model)
    if is_scored and backend == "tensorrt-rtx":
        kept = [item for item in copy.functions if not _is_scoring(item)]
        del copy.functions[:]
        copy.functions.extend([*kept, log_sum_exp_unrolled(num_blocks)])
        for body in (copy.graph, *copy.functions):
            nodes = _with_scores_first(body.node)
            clones = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del body.node[:]
            body.node.extend(clones)
    if missing:
        _replace_operators(copy, missing)
    return _with_all_weights_named(copy) if is_stripped else copy


def _with_all_weights_named(model: onnx.ModelProto) -> onnx.ModelProto:
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

    inlined = InlinePass()(ir.from_proto(model)).model
    for node in list(inlined.graph):
        if node.op_type == "ConstantOfShape":  # its parser makes a weight of its own of the value
            given = node.attributes.get("value")
            filled = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            value = ir.node("Constant", [], {"value": ir.tensor(filled.reshape(()))})
            expanded = ir.node("Expand", [value.outputs[0], node.inputs[0]])
            inlined.graph.insert_before(node, [value, expanded])
            ir.convenience.replace_all_uses_with(node.outputs[0], expanded.outputs[0])
            inlined.graph.remove(node, safe=True)
    lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    return ir.to_proto(lift(inlined).model)
