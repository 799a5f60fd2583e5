"""Qwen-Image-Edit: double-stream blocks, positions centred on each picture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ditrim.plugins.architectures.architecture import (
    Architecture,
    BlockList,
    CallArguments,
    Companion,
    Places,
    Positions,
    SingleFile,
)
from ditrim.plugins.architectures.streams import (
    DOUBLE_STREAM,
    CallSize,
    Config,
    MatrixProduct,
    count_inputs,
    input_products,
)
from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.plugins.attention import JointContext


def _embed(
    modules: Any,
    latents: Tensor,
    text_embeds: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    pooled_text: Tensor | None,
    *,
    has_reference_temb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden = modules.img_in(latents)
    text = modules.txt_in(modules.txt_norm(text_embeds))
    temb = modules.time_text_embed(timestep, hidden)
    reference_temb = None
    if has_reference_temb:
        reference_temb = modules.time_text_embed(timestep * 0, hidden)
    return hidden, text, temb, reference_temb


def _block_arguments(
    hidden: Tensor, text: Tensor, temb: Tensor, context: JointContext, is_reference: Tensor | None
) -> dict[str, Any]:
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": None,
        "temb": temb,
        "image_rotary_emb": context,
        "modulate_index": is_reference,
    }


def _live_arguments(
    hidden: Tensor, text: Tensor, temb: Tensor, context: JointContext, reference_temb: Tensor | None
) -> dict[str, Any]:
    import torch

    index = None
    if reference_temb is not None:
        temb = torch.cat([temb, reference_temb])
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        index = (positions >= context.num_noisy).int().expand(hidden.shape[0], -1)
    return _block_arguments(hidden, text, temb, context, index)


def _block_changes(block: Any) -> dict[str, Any]:
    if not getattr(block, "zero_cond_t", False):
        return {}
    return {"zero_cond_t": False, "_modulate": modulate_pair}


def modulate_pair(
    x: Tensor, mod_params: Tensor, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_modulate` of a block with `zero_cond_t`, for time embeddings stacked as (B, 2, d).

    diffusers stacks the two along the batch and splits a batch of unknown size again, which has no
    plain ONNX form.

    Args:
        x: (B, L, d).
        mod_params: (B, 2, 3 d) shift, scale and gate at [t, 0].
        index: (L, 1) bool, whether a token is modulated as at t = 0; none means that none is.

    Returns:
        the modulated x, and the gates (B, L or 1, d).
    """
    import torch

    at_t, at_zero = mod_params[:, :1], mod_params[:, 1:]  # (B, 1, 3 d)
    chosen = at_t if index is None else torch.where(index, at_zero, at_t)
    shift, scale, gate = chosen.chunk(3, dim=-1)
    return x * (1 + scale) + shift, gate


