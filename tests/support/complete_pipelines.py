"""Complete pipelines of every family: the released structure, tiny widths, random weights.

What a user's call meets is real: VAE factor 8 with its statistics, Qwen2.5-VL's picture processor
and special tokens, the 64 tokens of the prompt template that are cut off, 512 tokens of T5, 77 of
CLIP, the released scheduler configurations, folders in the released layout. Widths and depths are
tiny, and tokenizers know the words that stand here.

    python tests/support/complete_pipelines.py FOLDER [FAMILY ...]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)

FAMILIES = {
    "qwen-edit": QwenImageEditPipeline,
    "qwen-edit-plus": QwenImageEditPlusPipeline,
    "qwen-edit-2511": QwenImageEditPlusPipeline,
    "firered-edit": QwenImageEditPlusPipeline,
    "firered-edit-1.1": QwenImageEditPlusPipeline,
    "flux-kontext": FluxKontextPipeline,
}
AXES = (8, 12, 12)
TEXT_WIDTH, POOLED_WIDTH = 48, 24
QWEN_CONFIG: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": sum(AXES),
    "num_attention_heads": 1,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": AXES,
}
FLUX_CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": sum(AXES),
    "num_attention_heads": 1,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": AXES,
}
# scheduler_config.json of Qwen/Qwen-Image-Edit, -2509, -2511 and of FLUX.1-Kontext-dev.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "qwen": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    },
    "flux": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
}
# The words of the template, so that each is one token as in the released vocabulary.
_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
    "Picture 1: Picture 2: <|im_end|>\n<|im_start|>assistant\n"
)
_WORDS = (
    "make change turn replace remove add put keep give the a an red green blue yellow car house "
    "sky tree man woman dog cat cup lamp sofa wall street light dark warm cold winter summer night "
    "day bright soft sharp behind beside under over into from with without and but not only every "
    "picture photo painting person shirt hair window door garden river lake mountain sea snow rain"
)
_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def architecture_of(family: str) -> str:
    """ "qwen" or "flux"."""
    return "flux" if family.startswith("flux") else "qwen"


def prompt_of(num_words: int) -> str:
    """An instruction of that many words."""
    words = _WORDS.split()
    return " ".join(words[index % len(words)] for index in range(num_words))


def randomise(model: Any, seed: int) -> Any:
    """Give every parameter a value that matters, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.7 * noise * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:  # of a norm
                parameter.copy_(1 + 0.1 * noise)
    return model.eval()


def make_transformer(family: str, seed: int = 0, **changes: Any) -> Any:
    """The family's transformer, float32."""
    if architecture_of(family) == "flux":
        return randomise(FluxTransformer2DModel(**FLUX_CONFIG | changes), seed)
    config = QWEN_CONFIG | {"zero_cond_t": family == "qwen-edit-2511"} | changes
    return randomise(QwenImageTransformer2DModel(**config), seed)


def make_scheduler(family: str) -> FlowMatchEulerDiscreteScheduler:
    """With the released configuration."""
    return FlowMatchEulerDiscreteScheduler(**SCHEDULERS[architecture_of(family)])


def make_pipeline(family: str, seed: int = 0, **changes: Any) -> Any:
    """A complete pipeline in memory; `changes` go to the transformer's configuration."""
    transformer = make_transformer(family, seed, **changes)
    make = _flux_parts if architecture_of(family) == "flux" else _qwen_parts
    pipe: Any = FAMILIES[family](
        scheduler=make_scheduler(family), transformer=transformer, **make(seed)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _qwen_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    plain = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([_TEMPLATE, f"{_WORDS} {_WORDS}"], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]]
    )
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    return tokenizer


def _qwen_parts(seed: int) -> dict[str, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
    )

    from ditrim.runtime.editing.qwen_processor import PictureProcessor

    tokenizer = _qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    config = Qwen2_5_VLConfig(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128000,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [4, 4, 4],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [],
        },
    )
    processor = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    # The mean and deviation of the latents are the class's defaults, which are the released ones.
    vae = AutoencoderKLQwenImage(base_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
    return {
        "vae": randomise(vae, seed + 1),
        "text_encoder": randomise(Qwen2_5_VLForConditionalGeneration(config), seed + 2),
        "tokenizer": tokenizer,
        "processor": PictureProcessor(image_processor=processor, tokenizer=tokenizer),
    }


def _merges_of(word: str) -> list[tuple[str, str]]:
    """Merges by which a word becomes one token, from its first letter on."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(parts[:index]), parts[index]) for index in range(1, len(parts))]


def _flux_parts(seed: int) -> dict[str, Any]:
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    letters = [chr(code) for code in range(33, 127)]
    words = sorted(set(_WORDS.split()))
    ends = [f"{letter}</w>" for letter in letters]
    merges = [pair for word in words for pair in _merges_of(word)]
    learned = ["".join(pair) for pair in dict.fromkeys(merges)]
    names = [*letters, *ends, *learned, "<|startoftext|>", "<|endoftext|>"]
    names = list(dict.fromkeys(names))
    tokenizer = CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=list(dict.fromkeys(merges)),
        model_max_length=77,
    )
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in words)]
    tokenizer_2 = T5TokenizerFast(
        vocab=[(piece, -float(len(piece) == 1) - 1.0) for piece in pieces], model_max_length=512
    )
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=POOLED_WIDTH,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {
        "vae": randomise(vae, seed + 1),
        "text_encoder": randomise(CLIPTextModel(clip), seed + 2),
        "tokenizer": tokenizer,
        "text_encoder_2": randomise(T5EncoderModel(t5), seed + 3),
        "tokenizer_2": tokenizer_2,
    }


def save_pipeline(pipe: Any, folder: Path, *, max_shard_size: str = "10GB") -> Path:
    """Write a pipeline in the released layout; a small `max_shard_size` shards the transformer."""
    pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    if "processor" in content:  # the class that the released folders name
        content["processor"] = ["transformers", "Qwen2VLProcessor"]
        index.write_text(json.dumps(content, indent=2))
    return folder


def main(arguments: list[str]) -> None:
    """Write the pipelines of some families into a folder."""
    folder, *families = arguments
    for family in families or FAMILIES:
        start = time.perf_counter()
        save_pipeline(make_pipeline(family), Path(folder) / family)
        print(f"{family}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
