"""Editing tasks on drawn scenes: an instruction, its references and the one true edit.

Every true edit is fixed by the instruction and the references: positions are named cells, what is
added has one size, and what lies under a removed shape is plain, graded or periodic. Four
categories, like those of editing benchmarks:

========  ==========================================================
local     recolour, remove, add, replace (one shape of the picture)
global    grey, tint, background
camera    shift (large references only), zoom
transfer  insert, swap (the object comes from a second reference)
========  ==========================================================

A *large* reference shows 72 x 72 of the scene, of which the picture is the middle 48 x 48.

Held out are (1) every scene: the generators of the two splits start from different seed words; and
(2) the (colour, shape) pairs of `HELD_OUT_PAIRS`, which no training picture shows and no training
instruction names, while every held-out edit has one: as the edited, added or transferred object
where there is such an object, else in the picture.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ditrim.runtime.small_editor.drawing import (
    COLOURS,
    SHAPES,
    Background,
    Colour,
    Item,
    Picture,
    Scene,
)

__all__ = [
    "CATEGORIES",
    "HELD_OUT_PAIRS",
    "KINDS",
    "PICTURE_SIZE",
    "REFERENCE_SIZE",
    "EditExample",
    "Scene",
    "article",
    "held_out_edits",
    "sample_edit",
    "training_generator",
]

Split = Literal["train", "held-out"]
Pair = tuple[str, str]
_T = TypeVar("_T")

PICTURE_SIZE = 48
REFERENCE_SIZE = 72  # a large reference
SHIFT = 12.0  # world units that "move the camera" moves

KINDS: dict[str, tuple[str, ...]] = {
    "local": ("recolour", "remove", "add", "replace"),
    "global": ("grey", "tint", "background"),
    "camera": ("shift", "zoom"),
    "transfer": ("insert", "swap"),
}
CATEGORIES = tuple(KINDS)

PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("red", "diamond"),
    ("green", "ring"),
    ("blue", "triangle"),
    ("yellow", "square"),
    ("purple", "cross"),
    ("orange", "circle"),
    ("white", "triangle"),
    ("black", "ring"),
)
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

CELLS: dict[str, tuple[float, float]] = {
    "top left": (-12.0, -12.0),
    "top right": (12.0, -12.0),
    "bottom left": (-12.0, 12.0),
    "bottom right": (12.0, 12.0),
}
OUTER_CELLS: tuple[tuple[float, float], ...] = tuple(
    (x, y)
    for x in (-36.0, -12.0, 12.0, 36.0)
    for y in (-36.0, -12.0, 12.0, 36.0)
    if 36.0 in (abs(x), abs(y))
)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-SHIFT, 0.0),
    "right": (SHIFT, 0.0),
    "up": (0.0, -SHIFT),
    "down": (0.0, SHIFT),
}
NEW_RADIUS = 10.5
_TRAIN_WORD, _HELD_OUT_WORD = 0x7261, 0x686F


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EditExample:
    """One edit: what a request carries, and its true answer.

    `references` are (48, 48, 3) or (72, 72, 3) uint8, the first being the scene; `source` is the
    middle 48 x 48 of the first, which is what returning the source means; `edit_mask` marks the
    pixels in which `target` differs from it.
    """

    category: str
    kind: str
    prompt: str
    references: tuple[Picture, ...]
    source: Picture
    target: Picture
    edit_mask: npt.NDArray[np.bool_]
    pairs: tuple[Pair, ...]  # every (colour, shape) that is drawn


@dataclass(frozen=True, slots=True)
class _Draw:
    """What the samplers of the single kinds draw from."""

    rng: np.random.Generator
    pairs: tuple[Pair, ...]  # of ordinary items
    main: tuple[Pair, ...]  # of the item that the edit is about
    is_large: bool

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


@dataclass(frozen=True, slots=True)
class _Edit:
    prompt: str
    before: Scene
    after: Callable[[], Picture]
    second: Scene | None = None


def _distance(first: Colour, second: Colour) -> float:
    return float(np.linalg.norm(np.subtract(first, second)))


def _muted_colour(draw: _Draw) -> Colour:
    hue, saturation = draw.rng.random(), draw.rng.uniform(0.1, 0.5)
    return colorsys.hsv_to_rgb(hue, saturation, draw.rng.uniform(0.35, 0.85))


def _background(draw: _Draw) -> Background:
    kind = draw.pick(("plain", "graded", "graded", "stripes", "bars", "checks", "dots"))
    first = _muted_colour(draw)
    if kind == "graded":
        second = _muted_colour(draw)
        turn = draw.pick(range(8)) * np.pi / 4
        direction = (float(np.cos(turn)), float(np.sin(turn)))
        return Background(kind=kind, first=first, second=second, direction=direction)
    factor = draw.pick((0.7, 0.8, 1.2, 1.3))
    second = (min(first[0] * factor, 1.0), min(first[1] * factor, 1.0), min(first[2] * factor, 1.0))
    period = draw.pick((8.0, 12.0))
    phase = (float(draw.pick(range(12))), float(draw.pick(range(12))))
    return Background(kind=kind, first=first, second=second, period=period, phase=phase)


def _stands_out(pair: Pair, background: Background) -> bool:
    colour = COLOURS[pair[0]]
    return min(_distance(colour, background.first), _distance(colour, background.second)) > 0.3


def _scene(draw: _Draw, *, main: Pair | None, num_free: int = 0) -> Scene:
    """A scene of one to three shapes in the picture, the first being `main` where given."""
    background = _background(draw)
    while main is not None and not _stands_out(main, background):
        background = _background(draw)
    num_items = draw.pick((1, 2, 2, 3) if num_free else (2, 3, 3, 4))
    cells = list(CELLS.values())
    order = draw.rng.permutation(len(cells))
    places = [cells[index] for index in order[: min(num_items, 4 - num_free)]]
    if draw.is_large:
        outer = draw.rng.permutation(len(OUTER_CELLS))
        places += [OUTER_CELLS[index] for index in outer[: draw.pick((2, 3, 4, 5))]]
    taken: list[Pair] = [] if main is None else [main]
    for _ in places[len(taken) :]:
        free = [p for p in draw.pairs if p not in taken and _stands_out(p, background)]
        taken.append(draw.pick(free))
    items = []
    for (colour, shape), (x, y) in zip(taken, places, strict=True):
        jitter_x, jitter_y = draw.rng.integers(-1, 2, size=2)
        radius = draw.pick((9.5, 11.0))
        items.append(
            Item(shape=shape, colour=colour, x=x + jitter_x, y=y + jitter_y, radius=radius)
        )
    return Scene(background=background, items=tuple(items))


def article(word: str) -> str:
    """A word with its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _free_cells(scene: Scene) -> list[str]:
    taken = {(12.0 if i.x > 0 else -12.0, 12.0 if i.y > 0 else -12.0) for i in _inside(scene)}
    return [name for name, place in CELLS.items() if place not in taken]