def _noisy_forward(
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: JointContext,
    encoder_hidden_states_mask: None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ditrim.plugins.attention import clip_overflow

    num_noisy = image_rotary_emb.num_noisy
    attention_mod, mlp_mod = block.img_mod(temb).chunk(2, dim=-1)
    text_mod, _ = block.txt_mod(temb).chunk(2, dim=-1)
    normed, gate = block._modulate(block.img_norm1(hidden_states), attention_mod, modulate_index)
    if modulate_index is not None:
        gate = gate[:, :num_noisy]  # has every row's, see modulate_pair
    text_normed, _ = block._modulate(block.txt_norm1(encoder_hidden_states), text_mod)
    attended, _ = block.attn(
        hidden_states=normed,
        encoder_hidden_states=text_normed,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
    )
    hidden = hidden_states[:, :num_noisy] + gate * attended
    normed, gate = block._modulate(block.img_norm2(hidden), mlp_mod)  # noisy rows: none is at t = 0
    return encoder_hidden_states, clip_overflow(hidden + gate * block.img_mlp(normed))


def _positions(layout: Layout, num_text: int) -> Positions:
    """Frame, height and width, the last two centred; the text's follow those of the pictures."""
    import torch

    pictures = [
        torch.cartesian_prod(
            torch.arange(index, index + frames),
            torch.arange(height) - (height - height // 2),
            torch.arange(width) - (width - width // 2),
        )
        for index, (frames, height, width) in enumerate(layout.pictures)
    ]
    start = max(max(height // 2, width // 2) for _, height, width in layout.pictures)
    return Positions(
        noisy=pictures[0],
        text=torch.arange(start, start + num_text)[:, None].expand(-1, 3),
        reference=torch.cat([pictures[0][:0], *pictures[1:]]),
    )


def _place(num_tokens: int, num_text: int, img_shapes: Sequence[Any] | None) -> Places:
    """Read `img_shapes`: a batch of lists of (frames, height, width), the picture's first.

    The pipelines give one entry a prompt, whatever the number of pictures a prompt.
    """
    if not img_shapes:
        raise UsageError("img_shapes must be given: it separates noisy from reference tokens")
    samples = [
        [tuple(int(n) for n in shape) for shape in (s if isinstance(s, list) else [s])]
        for s in img_shapes
    ]
    if any(sample != samples[0] for sample in samples):
        raise UsageError(
            f"img_shapes of a batch must be one geometry for every entry, got {samples}"
        )
    layout = Layout.of_frames(samples[0])  # type: ignore[arg-type]
    if layout.num_noisy + layout.num_reference != num_tokens:
        raise UsageError(
            f"img_shapes {samples[0]} describe {layout.num_noisy + layout.num_reference} tokens, "
            f"hidden_states have {num_tokens}"
        )
    return Places(
        num_noisy=layout.num_noisy,
        layout=layout,
        key=(layout, num_text),
        positions=functools.partial(_positions, layout, num_text),
    )


def _joint_rope(rope: Any) -> tuple[Tensor, Tensor]:
    import torch

    image, text = rope  # complex (L, D/2)
    joint = torch.cat([text, image])[None]
    return joint.real.float(), joint.imag.float()


def _guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """The pipelines keep the norm."""
    guided = uncond + scale * (cond - uncond)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _embedding_products(config: Config, size: CallSize) -> list[MatrixProduct]:
    return input_products(config, size, 1 + bool(config.get("zero_cond_t")))


def _refusal(config: Config) -> str | None:
    for key in ("use_additional_t_cond", "use_layer3d_rope"):
        if config.get(key):
            return (
                f"key {key!r} is true: this is a layered Qwen-Image transformer, which is not an "
                "in-context editor and is not supported"
            )
    return None


def _text_bytes(pixels: int, tokens: int) -> int:
    """The pipeline asks for all hidden states, and the model makes logits, too."""
    layers, width, vocabulary = 28, 3584, 152064
    return 2 * tokens * ((layers + 1) * width + vocabulary)


QWEN = Architecture(
    name="qwen",
    transformer_class="QwenImageTransformer2DModel",
    blocks=(
        BlockList(
            name="transformer_blocks",
            depth_key="num_layers",
            depth=60,
            stream=DOUBLE_STREAM,
            noisy_forward=_noisy_forward,
        ),
    ),
    class_defaults={
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "zero_cond_t": False,
    },
    # diffusers' table (`QwenEmbedRope`) has so many on each side of a picture's centre.
    positions_limit=4096,
    refusal=_refusal,
    embeddings=("time_text_embed", "txt_norm", "txt_in", "img_in"),
    embed=_embed,
    has_reference_temb=lambda config: bool(config.get("zero_cond_t")),
    block_arguments=_block_arguments,
    block_changes=_block_changes,
    live_arguments=_live_arguments,
    arguments=CallArguments(
        positions=("img_shapes",),
        text_mask="encoder_hidden_states_mask",
        ignored=("txt_seq_lens",),  # the mask or the embeddings' length say the same
    ),
    place=_place,
    positions=_positions,
    angles="float32",
    joint_rope=_joint_rope,
    guided=_guided,
    # With the norm of the text.
    num_embedding_parameters=lambda config: count_inputs(config) + config["joint_attention_dim"],
    embedding_products=_embedding_products,
    single_file=SingleFile(
        width=("img_in.weight", 0),
        head_dim=("transformer_blocks.0.attn.norm_q.weight", 0),
        depths={"num_layers": "transformer_blocks"},
        sizes={
            "in_channels": ("img_in.weight", 1, 1),
            "out_channels": ("proj_out.weight", 0, 4),
            "joint_attention_dim": ("txt_in.weight", 1, 1),
        },
    ),
    companions=(
        Companion(
            name="Qwen2.5-VL-7B",
            part="text_encoder",
            num_parameters=8_292_166_656,
            phase="text",
            transient_bytes=_text_bytes,
            source="transformers' Qwen2_5_VLForConditionalGeneration of 28 layers, d = 3584, "
            "vocabulary 152064, vision tower of 32 layers, d = 1280 (Qwen2.5-VL technical report)",
        ),
        Companion(
            name="Qwen-Image VAE",
            part="vae",
            num_parameters=126_892_531,
            phase="pictures",
            transient_bytes=lambda pixels, tokens: 3462 * pixels,
            source="diffusers' AutoencoderKLQwenImage; live tensors on the meta device, attention "
            "fused; convolution workspaces are not in it",
        ),
    ),
)
