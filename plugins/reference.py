"""Float64 references of the scoring operator and of ToPi's influence score, in numpy.

They state the mathematics as plainly as possible, hold rows x keys in memory and are slow; the
portable form and the kernels are tested against them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _dot_products(queries: NDArray[np.floating], keys: NDArray[np.floating]) -> Array:
    """(B, H, R, D) and (B, H, N, D) -> (B, H, R, N)."""
    return np.matmul(queries.astype(np.float64), keys.astype(np.float64).swapaxes(-1, -2))


def log_sum_exp_reference(
    queries: NDArray[np.floating],
    keys: NDArray[np.floating],
    bias: NDArray[np.floating] | None = None,
    scale: float = 1.0,
) -> Array:
    """Logarithm of each query row's sum of exponentiated logits.

    `out[b, h, r] = log(sum_n exp(scale * <queries[b, h, r], keys[b, h, n]> + bias[b, h, n]))`

    Args:
        queries: (B, H, R, D), any floating dtype.
        keys: (B, H, N, D).
        bias: (B, H, N), added to every row's logits; none means zero.
        scale: factor of the dot products.

    Returns:
        (B, H, R) float64; `-inf` for a row without keys.
    """
    logits = scale * np.einsum(
        "bhrd,bhnd->bhrn", queries.astype(np.float64), keys.astype(np.float64)
    )
    if bias is not None:
        logits = logits + bias.astype(np.float64)[:, :, None, :]
    largest = logits.max(axis=-1, keepdims=True, initial=-np.finfo(np.float64).max)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]


def influence_reference(
    queries: NDArray[np.floating],
    keys: NDArray[np.floating],
    values: NDArray[np.floating],
    reference_start: int,
    scale: float,
) -> Array:
    """Token influence score of one layer, straight from its definition (ToPi Eq. 9).

    `A` is the joint attention matrix (softmax over text, noisy and reference keys), restricted to
    the scored noisy rows and the reference columns.

    Args:
        queries: (B, H, R, D) scored noisy rows, after QK-norm and RoPE.
        keys: (B, H, N, D) all keys, after QK-norm and RoPE; the reference ones come last.
        values: (B, H, N, D) all values.
        reference_start: index of the first reference key.
        scale: the attention's scale, 1/sqrt(D).

    Returns:
        (B, N - reference_start) float64.
    """
    logits = scale * np.einsum(
        "bhrd,bhnd->bhrn", queries.astype(np.float64), keys.astype(np.float64)
    )
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    attention = weights / weights.sum(axis=-1, keepdims=True)
    received = attention[..., reference_start:].sum(axis=2)  # (B, H, C)
    norms = np.linalg.norm(values[:, :, reference_start:].astype(np.float64), axis=-1)
    influence: Array = (norms * received).sum(axis=1)
    return influence


def influence_two_pass_reference(
    queries: NDArray[np.floating],
    keys: NDArray[np.floating],
    values: NDArray[np.floating],
    reference_start: int,
    scale: float,
) -> Array:
    """The same score (ToPi Eq. 9) as two log-sum-exps, the form that never needs rows x keys.

    First over the scored rows for their normalisers; then with the roles exchanged and the negated
    normalisers as bias, which gives the logarithm of each reference column's sum. Arguments and
    result as in `influence_reference`.
    """
    normaliser = log_sum_exp_reference(queries, keys, None, scale)  # (B, H, R)
    columns = log_sum_exp_reference(keys[:, :, reference_start:], queries, -normaliser, scale)
    norms = np.linalg.norm(values[:, :, reference_start:].astype(np.float64), axis=-1)
    influence: Array = (norms * np.exp(columns)).sum(axis=1)
    return influence
