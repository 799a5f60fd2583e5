"""What shares the device with the engines: text encoders and VAE of the diffusers pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# All of them are run in a 16-bit type.
_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A network of the pipeline besides the transformer.

    Attributes:
        name: what it is.
        part: its attribute in the pipeline.
        num_parameters: counted on the diffusers or transformers module.
        phase: when it runs: "text" or "pictures".
        transient_bytes: of the tensors that are alive at its peak, from the pixels of a picture
            and the number of text tokens.
        source: where the figures are from.
    """

    name: str
    part: str
    num_parameters: int
    phase: str
    transient_bytes: Callable[[int, int], int]
    source: str

    @property
    def weights_bytes(self) -> int:
        """In a 16-bit type."""
        return _ELEMENT_BYTES * self.num_parameters


def _per_pixel(num_bytes: float) -> Callable[[int, int], int]:
    return lambda pixels, tokens: round(num_bytes * pixels)


def _qwen_text(pixels: int, tokens: int) -> int:
    """The pipeline asks for all hidden states, and the model makes logits, too."""
    layers, width, vocabulary = 28, 3584, 152064
    return _ELEMENT_BYTES * tokens * ((layers + 1) * width + vocabulary)


def _t5_text(pixels: int, tokens: int) -> int:
    """Attention scores in float32 and as probabilities, and the gated MLP."""
    heads, width, mlp = 64, 4096, 10240
    return heads * tokens * tokens * (4 + _ELEMENT_BYTES) + _ELEMENT_BYTES * tokens * (
        3 * mlp + 4 * width
    )


_LIVE = (
    "live tensors of diffusers' module on the meta device, attention fused; "
    "convolution workspaces are not in it"
)

COMPANIONS: dict[str, tuple[Companion, ...]] = {
    "qwen": (
        Companion(
            name="Qwen2.5-VL-7B",
            part="text_encoder",
            num_parameters=8_292_166_656,
            phase="text",
            transient_bytes=_qwen_text,
            source="transformers' Qwen2_5_VLForConditionalGeneration of 28 layers, d = 3584, "
            "vocabulary 152064, vision tower of 32 layers, d = 1280 (Qwen2.5-VL technical report)",
        ),
        Companion(
            name="Qwen-Image VAE",
            part="vae",
            num_parameters=126_892_531,
            phase="pictures",
            transient_bytes=_per_pixel(3462),
            source=f"diffusers' AutoencoderKLQwenImage; {_LIVE}",
        ),
    ),
    "flux": (
        Companion(
            name="T5-XXL encoder",
            part="text_encoder_2",
            num_parameters=4_762_310_656,
            phase="text",
            transient_bytes=_t5_text,
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
            transient_bytes=_per_pixel(1536),
            source=f"diffusers' AutoencoderKL of 128, 256, 512, 512 channels; {_LIVE}",
        ),
    ),
}
