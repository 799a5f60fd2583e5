"""`ditrim::LogSumExp` as a model-local ONNX function, so that no runtime needs a custom library.

Replaces: a custom-op library. Limits: standard operators of opset 23 only. Trade-off: rows are
scored in blocks by a `Scan`, which bounds memory at `PORTABLE_ROWS` rows of logits a head. Products
are float32: a logit rounded to 16 bits would change its weight by up to 10 %.
"""

from __future__ import annotations

import onnx
from onnx import FunctionProto, TensorProto, helper

from ditrim.plugins.blocks import PORTABLE_ROWS
from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME, OP_VERSION

OPSET = 23


def int_constant(name: str, *values: int) -> onnx.NodeProto:
    """Return a Constant node that holds a 1-d int64 tensor."""
    return helper.make_node("Constant", [], [name], value_ints=list(values))


def float_constant(name: str, value: float) -> onnx.NodeProto:
    """Return a Constant node that holds a float32 scalar."""
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [], [value])
    return helper.make_node("Constant", [], [name], value=tensor)


def scale_constant(name: str) -> onnx.NodeProto:
    """A function's attribute `scale` as a float32 scalar."""
    node = helper.make_node("Constant", [], [name])
    node.attribute.append(
        onnx.AttributeProto(
            name="value_float", ref_attr_name="scale", type=onnx.AttributeProto.FLOAT
        )
    )
    return node


def function_of(nodes: list[onnx.NodeProto]) -> FunctionProto:
    """`LogSumExp(queries, keys, bias; scale) -> result` of these nodes."""
    return helper.make_function(
        DOMAIN,
        OP_NAME,
        ["queries", "keys", "bias"],
        ["result"],
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=["scale"],
        doc_string=f"version {OP_VERSION}",
    )


def prepared_nodes() -> list[onnx.NodeProto]:
    """Return the nodes that every form begins with: `scaled` rows, `axis_2`, the blocks' inputs."""
    return [
        scale_constant("scale_f"),
        helper.make_node("Cast", ["queries"], ["queries_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["queries_f", "scale_f"], ["scaled"]),
        helper.make_node("Cast", ["keys"], ["keys_f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["keys_f"], ["keys_t"], perm=[0, 1, 3, 2]),
        int_constant("axis_2", 2),
        int_constant("last_axis", -1),
        float_constant("lowest", -3.4028234663852886e38),
        helper.make_node("Unsqueeze", ["bias", "axis_2"], ["bias_u"]),
    ]


def log_sum_exp_nodes(rows: str, result: str, prefix: str = "") -> list[onnx.NodeProto]:
    """Scaled rows (B, H, R, D) -> their log-sum-exp (B, H, R) in float32, over all keys.

    Reads `keys_t` (B, H, D, N), `bias_u` (B, H, 1, N), `last_axis` and `lowest` (float32 scalar).
    `prefix` goes before the names of the values between.
    """
    nodes = [
        helper.make_node("MatMul", [rows, "keys_t"], ["products"]),
        helper.make_node("Add", ["products", "bias_u"], ["logits"]),
        helper.make_node("ReduceMax", ["logits", "last_axis"], ["largest_raw"], keepdims=1),
        # A row of -inf logits would give inf - inf; the lowest finite number gives log(0) instead.
        helper.make_node("Max", ["largest_raw", "lowest"], ["largest"]),
        helper.make_node("Sub", ["logits", "largest"], ["shifted"]),
        helper.make_node("Exp", ["shifted"], ["weights"]),
        helper.make_node("ReduceSum", ["weights", "last_axis"], ["total"], keepdims=1),
        helper.make_node("Log", ["total"], ["log_total"]),
        helper.make_node("Add", ["log_total", "largest"], ["result_u"]),
        helper.make_node("Squeeze", ["result_u", "last_axis"], [result]),
    ]
    between = {name for node in nodes for name in node.output} - {result}
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [prefix + name if name in between else name for name in names]
    return nodes


def _scan_body() -> onnx.GraphProto:
    """One block of rows (B, H, block, D) -> (B, H, block) float32."""
    nodes = log_sum_exp_nodes("rows", "block_out")
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    out = helper.make_tensor_value_info("block_out", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "score_block", [rows], [out])


def log_sum_exp_function(block_rows: int = PORTABLE_ROWS) -> FunctionProto:
    """The portable form of `LogSumExp(queries, keys, bias; scale) -> result`.

    Args:
        block_rows: rows whose logits are alive at a time.

    Returns:
        A `FunctionProto` of domain `ditrim`, for `ModelProto.functions`.
    """
    nodes = [
        *prepared_nodes(),
        int_constant("zero", 0),
        int_constant("one", 1),
        int_constant("block_limit", block_rows),
        # The block is no longer than there are rows: one row costs one row.
        helper.make_node("Shape", ["queries"], ["num_batch_heads"], start=0, end=2),
        helper.make_node("Shape", ["queries"], ["num_rows"], start=2, end=3),
        helper.make_node("Shape", ["queries"], ["width"], start=3, end=4),
        helper.make_node("Max", ["num_rows", "one"], ["num_rows_1"]),
        helper.make_node("Min", ["num_rows_1", "block_limit"], ["block"]),
        helper.make_node("Add", ["num_rows_1", "block"], ["rows_plus"]),
        helper.make_node("Sub", ["rows_plus", "one"], ["rows_up"]),
        helper.make_node("Div", ["rows_up", "block"], ["num_blocks"]),
        helper.make_node("Mul", ["num_blocks", "block"], ["padded_rows"]),
        helper.make_node("Sub", ["padded_rows", "num_rows"], ["num_padding"]),
        helper.make_node("Concat", ["zero", "num_padding"], ["pads"], axis=0),
        helper.make_node("Pad", ["scaled", "pads", "", "axis_2"], ["padded"]),
        helper.make_node(
            "Concat", ["num_batch_heads", "num_blocks", "block", "width"], ["blocked"], axis=0
        ),
        helper.make_node("Reshape", ["padded", "blocked"], ["row_blocks"]),
        helper.make_node(
            "Scan",
            ["row_blocks"],
            ["block_results"],
            body=_scan_body(),
            num_scan_inputs=1,
            scan_input_axes=[2],
            scan_output_axes=[2],
        ),
        helper.make_node("Concat", ["num_batch_heads", "padded_rows"], ["flat"], axis=0),
        helper.make_node("Reshape", ["block_results", "flat"], ["padded_result"]),
        helper.make_node("Slice", ["padded_result", "zero", "num_rows", "axis_2"], ["result"]),
    ]
    return function_of(nodes)
