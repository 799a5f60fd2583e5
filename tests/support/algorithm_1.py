"""ToPi's Algorithm 1, stated plainly on diffusers' own modules: the truth that engines must meet.

Nothing of ditrim is used: diffusers' processors, complex RoPE and block loop; queries, keys and
values are caught where diffusers hands them to its attention function, and the attention matrix is
written out in float64.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor


def _attention_module(transformer: Any) -> str:
    return type(transformer).__module__ + ".dispatch_attention_fn"


def layer_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    placeless_key: Tensor,
    num_text: int,
    num_noisy: int,
    stride: int = 1,
) -> Tensor:
    """Three scores of one layer from (B, N, H, D) tensors, every matrix written out.

    Args:
        query, key, value: as diffusers hands them to its attention function.
        placeless_key: (B, at least G + C, H, D) keys before RoPE, those of the image last.
        num_text, num_noisy: T and G.
        stride: score every n-th noisy row.

    Returns:
        (B, 3, C) float64: influence (Eq. 9), attention without values, similarity of keys.
    """
    q, k, v, p = (x.double().numpy() for x in (query, key, value, placeless_key))
    start, end = num_text, num_text + num_noisy
    logits = np.einsum("bihd,bjhd->bhij", q[:, start:end:stride], k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    attention = weights / weights.sum(axis=-1, keepdims=True)
    received = attention[..., end:].sum(axis=2)  # (B, H, C)
    norms = np.sqrt((v[:, end:] ** 2).sum(axis=-1)).transpose(0, 2, 1)  # (B, H, C)
    image = p[:, p.shape[1] - (k.shape[1] - num_text) :]
    image = image / np.sqrt((image**2).sum(axis=-1, keepdims=True))
    cosines = np.einsum("bihd,bjhd->bhij", image[:, :num_noisy:stride], image[:, num_noisy:])
    similarity = ((1 + cosines) / 2).mean(axis=(1, 2))
    scores = [(norms * received).sum(axis=1), received.sum(axis=1), similarity]
    return torch.from_numpy(np.stack(scores, axis=1))


def kept_tokens(influence: Tensor, tau: float) -> list[int]:
    """Eq. 10 for one sample: the fewest top-ranked tokens that hold tau of the total, ascending."""
    order = sorted(range(len(influence)), key=lambda j: (-float(influence[j]), j))
    total, reached, kept = float(influence.sum()), 0.0, []
    for j in order:
        kept.append(j)
        reached += float(influence[j])
        if reached >= tau * total:
            break
    return sorted(kept)


def run_model(
    transformer: Any,
    call: Any,
    *,
    front_depth: int,
    layers: tuple[int, ...] = (),
    kept: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """One step of Algorithm 1; arguments as in `run_details`, and `layers`, L.

    Returns:
        velocity of the noisy tokens, influence (B, C) summed over `layers` or none.
    """
    velocity, scores = run_details(
        transformer, call, front_depth=front_depth, layers=layers, kept=kept, stride=stride
    )
    return velocity, scores[:, :, 0].sum(dim=1) if layers else None


def run_details(  # noqa: C901 - the algorithm in one piece
    transformer: Any,
    call: Any,
    *,
    front_depth: int,
    layers: tuple[int, ...],
    kept: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """One step of Algorithm 1, and what single layers say of the reference tokens.

    Args:
        transformer: unmodified.
        call: see `tiny.make_call`.
        front_depth: K.
        layers: those to score (mode A, an anchor step).
        kept: (K',) the tokens of mode B; all if none. The same for every batch entry.
        stride: score every n-th noisy row.

    Returns:
        velocity of the noisy tokens, (B, len(layers), 3, C) scores of `layer_scores`.
    """
    kwargs = call.kwargs
    num_noisy = call.num_noisy
    num_text = kwargs["encoder_hidden_states"].shape[1]
    blocks = list(transformer.transformer_blocks)
    is_flux = hasattr(transformer, "single_transformer_blocks")
    if is_flux:
        blocks += list(transformer.single_transformer_blocks)
    reference = torch.arange(kwargs["hidden_states"].shape[1] - num_noisy)
    kept = reference if kept is None else kept
    rows = torch.cat([torch.arange(num_noisy), num_noisy + kept])
    caught: list[tuple[Tensor, Tensor, Tensor]] = []
    keys: list[Tensor] = []
    module = _attention_module(transformer)
    original = __import__(type(transformer).__module__, fromlist=["x"]).dispatch_attention_fn

    def catch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        caught.append((query, key, value))
        return original(query, key, value, **options)

    with torch.no_grad(), mock.patch(module, catch), contextlib.ExitStack() as stack:
        for block in blocks:
            hook = block.attn.norm_k.register_forward_hook(lambda _, __, key: keys.append(key))
            stack.callback(hook.remove)
        if is_flux:
            hidden = transformer.x_embedder(kwargs["hidden_states"])
            text = transformer.context_embedder(kwargs["encoder_hidden_states"])
            temb = transformer.time_text_embed(
                kwargs["timestep"] * 1000, kwargs["guidance"] * 1000, kwargs["pooled_projections"]
            )
            cos, sin = transformer.pos_embed(torch.cat([kwargs["txt_ids"], kwargs["img_ids"]]))
            joint = torch.cat([torch.arange(num_text), num_text + rows])
        else:
            hidden = transformer.img_in(kwargs["hidden_states"])
            text = transformer.txt_in(transformer.txt_norm(kwargs["encoder_hidden_states"]))
            times = kwargs["timestep"]
            index = None
            if transformer.zero_cond_t:
                times = torch.cat([times, times * 0])
                index = (torch.arange(hidden.shape[1]) >= num_noisy).int()
                index = index.expand(hidden.shape[0], -1)
            temb = transformer.time_text_embed(times, hidden)
            image_freqs, text_freqs = transformer.pos_embed(
                kwargs["img_shapes"], max_txt_seq_len=num_text, device=hidden.device
            )
        for layer, block in enumerate(blocks):
            if layer == front_depth:  # hard pruning and context realignment (Eq. 12)
                hidden = hidden[:, rows]
                if is_flux:
                    cos, sin = cos[joint], sin[joint]
                else:
                    image_freqs = image_freqs[rows]
                    index = None if index is None else index[:, rows]
            common = {
                "hidden_states": hidden,
                "encoder_hidden_states": text,
                "temb": temb,
            }
            if is_flux:
                text, hidden = block(**common, image_rotary_emb=(cos, sin))
            else:
                text, hidden = block(
                    **common,
                    encoder_hidden_states_mask=None,
                    image_rotary_emb=(image_freqs, text_freqs),
                    modulate_index=index,
                )
        if not is_flux and transformer.zero_cond_t:
            temb = temb.chunk(2)[0]
        velocity = transformer.proj_out(transformer.norm_out(hidden, temb))[:, :num_noisy]
    scores = [
        layer_scores(*caught[layer], keys[layer], num_text, num_noisy, stride) for layer in layers
    ]
    return velocity, torch.stack(scores, dim=1) if scores else torch.empty(0)
