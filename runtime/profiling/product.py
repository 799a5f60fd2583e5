"""A plain matrix product on a CPU: the rate that engines are held against, a machine's pulse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ditrim.engines.cost.cost import Cost

# Products of these sides are bound by operations on every CPU, and take some ten milliseconds.
PRODUCT_SIDE = 1024
PRODUCT_COST = Cost(flops=2 * PRODUCT_SIDE**3, activation_bytes=12 * PRODUCT_SIDE**2)


def plain_products(backend: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Plain float32 products by torch, and by ONNX Runtime where it runs the engine set."""
    shape = (PRODUCT_SIDE, PRODUCT_SIDE)
    left, right = torch.randn(shape), torch.randn(shape)
    yield "torch", lambda: torch.mm(left, right)
    if backend == "onnxruntime":
        import onnx
        import onnxruntime as ort
        from onnx import numpy_helper

        def value(name: str) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["left", "right"], ["out"])],
            "product",
            [value("left")],
            [value("out")],
            [numpy_helper.from_array(right.numpy(), "right")],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would slow what is measured next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {"left": left.numpy()}
        yield "onnxruntime", lambda: session.run(None, feed)
