"""The scoring operator: references against each other, torch and ONNX forms against them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ditrim.plugins.blocks import PORTABLE_ROWS
from ditrim.plugins.log_sum_exp import influence, log_sum_exp
from ditrim.plugins.onnx_function import log_sum_exp_function
from ditrim.plugins.reference import (
    influence_reference,
    influence_two_pass_reference,
    log_sum_exp_reference,
)

Array = NDArray[np.float32]


def onnx_model(
    scale: float, block_rows: int = PORTABLE_ROWS, element: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    def value(name: str, *axes: str) -> onnx.ValueInfoProto:
        kind = element if name in "qk" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, axes)

    node = helper.make_node("LogSumExp", ["q", "k", "b"], ["y"], domain="ditrim", scale=scale)
    graph = helper.make_graph(
        [node],
        "scoring",
        [value("q", *"BHRD"), value("k", *"BHND"), value("b", *"BHN")],
        [value("y", *"BHR")],
    )
    model = helper.make_model(
        graph,
        functions=[log_sum_exp_function(block_rows)],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("ditrim", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


SESSIONS: dict[tuple[float, int], Any] = {}


def run_onnx(q: Array, k: Array, b: Array, scale: float, block_rows: int = 7) -> Array:
    key = (scale, block_rows)
    if key not in SESSIONS:
        model = onnx_model(scale, block_rows).SerializeToString()
        SESSIONS[key] = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return SESSIONS[key].run(None, {"q": q, "k": k, "b": b})[0]  # type: ignore[no-any-return]


@st.composite
def scoring_inputs(draw: st.DrawFn) -> tuple[Array, Array, Array, float]:
    """Queries, keys, bias and the largest logit they are scaled to, up to +-80."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, keys = draw(st.integers(1, 23)), draw(st.integers(1, 19))
    width = draw(st.sampled_from([1, 3, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q = rng.standard_normal((batch, heads, rows, width))
    k = rng.standard_normal((batch, heads, keys, width))
    bias = rng.standard_normal((batch, heads, keys)) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    largest = draw(st.sampled_from([0.0, 1e-3, 1.0, 20.0, 80.0]))
    q *= largest / max(np.abs(q @ k.swapaxes(-1, -2)).max() * 0.5, 1e-12)  # scale below is 0.5
    return q.astype("f4"), k.astype("f4"), bias.astype("f4"), largest


def tolerance(largest: float) -> float:
    """Float32 rounding of a logit of this size, with room for the sum over channels."""
    return 2e-6 * (1 + largest) * 4


@settings(max_examples=150, deadline=None)
@given(scoring_inputs())
def test_onnx_and_torch_forms_agree_with_the_float64_reference(
    inputs: tuple[Array, Array, Array, float],
) -> None:
    q, k, b, largest = inputs
    expected = log_sum_exp_reference(q, k, b, 0.5)
    bound = tolerance(largest + float(np.abs(b).max()))
    found = run_onnx(q, k, b, 0.5)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound
    in_torch = log_sum_exp(torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(b), 0.5)
    assert np.abs(in_torch.numpy() - expected).max() <= bound


@settings(max_examples=100, deadline=None)
@given(scoring_inputs(), st.integers(0, 2**32 - 1))
def test_two_pass_form_is_exact(inputs: tuple[Array, Array, Array, float], seed: int) -> None:
    q, k, _, _ = inputs
    values = np.random.default_rng(seed).standard_normal(k.shape)
    start = seed % k.shape[2]
    direct = influence_reference(q, k, values, start, 0.5)
    two_pass = influence_two_pass_reference(q, k, values, start, 0.5)
    np.testing.assert_allclose(two_pass, direct, rtol=1e-9, atol=1e-300)
    found = influence(
        torch.from_numpy(q),
        torch.from_numpy(k),
        torch.from_numpy(k[:, :, start:]),
        torch.from_numpy(values[:, :, start:].astype("f4")),
        0.5,
    )
    np.testing.assert_allclose(found.numpy(), direct, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 14, 15])
def test_rows_around_a_block_boundary(rows: int) -> None:
    rng = np.random.default_rng(rows)
    q, k = (rng.standard_normal((1, 2, n, 8)).astype("f4") for n in (rows, 5))
    b = np.zeros((1, 2, 5), "f4")
    error = np.abs(run_onnx(q, k, b, 1.0) - log_sum_exp_reference(q, k, b)).max()
    assert error < 1e-5


def test_no_rows_give_no_result() -> None:
    q, k, b = np.zeros((1, 2, 0, 8), "f4"), np.ones((1, 2, 3, 8), "f4"), np.zeros((1, 2, 3), "f4")
    assert run_onnx(q, k, b, 1.0).shape == (1, 2, 0)
    tensors = (torch.from_numpy(x) for x in (q, k, b))
    assert log_sum_exp(*tensors, 1.0).shape == (1, 2, 0)


def test_a_row_without_attention_is_minus_infinity_not_nan() -> None:
    q, k = np.ones((1, 1, 2, 4), "f4"), np.ones((1, 1, 3, 4), "f4")
    b = np.full((1, 1, 3), -np.inf, "f4")
    assert np.all(run_onnx(q, k, b, 1.0) == -np.inf)
    assert np.all(log_sum_exp_reference(q, k, b) == -np.inf)


def test_logits_beyond_float32_exp_do_not_overflow() -> None:
    q, k = np.full((1, 1, 1, 1), 80.0, "f4"), np.array([[[[80.0], [-80.0]]]], "f4")
    found = run_onnx(q, k, np.zeros((1, 1, 2), "f4"), 1.0)
    np.testing.assert_allclose(found, 6400.0, rtol=1e-6)


def test_logits_of_bfloat16_queries_are_not_rounded_to_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 2, n, 128, generator=generator) for n in (9, 40))
    queries *= 50 / (queries @ keys.mT).abs().max()  # logits up to 50
    queries, keys, bias = queries.bfloat16(), keys.bfloat16(), torch.zeros(1, 2, 40)
    expected = log_sum_exp_reference(queries.float().numpy(), keys.float().numpy())
    rounded = torch.logsumexp((queries @ keys.mT).float(), dim=-1).numpy()
    assert np.abs(rounded - expected).max() > 0.02
    assert np.abs(log_sum_exp(queries, keys, bias, 1.0).numpy() - expected).max() < 1e-4
    model = onnx_model(1.0, 4, TensorProto.BFLOAT16).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    binding, found = session.io_binding(), torch.empty(1, 2, 9)
    for name, tensor in (("q", queries), ("k", keys), ("b", bias)):
        kind = TensorProto.FLOAT if name == "b" else TensorProto.BFLOAT16
        binding.bind_input(name, "cpu", 0, kind, tensor.shape, tensor.data_ptr())
    binding.bind_output("y", "cpu", 0, TensorProto.FLOAT, found.shape, found.data_ptr())
    session.run_with_iobinding(binding)
    assert np.abs(found.numpy() - expected).max() < 1e-4


