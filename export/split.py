"""FRONT and BACK: a diffusers transformer cut in two after its first K blocks (ToPi Alg. 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.transformers import architecture_of, blocks_of, listed_blocks
from ditrim.plugins.attention import JointContext, join_rope, paired
from ditrim.plugins.errors import UsageError

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPoint:
    """Where a transformer is cut and which layers score.

    Attributes:
        num_layers: blocks in all.
        front_depth: K; blocks [0, K) are FRONT.
        representative_layers: L, each in [K, num_layers).
    """

    num_layers: int
    front_depth: int
    representative_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.front_depth < self.num_layers:
            raise UsageError(
                f"front depth {self.front_depth} is not in [0, {self.num_layers}): the model has "
                f"{self.num_layers} layers and BACK needs at least one of them"
            )
        if not self.representative_layers:
            raise UsageError("no representative layers given; name at least one layer of BACK")
        if list(self.representative_layers) != sorted(set(self.representative_layers)):
            raise UsageError(
                f"representative layers {self.representative_layers} must increase and not repeat"
            )
        for layer in self.representative_layers:
            if not self.front_depth <= layer < self.num_layers:
                raise UsageError(
                    f"representative layer {layer} is not in [{self.front_depth}, "
                    f"{self.num_layers}), the layers of BACK; lower the front depth or choose "
                    "another layer (calibrate-layers measures them)"
                )

    @property
    def back_layers(self) -> tuple[int, ...]:
        """Indices of BACK's layers: [K, N)."""
        return tuple(range(self.front_depth, self.num_layers))

    def scoring_roles(self, *, scored: bool = True, detailed: bool = False) -> dict[int, str]:
        """`roles` of `processors_installed` for a graph.

        Args:
            scored: whether BACK gives `influence`.
            detailed: whether it gives `layer_scores` too.
        """
        if not scored:
            return {}
        if detailed:
            return dict.fromkeys(self.back_layers, "detail")
        return dict.fromkeys(self.representative_layers, "score")


@contextmanager
def processors_installed(
    transformer: nn.Module, roles: dict[int, str] | None = None, *, pairs_modulation: bool = True
) -> Iterator[None]:
    """Give every block this package's attention processor; put the old ones back at the end.

    Args:
        transformer: a diffusers transformer.
        roles: layer index -> "score", "detail" or "measure"; the others are "plain".
        pairs_modulation: `run_blocks` calls the blocks: let those with `zero_cond_t` take time
            embeddings as it stacks them, and the last give its noisy rows alone, which is exact:
            its other tokens are keys and values and nobody reads what they become; false where
            diffusers' own forward calls the blocks.
    """
    architecture = ARCHITECTURES[architecture_of(transformer)]
    blocks: list[Any] = blocks_of(transformer)
    before = [block.attn.processor for block in blocks]
    changes: list[tuple[Any, str, Any]] = []
    if pairs_modulation:
        last_list, last = listed_blocks(transformer)[-1]
        changes.append((last, "forward", partial(last_list.noisy_forward, last)))
        for block in blocks:
            changes += [(block, *item) for item in architecture.block_changes(block).items()]
    own = [vars(block).get(name, _ABSENT) for block, name, _ in changes]
    try:
        for layer, block in enumerate(blocks):
            role = (roles or {}).get(layer, "plain")
            is_last = pairs_modulation and block is blocks[-1]
            block.attn.processor = architecture.processor(role, has_noisy_queries=is_last)
        for block, name, value in changes:
            setattr(block, name, value)
        yield
    finally:
        for block, processor in zip(blocks, before, strict=True):
            block.attn.processor = processor
        for (block, name, _), value in zip(changes, own, strict=True):
            if value is _ABSENT:
                vars(block).pop(name, None)
            else:
                setattr(block, name, value)


def run_blocks(
    architecture: str,
    blocks: Iterable[nn.Module],
    hidden: Tensor,
    text: Tensor,
    temb: Tensor,
    reference_temb: Tensor | None,
    context: JointContext,
) -> tuple[Tensor, Tensor]:
    """Run diffusers' own blocks over [noisy; reference] and text.

    Args:
        hidden: (B, G + C, d); text: (B, T, d); temb: (B, d).
        reference_temb: (B, d), the modulation of reference tokens in models with `zero_cond_t`.
        context: see `JointContext`.

    Returns:
        hidden, text.
    """
    temb, is_reference = paired(temb, reference_temb, hidden.shape[1], context.num_noisy)
    arguments = ARCHITECTURES[architecture].block_arguments
    for block in blocks:
        text, hidden = block(**arguments(hidden, text, temb, context, is_reference))
    return hidden, text


