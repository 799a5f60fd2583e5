"""The Triton scoring kernel: right to float64, and how fast against what the GPU can do."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from gpu.clock import rates_of, times_of
from gpu.part import Context, need, need_gpu

# Qwen-Image-Edit at 1024 x 1024 with one reference.
HEADS, WIDTH, NOISY, REFERENCE, TEXT = 24, 128, 4096, 4144, 1400
_SHAPES = [
    (1, 2, 100, 333, 64), (2, 3, 1, 129, 128), (1, 4, 257, 515, 128), (1, 1, 64, 64, 16),
    (1, 2, 130, 70, 256), (3, 2, 33, 1000, 80), (1, HEADS, NOISY, NOISY + REFERENCE + TEXT, WIDTH),
]  # fmt: skip
_TOY_SHAPES = [(1, 2, 10, 33, 64), (2, 1, 1, 29, 128)]
_ATTENTION = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def random_scoring(
    shape: tuple[int, ...], dtype: Any, largest: float, seed: int, device: str
) -> Any:
    """Queries, keys, a bias with some -inf, and the scale that makes logits about so large."""
    batch, heads, rows, keys, width = shape
    random = torch.Generator(device).manual_seed(seed)
    made = functools.partial(torch.randn, generator=random, device=device)
    queries = made(batch, heads, rows, width).to(dtype)
    all_keys = made(batch, heads, keys, width).to(dtype)
    bias = made(batch, heads, keys) * largest / 4
    bias[torch.rand(bias.shape, generator=random, device=device) < 0.05] = -torch.inf
    return queries, all_keys, bias, largest / (4 * width**0.5)


def float64_error(found: Any, queries: Any, keys: Any, bias: Any, scale: float) -> Any:
    """Largest error against float64 and the largest logit, a few rows at a time."""
    worst, largest = 0.0, 0.0
    for first in range(0, queries.shape[2], 256):
        rows = queries[:, :, first : first + 256].double()
        logits = scale * (rows @ keys.double().transpose(-1, -2)) + bias.double()[:, :, None, :]
        expected = torch.logsumexp(logits, dim=-1)
        largest = max(largest, float(logits[torch.isfinite(logits)].abs().max()))
        part = found[:, :, first : first + 256].double()
        if not torch.equal(torch.isneginf(part), torch.isneginf(expected)):
            return math.inf, largest
        finite = torch.isfinite(expected)
        worst = max(worst, float((part[finite] - expected[finite]).abs().max()))
    return worst, largest


def kernel_accuracy(context: Context) -> None:
    """The scoring kernel over shapes, widths, dtypes and sizes of logits."""
    need_gpu(context)
    need("triton")
    import numpy as np

    from ditrim.plugins.kernel import influence, log_sum_exp
    from ditrim.plugins.reference import influence_reference

    record, device = context.record, context.device
    queries, keys, _, _ = random_scoring((1, 4, 300, 900, 128), torch.bfloat16, 1.0, 99, device)
    if context.is_rehearsal:
        queries, keys = queries[:, :1, :30].contiguous(), keys[:, :1, 560:640].contiguous()
    start = keys.shape[2] * 2 // 3
    values = torch.randn_like(keys)
    found = influence(queries, keys, keys[:, :, start:], values[:, :, start:], 128**-0.5)
    arrays = [tensor.double().cpu().numpy() for tensor in (queries, keys, values)]
    expected = influence_reference(*arrays, start, 128**-0.5)
    relative = float(np.abs(found.cpu().numpy() - expected).max() / np.abs(expected).max())
    record.note(influence_error=relative)
    record.check("influence (Eq. 9) to 1e-4 relative", relative <= 1e-4)

    shapes = _TOY_SHAPES if context.is_rehearsal else _SHAPES[: -1 if context.is_quick else None]
    # The kernel is compiled for each width, dtype and scale: the full size first.
    for seed, shape in reversed(list(enumerate(shapes))):
        for dtype in (torch.bfloat16, torch.float16):
            for size in (10.0, 1000.0):
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} logits to {size:g}"
                if not context.has_time(name, 2):
                    continue
                given = random_scoring(shape, dtype, size, seed, device)
                error, largest = float64_error(log_sum_exp(*given), *given)
                # Float32 rounding of a logit, with room for the sums over channels and keys.
                bound = 4e-6 * (1 + largest)
                record.note("cases", **{name: {"error": error, "of_bound": error / bound}})
                record.check(name, error <= bound)


def kernel_speed(context: Context) -> None:
    """Both launches of an anchor step at full size, against the GPU's own rates."""
    need_gpu(context)
    need("triton")
    from ditrim.plugins.kernel import log_sum_exp

    device, record = context.device, context.record
    repeats = 10 if context.is_quick else 30
    heads, noisy, reference, text = HEADS, NOISY, REFERENCE, TEXT
    if context.is_rehearsal:
        repeats, heads, noisy, reference, text = 1, 1, 16, 24, 8
    flops_per_s, bytes_per_s = rates_of(device, repeats)
    record.note(
        matrix_product_tflops=round(flops_per_s / 1e12, 3),
        copy_gb_per_s=round(bytes_per_s / 1e9, 1),
    )
    length = noisy + reference + text
    launches = {"rows x keys": (noisy, length), "references x rows": (reference, noisy)}
    scoring = 0.0
    for name, (rows, keys) in launches.items():
        given = random_scoring((1, heads, rows, keys, WIDTH), torch.bfloat16, 10.0, 0, device)
        record.check(f"{name}: finite", bool(torch.isfinite(log_sum_exp(*given)).all()))
        times = times_of(functools.partial(log_sum_exp, *given), device, repeats)
        flops = 2 * heads * rows * keys * WIDTH
        num_bytes = heads * (2 * WIDTH * (rows + keys) + 4 * (rows + keys))
        bound_ms = max(flops / flops_per_s, num_bytes / bytes_per_s) * 1e3
        rate = {
            "tflops": round(flops / times["median_ms"] / 1e9, 3),
            "bound_ms": round(bound_ms, 4),
            "of_bound": round(bound_ms / times["median_ms"], 3),
        }
        record.note("launches", **{name: times | rate})
        scoring += times["median_ms"]
    states = [
        torch.randn(1, heads, length, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(3)
    ]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *states)
    attention = times_of(attend, device, repeats)
    record.note(
        attention_of_a_layer=attention,
        scoring_of_attention=round(scoring / attention["median_ms"], 3),
    )
    time_attention_kernels(context, attend, repeats)


def time_attention_kernels(context: Context, attend: Any, repeats: int) -> None:
    """Each of torch's fused attention kernels by itself, where it serves this device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name in _ATTENTION:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                times: Any = times_of(attend, context.device, repeats)
        except RuntimeError as error:
            times = f"not here: {str(error).splitlines()[0]}"
        context.record.note("attention_kernels", **{name.lower(): times})
