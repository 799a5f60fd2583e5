"""What ONNX Runtime runs faster with operators of its own, put into an exported graph.

Replaces, in float32 graphs:

- `Attention`, which stores every logit, by `com.microsoft::MultiHeadAttention`, which goes through
  the keys in tiles as flash attention does. It takes its rows as projections give them, so queries,
  keys and values are not transposed in the graph.
- the two `LogSumExp` of a scored layer by `ditrim::ColumnSums`: the softmax of a block of rows and
  its sum over rows, with one product over all keys where the portable form takes two.

In graphs of 16 bits, which no CPU runs, the attention stays, and `ColumnSums` is written without a
loop: CUDA's kernels of `Loop`, `Scan`, `Pad`, `ReduceMax` and `Identity` are those of older opsets,
and what it has no kernel for runs on the CPU, with copies there and back.

Limits: ONNX Runtime alone has these operators. Trade-off: `ONNXRUNTIME_ROWS` rows of logits are
alive at a time while a layer is scored, with CUDA a 64th of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from ditrim.plugins.blocks import CUDA_BLOCKS, ONNXRUNTIME_ROWS
from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME
from ditrim.plugins.onnx_function import OPSET, float_constant, int_constant, scale_constant

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
COLUMN_SUMS = "ColumnSums"
# (B, L, H, D) <-> (B, H, L, D)
_SWAP = [0, 2, 1, 3]


def use_own_operators(model: ir.Model, num_heads: int, *, is_half: bool = False) -> None:
    """Rewrite a graph of FRONT or BACK in place, the functions that it calls too.

    Args:
        model: of `export_graph` or `assemble_graph`, not yet written.
        num_heads: H of the transformer.
        is_half: whether it is of 16 bits, and so for CUDA.
    """
    import onnx_ir as ir

    is_scored = False
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        num_fused = 0
        for node in list(body):
            if node.op_type == "Attention" and not node.domain and not is_half:
                _fuse_attention(body, node, num_heads)
                num_fused += 1
        for node in list(body):
            if _is_second_pass(node):
                _score_in_one_pass(body, node)
                is_scored = True
                num_fused += 1
        if num_fused:
            body.opset_imports[CONTRIB] = 1
            _remove_unused(body)
    model.opset_imports[CONTRIB] = 1
    if is_scored:
        form = column_sums_unrolled() if is_half else column_sums_function()
        function = ir.serde.deserialize_function(form)
        model.functions[function.identifier()] = function
        calls = [node for item in model.functions.values() for node in item.all_nodes()]
        if not any(node.op_type == OP_NAME for node in (*model.graph.all_nodes(), *calls)):
            del model.functions[DOMAIN, OP_NAME, ""]


def column_sums_function(block_rows: int = ONNXRUNTIME_ROWS) -> onnx.FunctionProto:
    """`ColumnSums(queries, keys; scale) -> sums`: attention that keys receive, summed over rows.

    (B, H, R, D), (B, H, N, D) -> (B, H, N) float32: the sum over rows of softmax(scale q k), of
    which ToPi Eq. 9 takes the reference columns. Returns zeros where no rows are scored.

    Args:
        block_rows: rows whose logits are alive at a time.
    """
    product = helper.make_node(
        "FusedMatMul", ["rows", "keys"], ["logits"], domain=CONTRIB, transB=1
    )
    product.attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="scale", type=onnx.AttributeProto.FLOAT)
    )
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["block_index", "block"], ["start"]),
            helper.make_node("Add", ["start", "block"], ["end"]),
            helper.make_node("Slice", ["queries", "start", "end", "axis_2"], ["rows"]),
            product,
            helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
            helper.make_node("ReduceSum", ["weights", "axis_2"], ["block_sums"], keepdims=0),
            helper.make_node("Add", ["sums_before", "block_sums"], ["sums_after"]),
            helper.make_node("Identity", ["goes_on"], ["goes_on_after"]),
        ],
        "score_block",
        [
            helper.make_tensor_value_info("block_index", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sums_before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on_after", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sums_after", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        int_constant("axis_2", 2),
        int_constant("block", block_rows),
        int_constant("most_padding", block_rows - 1),
        helper.make_node("Shape", ["queries"], ["num_rows"], start=2, end=3),
        helper.make_node("Add", ["num_rows", "most_padding"], ["rows_up"]),
        helper.make_node("Div", ["rows_up", "block"], ["num_blocks_1"]),
        helper.make_node("Squeeze", ["num_blocks_1"], ["num_blocks"]),
        helper.make_node("Shape", ["keys"], ["sums_shape"], start=0, end=3),
        helper.make_node("ConstantOfShape", ["sums_shape"], ["no_sums"]),  # float32 zeros
        helper.make_node("Loop", ["num_blocks", "", "no_sums"], ["sums"], body=body),
    ]
    return _function_of(nodes)


def column_sums_unrolled(num_blocks: int = CUDA_BLOCKS) -> onnx.FunctionProto:
    """`ColumnSums` of operators that CUDA has kernels for, over queries and keys of any type.

    A weighted sum over a block's rows is a product with 1 for each row and 0 for what is padded.
    """
    blocks = range(num_blocks)
    nodes = [
        int_constant("axis_0", 0),
        int_constant("axis_1", 1),
        int_constant("axis_2", 2),
        int_constant("num_blocks", num_blocks),
        float_constant("zero", 0.0),
        float_constant("one", 1.0),
        scale_constant("scale_f"),
        helper.make_node("Cast", ["queries"], ["queries_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["queries_f", "scale_f"], ["scaled"]),
        helper.make_node("Cast", ["keys"], ["keys_f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["keys_f"], ["keys_t"], perm=[0, 1, 3, 2]),
        helper.make_node("Shape", ["queries"], ["num_batch_heads"], start=0, end=2),
        helper.make_node("Shape", ["queries"], ["num_rows"], start=2, end=3),
        helper.make_node("Shape", ["queries"], ["width"], start=3, end=4),
        # At least one row is padded: nothing is empty, whatever a kernel makes of that.
        helper.make_node("Div", ["num_rows", "num_blocks"], ["block_down"]),
        helper.make_node("Add", ["block_down", "axis_1"], ["block"]),
        helper.make_node("Mul", ["block", "num_blocks"], ["padded_rows"]),
        helper.make_node("Sub", ["padded_rows", "num_rows"], ["num_padding"]),
        helper.make_node(
            "Concat", ["num_batch_heads", "num_padding", "width"], ["padding_shape"], axis=0
        ),
        helper.make_node("Expand", ["zero", "padding_shape"], ["padding"]),
        helper.make_node("Concat", ["scaled", "padding"], ["rows"], axis=2),
        helper.make_node("Expand", ["one", "num_rows"], ["ones"]),
        helper.make_node("Expand", ["zero", "num_padding"], ["zeros"]),
        helper.make_node("Concat", ["ones", "zeros"], ["counts_flat"], axis=0),
        helper.make_node("Unsqueeze", ["counts_flat", "axis_0"], ["counts"]),
        helper.make_node(
            "Split", ["rows"], [f"rows_{i}" for i in blocks], axis=2, num_outputs=num_blocks
        ),
        helper.make_node(
            "Split", ["counts"], [f"counts_{i}" for i in blocks], axis=1, num_outputs=num_blocks
        ),
    ]
    for i in blocks:
        nodes += [
            helper.make_node("MatMul", [f"rows_{i}", "keys_t"], [f"logits_{i}"]),
            helper.make_node("Softmax", [f"logits_{i}"], [f"weights_{i}"], axis=-1),
            helper.make_node("MatMul", [f"counts_{i}", f"weights_{i}"], [f"sums_{i}"]),
        ]
    nodes += [
        helper.make_node("Sum", [f"sums_{i}" for i in blocks], ["sums_u"]),
        helper.make_node("Squeeze", ["sums_u", "axis_2"], ["sums"]),
    ]
    return _function_of(nodes)


def _function_of(nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function(
        DOMAIN,
        COLUMN_SUMS,
        ["queries", "keys"],
        ["sums"],
        nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        attributes=["scale"],
    )


def _fuse_attention(body: ir.Graph | ir.Function, attention: ir.Node, num_heads: int) -> None:
    """`Attention` over (B, H, L, D), its transposes around it, as one node over (B, L, H D)."""
    import onnx_ir as ir

    assert len(attention.inputs) == 3, "the exporter writes attention without a mask"
    left_out = {"is_causal", "softcap", "qk_matmul_output_mode"}
    assert set(attention.attributes) - left_out == {"scale"}
    scale = attention.attributes["scale"].as_float()
    query, key, value = attention.inputs
    assert query is not None
    assert key is not None
    nodes: list[ir.Node] = []

    def add(
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        **attributes: float | list[int],
    ) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, domain=domain))
        return nodes[-1].outputs[0]

    flat_shape = _constant(body, attention, [0, 0, -1])
    flat: dict[ir.Value, ir.Value] = {}
    for rotated in (query, key):
        rotation = rotated.producer()
        assert rotation is not None
        assert rotation.op_type == "RotaryEmbedding"
        source = add("Reshape", [_swapped_from(rotation.inputs[0]), flat_shape])
        tables = list(rotation.inputs[1:])
        interleaved = rotation.attributes["interleaved"].as_int()
        flat[rotated] = add(
            "RotaryEmbedding", [source, *tables], interleaved=interleaved, num_heads=num_heads
        )
    rows = [flat[query], flat[key], add("Reshape", [_swapped_from(value), flat_shape])]
    output = add("MultiHeadAttention", rows, domain=CONTRIB, num_heads=num_heads, scale=scale)
    for rotated, replacement in flat.items():
        readers = [user for user, _ in rotated.uses() if user is not attention]
        if readers:  # scores read them by head
            by_head = add(
                "Reshape", [replacement, _constant(body, attention, [0, 0, num_heads, -1])]
            )
            ir.convenience.replace_all_uses_with(rotated, add("Transpose", [by_head], perm=_SWAP))
    body.insert_before(attention, nodes)
    swap = _only_user(attention.outputs[0], "Transpose")
    assert swap.attributes["perm"].as_ints() == tuple(_SWAP)
    flatten = _only_user(swap.outputs[0], "Reshape")
    output.shape, output.type = flatten.outputs[0].shape, flatten.outputs[0].type
    ir.convenience.replace_all_uses_with(flatten.outputs[0], output)
    body.remove([flatten, swap, attention], safe=True)


def _is_second_pass(node: ir.Node) -> bool:
    """Whether it is a `LogSumExp` whose bias is the negated result of another."""
    if node.op_type != OP_NAME or node.domain != DOMAIN:
        return False
    assert node.inputs[2] is not None
    negation = node.inputs[2].producer()
    return negation is not None and negation.op_type == "Neg"


def _score_in_one_pass(body: ir.Graph | ir.Function, columns: ir.Node) -> None:
    """Two `LogSumExp` and the `Exp` behind them as one `ColumnSums` and a slice of it."""
    import onnx_ir as ir

    reference_keys, queries, bias = columns.inputs
    assert reference_keys is not None
    assert bias is not None
    negation = bias.producer()
    assert negation is not None
    assert negation.inputs[0] is not None
    normaliser = negation.inputs[0].producer()
    assert normaliser is not None
    assert normaliser.op_type == OP_NAME
    keys = normaliser.inputs[1]
    part = reference_keys.producer()
    assert part is not None
    assert part.op_type == "Slice"
    assert part.inputs[0] is keys
    exponential = _only_user(columns.outputs[0], "Exp")
    scale = columns.attributes["scale"].as_float()
    sums = ir.node(COLUMN_SUMS, [queries, keys], {"scale": scale}, domain=DOMAIN)
    # Keys are the third axis of (B, H, N, D) and of the sums, (B, H, N): one slice fits both.
    received = ir.node("Slice", [sums.outputs[0], *part.inputs[1:]])
    body.insert_before(columns, [sums, received])
    ir.convenience.replace_all_uses_with(exponential.outputs[0], received.outputs[0])


def _swapped_from(value: ir.Value | None) -> ir.Value:
    """(B, L, H, D) of which `value` is the transposed (B, H, L, D)."""
    assert value is not None
    swap = value.producer()
    assert swap is not None
    assert swap.op_type == "Transpose"
    assert swap.attributes["perm"].as_ints() == tuple(_SWAP)
    assert swap.inputs[0] is not None
    return swap.inputs[0]


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    users = [user for user, _ in value.uses()]
    assert len(users) == 1, value.name
    assert users[0].op_type == op_type, users[0].op_type
    return users[0]


def _constant(body: ir.Graph | ir.Function, before: ir.Node, values: list[int]) -> ir.Value:
    import onnx_ir as ir

    node = ir.node("Constant", [], {"value_ints": values})
    body.insert_before(before, node)
    return node.outputs[0]


def _remove_unused(body: ir.Graph | ir.Function) -> None:
    """Nodes whose results nothing reads any more."""
    results = set(body.outputs)
    for node in reversed(list(body)):
        if not any(value.uses() or value in results for value in node.outputs):
            body.remove(node, safe=True)
