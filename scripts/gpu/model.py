"""Qwen-Image-Edit at its full width with random weights, and the calls that it gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu.part import CannotRunError

FAMILY = "qwen-edit"
# For activations of the longest sequence, the pools of CUDA graphs, and libraries.
_RESERVED_BYTES = 12 * 10**9


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the pictures that it gets.

    Attributes:
        layers: blocks.
        config: differences from the released transformer's configuration.
        noisy, reference: (height, width) in tokens of the picture and of each reference.
        text: text tokens with so many references.
    """

    layers: int
    config: Mapping[str, Any] = field(default_factory=dict)
    noisy: tuple[int, int]
    reference: tuple[int, int]
    text: Mapping[int, int]

    @property
    def num_noisy(self) -> int:
        """Noisy tokens."""
        return self.noisy[0] * self.noisy[1]

    def num_reference(self, references: int) -> int:
        """Reference tokens of so many references."""
        return references * self.reference[0] * self.reference[1]


def full_size() -> Size:
    """Pictures of 1024 x 1024 pixels: one reference, and three as the plus family takes them."""
    from ditrim.export.family import FAMILIES

    plus = FAMILIES["qwen-edit-plus"].sizing.usual_text_tokens(3)
    return Size(layers=60, noisy=(64, 64), reference=(56, 74), text={1: 1400, 3: plus})


def toy_size() -> Size:
    """What a rehearsal runs."""
    return Size(
        layers=4,
        config={
            "in_channels": 16,
            "out_channels": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        noisy=(4, 4),
        reference=(4, 6),
        text={1: 7, 3: 5},
    )


def fitting_layers(size: Size, free_bytes: float) -> int:
    """How many of a model's blocks fit in so much memory, in bf16 and with room to work.

    Raises:
        CannotRunError: not even a few do.
    """
    model = _empty_model(size, 1)
    block = sum(p.numel() for p in model.transformer_blocks.parameters())
    others = sum(p.numel() for p in model.parameters()) - block
    fitting = int((free_bytes - _RESERVED_BYTES - 2 * others) // (2 * block))
    if fitting < min(4, size.layers):
        raise CannotRunError(
            f"{free_bytes / 1e9:.1f} GB of memory are free, which hold {max(fitting, 0)} blocks"
        )
    return min(fitting, size.layers)


def random_model(size: Size, layers: int, device: str) -> Any:
    """A transformer in bf16 whose weights are drawn on the device."""
    empty = _empty_model(size, layers)
    model = empty.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02 if device == "cuda" else 0.3, generator=generator)
    return model


def _empty_model(size: Size, layers: int) -> Any:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=layers, **size.config)
    # Its tables of positions are plain attributes, which `to_empty` does not give a place.
    rope = model.pos_embed
    model.pos_embed = type(rope)(rope.theta, axes_dim=rope.axes_dim, scale_rope=rope.scale_rope)
    return model


@dataclass(frozen=True)
class Case:
    """One edit's tensors, on the device.

    Attributes:
        inputs: of `ditrim.runtime.denoising.inputs.ModelInputs`.
        grids: (1, height, width) of the picture, then of each reference.
        references: how many there are.
    """

    inputs: Any
    grids: list[tuple[int, int, int]]
    references: int

    @property
    def name(self) -> str:
        """What the document calls it."""
        return f"{self.references} reference{'s' if self.references > 1 else ''}"

    @property
    def num_reference(self) -> int:
        """Tokens of all references."""
        return int(self.inputs.reference_latents.shape[1])

    def plain_arguments(self) -> dict[str, Any]:
        """Arguments of diffusers' own forward."""
        inputs = self.inputs
        return {
            "hidden_states": torch.cat([inputs.noisy_latents, inputs.reference_latents], dim=1),
            "encoder_hidden_states": inputs.text_embeds,
            "timestep": inputs.timestep,
            "img_shapes": [self.grids],
            "return_dict": False,
        }

    def with_latents(self, latents: Tensor) -> Any:
        """Its inputs with other noisy latents."""
        return dataclasses.replace(self.inputs, noisy_latents=latents)


def case_of(size: Size, model: Any, references: int, device: str) -> Case:
    """An edit with so many references, drawn at random."""
    from ditrim.plugins.layout import Layout
    from ditrim.runtime.denoising.inputs import ModelInputs
    from ditrim.runtime.denoising.rope import rope_for

    generator = torch.Generator(device).manual_seed(1)

    def draw(length: int, channels: int) -> Tensor:
        shape = (1, length, channels)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    config, num_text = model.config, size.text[references]
    grids = [(1, *size.noisy), *references * [(1, *size.reference)]]
    layout, axes = Layout.of_frames(grids), config.axes_dims_rope
    inputs = ModelInputs(
        noisy_latents=draw(size.num_noisy, config.in_channels),
        reference_latents=draw(size.num_reference(references), config.in_channels),
        text_embeds=draw(num_text, config.joint_attention_dim),
        timestep=torch.full((1,), 0.7, device=device),
        layout=layout,
        rope_key=(tuple(grids), num_text),
        make_rope=lambda: rope_for("qwen", layout, num_text, axes, torch.device(device)),
    )
    return Case(inputs, grids, references)