def _inside(scene: Scene) -> list[Item]:
    return [item for item in scene.items if max(abs(item.x), abs(item.y)) < 18]


def _recolour(draw: _Draw) -> _Edit:
    main = draw.pick(draw.main)
    other = draw.pick([p for p in draw.pairs if p[1] == main[1] and p != main])
    old, new = (main, other) if draw.chance(0.5) else (other, main)
    scene = _scene(draw, main=old)
    while new in [item.pair for item in scene.items] or not _stands_out(new, scene.background):
        scene = _scene(draw, main=old)
    item = scene.items[0]
    template = draw.pick(("make the {} {} {}", "change the colour of the {} {} to {}"))
    after = scene.exchanged(item, replace(item, colour=new[0]))
    return _Edit(template.format(*old, new[0]), scene, after.render)


def _remove(draw: _Draw) -> _Edit:
    main = draw.pick(draw.main)
    scene = _scene(draw, main=main)
    template = draw.pick(("remove the {} {}", "take away the {} {}"))
    return _Edit(template.format(*main), scene, scene.without(scene.items[0]).render)


def _add(draw: _Draw) -> _Edit:
    main = draw.pick(draw.main)
    scene = _scene(draw, main=None, num_free=1)
    while main in [i.pair for i in scene.items] or not _stands_out(main, scene.background):
        scene = _scene(draw, main=None, num_free=1)
    cell = draw.pick(_free_cells(scene))
    x, y = CELLS[cell]
    new = Item(shape=main[1], colour=main[0], x=x, y=y, radius=NEW_RADIUS)
    template = draw.pick(("add {} {} at the {}", "draw {} {} in the {} corner"))
    prompt = template.format(article(main[0]), main[1], cell)
    return _Edit(prompt, scene, scene.with_items(*scene.items, new).render)