def test_shapes_and_dtypes_that_do_not_fit_are_named() -> None:
    q, k, b = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match=r"queries \(B, H, R, D\).*got \(2, 3, 4\)"):
        log_sum_exp(q[0], k, b, 1.0)
    with pytest.raises(ValueError, match=r"float32 bias; got torch\.float32, torch\.float16"):
        log_sum_exp(q, k.half(), b, 1.0)


MEMORY_PROGRAM = """
import resource, sys
import numpy as np, onnxruntime
rows, keys, heads, width = 1024, 4096, 8, 64
rng = np.random.default_rng(0)
q, k = (rng.standard_normal((1, heads, n, width), dtype="f4") for n in (rows, keys))
b = np.zeros((1, heads, keys), "f4")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {"q": q[:, :, :1], "k": k, "b": b})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.run(None, {"q": q, "k": k, "b": b})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_peak_memory_stays_far_below_rows_times_keys_times_heads(tmp_path: Any) -> None:
    onnx.save(onnx_model(0.125), tmp_path / "scoring.onnx")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path / "scoring.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    everything = 1024 * 4096 * 8 * 4  # 134 MB of float32 logits
    # Three buffers of one block's logits, the padded queries, and the transposed keys.
    bound = 3 * PORTABLE_ROWS * 4096 * 8 * 4 + 2 * (1024 + 4096) * 8 * 64 * 4
    assert bound < everything / 2
    assert int(done.stdout) < bound
