"""What a server accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    """Limits of requests, and what is logged.

    Attributes:
        max_body_bytes: of a request.
        max_pixels: of a picture, refused by its header.
        max_pictures: references of an edit.
        threads: that decode and encode pictures.
        presets: names that stand for a policy's text.
        default_policy: of requests that name neither a policy nor a preset.
        log_prompts: write prompts to the log.
    """

    max_body_bytes: int = 64 << 20
    max_pixels: int = 50_000_000
    max_pictures: int = 8
    threads: int = 2
    presets: Mapping[str, str] = field(default_factory=lambda: {"exact": "full"})
    default_policy: str = "topi"
    log_prompts: bool = False
