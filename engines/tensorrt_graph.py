"""What a graph needs changed before TensorRT or TensorRT-RTX parses it, on a copy.

`tensorrt` scores with the plugin, so its copy holds the operator without the portable function.

`tensorrt-rtx` has no plugins and keeps a function, but not the one that scores rows in blocks: its
parser reads the first state variable of every `Scan` and fails where there is none (onnx-tensorrt
throws in its importer), and given one, TensorRT-RTX 1.7.1 crashes while it builds the loop. So its
function scores all rows at once. Trade-off: TensorRT-RTX keeps the logits of one layer in memory,
in the model's precision (it reported 1.85 GB for 24 heads, 4096 rows and 9216 keys in bf16); score
fewer rows where that is too much.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME, OP_VERSION
from ditrim.plugins.onnx_function import OPSET, log_sum_exp_nodes
from ditrim.plugins.strip import scoring_graph_for_backend

_LOWEST = -3.4028234663852886e38


def log_sum_exp_at_once() -> onnx.FunctionProto:
    """`LogSumExp(queries, keys, bias; scale) -> result` without a loop; see `log_sum_exp`."""
    scale = helper.make_node("Constant", [], ["scale_f"])
    scale.attribute.append(
        onnx.AttributeProto(
            name="value_float", ref_attr_name="scale", type=onnx.AttributeProto.FLOAT
        )
    )
    lowest = helper.make_tensor("lowest", TensorProto.FLOAT, [], [_LOWEST])
    nodes = [
        scale,
        helper.make_node("CastLike", ["scale_f", "queries"], ["scale_t"]),
        helper.make_node("Mul", ["queries", "scale_t"], ["scaled"]),
        helper.make_node("Transpose", ["keys"], ["keys_t"], perm=[0, 1, 3, 2]),
        helper.make_node("Constant", [], ["axis_2"], value_ints=[2]),
        helper.make_node("Constant", [], ["last_axis"], value_ints=[-1]),
        helper.make_node("Constant", [], ["lowest"], value=lowest),
        helper.make_node("Unsqueeze", ["bias", "axis_2"], ["bias_u"]),
        *log_sum_exp_nodes("scaled", "result"),
    ]
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


def graph_for_backend(model: onnx.ModelProto, backend: str) -> onnx.ModelProto:
    """The graph as a backend's parser is to see it.

    Args:
        model: a graph of FRONT or BACK, its weights in external data. It is left as it is.
        backend: "tensorrt" or "tensorrt-rtx".

    Returns:
        the model itself if it scores nothing, otherwise a changed copy.
    """
    functions = [item for item in model.functions if (item.domain, item.name) == (DOMAIN, OP_NAME)]
    if not functions:
        return model
    if backend == "tensorrt":
        return scoring_graph_for_backend(model, backend)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [item for item in copy.functions if (item.domain, item.name) != (DOMAIN, OP_NAME)]
    del copy.functions[:]
    copy.functions.extend([*kept, log_sum_exp_at_once()])
    return copy
