"""Drawings of what a run kept: reference tokens over their pictures, and runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ditrim.plugins.layout import TokenGrid

Indices = npt.NDArray[np.int64]

_OUTLINE = (255, 176, 0)
_DROPPED = np.array([24.0, 26.0, 32.0])
_MIN_CELL = 16
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 26, 32), (96, 100, 110)


def kept_mask_picture(
    references: Sequence[Image.Image],
    grids: Sequence[TokenGrid],
    kept: Sequence[Indices],
    *,
    cell: int | None = None,
) -> Image.Image:
    """Show which reference tokens were kept: dropped ones are dark and grey, kept ones outlined.

    Several selections (one an anchor step) are shown together: a token is the darker the more of
    them dropped it, and those that at least half of them kept are outlined. References stand side
    by side, in order.

    Args:
        references: as the model saw them, uncropped.
        grids: (height, width) of each in tokens.
        kept: selections; each holds indices into all references' tokens together, in order.
        cell: pixels a token is drawn in; by default those that it covers, and at least 16.

    Raises:
        ValueError: the numbers of references and grids differ, or an index is outside.
    """
    counts = [height * width for height, width in grids]
    if len(references) != len(grids) or not grids:
        raise ValueError(f"{len(references)} references with {len(grids)} grids")
    share = np.zeros(sum(counts))
    for indices in kept:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(share):
            raise ValueError(f"kept indices are outside the {len(share)} reference tokens")
        share[indices] += 1 / len(kept)
    parts = np.split(share, np.cumsum(counts)[:-1])
    return side_by_side(
        [
            _masked(reference, part.reshape(grid), cell)
            for reference, part, grid in zip(references, parts, grids, strict=True)
        ]
    )


def _masked(
    reference: Image.Image, share: npt.NDArray[np.float64], cell: int | None
) -> Image.Image:
    """One reference, each token drawn in `cell` pixels; share: (h, w) in [0, 1]."""
    rows, columns = share.shape
    if cell is None:
        cell = max(_MIN_CELL, math.ceil(reference.width / columns))
    shown = enlarge(reference.convert("RGB"), (columns * cell, rows * cell))
    pixels = np.asarray(shown, dtype=np.float64)
    grey = pixels.mean(axis=-1, keepdims=True) * np.ones(3)
    dimmed = 0.28 * grey + 0.72 * _DROPPED
    weight = share.repeat(cell, axis=0).repeat(cell, axis=1)[..., None]
    result = Image.fromarray(np.rint(weight * pixels + (1 - weight) * dimmed).astype(np.uint8))
    _outline(ImageDraw.Draw(result), share >= 0.5, cell)
    return result


def _outline(draw: ImageDraw.ImageDraw, is_kept: npt.NDArray[np.bool_], cell: int) -> None:
    """A line along every border between a kept token and one that is not, on the kept side."""
    rows, columns = is_kept.shape
    padded = np.pad(is_kept, 1)
    line = max(1, cell // 12)
    for row, column in zip(*np.nonzero(is_kept), strict=True):
        left, top = int(column) * cell, int(row) * cell
        right, bottom = left + cell - 1, top + cell - 1
        sides = {
            (0, 1): (left, top, right, top + line - 1),
            (2, 1): (left, bottom - line + 1, right, bottom),
            (1, 0): (left, top, left + line - 1, bottom),
            (1, 2): (right - line + 1, top, right, bottom),
        }
        for (down, across), box in sides.items():
            inside = 0 < row + down <= rows and 0 < column + across <= columns
            if inside and not padded[row + down, column + across]:
                draw.rectangle(box, fill=_OUTLINE)


def enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize so that enlarged pixels stay square-edged and reduced ones are averaged."""
    grows = size[0] >= image.width and size[1] >= image.height
    method = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
    return image.resize(size, method) if size != image.size else image


def side_by_side(pictures: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Pictures in a row on white, at their own sizes, tops aligned."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A picture of a strip, the title above it and the note below it."""

    title: str
    picture: Image.Image
    note: str = ""


def draw_strip(panels: Sequence[Panel], heading: str, height: int = 288) -> Image.Image:
    """Panels in a row with their titles and notes, under a heading.

    Args:
        panels: from left to right.
        heading: wrapped to the strip's width, three lines at most.
        height: of the pictures, which keep their proportions.
    """
    title_font, text_font = ImageFont.load_default(20), ImageFont.load_default(16)
    margin, gap, line = 20, 16, 23
    shown = [
        enlarge(p.picture, (max(1, round(p.picture.width * height / p.picture.height)), height))
        for p in panels
    ]
    # A panel is at least as wide as its title.
    widths = [
        max(picture.width, math.ceil(title_font.getlength(panel.title)))
        for picture, panel in zip(shown, panels, strict=True)
    ]
    total = sum(widths) + gap * (len(panels) - 1) + 2 * margin
    lines = _wrapped(heading, title_font, total - 2 * margin, 3)
    notes = [
        _wrapped(panel.note, text_font, width, 4)
        for panel, width in zip(panels, widths, strict=True)
    ]
    top = margin + 28 * len(lines) + 12
    bottom = top + 30 + height + 8 + line * max(map(len, notes)) + margin
    strip = Image.new("RGB", (total, bottom), _PAPER)
    draw = ImageDraw.Draw(strip)
    for index, text in enumerate(lines):
        draw.text((margin, margin + 28 * index), text, fill=_INK, font=title_font)
    left = margin
    for panel, picture, width, note in zip(panels, shown, widths, notes, strict=True):
        draw.text((left, top), panel.title, fill=_INK, font=title_font)
        strip.paste(picture, (left, top + 30))
        for index, text in enumerate(note):
            where = (left, top + 30 + height + 8 + line * index)
            draw.text(where, text, fill=_FAINT, font=text_font)
        left += width + gap
    return strip


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """Lines no wider than `width`; what does not fit in `most` of them ends in an ellipsis."""
    lines = [""]
    for whole in text.split():
        word = whole if len(whole) <= 200 else whole[:200] + "..."
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    for index, content in enumerate(lines):
        while font.getlength(content) > width and len(content) > 4:
            content = content.removesuffix("...")[:-1] + "..."
        lines[index] = content
    return [content for content in lines if content]
