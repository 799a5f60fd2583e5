"""`LogSumExp` on NVIDIA GPUs: a Triton kernel and the wrapper that checks and launches it.

Replaces: `torch.logsumexp(queries @ keys.T + bias)`, which holds rows x keys in memory. A program
takes one tile of rows, keeps a running maximum and sum for each row, and streams over tiles of
keys: dot products on the tensor cores with float32 accumulation, everything after them in float32.

Limits: float16 and bfloat16, contiguous, head widths that are multiples of 16 up to 256, compute
capability 8.0 or later; forward only. A bias below -2.3e38 counts as -inf.
Trade-off: one tiling a width, chosen so that its shared memory stays under 48 KiB on every target:
a larger one would need the launcher to opt in, and nothing documents that TensorRT does. What runs
under torch, what the tests interpret and what is embedded in a plan are the same kernel and tiling.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import BackendError, UsageError

if TYPE_CHECKING:
    import torch
    import triton.language as tl

MAX_WIDTH = 256
WIDTH_STEP = 16
# Tensor cores for bfloat16 begin here.
MIN_CAPABILITY = (8, 0)
# CUDA's limit on a grid's first axis. The others end at 65535, so every program is on this one.
MAX_PROGRAMS = 2**31 - 1
_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Tile sizes of the kernel for one head width.

    Attributes:
        padded_width: the head width, rounded up to a power of two; what is added reads as zero.
        block_rows: rows a program takes.
        block_keys: keys a step of its loop takes.
        num_stages: depth of the software pipeline over keys.
        num_warps: warps a program has.
    """

    padded_width: int
    block_rows: int
    block_keys: int
    num_stages: int
    num_warps: int = 4


def tile_for_width(width: int) -> Tile:
    """The tiling for heads of `width` channels.

    Raises:
        UsageError: the width is not a multiple of 16 from 16 to 256.
    """
    if width % WIDTH_STEP or not 0 < width <= MAX_WIDTH:
        raise UsageError(
            f"the scoring kernel takes head widths that are multiples of {WIDTH_STEP} from "
            f"{WIDTH_STEP} to {MAX_WIDTH}; got {width}. Score with the portable ONNX function"
        )
    padded_width = 1 << (width - 1).bit_length()
    if padded_width <= 64:
        return Tile(padded_width=padded_width, block_rows=128, block_keys=64, num_stages=2)
    if padded_width == 128:
        return Tile(padded_width=padded_width, block_rows=64, block_keys=32, num_stages=3)
    return Tile(padded_width=padded_width, block_rows=32, block_keys=16, num_stages=3)


