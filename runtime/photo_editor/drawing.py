"""Objects that look solid: rounded, lit from the top left, grained, with a soft shadow.

A shape is a signed distance in units of its radius. Its body is inflated from the edge inwards, as
a cushion is; normals of that height give diffuse light and a highlight (Phong 1975). An object is
drawn once for each size and kept as a sprite, since a scene only moves it by whole pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from ditrim.runtime.small_editor.drawing import Colour, Floats, Picture

COLOURS: dict[str, Colour] = {
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "yellow": (0.97, 0.85, 0.14),
    "green": (0.12, 0.62, 0.24),
    "blue": (0.12, 0.30, 0.85),
    "purple": (0.54, 0.18, 0.70),
    "white": (0.93, 0.93, 0.93),
    "black": (0.10, 0.10, 0.11),
}
_LIGHT = np.array([-0.45, -0.6, 0.66])  # towards the light; y points down
_MARGIN = 1.45  # of the radius: room for the shadow around a sprite


def _ball(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1.0


def _cube(x: Floats, y: Floats) -> Floats:
    # A box with rounded corners: the exact distance to an inner box, less the rounding.
    outside_x, outside_y = np.maximum(np.abs(x) - 0.6, 0), np.maximum(np.abs(y) - 0.6, 0)
    inside = np.minimum(np.maximum(np.abs(x) - 0.6, np.abs(y) - 0.6), 0)
    distance: Floats = np.hypot(outside_x, outside_y) + inside - 0.25
    return distance


def _pyramid(x: Floats, y: Floats) -> Floats:
    sides = np.abs(x) * 0.8944 - (y + 0.95) * 0.4472
    distance: Floats = np.maximum(sides, y - 0.8)
    return distance


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - 0.68) - 0.30


def _star(x: Floats, y: Floats) -> Floats:
    # Five points: the distance to the edge between an outer and an inner corner, in one sector.
    angle = np.arctan2(x, -y)
    sector = 2 * math.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(folded), radius * np.cos(folded)
    inner = (0.46 * math.sin(sector / 2), 0.46 * math.cos(sector / 2))
    edge_x, edge_y = inner[0], inner[1] - 1.0
    length = math.hypot(edge_x, edge_y)
    return (px * -edge_y + (py - 1.0) * edge_x) / length


def _heart(x: Floats, y: Floats) -> Floats:
    # Two discs over the wedge between their tangents through the tip at (0, 0.95).
    wide, up = np.abs(x), -y
    disc = np.hypot(wide - 0.45, up - 0.28) - 0.52
    along = wide * 0.688 + (up + 0.95) * 0.725
    wedge = np.maximum(wide * 0.725 - (up + 0.95) * 0.688, np.maximum(along - 1.2, up - 0.45))
    distance: Floats = np.minimum(disc, wedge)
    return distance


def _moon(x: Floats, y: Floats) -> Floats:
    distance: Floats = np.maximum(np.hypot(x, y) - 0.98, 0.72 - np.hypot(x - 0.45, y + 0.1))
    return distance


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "ball": _ball,
    "cube": _cube,
    "pyramid": _pyramid,
    "ring": _ring,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
}
_DEPTH = {"ball": 1.0, "ring": 0.30}  # how far inwards the body rises; others 0.42


@dataclass(frozen=True, slots=True)
class Sprite:
    """One drawn object: colour (S, S, 3), its coverage and its shadow's (S, S), all in [0, 1]."""

    colour: Floats
    coverage: Floats
    shadow: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One object of a scene, its middle and radius in pixels; the origin is the scene's middle."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def pair(self) -> tuple[str, str]:
        """The (colour, shape) by which an instruction names it."""
        return self.colour, self.shape


