"""Graphs with ONNX Runtime's own operators against the standard ones, and what they gain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graph_sessions import GEOMETRIES, relative_error, run_sessions
from numpy.typing import NDArray
from onnx import TensorProto, helper
from shared_traces import export_graph
from tiny import MODEL_NAMES, make_call, tiny_transformer

from ditrim.engines.backends.onnxruntime.graph import (
    column_sums_function,
    column_sums_unrolled,
    use_own_operators,
)
from ditrim.export.assemble import assemble_graph, check_linked, index_weights, write_linked
from ditrim.export.checkpoint import find_checkpoint
from ditrim.export.family import FAMILIES
from ditrim.export.graph import write_graph
from ditrim.export.split import SplitPoint
from ditrim.plugins.blocks import ONNXRUNTIME_ROWS

Array = NDArray[np.floating[Any]]
LAYERS = (2, 3)  # the last layer too
STANDARD = {"Attention", "LogSumExp"}


def open_session(model: Path | bytes) -> Any:
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def operators(path: Path) -> set[str]:
    model = onnx.load(path, load_external_data=False)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    return {node.op_type for body in bodies for node in body}


def column_sums(
    queries: Array, keys: Array, scale: float, block_rows: int = 7, *, is_half: bool = False
) -> Array:
    def value(name: str, *axes: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)

    node = helper.make_node("ColumnSums", ["q", "k"], ["y"], domain="ditrim", scale=scale)
    graph = helper.make_graph(
        [node], "sums", [value("q", *"BHRD"), value("k", *"BHND")], [value("y", *"BHN")]
    )
    model = helper.make_model(
        graph,
        functions=[column_sums_unrolled() if is_half else column_sums_function(block_rows)],
        opset_imports=[
            helper.make_opsetid("", 23),
            helper.make_opsetid("ditrim", 1),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )
    session = open_session(model.SerializeToString())
    return session.run(None, {"q": queries, "k": keys})[0]  # type: ignore[no-any-return]


def column_sums_reference(queries: Array, keys: Array, scale: float) -> Array:
    """Float64."""
    logits = scale * np.einsum("bhrd,bhnd->bhrn", queries.astype(float), keys.astype(float))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=2)  # type: ignore[no-any-return]


def random_rows(rows: int, keys: int, size: float = 1.0) -> tuple[Array, Array]:
    generator = np.random.default_rng(rows * 1000 + keys)
    shapes = ((2, 3, rows, 8), (2, 3, keys, 8))
    queries, others = (size * generator.standard_normal(s).astype(np.float32) for s in shapes)
    return queries, others


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 14, 50])
@pytest.mark.parametrize("keys", [1, 33])
def test_column_sums_agree_with_the_float64_reference(rows: int, keys: int) -> None:
    queries, others = random_rows(rows, keys)
    expected = column_sums_reference(queries, others, 0.35)
    for is_half in (False, True):
        found = column_sums(queries, others, 0.35, is_half=is_half)
        assert np.abs(found - expected).max() <= 1e-5 * rows


# Since which opset the CUDA provider has an operator's kernel (its docs/OperatorKernels.md). A
# kernel without an end serves the version of the operator that it says, and no later one.
CUDA_SINCE = {
    "Add": 14,
    "Cast": 23,
    "CastLike": None,  # a function of Cast
    "Clip": 13,
    "Concat": 13,
    "Constant": None,  # folded
    "Cos": None,  # on the CPU: since 7 only, and of the timestep alone
    "Div": 14,
    "Exp": 13,
    "Expand": 13,
    "Gather": 13,
    "Gelu": 20,
    "Gemm": 13,
    "GreaterOrEqual": 16,
    "LayerNormalization": 17,
    "MatMul": 13,
    "Mul": 14,
    "Neg": 13,
    "Pow": 15,
    "RMSNormalization": 23,
    "Range": 11,
    "Reciprocal": 13,
    "ReduceL2": 18,
    "ReduceSum": 13,
    "Reshape": 23,
    "RotaryEmbedding": 23,
    "Shape": 23,
    "Sigmoid": 13,
    "Sin": None,
    "Slice": 13,
    "Softmax": 13,
    "Split": 18,
    "Sqrt": 13,
    "Squeeze": 23,
    "Sub": 14,
    "Sum": 13,
    "Tanh": 13,
    "Transpose": 23,
    "Unsqueeze": 23,
    "Where": 16,
}


@pytest.mark.parametrize("family", MODEL_NAMES)
def test_graphs_of_16_bits_hold_what_cuda_has_kernels_for(family: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(family).half()
    point = SplitPoint(num_layers=4, front_depth=1, representative_layers=LAYERS)
    for role in ("front", "back"):
        model = export_graph(transformer, point, role, torch.float16)
        use_own_operators(model, transformer.config.num_attention_heads, is_half=True)
        write_graph(model, tmp_path, role)
        check_linked(tmp_path / f"{role}.onnx", full_check=True)
        found = operators(tmp_path / f"{role}.onnx")
        assert ("ColumnSums" in found) == (role == "back")
        # Its attention of opset 23 came later than the rest.
        wrong = {
            name
            for name in found - {"ColumnSums", "Attention"}
            if CUDA_SINCE.get(name, 0) not in (None, onnx.defs.get_schema(name, 23).since_version)
        }
        assert not wrong


@pytest.mark.parametrize("rows", [ONNXRUNTIME_ROWS - 1, ONNXRUNTIME_ROWS, 2 * ONNXRUNTIME_ROWS + 1])
def test_rows_around_the_real_block(rows: int) -> None:
    queries, others = random_rows(rows, 70)
    found = column_sums(queries, others, 0.35, ONNXRUNTIME_ROWS)
    np.testing.assert_allclose(found, column_sums_reference(queries, others, 0.35), rtol=2e-5)


def test_large_logits_do_not_overflow() -> None:
    queries, others = random_rows(20, 30, size=60.0)
    found = column_sums(queries, others, 1.0)
    assert np.isfinite(found).all()
    assert np.abs(found - column_sums_reference(queries, others, 1.0)).max() < 2e-3


def test_no_rows_give_zeros() -> None:
    queries, others = random_rows(0, 5)
    assert (column_sums(queries, others, 1.0) == 0).all()


def test_no_keys_give_nothing() -> None:
    queries, others = random_rows(3, 0)
    assert column_sums(queries, others, 1.0).shape == (2, 3, 0)


def both_forms(
    family: str, folder: Path, *, is_assembled: bool, detailed: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sessions over the standard graphs, and over the rewritten ones."""
    transformer = tiny_transformer(family)
    point = SplitPoint(num_layers=4, front_depth=1, representative_layers=LAYERS)
    sessions: list[dict[str, Any]] = [{}, {}]
    weights = config = None
    if is_assembled:
        transformer.save_pretrained(folder / "checkpoint")
        checkpoint = find_checkpoint(folder / "checkpoint")
        weights, config = index_weights(checkpoint), checkpoint.config
    for role in ("front", "back"):
        if weights is not None and config is not None:
            model = assemble_graph(
                FAMILIES[family],
                config,
                point,
                role,
                dtype=torch.float32,
                weights=weights,
                detailed=detailed,
            )
        else:
            model = export_graph(transformer, point, role, torch.float32, detailed=detailed)
        for is_own, opened in enumerate(sessions):
            target = folder / str(is_own)
            target.mkdir(exist_ok=True)
            if is_own:
                use_own_operators(model, transformer.config.num_attention_heads)
            if weights is not None:
                write_linked(model, target, role, weights)
            else:
                write_graph(model, target, role)
            path = target / f"{role}.onnx"
            check_linked(path, full_check=True)
            opened[role] = open_session(path)
            found = operators(path)
            if is_own:
                assert "MultiHeadAttention" in found
                assert not found & STANDARD
                assert ("ColumnSums" in found) == (role == "back")
            else:
                assert "Attention" in found
    return sessions[0], sessions[1]


