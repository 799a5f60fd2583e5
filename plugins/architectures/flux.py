"""FLUX.1: double-stream blocks, then single-stream ones; positions come as ids."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ditrim.plugins.architectures.architecture import (
    Architecture,
    BlockList,
    CallArguments,
    Companion,
    OriginalNames,
    Places,
    Positions,
    SingleFile,
)
from ditrim.plugins.architectures.streams import (
    DOUBLE_STREAM,
    SINGLE_STREAM,
    CallSize,
    Config,
    MatrixProduct,
    count_inputs,
    count_linear,
    count_time,
    input_products,
    width_of,
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
) -> tuple[Tensor, Tensor, Tensor, None]:
    arguments = [timestep * 1000]
    if guidance is not None:
        arguments.append(guidance * 1000)
    temb = modules.time_text_embed(*arguments, pooled_text)
    return modules.x_embedder(latents), modules.context_embedder(text_embeds), temb, None


def _front_inputs(config: Config) -> tuple[str, ...]:
    return ("guidance",) * bool(config["guidance_embeds"]) + ("pooled_text",)


def double_noisy_forward(
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: JointContext,
) -> tuple[Tensor, Tensor]:
    """`noisy_forward` of a double-stream block."""
    normed, gate, mlp_shift, mlp_scale, mlp_gate = block.norm1(hidden_states, emb=temb)
    text_normed, *_ = block.norm1_context(encoder_hidden_states, emb=temb)
    attended, _ = block.attn(
        hidden_states=normed,
        encoder_hidden_states=text_normed,
        image_rotary_emb=image_rotary_emb,
    )
    hidden = hidden_states[:, : image_rotary_emb.num_noisy] + gate.unsqueeze(1) * attended
    normed = block.norm2(hidden) * (1 + mlp_scale[:, None]) + mlp_shift[:, None]
    return encoder_hidden_states, hidden + mlp_gate.unsqueeze(1) * block.ff(normed)


def single_noisy_forward(
    block: Any,
    *,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: JointContext,
) -> tuple[Tensor, Tensor]:
    """`noisy_forward` of a single-stream block."""
    import torch

    from ditrim.plugins.attention import clip_overflow

    num_noisy, num_text = image_rotary_emb.num_noisy, image_rotary_emb.num_text
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, N, d)
    normed, gate = block.norm(joint, emb=temb)
    attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
    expanded = block.act_mlp(block.proj_mlp(normed[:, num_text : num_text + num_noisy]))
    output = gate.unsqueeze(1) * block.proj_out(torch.cat([attended, expanded], dim=2))
    return encoder_hidden_states, clip_overflow(hidden_states[:, :num_noisy] + output)


def _positions(layout: Layout, num_text: int) -> Positions:
    """Picture, row and column, as FluxKontextPipeline counts: 0 for the noisy one; text has 0."""
    import torch

    pictures = [
        torch.cartesian_prod(torch.tensor([index]), torch.arange(height), torch.arange(width))
        for index, (height, width) in enumerate(layout.grids)
    ]
    return Positions(
        noisy=pictures[0],
        text=torch.zeros(num_text, 3, dtype=torch.int64),
        reference=torch.cat([pictures[0][:0], *pictures[1:]]),
    )


def place_by_ids(
    num_tokens: int,
    num_text: int,
    img_ids: Tensor | None,
    txt_ids: Tensor | None,
    *,
    noisy_id: int = 0,
) -> Places:
    """Read ids (picture, row, column) of image and text tokens, the noisy picture's first.

    Args:
        num_tokens, num_text: G + C and T.
        img_ids, txt_ids: (G + C, 3) and (T, 3), perhaps with an axis of one before them.
        noisy_id: of the picture in the making.

    Raises:
        UsageError: they are missing.
    """
    if img_ids is None or txt_ids is None:
        raise UsageError("img_ids, txt_ids and pooled_projections must be given")
    # Pipelines make the ids in the embeddings' dtype, which can be bfloat16.
    image = (img_ids[0] if img_ids.dim() == 3 else img_ids).float().cpu()
    text = (txt_ids[0] if txt_ids.dim() == 3 else txt_ids).float().cpu()
    num_noisy = int((image[:, 0] == noisy_id).sum())
    return Places(
        num_noisy=num_noisy,
        layout=_layout_of(image),
        key=(image.numpy().tobytes(), text.numpy().tobytes()),
        positions=functools.partial(
            Positions, noisy=image[:num_noisy], text=text, reference=image[num_noisy:]
        ),
    )


def _layout_of(ids: Tensor) -> Layout | None:
    """The pictures of some ids; none where one is no whole grid."""
    grids = []
    for picture in ids[:, 0].unique(sorted=True):
        rows, columns = ids[ids[:, 0] == picture, 1:].unbind(dim=1)
        height, width = len(rows.unique()), len(columns.unique())
        if height * width != len(rows):
            return None
        grids.append((height, width))
    return Layout.of_grids(grids)


def joint_rope(rope: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of diffusers' (N, D) each, which has every value twice."""
    return rope[0][None, :, ::2].float(), rope[1][None, :, ::2].float()


