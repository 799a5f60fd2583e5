"""Model families: what distinguishes one in-context editor from another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditrim.plugins.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of in-context editing transformer.

    Attributes:
        name: what `--model` takes.
        architecture: "qwen" (double-stream blocks) or "flux" (double- then single-stream blocks).
        transformer_class, pipeline_class: names in diffusers.
        hub_id: where the released weights are.
        front_depth: K, the first layers that always see the full context (ToPi App. B).
        representative_layers: L, the layers whose attention is scored (ToPi App. C.3).
        layers_source: where L comes from.
        config: differences of the released transformer's configuration from the class defaults.
        max_references: how many references the model was released for.
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
            **_QWEN,
        ),
        Family(
            name="qwen-edit-plus",
            pipeline_class="QwenImageEditPlusPipeline",
            hub_id="Qwen/Qwen-Image-Edit-2509",
            layers_source=_UNMEASURED,
            config={},
            max_references=3,
            **_QWEN,
        ),
        Family(
            name="qwen-edit-2511",
            pipeline_class="QwenImageEditPlusPipeline",
            hub_id="Qwen/Qwen-Image-Edit-2511",
            layers_source=_UNMEASURED,
            config={"zero_cond_t": True},
            max_references=3,
            **_QWEN,
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
