"""Attention processors that replace those of diffusers' blocks while a graph is made.

Replaces: diffusers' processors, whose RoPE is complex-valued or laid out for one batch entry, and
which give no access to queries and keys. Everything else of a block stays diffusers' own.

Limits: no attention mask (masked text tokens are removed before FRONT, which is exact).
Trade-off: RoPE tables stay float32 and only the product is cast back; angles in bfloat16 ruin the
picture. In a graph the queries' tables hold the attention's scale, D^-0.5, too, so that it is
rounded with them once: left to itself, TensorRT's parser multiplies queries and keys by D^-0.25 in
16 bits each, which in bfloat16 at D = 128 makes the logits 0.3 % smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditrim.plugins.log_sum_exp import influence, reference_column_sums


@dataclass(slots=True, kw_only=True)
class JointContext:
    """Context that a graph passes through diffusers' blocks in the place of `image_rotary_emb`.

    T text, G noisy and C reference tokens, in this order in the joint sequence of N tokens.

    Attributes:
        rope_cos, rope_sin: (B, N, D/2) float32.
        num_text, num_noisy: T and G.
        score_rows: (R,) int64, noisy rows that a scoring layer scores; none if nothing is scored.
        influences: one (B, C) float32 a scoring layer, in layer order (ToPi Eq. 9).
        details: one (B, 3, C) float32 a layer that returns its scores; see `detailed_scores`.
        sensitivities: one (B,) float32 a measured layer (ToPi Eq. 4, one sample's sum).
        as_onnx_node: score with ONNX nodes rather than by computing.
        processor: what a live processor hands a call to (the torch backend's).
        attention: (query, key, value), each (B, H, L, D) -> (B, H, L, D); none means torch's.
        score: in place of `plugins.log_sum_exp.influence`, with its arguments.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    num_text: int
    num_noisy: int
    score_rows: Tensor | None = None
    influences: list[Tensor] = field(default_factory=list)
    details: list[Tensor] = field(default_factory=list)
    sensitivities: list[Tensor] = field(default_factory=list)
    as_onnx_node: bool = False
    processor: Callable[..., Any] | None = None
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    score: Callable[..., Tensor] | None = None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, as_onnx_node: bool) -> Tensor:
    """Rotate consecutive pairs of channels, in float32.

    Args:
        x: (B, L, H, D).
        cos, sin: (B, L, D/2) float32.
        as_onnx_node: emit the standard `RotaryEmbedding` operator.

    Returns:
        (B, H, L, D), dtype of `x`.
    """
    x = x.transpose(1, 2)  # (B, L, H, D) -> (B, H, L, D)
    if as_onnx_node:
        rotated = torch.onnx.ops.rotary_embedding(x.float(), cos, sin, interleaved=True)
        return rotated.to(x.dtype)
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, H, L, D/2, 2)
    first, second = pairs.unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, L, D/2)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def join_rope(text: Tensor, noisy: Tensor, reference: Tensor) -> Tensor:
    """(T, D/2), (G, D/2) and (B, C, D/2) -> (B, T + G + C, D/2)."""
    shared = torch.cat([text, noisy], dim=0).expand(reference.shape[0], -1, -1)
    return torch.cat([shared, reference], dim=1)


def paired(
    temb: Tensor, reference_temb: Tensor | None, num_image: int, num_noisy: int
) -> tuple[Tensor, Tensor | None]:
    """Time embeddings of noisy and reference tokens, and which tokens take the second.

    Args:
        temb: (B, d); reference_temb: (B, d) where reference tokens are modulated otherwise.
        num_image, num_noisy: G + C and G.

    Returns:
        (B, 2, d) and (G + C, 1) bool, or `temb` and none.
    """
    if reference_temb is None:
        return temb, None
    positions = torch.arange(num_image, device=temb.device)
    return torch.stack([temb, reference_temb], dim=1), (positions >= num_noisy)[:, None]


def key_similarity(noisy_keys: Tensor, reference_keys: Tensor) -> Tensor:
    """How like the noisy tokens' keys each reference token's key is (ToPi Table 3).

    The paper ranks tokens "by cosine similarity" and does not say of what. Here it is of keys, what
    attention compares tokens by, after QK-norm and before RoPE: a rotation says where a token lies,
    and the paper means semantic alignment. The mean over rows is taken of the normalised keys
    before the product, which is the same and needs no (C x R) matrix.

    Args:
        noisy_keys: (B, H, R, D) of the scored noisy rows.
        reference_keys: (B, H, C, D).

    Returns:
        (B, C) float32 in [0, 1]: (1 + cosine) / 2, mean over rows and heads; 0 is opposite.
    """
    mean = F.normalize(noisy_keys.float(), dim=-1).mean(dim=2, keepdim=True)  # (B, H, 1, D)
    cosines = (F.normalize(reference_keys.float(), dim=-1) * mean).sum(dim=-1)  # (B, H, C)
    return ((1 + cosines.mean(dim=1)) / 2).clamp(0, 1)