@functools.lru_cache(maxsize=1024)
def sprite(shape: str, colour: str, radius: int) -> Sprite:
    """Draw one object of `radius` pixels, with its shadow."""
    half = math.ceil(radius * _MARGIN)
    axis = (np.arange(2 * half, dtype=np.float32) - half + 0.5) / radius
    x, y = np.meshgrid(axis, axis)
    distance = SHAPES[shape](x, y)
    coverage = np.clip(0.5 - distance * radius, 0, 1)
    depth = _DEPTH.get(shape, 0.42)
    rise = np.clip(-distance / depth, 0, 1)
    height = depth * np.sqrt(np.clip(1 - (1 - rise) ** 2, 0, None))
    slope_y, slope_x = np.gradient(height, 1 / radius)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    diffuse = np.clip(normal @ light, 0, 1)
    mirrored = 2 * diffuse * normal[..., 2] - light[2]  # the reflected ray towards the eye
    highlight = np.clip(mirrored, 0, 1) ** 24
    grain = _grain(2 * half)
    body = np.array(COLOURS[colour]) * (0.42 + 0.68 * diffuse + grain)[..., None]
    body = np.clip(body + 0.55 * highlight[..., None], 0, 1)
    silhouette = Image.fromarray(np.rint(coverage * 255).astype(np.uint8))
    moved = Image.new("L", silhouette.size)
    moved.paste(silhouette, (round(0.12 * radius), round(0.16 * radius)))
    blurred = moved.filter(ImageFilter.GaussianBlur(0.11 * radius))
    shadow = 0.5 * np.asarray(blurred, dtype=np.float32) / 255
    return Sprite(body.astype(np.float32), coverage.astype(np.float32), shadow)


@functools.lru_cache(maxsize=64)
def _grain(size: int) -> Floats:
    """Soft grain of a fixed pattern, about 2 % of the light."""
    noise = np.random.default_rng(5).standard_normal((256, 256))
    soft = Image.fromarray((noise * 40 + 128).clip(0, 255).astype(np.uint8))
    soft = soft.filter(ImageFilter.GaussianBlur(1.2))
    values = (np.asarray(soft, dtype=np.float32) - 128) / 128
    repeats = -(-size // 256)
    return np.tile(values, (repeats, repeats))[:size, :size] * 0.25


def paste(canvas: Floats, item: Item) -> None:
    """Draw `item` and its shadow onto a canvas (S, S, 3) of [0, 1], in place."""
    drawn = sprite(item.shape, item.colour, item.radius)
    half, size = drawn.coverage.shape[0] // 2, canvas.shape[0]
    top, left = size // 2 + item.y - half, size // 2 + item.x - half
    first_y, first_x = max(0, -top), max(0, -left)
    last_y, last_x = min(2 * half, size - top), min(2 * half, size - left)
    if first_y >= last_y or first_x >= last_x:
        return
    inside = (slice(first_y, last_y), slice(first_x, last_x))
    window = canvas[top + first_y : top + last_y, left + first_x : left + last_x]
    shadow, cover = drawn.shadow[inside][..., None], drawn.coverage[inside][..., None]
    window *= 1 - shadow
    window += (drawn.colour[inside] - window) * cover


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """Objects over a square photograph or a plain wall; the origin is the middle."""

    background: Picture  # (S, S, 3)
    items: tuple[Item, ...] = ()

    def render(self) -> Picture:
        """Draw the whole scene, as large as its background."""
        canvas = self.background.astype(np.float32) / 255
        for item in self.items:
            paste(canvas, item)
        return np.rint(canvas * 255).astype(np.uint8)

    def exchanged(self, old: Item, new: Item | None) -> Scene:
        """Put `new` in the place of `old`, or nothing."""
        items = tuple(new if item is old else item for item in self.items)
        return replace(self, items=tuple(item for item in items if item is not None))


def wall(colour: str, size: int) -> Picture:
    """A plain wall in a paler shade of `colour`, lighter at the top."""
    base = 0.62 * np.array(COLOURS[colour]) + 0.26
    share = np.linspace(1.12, 0.82, size, dtype=np.float32)[:, None, None]
    rows = np.clip(base * share, 0, 1).repeat(size, axis=1)
    return np.rint(rows * 255).astype(np.uint8)
