"""Drawn scenes: shapes and backgrounds as functions of the plane, rendered with antialiasing.

A scene lives in world coordinates whose origin is the middle of the picture, one world unit being
one pixel of the 48 x 48 picture, so that a camera that pans or zooms draws the same scene again
rather than resampling a bitmap. Coverage comes from signed distances: `clip(0.5 - distance, 0, 1)`
in pixels of the rendering, which is exact for straight edges and within about 1/100 for round ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]  # (H, W, 3)
Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.96, 0.86, 0.12),
    "purple": (0.56, 0.16, 0.70),
    "orange": (0.97, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.07),
}


def _box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    """Signed distance to an axis-aligned box, taken along the nearer axis."""
    distance: Floats = np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)
    return distance


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return np.sqrt(x * x + y * y) - radius


def _square(x: Floats, y: Floats, radius: float) -> Floats:
    return _box(x, y, 0.88 * radius, 0.88 * radius)


def _triangle(x: Floats, y: Floats, radius: float) -> Floats:
    # Two slanted sides through (0, -radius) and the bottom edge at y = 0.85 radius.
    slope_x, slope_y = 0.8944, 0.4472
    sides = np.abs(x) * slope_x - (y + radius) * slope_y
    distance: Floats = np.maximum(sides, y - 0.85 * radius)
    return distance


def _diamond(x: Floats, y: Floats, radius: float) -> Floats:
    return (np.abs(x) + np.abs(y) - 1.1 * radius) * math.sqrt(0.5)


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    return np.abs(np.sqrt(x * x + y * y) - 0.72 * radius) - 0.28 * radius


def _cross(x: Floats, y: Floats, radius: float) -> Floats:
    distance: Floats = np.minimum(
        _box(x, y, radius, 0.36 * radius), _box(x, y, 0.36 * radius, radius)
    )
    return distance


SHAPES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What lies behind the shapes: `plain`, `graded`, `stripes`, `bars`, `checks` or `dots`.

    Stripes are vertical, bars horizontal. `period` is in world units; `phase` moves the texture.
    """

    kind: str
    first: Colour
    second: Colour
    period: float = 8.0
    phase: tuple[float, float] = (0.0, 0.0)
    direction: tuple[float, float] = (1.0, 0.0)

    def share(self, x: Floats, y: Floats, scale: float) -> Floats:
        """Share of `second` at each point, in [0, 1]; `scale` is pixels per world unit."""
        if self.kind == "plain":
            return np.zeros_like(x)
        if self.kind == "graded":
            along = x * self.direction[0] + y * self.direction[1]
            return np.clip(along / 72.0 + 0.5, 0.0, 1.0).astype(np.float32)
        period, (phase_x, phase_y) = self.period, self.phase
        # Signed distance to the nearest stripe edge, positive inside the second colour.
        wave_x = np.abs((x + phase_x) % period - period / 2) - period / 4
        wave_y = np.abs((y + phase_y) % period - period / 2) - period / 4
        if self.kind == "stripes":
            return np.clip(wave_x * scale + 0.5, 0.0, 1.0)
        if self.kind == "bars":
            return np.clip(wave_y * scale + 0.5, 0.0, 1.0)
        if self.kind == "checks":
            share_x = np.clip(wave_x * scale + 0.5, 0.0, 1.0)
            share_y = np.clip(wave_y * scale + 0.5, 0.0, 1.0)
            return share_x + share_y - 2 * share_x * share_y
        if self.kind == "dots":
            centre_x = (x + phase_x) % period - period / 2
            centre_y = (y + phase_y) % period - period / 2
            return np.clip(0.5 - _circle(centre_x, centre_y, 0.3 * period) * scale, 0.0, 1.0)
        raise ValueError(
            f"background kind {self.kind!r} is unknown; "
            "allowed: plain, graded, stripes, bars, checks, dots"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One shape of a scene; `core`, where given, paints a smaller copy of the shape inside it."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    core: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape), by which an instruction names the item."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A background with items on it, painted in their order."""

    background: Background
    items: tuple[Item, ...] = ()

    def with_items(self, *items: Item) -> Scene:
        """The same scene with other items."""
        return replace(self, items=items)

    def without(self, item: Item) -> Scene:
        """The same scene with `item` taken away."""
        return replace(self, items=tuple(other for other in self.items if other != item))

    def exchanged(self, old: Item, new: Item) -> Scene:
        """The same scene with `new` in the place of `old`."""
        return replace(self, items=tuple(new if other == old else other for other in self.items))

    def render(
        self, size: int = 48, *, centre: tuple[float, float] = (0.0, 0.0), scale: float = 1.0
    ) -> Picture:
        """Draw what a camera at `centre` sees, (size, size, 3); `scale` is pixels a world unit."""
        steps = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) / scale
        x, y = np.meshgrid(steps + np.float32(centre[0]), steps + np.float32(centre[1]))
        share = self.background.share(x, y, scale)[..., None]
        first = np.asarray(self.background.first)
        second = np.asarray(self.background.second)
        # float64, so that what an item does not touch is the same to the bit without the item.
        canvas = first + (second - first) * share.astype(np.float64)  # (H, W, 3)
        for item in self.items:
            draw = SHAPES[item.shape]
            layers = [(item.colour, item.radius)]
            if item.core is not None:
                layers.append((item.core, 0.5 * item.radius))
            for colour, radius in layers:
                if item.shape == "ring" and colour is item.core:
                    distance = _circle(x - item.x, y - item.y, 0.3 * item.radius)
                else:
                    distance = draw(x - item.x, y - item.y, radius)
                cover = np.clip(0.5 - distance * scale, 0.0, 1.0)[..., None]
                canvas = canvas + (np.asarray(COLOURS[colour]) - canvas) * cover
        return np.rint(np.clip(canvas, 0.0, 1.0) * 255).astype(np.uint8)
