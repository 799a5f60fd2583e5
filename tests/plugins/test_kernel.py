"""The scoring kernel against the float64 reference: interpreted, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditrim.plugins import kernel
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.kernel import MAX_WIDTH, WIDTH_STEP, tile_for_width
from ditrim.plugins.reference import influence_reference, log_sum_exp_reference

WIDTHS = range(WIDTH_STEP, MAX_WIDTH + 1, WIDTH_STEP)
DTYPES = (torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of the kernel module in a process where Triton interprets."""
    context = multiprocessing.get_context("spawn")
    # One thread: products of small tiles gain nothing from more, and wait for each other.
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(1, context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(abs, 1).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def inputs(
    seed: int, shape: tuple[int, int, int, int, int], dtype: torch.dtype, largest: float = 10.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Queries, keys, a bias with some -inf, and the scale that makes logits at most as asked."""
    batch, heads, rows, keys, width = shape
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, width, generator=random).to(dtype)
    k = torch.randn(batch, heads, keys, width, generator=random).to(dtype)
    bias = torch.randn(batch, heads, keys, generator=random) * largest / 4
    bias[torch.rand(bias.shape, generator=random) < 0.05] = -torch.inf
    products = q.double() @ k.double().transpose(-1, -2)
    # A product that happens to cancel would be blown up together with the rounding of its terms:
    # half the spread of a product is the least that is scaled up.
    least = 0.5 * width**0.5
    scale = largest / max(float(products.abs().max()), least) if products.numel() else 1.0
    return q, k, bias, scale


def error_against_reference(
    found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scale: float
) -> float:
    """Largest absolute error; nan where one of the two is infinite and the other is not."""
    expected = log_sum_exp_reference(
        q.double().cpu().numpy(), k.double().cpu().numpy(), bias.cpu().numpy(), scale
    )
    result = found.cpu().numpy()
    assert found.dtype == torch.float32
    assert result.shape == expected.shape
    if not (np.isneginf(result) == np.isneginf(expected)).all():
        return float("nan")
    finite = np.isfinite(expected)
    return float(np.abs(result[finite] - expected[finite]).max(initial=0.0))


def tolerance(largest: float) -> float:
    """Float32 rounding of a logit of this size, with room for the sums over channels and keys."""
    return 4e-6 * (1 + largest)


@needs_triton
@settings(max_examples=25, deadline=None)
@example(seed=1, groups=(1, 1), lengths=(1, 1), width=240, dtype=torch.float16, largest=1.0)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    lengths=st.tuples(st.integers(1, 150), st.integers(0, 150)),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    largest=st.sampled_from([1e-3, 1.0, 20.0, 80.0]),
)
def test_random_shapes_agree_with_the_float64_reference(
    interpreted: Callable[..., Any],
    seed: int,
    groups: tuple[int, int],
    lengths: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    largest: float,
) -> None:
    case = inputs(seed, (*groups, *lengths, width), dtype, largest)
    found = interpreted(kernel.log_sum_exp, *case)
    error = error_against_reference(found, *case)
    assert error <= tolerance(2 * largest), f"largest error {error}"


@needs_triton
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_agrees_with_the_float64_reference(
    interpreted: Callable[..., Any], width: int
) -> None:
    for dtype in DTYPES:
        case = inputs(width, (1, 2, 37, 71, width), dtype)
        error = error_against_reference(interpreted(kernel.log_sum_exp, *case), *case)
        assert error <= tolerance(20), f"largest error {error} in {dtype}"


@needs_triton
@pytest.mark.parametrize("width", [64, 128, 256])
def test_ragged_tails_on_both_sides_of_a_tile(interpreted: Callable[..., Any], width: int) -> None:
    tile = tile_for_width(width)
    errors = {}
    for rows in (1, tile.block_rows - 1, tile.block_rows, tile.block_rows + 1):
        for keys in (1, tile.block_keys - 1, tile.block_keys, 2 * tile.block_keys + 1):
            case = inputs(rows + keys, (1, 2, rows, keys, width), torch.bfloat16)
            found = interpreted(kernel.log_sum_exp, *case)
            errors[rows, keys] = error_against_reference(found, *case)
    assert max(errors.values()) <= tolerance(20), f"largest errors {errors}"


@needs_triton
def test_no_rows_no_keys_and_no_attention(interpreted: Callable[..., Any]) -> None:
    q, k, bias, scale = inputs(0, (1, 2, 3, 5, 32), torch.float16)
    assert interpreted(kernel.log_sum_exp, q[:, :, :0], k, bias, scale).shape == (1, 2, 0)
    no_keys = interpreted(kernel.log_sum_exp, q, k[:, :, :0], bias[:, :, :0], scale)
    assert no_keys.tolist() == [[[-torch.inf] * 3] * 2]
    masked = interpreted(kernel.log_sum_exp, q, k, torch.full_like(bias, -torch.inf), scale)
    assert masked.tolist() == [[[-torch.inf] * 3] * 2]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_neither_overflow_nor_vanish(
    interpreted: Callable[..., Any], dtype: torch.dtype
) -> None:
    q = torch.full((1, 1, 2, 16), 80.0, dtype=dtype)
    q[:, :, 1] = -80
    k = torch.cat([q[:, :, :1], q[:, :, 1:], torch.zeros_like(q[:, :, :1])], dim=2).contiguous()
    for bias in (torch.zeros(1, 1, 3), torch.tensor([[[-1e30, 5e4, -5e4]]])):
        found = interpreted(kernel.log_sum_exp, q, k, bias, 1.0)  # logits of +-102400
        expected = log_sum_exp_reference(q.double().numpy(), k.double().numpy(), bias.numpy(), 1.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=3e-7)


@needs_triton
def test_one_row_and_one_key_are_their_logit(interpreted: Callable[..., Any]) -> None:
    case = inputs(3, (1, 1, 1, 1, 48), torch.bfloat16)
    bias = torch.tensor([[[0.25]]])
    found = interpreted(kernel.log_sum_exp, case[0], case[1], bias, case[3])
    logit = float((case[0].double() * case[1].double()).sum()) * case[3] + 0.25
    assert abs(float(found) - logit) < tolerance(10)


@needs_triton
@pytest.mark.parametrize("width", [48, 128])
def test_influence_by_two_launches_is_that_of_its_definition(
    interpreted: Callable[..., Any], width: int
) -> None:
    q, k, _, _ = inputs(width, (2, 3, 70, 90, width), torch.bfloat16)
    values = torch.randn(2, 3, 90, width, generator=torch.Generator().manual_seed(1))
    scale, start = width**-0.5, 50
    arguments = (q, k, k[:, :, start:], values[:, :, start:].to(torch.bfloat16), scale)
    found = interpreted(kernel.influence, *arguments)
    rounded = values.to(torch.bfloat16).double().numpy()
    expected = influence_reference(q.double().numpy(), k.double().numpy(), rounded, start, scale)
    error = np.abs(found.numpy() / expected - 1).max()
    assert error < 1e-5, f"largest relative error {error}"


EMPTY_LAUNCH_PROGRAM = """
import torch
from ditrim.plugins.kernel import triton_kernel
result = torch.full((4,), 7.0)
for groups, rows in ((0, 4), (1, 0), (1, 4)):
    q, b = torch.ones(max(groups * rows, 1), 16, dtype=torch.float16), torch.zeros(1)
    triton_kernel()[(2,)](
        q, q, b, groups, rows, 1, result, WIDTH=16, PADDED_WIDTH=16, BLOCK_ROWS=16, BLOCK_KEYS=16,
        SCALE=1.0, WIDEN=False, num_warps=4, num_stages=2)
    print(result.tolist())
"""


@needs_triton
def test_programs_beyond_the_work_touch_nothing() -> None:
    # TensorRT launches at least one program, also for no rows or an empty batch.
    done = subprocess.run(
        [sys.executable, "-c", EMPTY_LAUNCH_PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    seven, sixteen = str([7.0] * 4), str([16.0] * 4)
    assert done.stdout.splitlines() == [seven, seven, sixteen], done.stderr


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_has_a_tile_that_tensor_cores_take(width: int) -> None:
    tile = tile_for_width(width)
    assert tile.padded_width // 2 < width <= tile.padded_width
    assert tile.block_rows % 16 == 0
    assert tile.block_keys % 16 == 0


@pytest.mark.parametrize("width", [-16, 0, 8, 40, 100, 272])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(UsageError, match=rf"multiples of 16 from 16 to 256; got {width}\."):
        tile_for_width(width)


@needs_triton
def test_the_wrapper_names_what_does_not_fit() -> None:
    q, k, bias, scale = inputs(0, (1, 2, 3, 5, 32), torch.float16)
    with pytest.raises(UsageError, match=r"queries \(B, H, R, D\).*got \(2, 3, 32\)"):
        kernel.log_sum_exp(q[0], k, bias, scale)
    with pytest.raises(UsageError, match=r"differ in batch, heads.*\(1, 2, 5, 16\)"):
        kernel.log_sum_exp(q, k[..., :16], bias, scale)
    with pytest.raises(UsageError, match=r"float16 or bfloat16.*got float32, float32, float32"):
        kernel.log_sum_exp(q.float(), k.float(), bias, scale)
    with pytest.raises(UsageError, match="float32 bias; got float16, float16, float16"):
        kernel.log_sum_exp(q, k, bias.half(), scale)
    with pytest.raises(UsageError, match=r"keys of shape .* has strides .*call \.contiguous\(\)"):
        kernel.log_sum_exp(q, k.transpose(2, 3).contiguous().transpose(2, 3), bias, scale)
    with pytest.raises(UsageError, match="keys is on meta, queries on cpu"):
        kernel.log_sum_exp(q, k.to("meta"), bias, scale)
    with pytest.raises(UsageError, match=r"a grid holds 2147483647\. Score fewer rows"):
        kernel.log_sum_exp(
            *(torch.empty(s, dtype=torch.float16, device="meta") for s in ((2**31, 1, 1, 16),) * 2),
            torch.empty(2**31, 1, 1, device="meta"),
            scale,
        )


@needs_triton
def test_tensors_on_a_cpu_are_refused_unless_interpreted() -> None:
    with pytest.raises(UsageError, match=r"runs on NVIDIA GPUs; the tensors are on cpu.*INTERPRET"):
        kernel.log_sum_exp(*inputs(0, (1, 1, 1, 1, 16), torch.float16))


def test_without_triton_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=r"needs Triton 3\.4 or later: pip install triton"):
        kernel.log_sum_exp(*inputs(0, (1, 1, 1, 1, 16), torch.float16))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_compiled_kernel_agrees_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    for seed, (rows, keys) in enumerate([(1, 1), (1, 300), (257, 63), (130, 1000)]):
        q, k, bias, scale = inputs(seed, (2, 3, rows, keys, width), dtype)
        found = kernel.log_sum_exp(q.cuda(), k.cuda(), bias.cuda(), scale)
        error = error_against_reference(found, q, k, bias, scale)
        assert error <= 2e-5, f"largest error {error} at {rows} rows, {keys} keys"


@needs_triton
@needs_gpu
def test_memory_on_a_gpu_is_the_result_alone() -> None:
    q = torch.randn(1, 4, 2048, 128, device="cuda").bfloat16()
    bias = torch.zeros(1, 4, 2048, device="cuda")
    kernel.log_sum_exp(q, q, bias, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel.log_sum_exp(q, q, bias, 0.1)
    assert torch.cuda.max_memory_allocated() - before <= 2 * 4 * 2048 * 4
