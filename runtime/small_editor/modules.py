"""What stands around the small editor's transformer: a pixel "VAE" and a word embedding.

The transformer is diffusers' own `QwenImageTransformer2DModel`; these two replace the VAE and the
language model of the big editors by the least that the same pipeline shape needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin, QwenImageTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

PATCH_SIZE = 4
LATENT_CHANNELS = 3 * PATCH_SIZE * PATCH_SIZE
TEXT_CHANNELS = 128

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": PATCH_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": 3,
    "num_layers": 6,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "joint_attention_dim": TEXT_CHANNELS,
    "axes_dims_rope": (16, 24, 24),
}


class PixelVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Pictures to packed latents and back, exactly: a latent token is one patch of pixels.

    It has no weights but one constant, kept as a buffer so that the folder's layout, dtype and
    device are those of any diffusers component.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, patch_size: int = PATCH_SIZE, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("scale", torch.tensor(float(scaling_factor)))

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pack pictures (B, 3, H, W) in [-1, 1] into latents (B, H/p * W/p, 3 * p * p)."""
        batch, channels, height, width = pictures.shape
        size = self.patch_size
        if height % size or width % size:
            raise ValueError(
                f"the picture is {width}x{height}; both sides must be multiples of {size}"
            )
        patches = pictures.reshape(batch, channels, height // size, size, width // size, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, p)
        return patches.flatten(1, 2).flatten(2) * self.scale

    def decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Unpack latents (B, H/p * W/p, 3 * p * p) into pictures (B, 3, H, W), not clamped."""
        size = self.patch_size
        grid = (latents / self.scale).unflatten(1, (height // size, width // size))
        patches = grid.unflatten(-1, (3, size, size)).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(latents.shape[0], 3, height, width)


class WordEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One learned vector a word; the transformer's text stream does the reading."""

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, vocabulary_size: int, embedding_dim: int = TEXT_CHANNELS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed token numbers (B, T) int64 as (B, T, embedding_dim)."""
        embedded: torch.Tensor = self.embedding(tokens)
        return embedded


def build_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """A fresh transformer of the shipped configuration, with `changes` applied to it.

    The modulations and the last projection start at zero, so that every block starts as the
    identity and the model as the zero velocity (adaLN-zero, Peebles and Xie 2022).
    """
    unknown = sorted(set(changes) - set(TRANSFORMER_CONFIG))
    if unknown:
        raise ValueError(f"unknown keys {unknown}; allowed: {sorted(TRANSFORMER_CONFIG)}")
    model = QwenImageTransformer2DModel(**(TRANSFORMER_CONFIG | changes))
    layers: Sequence[nn.Linear] = [
        *(block.img_mod[1] for block in model.transformer_blocks),
        *(block.txt_mod[1] for block in model.transformer_blocks),
        model.norm_out.linear,
        model.proj_out,
    ]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model
