"""The scoring operator `ditrim::LogSumExp` for torch: checks, a blocked computation, an ONNX node.

Replaces: materialising the attention matrix (rows x keys x heads) to read its sums.
Limits: forward only. Trade-off: each block's logits are made twice over an anchor step (once a
role), so that at most `PORTABLE_ROWS` rows of logits are alive at a time; and they are float32
products, since in bfloat16 a logit of 50 is rounded by 0.1 and its weight by 10 %.
"""

from __future__ import annotations

import torch

from ditrim.plugins.blocks import PORTABLE_ROWS

DOMAIN = "ditrim"
OP_NAME = "LogSumExp"
OP_VERSION = 1


def log_sum_exp(
    queries: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    *,
    as_onnx_node: bool = False,
) -> torch.Tensor:
    """Logarithm of each query row's sum of exponentiated, biased logits.

    Args:
        queries: (B, H, R, D) float32, float16 or bfloat16.
        keys: (B, H, N, D), dtype of `queries`.
        bias: (B, H, N) float32, added to every row's logits.
        scale: factor of the dot products.
        as_onnx_node: emit a `ditrim::LogSumExp` node (while exporting) in place of computing.

    Returns:
        (B, H, R) float32.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if queries.dim() != 4 or keys.dim() != 4 or bias.dim() != 3:
        raise ValueError(
            "log_sum_exp takes queries (B, H, R, D), keys (B, H, N, D) and bias (B, H, N); "
            f"got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(bias.shape)}"
        )
    if queries.dtype != keys.dtype or bias.dtype != torch.float32:
        raise ValueError(
            "log_sum_exp takes queries and keys of one dtype and a float32 bias; "
            f"got {queries.dtype}, {keys.dtype} and {bias.dtype}"
        )
    if as_onnx_node:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_NAME}",
            (queries, keys, bias),
            attrs={"scale": scale},
            dtype=torch.float32,
            shape=queries.shape[:3],
            version=OP_VERSION,
        )
    transposed = keys.float().transpose(-1, -2)
    blocks = [
        torch.logsumexp(
            torch.matmul(rows.float() * scale, transposed) + bias[:, :, None, :], dim=-1
        )
        for rows in queries.split(PORTABLE_ROWS, dim=2)
    ]
    if not blocks:
        return queries.new_zeros(queries.shape[:3], dtype=torch.float32)
    return torch.cat(blocks, dim=-1)


def reference_column_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    reference_keys: torch.Tensor,
    scale: float,
    *,
    as_onnx_node: bool = False,
) -> torch.Tensor:
    """Attention that each reference token receives, summed over the scored rows.

    The inner sum of ToPi Eq. 9 in the two-pass form: `sum_i A[i, j]` a head, with A the joint
    attention matrix.

    Args:
        queries: (B, H, R, D) scored noisy rows, after QK-norm and RoPE.
        keys: (B, H, N, D) text, noisy and reference keys, after QK-norm and RoPE.
        reference_keys: (B, H, C, D) the reference ones among them.
        scale: the attention's scale, 1/sqrt(D).
        as_onnx_node: as in `log_sum_exp`.

    Returns:
        (B, H, C) float32, each at most R.
    """
    no_bias = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    normaliser = log_sum_exp(queries, keys, no_bias, scale, as_onnx_node=as_onnx_node)
    columns = log_sum_exp(
        reference_keys, queries, -normaliser, scale, as_onnx_node=as_onnx_node
    )  # (B, H, C)
    return columns.exp()


def influence(
    queries: torch.Tensor,
    keys: torch.Tensor,
    reference_keys: torch.Tensor,
    reference_values: torch.Tensor,
    scale: float,
    *,
    as_onnx_node: bool = False,
) -> torch.Tensor:
    """Token influence score of one layer (ToPi Eq. 9).

    Args:
        queries, keys, reference_keys, scale, as_onnx_node: as in `reference_column_sums`.
        reference_values: (B, H, C, D).

    Returns:
        (B, C) float32.
    """
    received = reference_column_sums(
        queries, keys, reference_keys, scale, as_onnx_node=as_onnx_node
    )
    norms = torch.linalg.vector_norm(reference_values.float(), dim=-1)  # (B, H, C)
    return (norms * received).sum(dim=1)
