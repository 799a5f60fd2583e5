"""The size of an edit's result: the first picture's shape, at the pipeline's own area.

Replaces: the pipelines' defaults, of which FLUX.1-Kontext's is a square whatever the picture, and
Qwen-Image-Edit-Plus's the shape of the last reference. Limits: what an engine set was built for;
a result that is larger is scaled down, a size that was asked for is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import LadderError, UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.engine_set import EngineSet

_AREA = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultSize:
    """Pixels of a result, and why it has so many."""

    width: int
    height: int
    why: str


def parse_size(text: str) -> ResultSize | None:
    """Read `--size`: WxH, or "auto", which gives none.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if match is None or "0" in match.groups():
        raise UsageError(f"--size {text!r} is neither WxH in pixels, as 1024x768, nor auto")
    return ResultSize(width=int(match[1]), height=int(match[2]), why="as --size says")


def check_size(size: ResultSize, unit: int, engine_set: EngineSet) -> None:
    """Check a size that was asked for.

    Args:
        size: in pixels.
        unit: pixels that a token spans.
        engine_set: to run it.

    Raises:
        UsageError: a side is not a whole number of tokens; says the nearest.
        LadderError: the engine set was not built for so many.
    """
    for value in (size.width, size.height):
        if value % unit or value < unit:
            near = [max(1, round(side / unit)) * unit for side in (size.width, size.height)]
            raise UsageError(
                f"--size {size.width}x{size.height}: {value} is not a multiple of {unit}; the "
                f"nearest size is {near[0]}x{near[1]}"
            )
    tokens, limit = _tokens(size.width, size.height, unit), _limit(engine_set)
    if tokens > limit:
        command = engine_set.rebuild_command(resolution=f"{size.width}x{size.height}")
        raise LadderError(
            f"--size {size.width}x{size.height} makes {tokens} tokens, and the engine set was "
            f"built for {limit}; choose a smaller size, or build one with: {command}"
        )


def size_like(picture: tuple[int, int], pipe: Any, unit: int, engine_set: EngineSet) -> ResultSize:
    """The size of a result in the shape of a picture.

    Args:
        picture: its width and height.
        pipe: a pipeline of diffusers, whose area and rounding it is.
        unit: pixels that a token spans.
        engine_set: whose limit on noisy tokens it keeps.
    """
    ratio, limit = picture[0] / picture[1], _limit(engine_set)
    # Qwen's pipelines round to the nearest two tokens, Kontext's down to whole ones.
    floors = hasattr(pipe, "default_sample_size") and "Kontext" in type(pipe).__name__
    width, height = _scaled(_AREA, ratio, unit if floors else 2 * unit, floors=floors)
    why = f"the shape of the first picture ({picture[0]} x {picture[1]})"
    tokens = _tokens(width, height, unit)
    if tokens <= limit:
        return ResultSize(width=width, height=height, why=why)
    full, area = f"{width} x {height}", float(_AREA)
    while tokens > limit:
        area *= min(limit / tokens, 0.99)
        width, height = _scaled(area, ratio, unit, floors=True)
        tokens = _tokens(width, height, unit)
    why += f", scaled down from {full}: the engine set was built for {limit} noisy tokens"
    return ResultSize(width=width, height=height, why=why)


def _limit(engine_set: EngineSet) -> int:
    limit: int = engine_set.manifest.limits.noisy
    return limit


def _tokens(width: int, height: int, unit: int) -> int:
    return (width // unit) * (height // unit)


def _scaled(area: float, ratio: float, unit: int, *, floors: bool) -> tuple[int, int]:
    """Width and height of about an area, in whole units."""
    width = math.sqrt(area * ratio)
    sides = (round(width), round(width / ratio)) if floors else (width, width / ratio)
    whole = [int(side // unit) if floors else round(side / unit) for side in sides]
    return max(1, whole[0]) * unit, max(1, whole[1]) * unit
