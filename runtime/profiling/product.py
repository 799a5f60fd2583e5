"""Plain matrix products on a CPU: the reference product that engines' rates are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ditrim.engines.cost.cost import Cost

# Products of these sides are bound by operations on every CPU, and take some ten milliseconds.
PRODUCT_SIDE = 1024
PRODUCT_COST = Cost(flops=2 * PRODUCT_SIDE**3, activation_bytes=12 * PRODUCT_SIDE**2)


def plain_products(backend: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Plain float32 products by torch, and by ONNX Runtime where it runs the engine set."""
    import torch

    shape = (PRODUCT_SIDE, PRODUCT_SIDE)
    left, right = torch.randn(shape), torch.randn(shape)
    yield "torch", lambda: torch.mm(left, right)
    if backend == "onnxruntime":
        yield "onnxruntime", onnxruntime_product(shape, shape, torch.get_num_threads())


def onnxruntime_product(
    left: tuple[int, ...], right: tuple[int, ...], threads: int, *, is_weight: bool = True
) -> Callable[[], Any]:
    """A function that multiplies float32 matrices of these shapes by ONNX Runtime.

    Args:
        left, right: shapes of the operands, with batch axes in front of two or without.
        threads: of the session.
        is_weight: the right operand is a weight, packed beforehand as an engine's are.
    """
    import onnxruntime as ort
    import torch
    from onnx import TensorProto, helper, numpy_helper

    feed = {"left": torch.randn(left).numpy(), "right": torch.randn(right).numpy()}
    weights = [numpy_helper.from_array(feed.pop("right"), "right")] if is_weight else []
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["left", "right"], ["out"])],
        "product",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feed.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads that spin would slow what is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, feed)
