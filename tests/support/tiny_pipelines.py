"""The three diffusers pipelines with tiny random parts; text encoders are left out.

The pipelines resize references to about one megapixel; `small_pictures` shrinks that constant, and
nothing else, so that their own code runs in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from PIL import Image
from tiny import tiny_transformer

TEXT_WIDTH, POOLED_WIDTH = 24, 12


def tiny_pipeline(family: str, seed: int = 0) -> Any:
    """A pipeline of the family's class with a tiny transformer and VAE."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    transformer = tiny_transformer(family, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "flux-kontext":
            vae: Any = AutoencoderKL(
                in_channels=3,
                out_channels=3,
                block_out_channels=(4,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                norm_num_groups=2,
                latent_channels=4,
                scaling_factor=1.0,
                shift_factor=0.0,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
            pipe: Any = FluxKontextPipeline(
                scheduler=scheduler,
                vae=vae,
                text_encoder=None,
                tokenizer=None,
                text_encoder_2=None,
                tokenizer_2=None,
                transformer=transformer,
            )
        else:
            vae = AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            )
            kind = QwenImageEditPipeline if family == "qwen-edit" else QwenImageEditPlusPipeline
            pipe = kind(
                scheduler=scheduler,
                vae=vae,
                text_encoder=None,
                tokenizer=None,
                processor=None,
                transformer=transformer,
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def small_pictures(side: int = 64) -> Iterator[None]:
    """References of about `side` x `side` pixels in place of about a megapixel."""

    def small(_: float, ratio: float) -> tuple[int, int]:
        return side, max(32, round(side / ratio / 32) * 32)

    base = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit"
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch(f"{base}.calculate_dimensions", lambda a, r: (*small(a, r), None))
        )
        stack.enter_context(mock.patch(f"{base}_plus.calculate_dimensions", small))
        yield


def picture(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    """A random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(
    family: str,
    *,
    batch: int = 1,
    num_text: int = 5,
    side: int = 48,
    steps: int = 4,
    seed: int = 0,
    num_references: int = 1,
    guided: bool = False,
    short_prompts: bool = False,
) -> dict[str, Any]:
    """Arguments of a pipeline call. `short_prompts` masks text tokens of all entries but one."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    arguments: dict[str, Any] = {
        "prompt_embeds": randn(batch, num_text, TEXT_WIDTH),
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    if guided:
        arguments |= {
            "negative_prompt_embeds": randn(batch, num_text, TEXT_WIDTH),
            "true_cfg_scale": 3.0,
        }
    if family == "flux-kontext":
        arguments |= {
            "image": picture(seed),
            "_auto_resize": False,
            "max_area": side * side,
            "pooled_prompt_embeds": randn(batch, POOLED_WIDTH),
            "guidance_scale": 2.5,
        }
        if guided:
            arguments["negative_pooled_prompt_embeds"] = randn(batch, POOLED_WIDTH)
        return arguments
    mask = torch.ones(batch, num_text, dtype=torch.int64)
    if short_prompts:
        mask[1:, num_text - 2 :] = 0
    arguments["prompt_embeds_mask"] = mask
    if guided:
        arguments["negative_prompt_embeds_mask"] = torch.ones(batch, num_text, dtype=torch.int64)
    pictures = [picture(seed + i, width=64 if i == 0 else 96) for i in range(num_references)]
    arguments["image"] = pictures if family != "qwen-edit" else pictures[0]
    return arguments
