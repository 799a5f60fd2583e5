"""Sizes that modules beside heavy libraries and estimates without them have to agree on."""

from __future__ import annotations

# Pixels that a token spans: the VAE's factor 8 and patches of 2.
TOKEN_PIXELS = 16
# Rows that are scored at a time by the portable function: with 8704 keys and 24 heads, their
# float32 logits are 53 MB.
PORTABLE_ROWS = 64
# By ONNX Runtime's form: with 2112 keys and 8 heads 9 MB. Half of them took 9 % longer, twice as
# many no less.
ONNXRUNTIME_ROWS = 128
# Blocks of rows in its form for CUDA, which has no loop.
CUDA_BLOCKS = 64
# By TensorRT-RTX's form: with 8704 keys and 24 heads 214 MB of float32 logits, less than the rest
# of a block of that size takes. Fewer than 8 blocks were not kept apart by TensorRT-RTX 1.7.1 at
# every length (`docs/guide/tensorrt.md`).
RTX_ROWS, RTX_LEAST_BLOCKS, RTX_MOST_BLOCKS = 256, 8, 16


def num_row_blocks(num_rows: int) -> int:
    """Return the number of blocks that TensorRT-RTX's form unrolls, by the most rows scored."""
    if num_rows <= RTX_ROWS:
        return 1
    return min(max(-(-num_rows // RTX_ROWS), RTX_LEAST_BLOCKS), RTX_MOST_BLOCKS)
