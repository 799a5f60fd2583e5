"""A diffusers pipeline for the small editor, shaped like `QwenImageEditPlusPipeline`.

The transformer is called with exactly the arguments, cache contexts and order of diffusers' Qwen
editing pipelines, and nothing else of it is used but `config`, `dtype`, `device` and
`cache_context`, so whatever stands in for theirs stands in for this one too.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

from ditrim.runtime.small_editor.modules import PixelVAE, WordEmbedder
from ditrim.runtime.small_editor.scenes import PICTURE_SIZE, REFERENCE_SIZE
from ditrim.runtime.small_editor.vocabulary import WordTokenizer

logger = logging.getLogger(__name__)

Images = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]


@dataclass
class SmallEditOutput(BaseOutput):  # type: ignore[misc]
    """`images`: a list of PIL pictures, or an array, or a tensor, as `output_type` asked."""

    images: list[Image.Image] | npt.NDArray[np.float32] | torch.Tensor


def fit_reference(image: Image.Image, *, is_first: bool = True) -> Image.Image:
    """Bring a picture to a size that the small editor was trained on: RGB, square.

    The middle square is kept. The first reference becomes 72 x 72 where its shorter side has at
    least 72 pixels (the picture is then its middle 48 x 48), else 48 x 48; the others are always
    48 x 48. Transparent pictures are laid on white. Raises `TypeError` for what is no PIL picture.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"a reference is a {type(image).__name__}; pass PIL.Image.Image, or a list of them"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    is_large = is_first and min(image.size) >= REFERENCE_SIZE
    size = REFERENCE_SIZE if is_large else PICTURE_SIZE
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def picture_of(reference: Image.Image) -> Image.Image:
    """The picture that an edit of this first reference starts from: its middle 48 x 48."""
    fitted = fit_reference(reference)
    margin = (fitted.width - PICTURE_SIZE) // 2
    return fitted.crop((margin, margin, margin + PICTURE_SIZE, margin + PICTURE_SIZE))


def _to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W) in [-1, 1]


class SmallEditPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Edit a 48 x 48 picture by an instruction, with one or more references.

    Components: `transformer` (QwenImageTransformer2DModel), `scheduler`
    (FlowMatchEulerDiscreteScheduler), `vae` (PixelVAE), `text_encoder` (WordEmbedder) and
    `tokenizer` (WordTokenizer). Latent tokens are patches of 4 x 4 pixels.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")
    _optional_components: ClassVar[list[str]] = ["tokenizer"]

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: PixelVAE,
        text_encoder: WordEmbedder,
        tokenizer: WordTokenizer,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=None,
        )
        # diffusers saves and loads only subclasses of a few bases of its own and of transformers:
        # the word list goes through this class's `save_pretrained` and `from_pretrained` instead.
        self.tokenizer = tokenizer
        self.patch_size: int = self.vae.config.patch_size
        self._attention_kwargs: dict[str, Any] = {}
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> SmallEditPipeline:
        """Load a folder in diffusers' layout; components may be passed by name, as in diffusers.

        Raises `FileNotFoundError` for a folder that holds no small editor.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no small editor (there is no model_index.json); train one with "
                "scripts/small_editor/train_small_editor.py"
            )
        if "tokenizer" not in kwargs:
            kwargs["tokenizer"] = WordTokenizer.from_pretrained(folder / "tokenizer")
        kwargs.setdefault("local_files_only", True)
        pipeline: SmallEditPipeline = super().from_pretrained(folder, **kwargs)
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write every component into a folder in diffusers' layout, weights as safetensors."""
        kwargs["safe_serialization"] = True
        super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(Path(save_directory) / "tokenizer")

    @property
    def attention_kwargs(self) -> dict[str, Any]:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, T, 128) and mask (B, T), the mask `None` where nothing is padding."""
        device = device or self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows, valid = self.tokenizer(prompts, max_sequence_length)
        tokens = torch.tensor(rows, device=device)
        embeds = self.text_encoder(tokens).to(self.transformer.dtype)
        mask = torch.tensor(valid, device=device)
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)
        mask = mask.repeat_interleave(num_images_per_prompt, dim=0)
        return embeds, None if bool(mask.all()) else mask

    def prepare_references(self, image: Images, batch_size: int) -> list[torch.Tensor]:
        """The references as tensors (B, 3, H, W), one a reference, in their order.

        `image` is a picture, a list of pictures that every prompt shares, or one list a prompt;
        the fitted sizes must then agree from prompt to prompt.
        """
        if isinstance(image, Image.Image):
            image = [image]
        if not isinstance(image, Sequence) or len(image) == 0:
            raise ValueError(
                "`image` holds no picture; pass a PIL picture, a list of references, or a list of "
                "such lists with one for each prompt"
            )
        is_nested = isinstance(image[0], Sequence)
        rows: list[list[Image.Image]] = [list(row) for row in image] if is_nested else [list(image)]  # type: ignore[arg-type]
        if is_nested and len(rows) != batch_size:
            raise ValueError(
                f"`image` has {len(rows)} lists of references and there are {batch_size} prompts; "
                "pass one list for each prompt, or one flat list for all"
            )
        fitted = [
            [fit_reference(picture, is_first=number == 0) for number, picture in enumerate(row)]
            for row in rows
        ]
        layouts = {tuple(picture.size for picture in row) for row in fitted}
        if len(layouts) > 1:
            raise ValueError(
                f"the prompts of one batch have references of different sizes: {sorted(layouts)}; "
                "run them in separate calls"
            )
        columns = [_to_tensor(column) for column in zip(*fitted, strict=True)]
        repeats = 1 if is_nested else batch_size
        return [column.repeat(repeats, 1, 1, 1) for column in columns]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Noise of the packed latents' shape (B, G, 48), or the caller's `latents`, checked."""
        device, dtype = self._execution_device, self.transformer.dtype
        num_tokens = (height // self.patch_size) * (width // self.patch_size)
        shape = (batch_size, num_tokens, 3 * self.patch_size**2)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` has shape {tuple(latents.shape)}; needed: {shape}")
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} pictures; "
                "pass one generator, or one for each picture"
            )
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise

    def _check_inputs(
        self,
        prompt: object,
        negative_prompt: object,
        height: int,
        width: int,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            is_list = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
            if name == "negative_prompt" and value is None:
                continue
            if not (isinstance(value, str) or (is_list and value)):
                raise ValueError(
                    f"`{name}` is a {type(value).__name__}; pass a string, or a list of strings "
                    "that is not empty"
                )
        if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
            raise ValueError(
                f"height and width are {height} and {width}; both must be positive multiples of "
                f"{self.patch_size} (the model was trained at {PICTURE_SIZE})"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(
                f"`output_type` is {output_type!r}; allowed: 'pil', 'np', 'pt', 'latent'"
            )
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {unknown}; allowed: "
                f"{list(self._callback_tensor_inputs)}"
            )

    def _set_timesteps(
        self, num_inference_steps: int, sigmas: Sequence[float] | None, num_tokens: int
    ) -> torch.Tensor:
        """Set the scheduler as diffusers' Qwen pipelines do and return its timesteps."""
        if sigmas is None:
            if num_inference_steps < 1:
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}; at least 1 is needed"
                )
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        given: dict[str, Any] = {"sigmas": list(sigmas or ())}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if "sigmas" not in accepted:
            raise ValueError(
                f"{type(self.scheduler).__name__}.set_timesteps takes no sigmas; use a flow "
                "matching scheduler"
            )
        if self.scheduler.config.get("use_dynamic_shifting", False):
            config = self.scheduler.config
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            given["mu"] = base + (num_tokens - low) * (most - base) / (high - low)
        self.scheduler.set_timesteps(device=self._execution_device, **given)
        timesteps: torch.Tensor = self.scheduler.timesteps
        return timesteps

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 40,
        sigmas: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int | None = None,
    ) -> SmallEditOutput | tuple[Any, ...]:
        """Edit pictures; the arguments mean what they mean in `QwenImageEditPlusPipeline`.

        `image` is the picture to edit, or the list of references of which it is the first (see
        `fit_reference` for sizes), or one such list for each prompt. True classifier-free guidance
        runs where `true_cfg_scale` > 1 and a negative prompt is given ("" will do). Raises
        `ValueError` or `TypeError` that name the argument.
        """
        height, width = height or PICTURE_SIZE, width or PICTURE_SIZE
        self._check_inputs(
            prompt, negative_prompt, height, width, output_type, callback_on_step_end_tensor_inputs
        )
        self._attention_kwargs = attention_kwargs or {}
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) * num_images_per_prompt
        tensors = self.prepare_references(image, len(prompts))
        references = [
            self.vae.encode(pictures.to(device).repeat_interleave(num_images_per_prompt, dim=0))
            for pictures in tensors
        ]
        size = self.patch_size
        grids = [(1, height // size, width // size)]
        grids += [(1, tensor.shape[2] // size, tensor.shape[3] // size) for tensor in tensors]
        img_shapes = [grids] * batch_size

        do_true_cfg = _is_guided(true_cfg_scale, negative_prompt)
        prompt_embeds, prompt_embeds_mask = self.encode_prompt(
            prompts, device, num_images_per_prompt, max_sequence_length
        )
        if do_true_cfg:
            negatives = _negatives_of(negative_prompt, len(prompts))
            negative_prompt_embeds, negative_prompt_embeds_mask = self.encode_prompt(
                negatives, device, num_images_per_prompt, max_sequence_length
            )

        latents = self.prepare_latents(batch_size, height, width, generator, latents)
        image_latents = torch.cat(references, dim=1).to(latents.dtype)  # (B, C, 48)
        timesteps = self._set_timesteps(num_inference_steps, sigmas, latents.shape[1])
        self._num_timesteps = len(timesteps)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                latent_model_input = torch.cat([latents, image_latents], dim=1)
                timestep = t.expand(latents.shape[0]).to(latents.dtype)
                with self.transformer.cache_context("cond"):
                    noise_pred = self.transformer(
                        hidden_states=latent_model_input,
                        timestep=timestep / 1000,
                        guidance=None,
                        encoder_hidden_states_mask=prompt_embeds_mask,
                        encoder_hidden_states=prompt_embeds,
                        img_shapes=img_shapes,
                        attention_kwargs=self.attention_kwargs,
                        return_dict=False,
                    )[0][:, : latents.size(1)]
                if do_true_cfg:
                    with self.transformer.cache_context("uncond"):
                        neg_noise_pred = self.transformer(
                            hidden_states=latent_model_input,
                            timestep=timestep / 1000,
                            guidance=None,
                            encoder_hidden_states_mask=negative_prompt_embeds_mask,
                            encoder_hidden_states=negative_prompt_embeds,
                            img_shapes=img_shapes,
                            attention_kwargs=self.attention_kwargs,
                            return_dict=False,
                        )[0][:, : latents.size(1)]
                    guided = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)
                    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
                    noise_pred = guided * (cond_norm / torch.norm(guided, dim=-1, keepdim=True))
                latents_dtype = latents.dtype
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                latents = latents.to(latents_dtype)
                if callback_on_step_end is not None:
                    tensors_of = {"latents": latents, "prompt_embeds": prompt_embeds}
                    kwargs = {name: tensors_of[name] for name in callback_on_step_end_tensor_inputs}
                    outputs = callback_on_step_end(self, i, t, kwargs) or {}
                    latents = outputs.pop("latents", latents)
                    prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
                progress_bar.update()
        self._current_timestep = None

        images = self._decode(latents, height, width, output_type)
        self.maybe_free_model_hooks()
        return SmallEditOutput(images=images) if return_dict else (images,)

    def _decode(
        self, latents: torch.Tensor, height: int, width: int, output_type: str
    ) -> list[Image.Image] | npt.NDArray[np.float32] | torch.Tensor:
        if output_type == "latent":
            return latents
        decoded: torch.Tensor = self.vae.decode(latents.to(self.vae.dtype), height, width)
        pictures = (decoded.float() / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W) in [0, 1]
        if output_type == "pt":
            return pictures
        array: npt.NDArray[np.float32] = pictures.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(np.rint(picture * 255).astype(np.uint8)) for picture in array]


def _is_guided(true_cfg_scale: float, negative_prompt: str | list[str] | None) -> bool:
    """Whether true classifier-free guidance runs; warns where one half of it is missing."""
    if true_cfg_scale > 1 and negative_prompt is None:
        logger.warning(
            "true_cfg_scale is %s and there is no negative_prompt: no guidance", true_cfg_scale
        )
    elif true_cfg_scale <= 1 and negative_prompt is not None:
        logger.warning("negative_prompt is not used, since true_cfg_scale is not above 1")
    return true_cfg_scale > 1 and negative_prompt is not None


def _negatives_of(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    """A negative prompt for each of `count` prompts."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    negatives = negative_prompt or []
    if len(negatives) != count:
        raise ValueError(
            f"`negative_prompt` has {len(negatives)} entries and `prompt` {count}; pass one "
            "string, or one for each prompt"
        )
    return negatives