class _Graph(nn.Module):
    """What FRONT and BACK share. Holds the transformer's modules, not copies of them."""

    def __init__(self, transformer: Any, *, as_onnx_node: bool) -> None:
        super().__init__()
        self.architecture = architecture_of(transformer)
        self.as_onnx_node = as_onnx_node
        architecture, config = ARCHITECTURES[self.architecture], transformer.config
        self.has_reference_temb = architecture.has_reference_temb(config)
        self.front_inputs = architecture.front_inputs(config)
        reason = architecture.refusal(config)
        if reason is not None:
            raise UsageError(f"this transformer cannot be split: {reason}")

    def _context(self, rope: tuple[Tensor, ...], num_text: int, num_noisy: int) -> JointContext:
        noisy_cos, noisy_sin, text_cos, text_sin, reference_cos, reference_sin = rope
        return JointContext(
            rope_cos=join_rope(text_cos, noisy_cos, reference_cos),
            rope_sin=join_rope(text_sin, noisy_sin, reference_sin),
            num_text=num_text,
            num_noisy=num_noisy,
            as_onnx_node=self.as_onnx_node,
        )


class FrontGraph(_Graph):
    """Embeddings and blocks [0, K), always over the full context (ToPi Alg. 1, DiT_front).

    `front_input_names` and `front_output_names` list the tensors, in order.
    """

    def __init__(self, transformer: Any, point: SplitPoint, *, as_onnx_node: bool = False) -> None:
        super().__init__(transformer, as_onnx_node=as_onnx_node)
        for name in ARCHITECTURES[self.architecture].embeddings:
            self.add_module(name, getattr(transformer, name))
        self.blocks = nn.ModuleList(blocks_of(transformer)[: point.front_depth])

    def embed(
        self,
        noisy_latents: Tensor,
        reference_latents: Tensor,
        text_embeds: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_text: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Hidden states of image and text, and the time embeddings (noisy, reference)."""
        latents = torch.cat([noisy_latents, reference_latents], dim=1)  # (B, G + C, c)
        # These stay float32 up to the sinusoids: 1000 in bfloat16 is coarse.
        timestep, guidance = timestep.float(), None if guidance is None else guidance.float()
        return ARCHITECTURES[self.architecture].embed(
            self,
            latents,
            text_embeds,
            timestep,
            guidance,
            pooled_text,
            has_reference_temb=self.has_reference_temb,
        )

    def forward(
        self,
        noisy_latents: Tensor,
        reference_latents: Tensor,
        text_embeds: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_text: Tensor | None,
        noisy_rope_cos: Tensor,
        noisy_rope_sin: Tensor,
        text_rope_cos: Tensor,
        text_rope_sin: Tensor,
        reference_rope_cos: Tensor,
        reference_rope_sin: Tensor,
    ) -> tuple[Tensor, ...]:
        hidden, text, temb, reference_temb = self.embed(
            noisy_latents, reference_latents, text_embeds, timestep, guidance, pooled_text
        )
        num_noisy = noisy_latents.shape[1]
        if len(self.blocks) > 0:
            rope = (
                noisy_rope_cos,
                noisy_rope_sin,
                text_rope_cos,
                text_rope_sin,
                reference_rope_cos,
                reference_rope_sin,
            )
            context = self._context(rope, text_embeds.shape[1], num_noisy)
            hidden, text = run_blocks(
                self.architecture, self.blocks, hidden, text, temb, reference_temb, context
            )
        outputs = (hidden[:, :num_noisy], hidden[:, num_noisy:], text, temb)
        return outputs if reference_temb is None else (*outputs, reference_temb)


class BackGraph(_Graph):
    """Blocks [K, N), the output layers and the score, at any reference length K' <= C.

    Without `score_rows` it computes the velocity alone; where its blocks have the role "detail", it
    returns the scores of every layer too. `back_input_names` and `back_output_names` list the
    tensors, in order.
    """

    def __init__(self, transformer: Any, point: SplitPoint, *, as_onnx_node: bool = False) -> None:
        super().__init__(transformer, as_onnx_node=as_onnx_node)
        self.blocks = nn.ModuleList(blocks_of(transformer)[point.front_depth :])
        self.representative = [layer - point.front_depth for layer in point.representative_layers]
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out

    def forward(
        self,
        noisy: Tensor,
        reference: Tensor,
        text: Tensor,
        temb: Tensor,
        reference_temb: Tensor | None,
        noisy_rope_cos: Tensor,
        noisy_rope_sin: Tensor,
        text_rope_cos: Tensor,
        text_rope_sin: Tensor,
        reference_rope_cos: Tensor,
        reference_rope_sin: Tensor,
        score_rows: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rope = (
            noisy_rope_cos,
            noisy_rope_sin,
            text_rope_cos,
            text_rope_sin,
            reference_rope_cos,
            reference_rope_sin,
        )
        context = self._context(rope, text.shape[1], noisy.shape[1])
        context.score_rows = score_rows
        hidden = torch.cat([noisy, reference], dim=1)  # (B, G + K', d)
        hidden, _ = run_blocks(
            self.architecture, self.blocks, hidden, text, temb, reference_temb, context
        )  # (B, G, d)
        velocity = self.proj_out(self.norm_out(hidden, temb))
        if score_rows is None:
            return (velocity,)
        influences = context.influences or [context.details[i][:, 0] for i in self.representative]
        influence = torch.stack(influences).sum(dim=0)  # (L, B, K') -> (B, K')
        if not context.details:
            return velocity, influence
        return velocity, influence, torch.stack(context.details, dim=1)  # (B, L, 3, K')
