"""Runs a transformer's own blocks on the tokens of FRONT and BACK.

Replaces: the modules that are traced for engines (`export.split`), which change blocks while they
are at work. Blocks are called as diffusers' own forward calls them, so what a user put on them
(offload and casting hooks, LoRA layers, quantised linears, compiled forwards) acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditrim.engines.backends.torch.scoring import (
    can_use_kernel,
    score_in_blocks,
    score_with_kernel,
)
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import BlockList
from ditrim.plugins.architectures.transformers import architecture_of
from ditrim.plugins.attention import JointContext, join_rope, paired


@dataclass(slots=True, kw_only=True)
class Streams:
    """Hidden states that pass from block to block.

    Attributes:
        hidden: (B, G + C, d) noisy, then reference tokens; (B, G, d) after the last block.
        text: (B, T, d).
        temb: (B, d); reference_temb: (B, d), of models that modulate references as at t = 0.
        rope_cos, rope_sin: (B, T + G + C, D/2) float32.
        num_noisy: G.
        score_rows: (R,) noisy rows that are scored; none where nothing is.
        influences: one (B, C) float32 a scoring layer (ToPi Eq. 9).
    """

    hidden: Tensor
    text: Tensor
    temb: Tensor
    reference_temb: Tensor | None
    rope_cos: Tensor
    rope_sin: Tensor
    num_noisy: int
    score_rows: Tensor | None
    influences: list[Tensor]


def streams_of(inputs: Mapping[str, Tensor], hidden: Tensor, scored: bool) -> Streams:
    """The streams before the first block of a graph."""

    def table(name: str) -> Tensor:
        parts = (inputs[f"{part}_rope_{name}"] for part in ("text", "noisy", "reference"))
        return join_rope(*parts)

    return Streams(
        hidden=hidden,
        text=inputs["text"],
        temb=inputs["temb"],
        reference_temb=inputs.get("reference_temb"),
        rope_cos=table("cos"),
        rope_sin=table("sin"),
        num_noisy=inputs["noisy_rope_cos"].shape[0],
        score_rows=inputs["score_rows"] if scored else None,
        influences=[],
    )


def embed(transformer: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states of pictures and text, and the time embeddings.

    Args:
        inputs: FRONT's, by name.

    Returns:
        "hidden" (B, G + C, d), "text" (B, T, d), "temb" (B, d) and, for models that modulate
        references as at t = 0, "reference_temb" (B, d).
    """
    latents = torch.cat([inputs["noisy_latents"], inputs["reference_latents"]], dim=1)
    # Rounded as diffusers rounds them, which is coarse in bfloat16: a model's results are those.
    time, guidance = inputs["timestep"].to(latents.dtype), inputs.get("guidance")
    known = ARCHITECTURES[architecture_of(transformer)]
    hidden, text, temb, reference_temb = known.embed(
        transformer,
        latents,
        inputs["text_embeds"],
        time,
        None if guidance is None else guidance.to(latents.dtype),
        inputs.get("pooled_text"),
        has_reference_temb=known.has_reference_temb(transformer.config),
    )
    embedded = {"hidden": hidden, "text": text, "temb": temb}
    return embedded if reference_temb is None else {**embedded, "reference_temb": reference_temb}


def run_blocks(
    blocks: Iterable[Any],
    streams: Streams,
    *,
    architecture: str,
    scoring: frozenset[int] = frozenset(),
    last: tuple[BlockList, nn.Module] | None = None,
    call: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
) -> None:
    """Run blocks in turn.

    Args:
        blocks: with live processors.
        streams: changed in place.
        architecture: of the transformer.
        scoring: places of the blocks that score.
        last: the transformer's last block, which gives its noisy rows alone, and its list.
        call: `call_block`, perhaps compiled.
    """
    for place, block in enumerate(blocks):
        scores = place in scoring and streams.score_rows is not None
        streams.text, streams.hidden, influence = call(
            block,
            streams.hidden,
            streams.text,
            streams.temb,
            streams.reference_temb,
            streams.rope_cos,
            streams.rope_sin,
            streams.num_noisy,
            streams.score_rows if scores else None,
            architecture,
            last[0] if last is not None and block is last[1] and _is_bare(block) else None,
        )
        if influence is not None:
            streams.influences.append(influence)
    streams.hidden = streams.hidden[:, : streams.num_noisy] if last is not None else streams.hidden


def call_block(
    block: Any,
    hidden: Tensor,
    text: Tensor,
    temb: Tensor,
    reference_temb: Tensor | None,
    rope_cos: Tensor,
    rope_sin: Tensor,
    num_noisy: int,
    score_rows: Tensor | None,
    architecture: str,
    noisy_only: BlockList | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Call one block of diffusers; text, hidden states and, where rows are scored, influence.

    Args:
        noisy_only: the list of a block that gives its noisy rows alone; none of any other.
    """
    known = ARCHITECTURES[architecture]
    role = "plain" if score_rows is None else "score"
    width = 2 * rope_cos.shape[-1]  # of a head
    context = JointContext(
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        num_text=text.shape[1],
        num_noisy=num_noisy,
        score_rows=score_rows,
        processor=known.processor(role, has_noisy_queries=noisy_only is not None),
        score=score_with_kernel if can_use_kernel(hidden, width) else score_in_blocks,
    )
    if noisy_only is None:
        arguments = known.live_arguments(hidden, text, temb, context, reference_temb)
        text, hidden = block(**arguments)
    else:
        temb, is_reference = paired(temb, reference_temb, hidden.shape[1], num_noisy)
        arguments = known.block_arguments(hidden, text, temb, context, is_reference)
        changed = _Changed(block, known.block_changes(block))
        text, hidden = noisy_only.noisy_forward(changed, **arguments)
    return text, hidden, context.influences[0] if context.influences else None


class _Changed:
    """A block with other attributes; the block itself stays as it is."""

    def __init__(self, block: Any, changes: Mapping[str, Any]) -> None:
        self._block, self._changes = block, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._block, name)


def _is_bare(block: nn.Module) -> bool:
    """Whether a block does nothing around its own forward."""
    return (
        not hasattr(block, "_hf_hook")
        and not hasattr(block, "_diffusers_hook")
        and block._compiled_call_impl is None
        and "forward" not in vars(block)
        and type(block).forward.__module__.startswith("diffusers.")
        and not block._forward_hooks
        and not block._forward_pre_hooks
    )
