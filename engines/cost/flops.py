"""Floating-point operations of one model call, counted from the configuration.

Matrix products only (a multiply-add is two operations): normalisation, activation and softmax are
left out, as ToPi's App. F leaves them out. Of these, every one is counted: embeddings, modulation
and scoring too. `cost` adds the bytes that they move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditrim.engines.cost.parameters import complete_config

# Width of the sinusoids that a timestep is embedded with.
_TIMESTEP_CHANNELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSize:
    """Lengths of one call.

    Attributes:
        num_noisy, num_reference, num_text: G, C (or K' where reduced) and T.
        batch: B.
    """

    num_noisy: int
    num_reference: int
    num_text: int
    batch: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """`count` products (m, k) x (k, n).

    Attributes:
        is_batched: the products are one batched call (attention), not `count` calls.
    """

    m: int
    k: int
    n: int
    count: int = 1
    is_batched: bool = False

    @property
    def flops(self) -> int:
        """Operations of all of them."""
        return 2 * self.m * self.k * self.n * self.count


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
        architecture: "qwen" or "flux".
        layer: FLUX counts double-stream blocks first.
        size: of the call.
        is_last: the last block of BACK gives its noisy rows alone: the others are keys and values.
    """
    config = complete_config(config, architecture)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width, batch = heads * head_dim, size.batch
    num_times = batch * (1 + bool(config.get("zero_cond_t")))  # references modulated at t = 0
    image = (size.num_noisy + size.num_reference) * batch
    text = size.num_text * batch
    noisy = size.num_noisy * batch
    joint = size.num_noisy + size.num_reference + size.num_text
    queries = size.num_noisy if is_last else joint
    attention = [
        MatrixProduct(m=queries, k=head_dim, n=joint, count=heads * batch, is_batched=True),
        MatrixProduct(m=queries, k=joint, n=head_dim, count=heads * batch, is_batched=True),
    ]
    if architecture == "flux" and layer >= config["num_layers"]:  # single-stream
        tokens, rows = joint * batch, queries * batch
        projections = [MatrixProduct(m=tokens, k=width, n=width, count=3)]
        if is_last:
            projections = [
                MatrixProduct(m=rows, k=width, n=width),
                MatrixProduct(m=tokens, k=width, n=width, count=2),
            ]
        return [
            *attention,
            *projections,
            MatrixProduct(m=rows, k=width, n=4 * width),
            MatrixProduct(m=rows, k=5 * width, n=width),
            MatrixProduct(m=batch, k=width, n=3 * width),
        ]
    streams = [
        product
        for tokens in (image, text)
        for product in (
            MatrixProduct(m=tokens, k=width, n=width, count=4),
            MatrixProduct(m=tokens, k=width, n=4 * width),
            MatrixProduct(m=tokens, k=4 * width, n=width),
            MatrixProduct(m=num_times, k=width, n=6 * width),
        )
    ]
    if is_last:
        streams = [
            MatrixProduct(m=noisy, k=width, n=width, count=2),  # queries and output
            MatrixProduct(m=image, k=width, n=width, count=2),
            MatrixProduct(m=noisy, k=width, n=4 * width),
            MatrixProduct(m=noisy, k=4 * width, n=width),
            MatrixProduct(m=text, k=width, n=width, count=2),
            MatrixProduct(m=num_times, k=width, n=6 * width, count=2),
        ]
    return [*attention, *streams]


def embedding_products(
    config: Mapping[str, Any], architecture: str, size: CallSize
) -> list[MatrixProduct]:
    """Matrix products before the first block: latents, text, times, FLUX's guidance and pooled."""
    config = complete_config(config, architecture)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    image, batch = (size.num_noisy + size.num_reference) * size.batch, size.batch
    num_times = 1 + bool(config.get("zero_cond_t"))
    if architecture == "flux":
        num_times += bool(config["guidance_embeds"])
    products = [
        MatrixProduct(m=image, k=config["in_channels"], n=width),
        MatrixProduct(m=size.num_text * batch, k=config["joint_attention_dim"], n=width),
        MatrixProduct(m=batch, k=_TIMESTEP_CHANNELS, n=width, count=num_times),
        MatrixProduct(m=batch, k=width, n=width, count=num_times),
    ]
    if architecture == "flux":
        products += [
            MatrixProduct(m=batch, k=config["pooled_projection_dim"], n=width),
            MatrixProduct(m=batch, k=width, n=width),
        ]
    return products


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
    width = config["num_attention_heads"] * config["attention_head_dim"]
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
        return products + embedding_products(config, architecture, size)
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