def _num_embedding_parameters(config: Config) -> int:
    width = width_of(config)
    pooled = count_linear(config["pooled_projection_dim"], width) + count_linear(width, width)
    return count_inputs(config) + pooled + count_time(config) * bool(config["guidance_embeds"])


def _embedding_products(config: Config, size: CallSize) -> list[MatrixProduct]:
    width, batch = width_of(config), size.batch
    return [
        *input_products(config, size, 1 + bool(config["guidance_embeds"])),
        MatrixProduct(m=batch, k=config["pooled_projection_dim"], n=width),
        MatrixProduct(m=batch, k=width, n=width),
    ]


def _refusal(config: Config) -> str | None:
    inputs, outputs = config.get("in_channels", 64), config.get("out_channels")
    if outputs is None or inputs == outputs:
        return None
    return (
        f"key 'in_channels' is {inputs} and 'out_channels' {outputs}: this FLUX takes its "
        "condition as channels, not in context, and has no reference tokens to trim"
    )


def _t5_bytes(pixels: int, tokens: int) -> int:
    """Attention scores in float32 and as probabilities, and the gated MLP."""
    heads, width, mlp = 64, 4096, 10240
    return heads * tokens * tokens * (4 + 2) + 2 * tokens * (3 * mlp + 4 * width)


_ORIGINAL_NAMES = OriginalNames(
    top={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
    # diffusers keeps scale before shift
    swapped=("final_layer.adaLN_modulation.1", "norm_out.linear"),
    blocks=(
        (
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "img_attn.proj": ("attn.to_out.0",),
                "txt_attn.proj": ("attn.to_add_out",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
            },
        ),
        (
            "single_blocks",
            "single_transformer_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
            },
        ),
    ),
)

FLUX = Architecture(
    name="flux",
    transformer_class="FluxTransformer2DModel",
    blocks=(
        BlockList(
            name="transformer_blocks",
            depth_key="num_layers",
            depth=19,
            stream=DOUBLE_STREAM,
            noisy_forward=double_noisy_forward,
        ),
        BlockList(
            name="single_transformer_blocks",
            depth_key="num_single_layers",
            depth=38,
            stream=SINGLE_STREAM,
            noisy_forward=single_noisy_forward,
        ),
    ),
    class_defaults={
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
    },
    refusal=_refusal,
    embeddings=("time_text_embed", "context_embedder", "x_embedder"),
    embed=_embed,
    front_inputs=_front_inputs,
    arguments=CallArguments(
        positions=("img_ids", "txt_ids"),
        pooled_text="pooled_projections",
        ignored=("controlnet_blocks_repeat",),  # says something of samples, which are refused
    ),
    place=place_by_ids,
    positions=_positions,
    angles="float64",
    joint_rope=joint_rope,
    num_embedding_parameters=_num_embedding_parameters,
    embedding_products=_embedding_products,
    single_file=SingleFile(
        width=("img_in.weight", 0),
        head_dim=("double_blocks.0.img_attn.norm.query_norm.scale", 0),
        depths={"num_layers": "double_blocks", "num_single_layers": "single_blocks"},
        sizes={
            "in_channels": ("img_in.weight", 1, 1),
            "joint_attention_dim": ("txt_in.weight", 1, 1),
            "pooled_projection_dim": ("vector_in.in_layer.weight", 1, 1),
        },
        flags={"guidance_embeds": "guidance_in.in_layer.weight"},
    ),
    original_names=_ORIGINAL_NAMES,
    companions=(
        Companion(
            name="T5-XXL encoder",
            part="text_encoder_2",
            num_parameters=4_762_310_656,
            phase="text",
            transient_bytes=_t5_bytes,
            source="transformers' T5EncoderModel of 24 layers, d = 4096, d_ff = 10240, gated "
            "(google/t5-v1_1-xxl)",
        ),
        Companion(
            name="CLIP-L text encoder",
            part="text_encoder",
            num_parameters=123_060_480,
            phase="text",
            transient_bytes=lambda pixels, tokens: 0,
            source="transformers' CLIPTextModel of 12 layers, d = 768 "
            "(openai/clip-vit-large-patch14); 77 tokens, so its activations are left out",
        ),
        Companion(
            name="FLUX VAE",
            part="vae",
            num_parameters=83_819_683,
            phase="pictures",
            transient_bytes=lambda pixels, tokens: 1536 * pixels,
            source="diffusers' AutoencoderKL of 128, 256, 512, 512 channels; live tensors on the "
            "meta device, attention fused; convolution workspaces are not in it",
        ),
    ),
)