def _replace(draw: _Draw) -> _Edit:
    main = draw.pick(draw.main)
    other = draw.pick([p for p in draw.pairs if p[1] != main[1]])
    old, new = (main, other) if draw.chance(0.5) else (other, main)
    scene = _scene(draw, main=old)
    while new in [item.pair for item in scene.items] or not _stands_out(new, scene.background):
        scene = _scene(draw, main=old)
    item = scene.items[0]
    template = draw.pick(("replace the {} {} with {} {}", "turn the {} {} into {} {}"))
    after = scene.exchanged(item, replace(item, colour=new[0], shape=new[1]))
    return _Edit(template.format(*old, article(new[0]), new[1]), scene, after.render)


def _grey(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(draw.main))

    def after() -> Picture:
        luminance = scene.render() @ np.array([0.299, 0.587, 0.114])
        return np.rint(luminance).astype(np.uint8)[..., None].repeat(3, axis=-1)

    prompt = draw.pick(("make the picture grey", "turn it into a grey picture"))
    return _Edit(prompt, scene, after)


def _tint(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(draw.main))
    name = draw.pick([name for name in COLOURS if name not in ("white", "black")])

    def after() -> Picture:
        tint = np.array(COLOURS[name]) * 255
        return np.rint(scene.render() * 0.55 + tint * 0.45).astype(np.uint8)

    template = draw.pick(("tint the picture {}", "give the whole picture {} tint"))
    return _Edit(template.format(name if "whole" not in template else article(name)), scene, after)


def _change_background(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(draw.main))
    used = {item.colour for item in scene.items}
    # A large scene can show every colour; then any will do, as a background is paler.
    name = draw.pick([name for name in COLOURS if name not in used] or list(COLOURS))
    red, green, blue = (0.6 * channel + 0.2 for channel in COLOURS[name])
    light = (0.7 * red + 0.3, 0.7 * green + 0.3, 0.7 * blue + 0.3)
    kind = draw.pick(("plain", "plain", "stripes", "checks", "dots"))
    new = Background(kind=kind, first=(red, green, blue), second=light)
    template = draw.pick(("make the background {}", "change the background to {}"))
    prompt = template.format(name) + ("" if kind == "plain" else f" with {kind}")
    return _Edit(prompt, scene, replace(scene, background=new).render)


def _shift(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(draw.main))
    way = draw.pick(tuple(DIRECTIONS))
    template = draw.pick(("move the camera {}", "shift the view {}"))
    return _Edit(template.format(way), scene, lambda: scene.render(centre=DIRECTIONS[way]))


def _zoom(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(draw.main))
    if draw.is_large and draw.chance(0.5):
        prompt = draw.pick(("zoom out", "show more of the scene"))
        return _Edit(prompt, scene, lambda: scene.render(scale=PICTURE_SIZE / REFERENCE_SIZE))
    prompt = draw.pick(("zoom in", "zoom in on the middle"))
    return _Edit(prompt, scene, lambda: scene.render(scale=2.0))


def _second_picture(draw: _Draw, item: Item) -> Scene:
    background = _background(draw)
    while not _stands_out(item.pair, background):
        background = _background(draw)
    return Scene(background=background, items=(replace(item, x=0.0, y=0.0),))


def _object(draw: _Draw) -> Item:
    colour, shape = draw.pick(draw.main)
    core = draw.pick([name for name in COLOURS if name != colour]) if draw.chance(0.5) else None
    return Item(shape=shape, colour=colour, core=core, x=0.0, y=0.0, radius=NEW_RADIUS)


def _insert(draw: _Draw) -> _Edit:
    new = _object(draw)
    scene = _scene(draw, main=None, num_free=1)
    cell = draw.pick(_free_cells(scene))
    template = draw.pick(
        (
            "put the object from the second picture at the {}",
            "add the object of the second picture in the {} corner",
        )
    )
    second = _second_picture(draw, new)
    placed = replace(new, x=CELLS[cell][0], y=CELLS[cell][1])
    after = scene.with_items(*scene.items, placed)
    return _Edit(template.format(cell), scene, after.render, second)


