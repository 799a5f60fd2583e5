"""LoRA files in the key styles that are published, with random values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Layers that published LoRAs train.
QWEN_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("img_mod.1", "txt_mod.1"),
)
FLUX_LAYERS = {
    "transformer_blocks": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    ),
    "single_transformer_blocks": (
        *("attn.to_q", "attn.to_k", "attn.to_v"),
        *("proj_mlp", "proj_out", "norm.linear"),
    ),
}
_ORIGINAL_FLUX = {
    "double_blocks": (
        *("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "img_mod.lin"),
        *("txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2", "txt_mod.lin"),
    ),
    "single_blocks": ("linear1", "linear2", "modulation.lin"),
}


def layers_of(transformer: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that LoRAs train, by its path."""
    wanted = []
    for path, module in transformer.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        block, _, rest = path.partition(".")
        _, _, layer = rest.partition(".")
        names = FLUX_LAYERS.get(block, ()) if "Flux" in type(transformer).__name__ else QWEN_LAYERS
        if layer in names:
            wanted.append((path, (module.out_features, module.in_features)))
    return dict(wanted)


def original_flux_layers(transformer: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the same layers under the names of the original FLUX code."""
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    sizes = {
        "img_attn.qkv": (3 * width, width),
        "txt_attn.qkv": (3 * width, width),
        "img_attn.proj": (width, width),
        "txt_attn.proj": (width, width),
        "img_mlp.0": (4 * width, width),
        "txt_mlp.0": (4 * width, width),
        "img_mlp.2": (width, 4 * width),
        "txt_mlp.2": (width, 4 * width),
        "img_mod.lin": (6 * width, width),
        "txt_mod.lin": (6 * width, width),
        "linear1": (7 * width, width),
        "linear2": (width, 5 * width),
        "modulation.lin": (3 * width, width),
    }
    counts = {
        "double_blocks": transformer.config.num_layers,
        "single_blocks": transformer.config.num_single_layers,
    }
    return {
        f"{block}.{number}.{layer}": sizes[layer]
        for block, layers in _ORIGINAL_FLUX.items()
        for number in range(counts[block])
        for layer in layers
    }


def random_lora(
    layers: Mapping[str, tuple[int, int]], *, rank: int = 4, seed: int = 0, strength: float = 0.3
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) for every layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for index, (path, (rows, columns)) in enumerate(layers.items()):
        own = rank + index % 3  # mixed ranks
        down = torch.randn(own, columns, generator=generator) / math.sqrt(columns)
        up = torch.randn(rows, own, generator=generator) * strength / math.sqrt(own)
        made[path] = (down, up)
    return made


def _peft(prefix: str) -> Callable[[str], tuple[str, str, None]]:
    return lambda path: (
        f"{prefix}{path}.lora_A.weight",
        f"{prefix}{path}.lora_B.weight",
        None,
    )


def _kohya(prefix: str, joiner: str) -> Callable[[str], tuple[str, str, str]]:
    def names(path: str) -> tuple[str, str, str]:
        stem = prefix + path.replace(".", joiner)
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"

    return names


# Of each style, the names of a layer's down, up and alpha.
STYLES: dict[str, Callable[[str], tuple[str, str, str | None]]] = {
    "diffusers": _peft("transformer."),
    "comfy": _peft("diffusion_model."),
    "lightning": _kohya("", "."),
    "kohya": _kohya("lora_unet_", "_"),
    "comfy-down-up": _kohya("diffusion_model.", "."),
}


def write_lora(
    path: Path, lora: Mapping[str, tuple[Tensor, Tensor]], style: str, alpha: float = 2.0
) -> Path:
    """Write a LoRA; `alpha` only where the style has one."""
    tensors = {}
    for layer, (down, up) in lora.items():
        down_name, up_name, alpha_name = STYLES[style](layer)
        tensors |= {down_name: down.contiguous(), up_name: up.contiguous()}
        if alpha_name is not None:
            tensors[alpha_name] = torch.tensor(alpha)
    save_file(tensors, path)
    return path