def ditrim_log_sum_exp(
    queries: tl.tensor,
    keys: tl.tensor,
    bias: tl.tensor,
    num_groups: tl.tensor,
    num_rows: tl.tensor,
    num_keys: tl.tensor,
    result: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One tile of rows of one (batch, head) group; groups and tiles share the grid's first axis.

    Triton source; the name is what a profiler shows. Arguments as those of `log_sum_exp`, in the
    order in which TensorRT passes them; num_groups is batch x heads.

    Logits are kept in units of log 2, so that `exp2` and `log2` serve; the result is in nats.
    WIDEN is for Triton's interpreter, which multiplies the bits of bfloat16 numbers as integers: it
    widens tiles to float32 first, which is exact.
    """
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    if program >= num_groups * num_tiles:  # an empty batch, or no rows: TensorRT launches one
        return
    group = (program // num_tiles).to(tl.int64)
    rows = (program % num_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channels = tl.arange(0, PADDED_WIDTH)
    queries += group * num_rows * WIDTH
    keys += group * num_keys * WIDTH
    bias += group * num_keys

    is_row = rows[:, None] < num_rows
    if WIDTH != PADDED_WIDTH:
        is_row = is_row & (channels[None, :] < WIDTH)
    row_tile = tl.load(queries + rows[:, None] * WIDTH + channels[None, :], mask=is_row, other=0.0)
    if WIDEN:
        row_tile = row_tile.to(tl.float32)
    # Starting at the lowest finite number and not at -inf: a row of -inf logits then ends in
    # log(0) = -inf, where inf - inf would be nan.
    largest = tl.full((BLOCK_ROWS,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first_key in range(0, num_keys, BLOCK_KEYS):
        columns = first_key + tl.arange(0, BLOCK_KEYS)
        is_key = columns[:, None] < num_keys
        if WIDTH != PADDED_WIDTH:
            is_key = is_key & (channels[None, :] < WIDTH)
        key_tile = tl.load(
            keys + columns[:, None] * WIDTH + channels[None, :], mask=is_key, other=0.0
        )
        if WIDEN:
            key_tile = key_tile.to(tl.float32)
        # A key past the end has a bias of -inf: it adds nothing.
        key_bias = tl.load(bias + columns, mask=columns < num_keys, other=float("-inf"))
        logits = tl.dot(row_tile, key_tile.T) * (SCALE * 1.4426950408889634)
        logits += key_bias[None, :] * 1.4426950408889634  # (BLOCK_ROWS, BLOCK_KEYS)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_largest[:, None])
        total = total * tl.exp2(largest - new_largest) + tl.sum(weights, 1)
        largest = new_largest
    nats = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(result + group * num_rows + rows, nats, mask=rows < num_rows)


def import_triton() -> Any:
    """Triton, which only launching and compiling need.

    Raises:
        BackendError: it is missing or too old.
    """
    try:
        import triton
    except ImportError as error:
        raise BackendError(
            "the scoring kernel needs Triton 3.4 or later: pip install triton"
        ) from error
    if not hasattr(triton, "knobs"):
        raise BackendError(
            f"the scoring kernel needs Triton 3.4 or later; found {triton.__version__}"
        )
    return triton


@functools.cache
def triton_kernel() -> Any:
    """The kernel as Triton's function: compiled, or interpreted where TRITON_INTERPRET=1 is set.

    Lengths are not specialised on, so that one compilation serves every length.
    """
    global tl  # what the kernel's body names; Triton looks it up among this module's names
    jit = import_triton().jit
    import triton.language as tl

    return jit(ditrim_log_sum_exp, do_not_specialize=["num_groups", "num_rows", "num_keys"])


def _check(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor) -> None:
    if queries.dim() != 4 or keys.dim() != 4 or bias.dim() != 3:
        raise UsageError(
            "log_sum_exp takes queries (B, H, R, D), keys (B, H, N, D) and bias (B, H, N); "
            f"got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(bias.shape)}"
        )
    batch, heads, _, width = queries.shape
    if keys.shape[:2] != (batch, heads) or keys.shape[3] != width or bias.shape != keys.shape[:3]:
        raise UsageError(
            "queries, keys and bias differ in batch, heads, keys or head width: "
            f"{tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(bias.shape)}"
        )
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (queries, keys, bias)]
    if dtypes[0] not in _DTYPES or dtypes[1] != dtypes[0] or dtypes[2] != "float32":
        raise UsageError(
            f"the scoring kernel takes queries and keys of one dtype, {' or '.join(_DTYPES)}, and "
            f"a float32 bias; got {', '.join(dtypes)}"
        )
    for name, tensor in (("queries", queries), ("keys", keys), ("bias", bias)):
        if tensor.device != queries.device:
            raise UsageError(f"{name} is on {tensor.device}, queries on {queries.device}")
        if not tensor.is_contiguous():
            raise UsageError(
                f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; "
                "the scoring kernel reads contiguous tensors: call .contiguous() first"
            )


def _check_device(device: torch.device) -> None:
    import torch

    if import_triton().knobs.runtime.interpret:
        return
    if device.type != "cuda":
        raise UsageError(
            f"the scoring kernel runs on NVIDIA GPUs; the tensors are on {device}. Use "
            "ditrim.plugins.log_sum_exp there, or set TRITON_INTERPRET=1 before Python starts"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise UsageError(
            f"{device} has compute capability {capability[0]}.{capability[1]}; the scoring kernel "
            f"needs {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"
        )


def log_sum_exp(
    queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """`ditrim.plugins.log_sum_exp.log_sum_exp` by the kernel.

    Args:
        queries: (B, H, R, D) float16 or bfloat16, contiguous, on a GPU.
        keys: (B, H, N, D), dtype and device of `queries`, contiguous.
        bias: (B, H, N) float32, contiguous, added to every row's logits.
        scale: factor of the dot products. Each value is compiled once.

    Returns:
        (B, H, R) float32; `-inf` for a row without keys or whose logits are all `-inf`.

    Raises:
        UsageError: shapes, dtypes, strides, device or head width are not the kernel's.
        BackendError: Triton is missing.
    """
    import torch

    _check(queries, keys, bias)
    batch, heads, num_rows, width = queries.shape
    tile = tile_for_width(width)
    num_programs = batch * heads * -(-num_rows // tile.block_rows)
    if num_programs > MAX_PROGRAMS:
        raise UsageError(
            f"{batch} x {heads} groups of {num_rows} rows take {num_programs} programs; a grid "
            f"holds {MAX_PROGRAMS}. Score fewer rows at a time"
        )
    result = queries.new_empty(queries.shape[:3], dtype=torch.float32)
    if not num_programs:
        return result
    _check_device(queries.device)
    with torch.cuda.device_of(queries):
        triton_kernel()[(num_programs,)](
            queries,
            keys,
            bias,
            batch * heads,
            num_rows,
            keys.shape[2],
            result,
            WIDTH=width,
            PADDED_WIDTH=tile.padded_width,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_KEYS=tile.block_keys,
            SCALE=scale,
            WIDEN=import_triton().knobs.runtime.interpret,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return result


def influence(
    queries: torch.Tensor,
    keys: torch.Tensor,
    reference_keys: torch.Tensor,
    reference_values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Token influence score of one layer (ToPi Eq. 9) by two launches of the kernel.

    The first gives the scored rows' normalisers; the second exchanges the roles, with the negated
    normalisers as bias, and gives the logarithm of each reference token's column sum.

    Args:
        queries: (B, H, R, D) scored noisy rows, after QK-norm and RoPE.
        keys: (B, H, N, D) text, noisy and reference keys, after QK-norm and RoPE.
        reference_keys: (B, H, C, D) the reference ones among them; a view of `keys` is copied.
        reference_values: (B, H, C, D).
        scale: the attention's scale, 1/sqrt(D).

    Returns:
        (B, C) float32.

    Raises:
        UsageError, BackendError: as `log_sum_exp`.
    """
    import torch

    no_bias = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    normaliser = log_sum_exp(queries, keys, no_bias, scale)
    columns = log_sum_exp(reference_keys.contiguous(), queries, -normaliser, scale)  # (B, H, C)
    norms = torch.linalg.vector_norm(reference_values.float(), dim=-1)
    return (norms * columns.exp()).sum(dim=1)