def _swap(draw: _Draw) -> _Edit:
    new = _object(draw)
    old = draw.pick([p for p in draw.pairs if p != new.pair])
    scene = _scene(draw, main=old)
    item = scene.items[0]
    template = draw.pick(
        (
            "replace the {} {} with the object from the second picture",
            "swap the {} {} for the object of the second picture",
        )
    )
    after = scene.exchanged(item, replace(new, x=item.x, y=item.y))
    return _Edit(template.format(*old), scene, after.render, _second_picture(draw, new))


_SAMPLERS: dict[str, Callable[[_Draw], _Edit]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "grey": _grey,
    "tint": _tint,
    "background": _change_background,
    "shift": _shift,
    "zoom": _zoom,
    "insert": _insert,
    "swap": _swap,
}


def sample_edit(
    rng: np.random.Generator,
    category: str | None = None,
    split: Split = "train",
    reference: Literal["same", "large"] | None = None,
    kind: str | None = None,
) -> EditExample:
    """Draw one edit; what is not given is drawn too.

    `reference` is the first reference's size: "same" 48 x 48, "large" 72 x 72. A camera shift
    needs a large one: with "same", the camera category is zoom only. Raises `ValueError` for an
    unknown category, kind or split, and for a shift with a reference of the same size.
    """
    _check_choice(category, split, reference, kind)
    if kind is not None:
        category = next(name for name, kinds in KINDS.items() if kind in kinds)
    if category is None:
        category = CATEGORIES[int(rng.choice(len(CATEGORIES), p=(0.45, 0.2, 0.15, 0.2)))]
    if kind is None:
        kinds = [k for k in KINDS[category] if not (k == "shift" and reference == "same")]
        kind = kinds[int(rng.integers(len(kinds)))]
    if reference is None:
        reference = "large" if kind == "shift" or rng.random() < 0.5 else "same"
    draw = _Draw(
        rng=rng,
        pairs=TRAIN_PAIRS,
        main=TRAIN_PAIRS if split == "train" else HELD_OUT_PAIRS,
        is_large=reference == "large",
    )
    edit = _SAMPLERS[kind](draw)
    first = edit.before.render(REFERENCE_SIZE if draw.is_large else PICTURE_SIZE)
    references = (first,) if edit.second is None else (first, edit.second.render())
    source, target = edit.before.render(), edit.after()
    items = edit.before.items + (() if edit.second is None else edit.second.items)
    return EditExample(
        category=category,
        kind=kind,
        prompt=edit.prompt,
        references=references,
        source=source,
        target=target,
        edit_mask=np.any(source != target, axis=-1),
        pairs=tuple(item.pair for item in items),
    )


def _check_choice(
    category: str | None, split: str, reference: str | None, kind: str | None
) -> None:
    if category is not None and category not in KINDS:
        raise ValueError(f"category {category!r} is unknown; allowed: {', '.join(CATEGORIES)}")
    if kind is not None and kind not in _SAMPLERS:
        raise ValueError(f"kind {kind!r} is unknown; allowed: {', '.join(_SAMPLERS)}")
    if split not in ("train", "held-out"):
        raise ValueError(f"split {split!r} is unknown; allowed: train, held-out")
    if kind == "shift" and reference == "same":
        raise ValueError("a shift needs what lies outside the picture; pass reference='large'")


def training_generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one training step, apart from every held-out one."""
    return np.random.default_rng((_TRAIN_WORD, seed, step))


def held_out_edits(count: int, seed: int = 0, category: str | None = None) -> list[EditExample]:
    """The first `count` held-out edits; item i is the same whatever `count` is.

    The kinds take turns, within `category` where given, and so do the reference sizes.
    """
    kinds = [k for name in CATEGORIES if category in (None, name) for k in KINDS[name]]
    if not kinds:
        raise ValueError(f"category {category!r} is unknown; allowed: {', '.join(CATEGORIES)}")
    examples = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        is_large = kind == "shift" or (index // len(kinds)) % 2 == 1
        # The generator knows its kind's number, so that a category gives the same edits for a kind
        # in the same turn whether it was asked for alone or with the others.
        turn, number = index // len(kinds), list(_SAMPLERS).index(kind)
        rng = np.random.default_rng((_HELD_OUT_WORD, seed, number, turn))
        reference: Literal["same", "large"] = "large" if is_large else "same"
        examples.append(sample_edit(rng, split="held-out", reference=reference, kind=kind))
    return examples
