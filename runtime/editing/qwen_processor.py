"""Qwen2.5-VL's processor for pictures alone, where torchvision is not installed.

Replaces: `Qwen2VLProcessor`, whose video part cannot be made without torchvision, so that no
Qwen-Image-Edit pipeline would load. Limits: no videos, which no editor is given. Trade-off:
pictures are prepared by transformers' Pillow backend, as they are without torchvision in any case.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Prepares prompts and pictures as `Qwen2VLProcessor` does; takes no videos."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept a missing video processor."""
        if argument_name == "video_processor":
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


def load_picture_processor(folder: str, **options: Any) -> PictureProcessor:
    """Load the processor of a pipeline.

    Args:
        folder: a pipeline's `processor/`, or a hub id with `subfolder`.
        options: of `from_pretrained`.
    """
    from transformers import AutoTokenizer, Qwen2VLImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return PictureProcessor(
        image_processor=Qwen2VLImageProcessor.from_pretrained(folder, **options),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
