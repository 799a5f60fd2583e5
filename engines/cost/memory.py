"""Memory that activations of FRONT and BACK take, from lengths and configuration.

TensorRT and TensorRT-RTX: the coefficients were read off TensorRT-RTX 1.7.1, which states the
activation memory of every profile when it builds a plan (`docs/guide/dry-run.md` has the figures
and the errors). For `tensorrt` they are an assumption until a plan of it is measured. ONNX Runtime:
off its CPU provider's memory while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.parameters import complete_config
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.blocks import (
    CUDA_BLOCKS,
    ONNXRUNTIME_ROWS,
    RTX_MOST_BLOCKS,
    RTX_ROWS,
    num_row_blocks,
)
from ditrim.plugins.precision import PRECISIONS

# Hidden states of width d that are alive at the peak, for a token of (image, text); those of plans
# are the blocks' own (`Stream.states`).
_ONNXRUNTIME = (20.0, 20.0)  # with its own operators, in float32
_ONNXRUNTIME_STANDARD = (15.5, 15.5)
# Code of a scored layer in a plan, for each profile: of the layer, and of each block of its rows.
_SCORING_CODE, _BLOCK_CODE = 600_000, 680_000
_PLUGIN_CODE = 1_200_000  # assumed
# Of a channel of a scored row: its query in float32, and what its parts take besides.
_QUERY_BYTES = 6
# TensorRT-RTX states so much more for narrow models; in wide ones the rest hides it.
_LIBRARY_BYTES = 16 << 20


def activation_bytes(
    config: Mapping[str, Any],
    architecture: str,
    layers: range,
    size: CallSize,
    *,
    backend: str,
    precision: str,
    num_rows: int = 0,
    num_scored: int = 1,
) -> int:
    """Peak of what one call of a graph keeps besides weights, inputs and outputs.

    Args:
        config: of the diffusers transformer.
        architecture: its name in `ARCHITECTURES`.
        layers: the graph's blocks.
        size: of the call; `num_reference` is C, or K' where reduced.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        precision: "fp32", "fp16" or "bf16".
        num_rows: noisy rows that are scored, 0 where the graph does not score.
        num_scored: layers that score them.
    """
    known = ARCHITECTURES[architecture]
    config = known.completed(config)
    # The blocks of a graph that take most come last.
    stream = known.stream_of(config, layers[-1]) if layers else known.blocks[0].stream
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    image, text = size.num_noisy + size.num_reference, size.num_text
    keys, element = image + text, PRECISIONS[precision].num_bytes
    hidden = heads * head_dim * element  # of a token
    rope = 4 * head_dim * keys  # cosines and sines of every token, float32
    is_standard = backend == "onnxruntime" and precision != "fp32"
    states = stream.states(config)
    if backend == "onnxruntime":
        states = _ONNXRUNTIME_STANDARD if is_standard else _ONNXRUNTIME
    peak = states[0] * hidden * image + states[1] * hidden * text + rope
    if is_standard:
        # Its standard attention is not fused: the logits of all heads, float32.
        peak += 4 * heads * keys * keys
    if num_rows and backend == "tensorrt-rtx":
        # A block of rows at a time and a layer after the other, with float32 queries of all rows.
        # Where several layers score, a layer hands over hidden states, and single-stream blocks
        # keep two layers' logits.
        block = 4 * heads * _rtx_block_rows(num_rows) * keys
        several = num_scored > 1
        peak += block * stream.logits * (1 + (several and stream.logits < 1))
        peak += _QUERY_BYTES * heads * head_dim * num_rows + several * hidden * keys
    elif num_rows:
        block_rows = 0
        if backend == "onnxruntime":
            block_rows = num_rows // CUDA_BLOCKS + 1 if is_standard else ONNXRUNTIME_ROWS
        peak += num_scored * _scoring_bytes(heads, head_dim, size, num_rows, element, block_rows)
    return round(size.batch * peak) + (backend != "onnxruntime") * _LIBRARY_BYTES


def scoring_code_bytes(backend: str, num_rows: int) -> int:
    """Bytes that a scored layer adds to a plan for each profile, by the most rows scored."""
    if backend != "tensorrt-rtx":
        return _PLUGIN_CODE
    return _SCORING_CODE + _BLOCK_CODE * num_row_blocks(num_rows)


def _rtx_block_rows(rows: int) -> int:
    """The most rows that TensorRT-RTX scores at a time where up to so many are scored.

    Between 257 and 2047 rows `num_row_blocks` makes them smaller than this.
    """
    return min(rows, max(RTX_ROWS, -(-rows // RTX_MOST_BLOCKS)))


def _scoring_bytes(
    heads: int, head_dim: int, size: CallSize, rows: int, element: int, block_rows: int
) -> int:
    """Bytes that scoring adds for a picture and a layer, where all layers' may be alive.

    Args:
        block_rows: rows whose logits are alive at a time; 0 with the plugin, which keeps none.
    """
    references = size.num_reference
    keys = size.num_noisy + references + size.num_text
    gathered = heads * rows * head_dim * element
    if block_rows:
        # Transposed keys, and a block of rows as logits and as their exponentials.
        block = 2 * 4 * heads * min(rows, block_rows) * keys
        return 2 * gathered + heads * keys * head_dim * element + block
    return gathered + 4 * heads * (keys + rows + references)


def seam_bytes(
    config: Mapping[str, Any], architecture: str, size: CallSize, *, precision: str
) -> int:
    """FRONT's outputs, the references gathered from them, RoPE tables and latents of a call."""
    config = complete_config(config, architecture)
    head_dim = config["attention_head_dim"]
    width, element = config["num_attention_heads"] * head_dim, PRECISIONS[precision].num_bytes
    image = size.num_noisy + size.num_reference
    states = (image + size.num_reference + size.num_text + 2) * width
    latents = (image + size.num_noisy) * config["in_channels"]
    latents += size.num_text * config["joint_attention_dim"]
    rope = 4 * head_dim * (image + size.num_reference + size.num_text)
    return size.batch * ((states + latents) * element + rope)
