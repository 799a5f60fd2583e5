"""The small editor as it is trained, and its loss: flow matching (Lipman et al. 2023).

With x_s = (1 - s) x + s e, the model predicts the velocity e - x of the noisy tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from batches import NUM_NOISY, TrainingConfig
from diffusers import QwenImageTransformer2DModel
from torch import nn

from ditrim.runtime.small_editor.modules import PixelVAE, WordEmbedder, build_transformer
from ditrim.runtime.small_editor.vocabulary import WordTokenizer


class RealRopeAttention:
    """diffusers' Qwen joint attention with real-valued RoPE and, on a CPU, explicit products.

    The same function as `QwenDoubleStreamAttnProcessor2_0`; used in training only, where the
    backward pass of the CPU's fused attention takes three times as long as that of two products.
    `image_rotary_emb` is (cos, sin), each (T + L, D / 2), text first; the mask is additive.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,  # (B, L, d)
        encoder_hidden_states: torch.Tensor,  # (B, T, d)
        encoder_hidden_states_mask: torch.Tensor,  # (B, 1, 1, T + L)
        attention_mask: None = None,  # always passed by diffusers, never used
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None
        num_text = encoder_hidden_states.shape[1]
        cos, sin = image_rotary_emb

        def split(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, H, L, D)

        def rotate(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            real, imaginary = states.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
            return torch.stack(turned, dim=-1).flatten(-2).to(dtype)

        text, image = encoder_hidden_states, hidden_states
        query_text = attn.norm_added_q(split(attn.add_q_proj(text)))
        key_text = attn.norm_added_k(split(attn.add_k_proj(text)))
        query = torch.cat([query_text, attn.norm_q(split(attn.to_q(image)))], dim=2)
        key = torch.cat([key_text, attn.norm_k(split(attn.to_k(image)))], dim=2)
        value = torch.cat([split(attn.add_v_proj(text)), split(attn.to_v(image))], dim=2)
        query, key = rotate(query, value.dtype), rotate(key, value.dtype)
        if value.device.type == "cpu":
            query = query * query.shape[-1] ** -0.5
            scores = torch.matmul(query, key.transpose(-1, -2)) + encoder_hidden_states_mask
            joint = torch.matmul(torch.softmax(scores, dim=-1), value)
        else:
            joint = F.scaled_dot_product_attention(
                query, key, value, attn_mask=encoder_hidden_states_mask
            )
        joint = joint.transpose(1, 2).flatten(2)
        return attn.to_out[0](joint[:, num_text:]), attn.to_add_out(joint[:, :num_text])


class Trainee(nn.Module):
    """The two trained modules together: the transformer and the word embedding."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.text_encoder = WordEmbedder(len(WordTokenizer()))
        self.transformer = build_transformer(num_layers=config.num_layers)
        nn.init.normal_(self.text_encoder.embedding.weight)

    def forward(
        self,
        latents: torch.Tensor,  # (B, G + C, 48)
        sigma: torch.Tensor,  # (B)
        tokens: torch.Tensor,
        mask: torch.Tensor,
        shapes: list[tuple[int, int, int]],
    ) -> torch.Tensor:
        """Velocity of the noisy tokens, (B, G, 48).

        What `QwenImageTransformer2DModel.forward` computes, but for precision under autocast: the
        residual streams, the timestep and its embedding stay float32, since a timestep rounded to
        bfloat16 would be off by up to two of its thousand units.
        """
        model: QwenImageTransformer2DModel = self.transformer
        states = model.img_in(latents).float()
        with torch.autocast(latents.device.type, enabled=False):
            temb = model.time_text_embed(sigma, states)
        text = model.txt_in(model.txt_norm(self.text_encoder(tokens))).float()
        image_freqs, text_freqs = model.pos_embed(
            [shapes], max_txt_seq_len=text.shape[1], device=latents.device
        )
        freqs = torch.cat([text_freqs, image_freqs])
        rope = (freqs.real.contiguous(), freqs.imag.contiguous())
        keep = torch.cat([mask, mask.new_ones(mask.shape[0], states.shape[1])], dim=1)
        dtype = torch.bfloat16 if torch.is_autocast_enabled(latents.device.type) else text.dtype
        bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        bias = bias.masked_fill(~keep, -1e4)[:, None, None]
        for block in model.transformer_blocks:
            text, states = block(
                hidden_states=states,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=bias,
                temb=temb,
                image_rotary_emb=rope,
            )
        velocity: torch.Tensor = model.proj_out(model.norm_out(states[:, :NUM_NOISY], temb))
        return velocity


def flow_matching_loss(
    trainee: Trainee, batch: dict[str, Any], vae: PixelVAE, device: torch.device, precision: str
) -> torch.Tensor:
    """Mean squared error of the predicted velocity over one batch, each pixel by its weight."""
    target = vae.encode(batch["target"].to(device))  # (B, G, 48)
    references = [vae.encode(reference.to(device)) for reference in batch["references"]]
    noise, sigma = batch["noise"].to(device), batch["sigma"].to(device)
    noisy = (1 - sigma[:, None, None]) * target + sigma[:, None, None] * noise
    grids = [(1, r.shape[2] // 4, r.shape[3] // 4) for r in (batch["target"], *batch["references"])]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:
        velocity = trainee(
            torch.cat([noisy, *references], dim=1),
            sigma,
            batch["tokens"].to(device),
            batch["mask"].to(device),
            grids,
        )
    weight = vae.encode(batch["weight"].to(device)[:, None].expand(-1, 3, -1, -1))  # (B, G, 48)
    return (weight * (velocity.float() - (noise - target)).square()).mean()
