"""Drawings of kept tokens, and strips."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ditrim.runtime.editing.overlay import (
    Panel,
    draw_strip,
    enlarge,
    kept_mask_picture,
    side_by_side,
)

GREEN = Image.new("RGB", (48, 48), (90, 200, 120))


def cells(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The colour in the middle of every cell, (rows, columns, 3)."""
    pixels = np.asarray(picture, dtype=int)
    size = pixels.shape[0] // rows
    return pixels[size // 2 :: size, size // 2 :: size][:rows, :columns]


def test_kept_tokens_keep_their_colours_and_dropped_ones_are_dark() -> None:
    kept = np.array([0, 5, 143])
    picture = kept_mask_picture([GREEN], [(12, 12)], [kept])
    found = cells(picture, 12, 12).reshape(-1, 3)
    assert (found[kept] == (90, 200, 120)).all()
    dropped = np.delete(found, kept, axis=0)
    assert dropped.max() < 80
    assert np.ptp(dropped, axis=1).max() < 12  # nearly grey


def test_kept_tokens_are_outlined_against_dropped_ones_only() -> None:
    everything = np.arange(144)
    untouched = kept_mask_picture([GREEN], [(12, 12)], [everything], cell=24)
    assert np.array_equal(np.asarray(untouched), np.asarray(enlarge(GREEN, (288, 288))))
    one = np.asarray(kept_mask_picture([GREEN], [(12, 12)], [np.array([13])], cell=24))
    assert tuple(one[24, 36]) == tuple(one[36, 24]) == (255, 176, 0)
    assert (one == (255, 176, 0)).all(axis=-1)[48:].sum() == 0


def test_tokens_kept_at_some_anchors_are_dimmed_in_part() -> None:
    picture = kept_mask_picture([GREEN], [(2, 2)], [np.array([0, 1]), np.array([0])], cell=40)
    always, sometimes, never, _ = cells(picture, 2, 2).reshape(-1, 3).sum(axis=1)
    assert always > sometimes > never


def test_several_references_stand_side_by_side_in_their_own_geometry() -> None:
    wide = Image.new("RGB", (96, 48), (200, 40, 40))
    picture = kept_mask_picture([GREEN, wide], [(3, 3), (3, 6)], [np.array([0, 9])], cell=20)
    assert picture.size == (60 + 16 + 120, 60)
    pixels = np.asarray(picture)
    assert tuple(pixels[10, 10]) == (90, 200, 120)  # token 0: the first of the first
    assert tuple(pixels[10, 60 + 16 + 10]) == (200, 40, 40)  # token 9: the first of the second
    assert pixels[10, 30].max() < 80


def test_index_outside_the_references_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the 144 reference tokens"):
        kept_mask_picture([GREEN], [(12, 12)], [np.array([144])])
    with pytest.raises(ValueError, match="1 references with 2 grids"):
        kept_mask_picture([GREEN], [(12, 12), (12, 12)], [np.array([0])])


def test_small_pictures_grow_with_square_edges_and_large_ones_are_averaged() -> None:
    checks = np.indices((4, 4)).sum(axis=0) % 2 * 255
    image = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    assert set(np.unique(np.asarray(enlarge(image, (32, 32))))) == {0, 255}
    assert len(np.unique(np.asarray(enlarge(enlarge(image, (32, 32)), (30, 30))))) > 2


def test_pictures_side_by_side_keep_their_sizes() -> None:
    row = side_by_side([Image.new("RGB", (72, 72)), Image.new("RGB", (48, 48))], gap=4)
    assert row.size == (124, 72)
    assert row.getpixel((100, 60)) == (255, 255, 255)


@pytest.mark.parametrize("prompt", ["grey", "make it " + "very " * 200 + "grey", "x" * 3000])
def test_strip_holds_every_panel_and_bounds_its_text(prompt: str) -> None:
    panels = [
        Panel(title=title, picture=GREEN, note=f"note of {title}")
        for title in ("source", "full context", "pruned", "kept-token mask")
    ]
    strip = draw_strip(panels, prompt, height=96)
    assert strip.height <= 96 + 220
    pixels = np.asarray(strip)
    is_panel = (pixels == (90, 200, 120)).all(axis=-1)
    columns = np.flatnonzero(is_panel.any(axis=0))
    assert is_panel.sum() == 4 * 96 * 96  # no text lies over a picture
    assert np.count_nonzero(np.diff(columns) > 1) == 3
    margins = np.concatenate(
        [pixels[:, :16].ravel(), pixels[:, -16:].ravel(), pixels[-16:].ravel()]
    )
    assert (margins == 255).all()