@pytest.mark.parametrize("is_assembled", [False, True], ids=["traced", "assembled"])
@pytest.mark.parametrize("family", MODEL_NAMES)
def test_both_forms_agree(family: str, is_assembled: bool, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    standard, own = both_forms(family, tmp_path, is_assembled=is_assembled)
    for geometry in GEOMETRIES:
        call = make_call(family, **geometry)
        num_reference = sum(height * width for _, height, width in call.grids[1:])
        for kept in (None, torch.arange(0, num_reference, 3)):
            expected = run_sessions(standard, transformer, call, kept)
            found = run_sessions(own, transformer, call, kept)
            for name in ("velocity", "influence"):
                assert relative_error(found[name], expected[name]) < 2e-5, (name, geometry)


def test_detailed_scores_agree(tmp_path: Path) -> None:
    family = "qwen-edit-2511"
    standard, own = both_forms(family, tmp_path, is_assembled=False, detailed=True)
    call = make_call(family, **GEOMETRIES[1])
    transformer = tiny_transformer(family)
    expected = run_sessions(standard, transformer, call)["layer_scores"]
    found = run_sessions(own, transformer, call)["layer_scores"]
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 2e-5


_PEAK = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
length = int(sys.argv[2])
sizes = {"batch": 1, "noisy": length, "reference": length, "text": 4, "rows": length}
feeds = {}
for item in session.get_inputs():
    shape = [sizes.get(axis, axis) for axis in item.shape]
    dtype = np.int64 if item.type == "tensor(int64)" else np.float32
    feeds[item.name] = np.full(shape, 0.1, dtype) if dtype == np.float32 else np.arange(length)
def most_kib():  # of this process; ru_maxrss begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = most_kib()
session.run(None, feeds)
print(most_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_logits_of_all_tokens_are_stored(tmp_path: Path) -> None:
    both_forms("qwen-edit", tmp_path, is_assembled=False)
    kib = []
    for form in ("0", "1"):
        arguments = [sys.executable, "-c", _PEAK, str(tmp_path / form / "back.onnx"), "2000"]
        kib.append(int(subprocess.run(arguments, check=True, capture_output=True).stdout))
    logits = 3 * 4004**2 * 4 / 1024  # three heads
    assert kib[0] > logits
    assert kib[1] < logits / 3, kib
