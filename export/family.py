"""Model families: what distinguishes one in-context editor from another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditrim.plugins.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The lengths that a family's pipeline makes of pictures between 1:8 and 8:1, and of prompts.

    A token is 16 x 16 pixels: the VAE's factor 8 and patches of 2. The figures are those of
    diffusers 0.42; `tests/engines/test_sizing.py` compares them with the installed one's functions.

    Attributes:
        noisy_tokens: most tokens of the picture in the making.
        reference_tokens: most tokens of one reference.
        usual_tokens: of a square picture, which plans are tuned for.
        prompt_tokens: most tokens of the prompt and of the template around it.
        usual_prompt_tokens: of a prompt of some 30 words.
        picture_text_tokens: most text tokens that one reference adds, its label included.
        usual_picture_text_tokens: of a square reference.
        source: where the figures are from.
    """

    noisy_tokens: int
    reference_tokens: int
    usual_tokens: int = 4096
    prompt_tokens: int
    usual_prompt_tokens: int
    picture_text_tokens: int = 0
    usual_picture_text_tokens: int = 0
    source: str

    def text_tokens(self, num_references: int) -> int:
        """The longest text embeddings of an edit."""
        return self.prompt_tokens + num_references * self.picture_text_tokens

    def usual_text_tokens(self, num_references: int) -> int:
        """The text embeddings of a usual edit."""
        return self.usual_prompt_tokens + num_references * self.usual_picture_text_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of in-context editing transformer.

    Attributes:
        name: what `--model` takes.
        architecture: its name in `ARCHITECTURES`: "qwen" or "flux".
        transformer_class, pipeline_class: names in diffusers.
        hub_id: where the released weights are.
        front_depth: K, the first layers that always see the full context (ToPi App. B).
        representative_layers: L, the layers whose attention is scored (ToPi App. C.3).
        layers_source: where L comes from.
        config: differences of the released transformer's configuration from the class defaults.
        max_references: how many references the model was released for.
        sizing: the lengths that its pipeline makes.
    """

    name: str
    architecture: str
    transformer_class: str
    pipeline_class: str
    hub_id: str
    front_depth: int
    representative_layers: tuple[int, ...]
    layers_source: str
    config: Mapping[str, Any]
    max_references: int
    sizing: Sizing


# Pictures and references have an area of 1024 x 1024 pixels and sides of multiples of 32
# (`calculate_dimensions`). Of the text, 64 tokens of the template are cut off; the prompt may have
# 1,024, and five tokens of the template follow it.
_QWEN_EDIT_SIZING = Sizing(
    noisy_tokens=4272,
    reference_tokens=4272,
    prompt_tokens=1024 + 5,
    usual_prompt_tokens=32 + 5,
    picture_text_tokens=1428 + 2,
    usual_picture_text_tokens=1369 + 2,
    source="QwenImageEditPipeline: calculate_dimensions, and Qwen2VLImageProcessor's smart_resize "
    "of the same picture (28 x 28 pixels a token)",
)
_QWEN_PLUS_SIZING = Sizing(
    noisy_tokens=4272,
    reference_tokens=4272,
    prompt_tokens=1024 + 5,
    usual_prompt_tokens=32 + 5,
    picture_text_tokens=222 + 7,
    usual_picture_text_tokens=196 + 7,
    source="QwenImageEditPlusPipeline: calculate_dimensions (VAE_IMAGE_SIZE), and smart_resize of "
    "pictures of 384 x 384 pixels (CONDITION_IMAGE_SIZE), each labelled in the prompt",
)
_KONTEXT_SIZING = Sizing(
    noisy_tokens=4100,
    reference_tokens=4150,
    prompt_tokens=512,
    usual_prompt_tokens=512,
    source="FluxKontextPipeline: max_area for the picture, PREFERRED_KONTEXT_RESOLUTIONS for the "
    "reference; T5 pads to 512 tokens",
)

_QWEN: dict[str, Any] = {
    "architecture": "qwen",
    "transformer_class": "QwenImageTransformer2DModel",
    "front_depth": 10,
    "representative_layers": (35, 37, 42),
}
_UNMEASURED = "ToPi App. C.3, measured on Qwen-Image-Edit; calibrate-layers measures this model's"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="qwen-edit",
            pipeline_class="QwenImageEditPipeline",
            hub_id="Qwen/Qwen-Image-Edit",
            layers_source="ToPi App. C.3",
            config={},
            max_references=1,
            sizing=_QWEN_EDIT_SIZING,
            **_QWEN,
        ),
        Family(
            name="qwen-edit-plus",
            pipeline_class="QwenImageEditPlusPipeline",
            hub_id="Qwen/Qwen-Image-Edit-2509",
            layers_source=_UNMEASURED,
            config={},
            max_references=3,
            sizing=_QWEN_PLUS_SIZING,
            **_QWEN,
        ),
        Family(
            name="qwen-edit-2511",
            pipeline_class="QwenImageEditPlusPipeline",
            hub_id="Qwen/Qwen-Image-Edit-2511",
            layers_source=_UNMEASURED,
            config={"zero_cond_t": True},
            max_references=3,
            sizing=_QWEN_PLUS_SIZING,
            **_QWEN,
        ),
        # The structure of Qwen-Image-Edit-2509 (config.json sets no zero_cond_t), other weights.
        *(
            Family(
                name=name,
                pipeline_class="QwenImageEditPlusPipeline",
                hub_id=hub_id,
                layers_source=_UNMEASURED,
                config={},
                max_references=3,
                sizing=_QWEN_PLUS_SIZING,
                **_QWEN,
            )
            for name, hub_id in (
                ("firered-edit", "FireRedTeam/FireRed-Image-Edit-1.0"),
                ("firered-edit-1.1", "FireRedTeam/FireRed-Image-Edit-1.1"),
            )
        ),
        Family(
            name="flux-kontext",
            architecture="flux",
            transformer_class="FluxTransformer2DModel",
            pipeline_class="FluxKontextPipeline",
            hub_id="black-forest-labs/FLUX.1-Kontext-dev",
            front_depth=10,
            representative_layers=(13, 18, 31),
            layers_source="ToPi App. C.3",
            config={"guidance_embeds": True},
            max_references=1,
            sizing=_KONTEXT_SIZING,
        ),
    )
}


def family_named(name: str) -> Family:
    """The family of this name.

    Raises:
        UsageError: there is none; names the nearest one and all that exist.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown model {name!r}.{hint} Known models: {', '.join(FAMILIES)}.")
