"""Tiny random transformers of every family, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor

from ditrim.plugins.architectures.transformers import architecture_of
from ditrim.plugins.layout import Layout
from ditrim.runtime.denoising.rope import RopeTables, rope_for

AXES = (4, 6, 6)
FAMILY_NAMES = ("qwen-edit", "qwen-edit-plus", "qwen-edit-2511", "flux-kontext")
# Those whose models differ: `qwen-edit-plus` has the one of `qwen-edit`.
MODEL_NAMES = ("qwen-edit", "qwen-edit-2511", "flux-kontext")
QWEN_CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": AXES,
}
FLUX_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": AXES,
}


def tiny_transformer(family: str, seed: int = 0, num_layers: int = 4) -> Any:
    """A float32 transformer whose every parameter matters (none is left at zero)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "flux-kontext":
            depths = {"num_layers": num_layers // 2, "num_single_layers": num_layers // 2}
            model: Any = FluxTransformer2DModel(**(FLUX_CONFIG | depths))
        else:
            extra: dict[str, Any] = {"zero_cond_t": family == "qwen-edit-2511"}
            extra |= {"num_layers": num_layers}
            model = QwenImageTransformer2DModel(**(QWEN_CONFIG | extra))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
            else:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@dataclass(slots=True, kw_only=True)
class Call:
    """One transformer call: `kwargs` for the diffusers class, and the geometry it means."""

    kwargs: dict[str, Any]
    num_noisy: int
    grids: list[tuple[int, int, int]]

    @property
    def layout(self) -> Layout:
        return Layout.of_frames(self.grids)


def rope_of(transformer: Any, call: Call) -> RopeTables:
    """RoPE tables of a call."""
    num_text = call.kwargs["encoder_hidden_states"].shape[1]
    axes, cpu = transformer.config.axes_dims_rope, torch.device("cpu")
    return rope_for(architecture_of(transformer), call.layout, num_text, axes, cpu)


def make_call(
    family: str,
    *,
    batch: int = 1,
    noisy: tuple[int, int] = (4, 5),
    references: tuple[tuple[int, int], ...] = ((5, 4),),
    num_text: int = 6,
    timestep: float = 0.7,
    seed: int = 1,
) -> Call:
    """Random inputs for a tiny transformer."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    grids = [(1, *noisy), *((1, *grid) for grid in references)]
    total = sum(height * width for _, height, width in grids)
    kwargs: dict[str, Any] = {
        "hidden_states": randn(batch, total, 16),
        "encoder_hidden_states": randn(batch, num_text, 24),
        "timestep": torch.full((batch,), timestep),
        "return_dict": False,
    }
    if family == "flux-kontext":
        ids = []
        for index, (_, height, width) in enumerate(grids):
            grid = torch.zeros(height, width, 3)
            grid[..., 0] = index
            grid[..., 1] += torch.arange(height)[:, None]
            grid[..., 2] += torch.arange(width)[None, :]
            ids.append(grid.reshape(-1, 3))
        kwargs |= {
            "pooled_projections": randn(batch, 12),
            "img_ids": torch.cat(ids),
            "txt_ids": torch.zeros(num_text, 3),
            "guidance": torch.full((batch,), 2.5),
        }
    else:
        kwargs |= {"img_shapes": [grids] * batch, "encoder_hidden_states_mask": None}
    return Call(kwargs=kwargs, num_noisy=noisy[0] * noisy[1], grids=grids)
