"""Runs a transformer's own blocks on the tokens of FRONT and BACK.

Replaces: the modules that are traced for engines (`export.split`), which change blocks while they
are at work. Blocks are called as diffusers' own forward calls them, so what a user put on them
(offload and casting hooks, LoRA layers, quantised linears, compiled forwards) acts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditrim.engines.backends.torch.scoring import can_use_kernel, score_with_kernel
from ditrim.export.attention import JointContext
from ditrim.export.last_block import noisy_forward
from ditrim.export.split import PROCESSORS, architecture_of, join_rope, modulate_pair

_PROCESSORS = {
    (architecture, role, noisy): make(role, has_noisy_queries=noisy)
    for architecture, make in PROCESSORS.items()
    for role in ("plain", "score")
    for noisy in (False, True)
}


@dataclass(slots=True, kw_only=True)
class Streams:
    """What goes from block to block.

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
    time = inputs["timestep"].to(latents.dtype)
    if architecture_of(transformer) == "flux":
        arguments = [time * 1000]
        if transformer.config.guidance_embeds:
            arguments.append(inputs["guidance"].to(latents.dtype) * 1000)
        return {
            "hidden": transformer.x_embedder(latents),
            "text": transformer.context_embedder(inputs["text_embeds"]),
            "temb": transformer.time_text_embed(*arguments, inputs["pooled_text"]),
        }
    hidden = transformer.img_in(latents)
    embedded = {
        "hidden": hidden,
        "text": transformer.txt_in(transformer.txt_norm(inputs["text_embeds"])),
        "temb": transformer.time_text_embed(time, hidden),
    }
    if transformer.config.get("zero_cond_t", False):
        embedded["reference_temb"] = transformer.time_text_embed(time * 0, hidden)
    return embedded


def run_blocks(
    blocks: Iterable[Any],
    streams: Streams,
    *,
    architecture: str,
    scoring: frozenset[int] = frozenset(),
    last: Any = None,
    call: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
) -> None:
    """Run blocks in turn.

    Args:
        blocks: with live processors.
        streams: changed in place.
        architecture: of the transformer.
        scoring: places of the blocks that score.
        last: the transformer's last block, which gives its noisy rows alone.
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
            block is last and _is_bare(block),
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
    noisy_only: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Call one block of diffusers; text, hidden states and, where rows are scored, influence."""
    role = "plain" if score_rows is None else "score"
    context = JointContext(
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        num_text=text.shape[1],
        num_noisy=num_noisy,
        score_rows=score_rows,
        processor=_PROCESSORS[architecture, role, noisy_only],
        score=score_with_kernel if can_use_kernel(hidden, 2 * rope_cos.shape[-1]) else None,
    )
    arguments: dict[str, Any] = {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "temb": temb,
        "image_rotary_emb": context,
    }
    forward = noisy_forward(block) if noisy_only else block
    if architecture == "qwen":
        arguments |= {"encoder_hidden_states_mask": None, "modulate_index": None}
        if reference_temb is not None:
            is_reference = torch.arange(hidden.shape[1], device=hidden.device) >= num_noisy
            if noisy_only:
                forward = functools.partial(forward.func, _Paired(block))
                arguments["temb"] = torch.stack([temb, reference_temb], dim=1)
                arguments["modulate_index"] = is_reference[:, None]
            else:
                arguments["temb"] = torch.cat([temb, reference_temb])
                index = is_reference.int().expand(hidden.shape[0], -1)
                arguments["modulate_index"] = index
    text, hidden = forward(**arguments)
    return text, hidden, context.influences[0] if context.influences else None


class _Paired:
    """A block with `zero_cond_t` that takes its time embeddings stacked; see `modulate_pair`."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    _modulate = staticmethod(modulate_pair)


def _is_bare(block: nn.Module) -> bool:
    """Whether a block does nothing around its own forward."""
    return (
        not hasattr(block, "_hf_hook")
        and not hasattr(block, "_diffusers_hook")
        and block._compiled_call_impl is None
        and "forward" not in vars(block)
        and not block._forward_hooks
        and not block._forward_pre_hooks
    )