def detailed_scores(
    rows: Tensor,
    key: Tensor,
    reference_key: Tensor,
    reference_value: Tensor,
    similarity: Tensor,
    scale: float,
    *,
    as_onnx_node: bool,
) -> Tensor:
    """Three scores of each reference token in one layer: what ToPi Table 3 compares.

    Args:
        rows: (B, H, R, D) scored noisy queries, after QK-norm and RoPE.
        key: (B, H, N, D) all keys, after QK-norm and RoPE; reference_key: (B, H, C, D) among them.
        reference_value: (B, H, C, D).
        similarity: (B, C) float32, of `key_similarity`.
        scale: of the dot products.
        as_onnx_node: score with ONNX nodes rather than by computing.

    Returns:
        (B, 3, C) float32: influence (Eq. 9), attention (the same without the values' norms) and
        key similarity; none is negative.
    """
    received = reference_column_sums(
        rows, key, reference_key, scale, as_onnx_node=as_onnx_node
    )  # (B, H, C)
    norms = torch.linalg.vector_norm(reference_value.float(), dim=-1)  # (B, H, C)
    return torch.stack([(norms * received).sum(dim=1), received.sum(dim=1), similarity], dim=1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: JointContext,
    role: str,
    *,
    has_noisy_queries: bool = False,
) -> Tensor:
    """Joint attention with RoPE, and this layer's score if it has a role.

    Args:
        query, key, value: (B, N, H, D), after QK-norm; see `has_noisy_queries`.
        context: see `JointContext`.
        role: "plain", "score" (append an influence), "detail" (append three scores) or "measure"
            (append a sensitivity).
        has_noisy_queries: the queries are (B, G, H, D), of noisy tokens alone.

    Returns:
        (B, N, H * D), or (B, G, H * D).
    """
    node = context.as_onnx_node
    placeless_key = key  # (B, N, H, D)
    start, end = context.num_text, context.num_text + context.num_noisy
    query_cos, query_sin = context.rope_cos, context.rope_sin
    if has_noisy_queries:
        query_cos, query_sin = query_cos[:, start:end], query_sin[:, start:end]
    scale = query.shape[-1] ** -0.5
    if node:
        query_cos, query_sin, scale = query_cos * scale, query_sin * scale, 1.0
    query = apply_rope(query, query_cos, query_sin, as_onnx_node=node)
    key = apply_rope(key, context.rope_cos, context.rope_sin, as_onnx_node=node)
    value = value.transpose(1, 2)  # (B, N, H, D) -> (B, H, N, D)
    if node:
        output = F.scaled_dot_product_attention(query, key, value, scale=scale)
    else:
        output = (context.attention or F.scaled_dot_product_attention)(query, key, value)
    if role != "plain" and context.score_rows is not None:
        noisy_query = query if has_noisy_queries else query[:, :, start:end]
        rows = noisy_query.index_select(2, context.score_rows)
        if role == "score" and context.score is not None:
            references = key[:, :, end:], value[:, :, end:]
            context.influences.append(context.score(rows, key, *references, scale))
        elif role == "score":
            scores = influence(
                rows, key, key[:, :, end:], value[:, :, end:], scale, as_onnx_node=node
            )
            context.influences.append(scores)
        elif role == "detail":
            placeless_key = placeless_key.transpose(1, 2)  # (B, N, H, D) -> (B, H, N, D)
            noisy_keys = placeless_key[:, :, start:end].index_select(2, context.score_rows)
            scores = detailed_scores(
                rows,
                key,
                key[:, :, end:],
                value[:, :, end:],
                key_similarity(noisy_keys, placeless_key[:, :, end:]),
                scale,
                as_onnx_node=node,
            )
            context.details.append(scores)
        else:
            received = reference_column_sums(rows, key, key[:, :, end:], scale)
            context.sensitivities.append(received.sum(dim=(1, 2)))
    return output.transpose(1, 2).flatten(2)  # (B, H, L, D) -> (B, L, H * D)


class JointProcessor:
    """Joint attention of a double-stream or a single-stream block of diffusers.

    Args:
        role, has_noisy_queries: see `attend`. Noisy queries alone give no text.
    """

    def __init__(self, role: str = "plain", *, has_noisy_queries: bool = False) -> None:
        self.role, self.has_noisy_queries = role, has_noisy_queries

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: JointContext | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        assert image_rotary_emb is not None
        assert attention_mask is None
        assert encoder_hidden_states_mask is None
        is_single = encoder_hidden_states is None  # the caller has joined text and image
        head_dim = attn.inner_dim // attn.heads

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, head_dim))  # (B, L, H * D) -> (B, L, H, D)

        query_rows = hidden_states
        if self.has_noisy_queries:
            start = image_rotary_emb.num_text if is_single else 0
            query_rows = hidden_states[:, start : start + image_rotary_emb.num_noisy]
        query = attn.norm_q(heads(attn.to_q(query_rows)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            if not self.has_noisy_queries:
                text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
                query = torch.cat([text_query, query], dim=1)
            text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
            text_value = heads(attn.add_v_proj(encoder_hidden_states))
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        output = attend(
            query,
            key,
            value,
            image_rotary_emb,
            self.role,
            has_noisy_queries=self.has_noisy_queries,
        )
        if is_single:
            return output
        if self.has_noisy_queries:
            return attn.to_out[0](output), None
        text, image = output[:, : image_rotary_emb.num_text], output[:, image_rotary_emb.num_text :]
        return attn.to_out[0](image), attn.to_add_out(text)


def clip_overflow(hidden: Tensor) -> Tensor:
    """Hidden states kept from overflow in float16, as diffusers does."""
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden
