"""Floating-point operations of one model call, counted from the configuration.

Matrix products only (a multiply-add is two operations): normalisation, activation and softmax are
left out, as ToPi's App. F leaves them out. Of these, every one is counted: embeddings, modulation
and scoring too. `cost` adds the bytes that they move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditrim.engines.cost.parameters import complete_config
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.streams import CallSize, MatrixProduct, width_of

__all__ = [
    "CallSize",
    "MatrixProduct",
    "block_products",
    "call_flops",
    "graph_products",
    "scoring_products",
]


def block_products(
    config: Mapping[str, Any],
    architecture: str,
    layer: int,
    size: CallSize,
    *,
    is_last: bool = False,
) -> list[MatrixProduct]:
    """Matrix products of one transformer block (ToPi Eq. 13-17 with the released MLP width of 4 d).

    Args:
        config: of the diffusers transformer.
        architecture: its name in `ARCHITECTURES`.
        layer: FLUX counts double-stream blocks first.
        size: of the call.
        is_last: the last block of BACK gives its noisy rows alone: the others are keys and values.
    """
    known = ARCHITECTURES[architecture]
    config = known.completed(config)
    return known.stream_of(config, layer).products(config, size, is_last)


def scoring_products(
    config: Mapping[str, Any],
    architecture: str,
    size: CallSize,
    num_rows: int,
    *,
    num_passes: int = 2,
) -> list[MatrixProduct]:
    """Matrix products that score one layer (ToPi Eq. 9).

    Args:
        config, architecture: see `block_products`.
        size: of the call; `num_reference` is what BACK runs on.
        num_rows: noisy rows that are scored.
        num_passes: 2 with `LogSumExp`, over all keys and with the roles exchanged; 1 with
            `onnxruntime_graph`'s softmax by blocks of rows, which stores their logits.
    """
    config = complete_config(config, architecture)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    joint, count = size.num_noisy + size.num_reference + size.num_text, heads * size.batch
    passes = [
        MatrixProduct(m=num_rows, k=head_dim, n=joint, count=count, is_batched=True),
        MatrixProduct(m=size.num_reference, k=head_dim, n=num_rows, count=count, is_batched=True),
    ]
    return passes[:num_passes]


def graph_products(
    config: Mapping[str, Any],
    architecture: str,
    layers: range,
    size: CallSize,
    role: str,
    *,
    num_rows: int = 0,
    num_scored: int = 0,
    num_passes: int = 2,
) -> list[MatrixProduct]:
    """Matrix products of FRONT ("front": embeddings and its blocks) or BACK (blocks and output).

    Args:
        config, architecture: see `block_products`.
        layers: the graph's blocks.
        size: of the call; `num_reference` is what the graph runs on.
        role: "front" or "back".
        num_rows, num_scored: noisy rows that are scored, and in how many layers.
        num_passes: see `scoring_products`.
    """
    config = complete_config(config, architecture)
    width = width_of(config)
    products = [
        product
        for layer in layers
        for product in block_products(
            config,
            architecture,
            layer,
            size,
            is_last=role == "back" and layer == layers[-1],
        )
    ]
    if role == "front":
        return products + ARCHITECTURES[architecture].embedding_products(config, size)
    channels = (config["out_channels"] or config["in_channels"]) * config["patch_size"] ** 2
    products += [
        MatrixProduct(m=size.batch, k=width, n=2 * width),
        MatrixProduct(m=size.num_noisy * size.batch, k=width, n=channels),
    ]
    if num_rows:
        scoring = scoring_products(config, architecture, size, num_rows, num_passes=num_passes)
        products += num_scored * scoring
    return products


def call_flops(
    config: Mapping[str, Any],
    architecture: str,
    front_depth: int,
    num_layers: int,
    size: CallSize,
    num_kept: int,
) -> tuple[int, int]:
    """Operations of FRONT at the full context and of BACK at `num_kept` reference tokens."""
    from dataclasses import replace

    front = graph_products(config, architecture, range(front_depth), size, "front")
    reduced = replace(size, num_reference=num_kept)
    back = graph_products(config, architecture, range(front_depth, num_layers), reduced, "back")
    return sum(p.flops for p in front), sum(p.flops for p in back)
