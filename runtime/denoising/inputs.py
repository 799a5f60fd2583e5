"""One model call's inputs: what they are, what is checked, and groups of equally long text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ditrim.plugins.errors import DitrimError, LadderError, UsageError
from ditrim.plugins.layout import Grids, Layout
from ditrim.runtime.denoising.rope import RopeTables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.engines.sets.specs import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One model call, noisy and reference tokens apart.

    Attributes:
        noisy_latents: (B, G, c); reference_latents: (B, C, c), all references together.
        text_embeds: (B, T, c_text).
        text_mask: (B, T) bool, which text tokens exist; none means all.
        timestep: (B,) in [0, 1].
        guidance: (B,), models with guidance embeddings only.
        pooled_text: (B, c_pool), FLUX only.
        time: `timestep` of the whole batch as a number, where it is known without waiting for
            the device.
        layout: of the noisy picture and the references; none where one is no whole grid.
        rope_key: identifies the geometry; equal keys have equal tables.
        make_rope: computes the tables of that geometry.
    """

    noisy_latents: Tensor
    reference_latents: Tensor
    text_embeds: Tensor
    text_mask: Tensor | None = None
    timestep: Tensor
    time: float | None = None
    layout: Layout | None = None
    guidance: Tensor | None = None
    pooled_text: Tensor | None = None
    rope_key: tuple[object, ...]
    make_rope: Callable[[], RopeTables]

    @property
    def grids(self) -> Grids | None:
        """(height, width) in tokens of the noisy picture and of each reference."""
        return None if self.layout is None else self.layout.grids


# Batch entries, and the text tokens that they keep; none means all.
TextGroup = tuple[Tensor, Tensor | None]


def equal_text_groups(mask: Tensor | None, batch: int) -> list[TextGroup]:
    """Batch entries with the same text mask, and the text tokens that each group keeps.

    A masked text token is a key for nobody and is not decoded, so removing it is exact.
    """
    everything = torch.arange(batch)
    if mask is None:
        return [(everything, None)]
    mask = mask.bool().cpu()
    if bool(mask.all()):
        return [(everything, None)]
    patterns, which = mask.unique(dim=0, return_inverse=True)
    groups: list[tuple[Tensor, Tensor | None]] = []
    for index, pattern in enumerate(patterns):
        text_rows = pattern.nonzero().flatten()
        if len(text_rows) == 0:
            raise UsageError("a text mask without any token: every prompt needs at least one")
        groups.append(((which == index).nonzero().flatten(), text_rows))
    return groups


def rows_of(inputs: ModelInputs, rows: Tensor, text_rows: Tensor | None) -> ModelInputs:
    """The inputs of some batch entries and text tokens."""
    if text_rows is None:
        return inputs

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows.to(tensor.device)]

    return replace(
        inputs,
        noisy_latents=inputs.noisy_latents[rows],
        reference_latents=inputs.reference_latents[rows],
        text_embeds=inputs.text_embeds[rows][:, text_rows],
        timestep=inputs.timestep[rows],
        guidance=pick(inputs.guidance),
        pooled_text=pick(inputs.pooled_text),
        text_mask=None,
    )


def check_inputs(inputs: ModelInputs, engine_set: EngineSet, *, is_first: bool) -> None:
    """Sizes at every call; values where that costs no wait for a device, else at the first.

    On a GPU an anchor step looks at its latents again (`check_finite`).

    Raises:
        LadderError: more than the engine set was built for.
        UsageError: inputs that do not fit the model or are not finite.
    """
    _check_limits(inputs, engine_set)
    if inputs.reference_latents.shape[1] < 1:
        raise UsageError(
            "no reference tokens: an in-context editor needs at least one reference picture"
        )
    specs = {spec.name: spec for spec in engine_set.manifest.graphs["front"].inputs}
    for name in ("noisy_latents", "reference_latents", "text_embeds", "pooled_text"):
        _check_tensor(name, inputs, specs, is_first=is_first)
    mask = inputs.text_mask
    if mask is not None and mask.shape != inputs.text_embeds.shape[:2]:
        raise UsageError(
            f"the text mask has shape {tuple(mask.shape)}, the text embeddings need "
            f"{tuple(inputs.text_embeds.shape[:2])}"
        )
    if "guidance" in specs and inputs.guidance is None:
        raise UsageError("guidance is missing; this model has guidance embeddings")


def _check_limits(inputs: ModelInputs, engine_set: EngineSet) -> None:
    limits = engine_set.manifest.limits
    batch, num_noisy, _ = inputs.noisy_latents.shape
    for what, value, limit, option in (
        ("a batch of", batch, limits.batch, "max_batch"),
        ("noisy tokens:", num_noisy, limits.noisy, "max_noisy_tokens"),
        ("text tokens:", inputs.text_embeds.shape[1], limits.text, "max_text_tokens"),
    ):
        if value > limit:
            command = engine_set.rebuild_command(**{option: value})
            raise LadderError(
                f"{what} {value} is more than the engine set was built for ({limit}); "
                f"build it for more with: {command}"
            )


def _check_tensor(
    name: str, inputs: ModelInputs, specs: Mapping[str, TensorSpec], *, is_first: bool
) -> None:
    tensor: Tensor | None = getattr(inputs, name)
    if tensor is None:
        if name in specs:
            raise UsageError(f"{name} is missing; this model needs it")
        return
    spec = specs.get("noisy_latents" if "latents" in name else name)
    width = tensor.shape[-1] if spec is None else spec.shape[-1]
    if tensor.shape[-1] != width:
        raise UsageError(f"{name} has {tensor.shape[-1]} channels, the model takes {width}")
    batch = inputs.noisy_latents.shape[0]
    if tensor.shape[0] != batch:
        raise UsageError(f"{name} has batch {tensor.shape[0]}, noisy_latents have {batch}")
    looks = is_first or (name == "noisy_latents" and tensor.device.type == "cpu")
    if looks and not _is_finite(tensor):
        raise UsageError(f"{name} hold NaN or infinite values")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; on a CPU by numpy, without waking torch's threads."""
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float16):
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(torch.isfinite(tensor).all())


def check_finite(inputs: ModelInputs, velocity: Tensor, influence: Tensor, step: int) -> None:
    """Check an anchor step's inputs and outputs; choosing tokens waits for the device anyway."""
    tensors = (inputs.noisy_latents, velocity, influence)
    flags = [torch.isfinite(tensor).all().to(influence.device) for tensor in tensors]
    latents_are, velocity_is, influence_is = torch.stack(flags).tolist()
    if not latents_are:
        raise UsageError(f"noisy_latents hold NaN or infinite values at step {step}")
    if not velocity_is or not influence_is:
        what = "velocity" if not velocity_is else "influence scores"
        raise DitrimError(
            f"the {what} of step {step} are not finite: the model overflowed on these inputs; "
            "with an fp16 engine set, try fp32 or bf16"
        )
