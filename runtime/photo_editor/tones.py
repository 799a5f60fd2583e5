"""Global edits of a photograph as functions of its pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ditrim.runtime.small_editor.drawing import Picture

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _bytes(values: npt.NDArray[Any]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _grey(picture: Picture) -> npt.NDArray[np.float32]:
    """The luminance, as (H, W, 1) float32."""
    return (picture.astype(np.float32) @ _LUMINANCE)[..., None]


def _black_and_white(picture: Picture) -> Picture:
    return _bytes(_grey(picture).repeat(3, axis=-1))


def _sepia(picture: Picture) -> Picture:
    return _bytes(_grey(picture) * np.array([1.08, 0.90, 0.68], dtype=np.float32))


def _night(picture: Picture) -> Picture:
    return _bytes(picture * np.array([0.30, 0.36, 0.58], dtype=np.float32))


def _warmer(picture: Picture) -> Picture:
    return _bytes(picture * np.array([1.15, 1.0, 0.72], dtype=np.float32))


def _colder(picture: Picture) -> Picture:
    return _bytes(picture * np.array([0.75, 0.98, 1.2], dtype=np.float32))


def _autumn(picture: Picture) -> Picture:
    """Turn what is green towards orange, and warm the rest a little."""
    values = picture.astype(np.float32)
    green = np.clip(values[..., 1] - np.maximum(values[..., 0], values[..., 2]) + 24, 0, 96)
    moved = values + green[..., None] * np.array([1.1, -0.15, -0.5], dtype=np.float32)
    return _bytes(moved * np.array([1.08, 0.96, 0.82], dtype=np.float32))


def _winter(picture: Picture) -> Picture:
    """Take most of the colour away, and lighten towards a pale blue."""
    pale = 0.3 * picture.astype(np.float32) + 0.7 * _grey(picture)
    return _bytes(0.72 * pale + np.array([62, 68, 78], dtype=np.float32))


TONES: dict[str, Callable[[Picture], Picture]] = {
    "black and white": _black_and_white,
    "sepia": _sepia,
    "night": _night,
    "warmer": _warmer,
    "colder": _colder,
}
SEASONS: dict[str, Callable[[Picture], Picture]] = {"autumn": _autumn, "winter": _winter}
