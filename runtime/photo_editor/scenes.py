"""Editing tasks on photographs: an instruction, its references and the one true edit.

Objects that look solid stand over a square cut from a photograph. Every true edit but what lies
behind a removed object is fixed by the instruction and the references. Four categories, like those
of editing benchmarks:

========  ==========================================================
local     recolour, remove, add, replace, resize (one object)
global    tone, season, background
camera    shift (large references only), zoom
transfer  insert, swap (the object comes from a second reference)
========  ==========================================================

A *large* reference shows 512 x 512, of which the picture is the middle 256 x 256. Held-out edits
stand on photographs of which no part was trained on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from ditrim.runtime.photo_editor.drawing import COLOURS, SHAPES, Item, Scene, wall
from ditrim.runtime.photo_editor.tones import SEASONS, TONES
from ditrim.runtime.small_editor.drawing import Picture
from ditrim.runtime.small_editor.scenes import EditExample, article

__all__ = [
    "CATEGORIES",
    "KINDS",
    "PICTURE_SIZE",
    "REFERENCE_SIZE",
    "held_out_edits",
    "held_out_photographs",
    "sample_edit",
    "training_generator",
]

Pair = tuple[str, str]
_T = TypeVar("_T")

PICTURE_SIZE = 256
REFERENCE_SIZE = 512  # a large reference

KINDS: dict[str, tuple[str, ...]] = {
    "local": ("recolour", "remove", "add", "replace", "resize"),
    "global": ("tone", "season", "background"),
    "camera": ("shift", "zoom"),
    "transfer": ("insert", "swap"),
}
CATEGORIES = tuple(KINDS)
PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Positions, radii and moves in pixels of the 256 x 256 picture.
CELLS: dict[str, tuple[int, int]] = {
    "top left": (-56, -56),
    "top right": (56, -56),
    "bottom left": (-56, 56),
    "bottom right": (56, 56),
}
OUTER_CELLS: tuple[tuple[int, int], ...] = tuple(
    (x, y) for x in (-184, -56, 56, 184) for y in (-184, -56, 56, 184) if 184 in (abs(x), abs(y))
)
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-64, 0),
    "right": (64, 0),
    "up": (0, -64),
    "down": (0, 64),
}
RADII = (36, 40, 44)
NEW_RADIUS = 42
SMALLER, BIGGER = 0.62, 1.4
_TRAIN_WORD, _HELD_OUT_WORD = 0x7074, 0x7068


@dataclass(frozen=True, slots=True)
class _Draw:
    """What the samplers of the single kinds draw from; `unit` is 1 at the full size."""

    rng: np.random.Generator
    photographs: Sequence[Picture]
    is_large: bool
    unit: float

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pixels(self, length: float) -> int:
        return round(length * self.unit)

    @property
    def size(self) -> int:
        """Sides of the whole scene in pixels."""
        return self.pixels(REFERENCE_SIZE if self.is_large else PICTURE_SIZE)


@dataclass(frozen=True, slots=True)
class _Edit:
    prompt: str
    before: Scene
    after: Callable[[], Picture]
    second: Scene | None = None


def _cut(draw: _Draw, size: int) -> Picture:
    """A square of a random photograph, flipped, with another exposure, `size` pixels wide."""
    photograph = draw.pick(draw.photographs)
    longest = min(photograph.shape[:2])
    least = min(longest, 400 if draw.is_large else 224)
    side = round(math.exp(draw.rng.uniform(math.log(least), math.log(longest))))
    top = int(draw.rng.integers(photograph.shape[0] - side + 1))
    left = int(draw.rng.integers(photograph.shape[1] - side + 1))
    image = Image.fromarray(photograph[top : top + side, left : left + side])
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    if draw.chance(0.5):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = draw.rng.uniform(0.85, 1.1) * draw.rng.uniform(0.93, 1.07, 3)
    return np.clip(np.asarray(image) * gains, 0, 255).astype(np.uint8)


def _scene(draw: _Draw, *, main: Pair | None, num_free: int = 0) -> Scene:
    """A scene of one to three objects in the picture, the first being `main` where given."""
    num_items = draw.pick((1, 1, 2, 3) if num_free else (1, 2, 2, 3))
    cells = list(CELLS.values())
    places = [cells[index] for index in draw.rng.permutation(4)[: min(num_items, 4 - num_free)]]
    if draw.is_large:
        outer = draw.rng.permutation(len(OUTER_CELLS))
        places += [OUTER_CELLS[index] for index in outer[: draw.pick((1, 2, 3))]]
    taken: list[Pair] = [] if main is None else [main]
    while len(taken) < len(places):
        pair = draw.pick(PAIRS)
        if pair not in taken:
            taken.append(pair)
    items = []
    for (colour, shape), (x, y) in zip(taken, places, strict=True):
        jitter_x, jitter_y = draw.rng.integers(-8, 9, size=2)
        items.append(
            Item(
                shape=shape,
                colour=colour,
                x=draw.pixels(x + jitter_x),
                y=draw.pixels(y + jitter_y),
                radius=draw.pixels(draw.pick(RADII)),
            )
        )
    return Scene(background=_cut(draw, draw.size), items=tuple(items))


def _free_cells(draw: _Draw, scene: Scene) -> list[str]:
    edge = draw.pixels(PICTURE_SIZE) // 2
    inside = [item for item in scene.items if max(abs(item.x), abs(item.y)) < edge]
    taken = {(item.x > 0, item.y > 0) for item in inside}
    return [name for name, (x, y) in CELLS.items() if (x > 0, y > 0) not in taken]


def _middle(draw: _Draw, picture: Picture) -> Picture:
    """The middle of a rendered scene, which is the picture."""
    size = draw.pixels(PICTURE_SIZE)
    margin = (picture.shape[0] - size) // 2
    return picture[margin : margin + size, margin : margin + size]


def _scene_without(draw: _Draw, main: Pair, new: Pair, **options: int) -> Scene:
    """A scene with `main` in it and without `new`, so that names stay unique."""
    scene = _scene(draw, main=main, **options)
    while new in [item.pair for item in scene.items]:
        scene = _scene(draw, main=main, **options)
    return scene


def _recolour(draw: _Draw) -> _Edit:
    colour, shape = draw.pick(PAIRS)
    new = draw.pick([name for name in COLOURS if name != colour])
    scene = _scene_without(draw, (colour, shape), (new, shape))
    item = scene.items[0]
    template = draw.pick(
        ("make the {} {} {}", "change the colour of the {} {} to {}", "paint the {} {} {}")
    )
    after = scene.exchanged(item, replace(item, colour=new))
    return _Edit(template.format(colour, shape, new), scene, after.render)


def _remove(draw: _Draw) -> _Edit:
    main = draw.pick(PAIRS)
    scene = _scene(draw, main=main)
    template = draw.pick(
        ("remove the {} {}", "take away the {} {}", "erase the {} {} from the photo")
    )
    return _Edit(template.format(*main), scene, scene.exchanged(scene.items[0], None).render)


def _placed(draw: _Draw, pair: Pair, cell: str) -> Item:
    x, y = CELLS[cell]
    radius = draw.pixels(NEW_RADIUS)
    return Item(shape=pair[1], colour=pair[0], x=draw.pixels(x), y=draw.pixels(y), radius=radius)


def _add(draw: _Draw) -> _Edit:
    main = draw.pick(PAIRS)
    scene = _scene(draw, main=None, num_free=1)
    while main in [item.pair for item in scene.items]:
        scene = _scene(draw, main=None, num_free=1)
    cell = draw.pick(_free_cells(draw, scene))
    after = replace(scene, items=(*scene.items, _placed(draw, main, cell)))
    template = draw.pick(
        ("add {} {} at the {}", "put {} {} in the {} corner", "place {} {} at the {} of the photo")
    )
    return _Edit(template.format(article(main[0]), main[1], cell), scene, after.render)


def _replace(draw: _Draw) -> _Edit:
    old = draw.pick(PAIRS)
    new = draw.pick([pair for pair in PAIRS if pair[1] != old[1]])
    scene = _scene_without(draw, old, new)
    item = scene.items[0]
    template = draw.pick(("replace the {} {} with {} {}", "turn the {} {} into {} {}"))
    after = scene.exchanged(item, replace(item, colour=new[0], shape=new[1]))
    return _Edit(template.format(*old, article(new[0]), new[1]), scene, after.render)


def _resize(draw: _Draw) -> _Edit:
    main = draw.pick(PAIRS)
    scene = _scene(draw, main=main)
    item = scene.items[0]
    word, factor = draw.pick((("smaller", SMALLER), ("bigger", BIGGER)))
    template = draw.pick(("make the {} {} {}", "make the {} {} in the photo {}"))
    after = scene.exchanged(item, replace(item, radius=round(item.radius * factor)))
    return _Edit(template.format(*main, word), scene, after.render)


def _toned(draw: _Draw, name: str, templates: Sequence[str]) -> _Edit:
    scene = _scene(draw, main=draw.pick(PAIRS))
    change = (TONES | SEASONS)[name]
    return _Edit(draw.pick(templates).format(name), scene, lambda: change(scene.render()))


def _tone(draw: _Draw) -> _Edit:
    templates = {
        "black and white": ("turn it into a {} photo", "make the photo {}"),
        "sepia": ("give the photo a {} tone", "make the photo {}"),
        "night": ("make it look like {}", "turn the day into {}"),
        "warmer": ("make the light {}", "make the whole photo {}"),
        "colder": ("make the light {}", "make the whole photo {}"),
    }
    name = draw.pick(tuple(TONES))
    return _toned(draw, name, templates[name])


def _season(draw: _Draw) -> _Edit:
    templates = ("make it look like {}", "change the season to {}")
    return _toned(draw, draw.pick(tuple(SEASONS)), templates)


def _change_background(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(PAIRS))
    colour = draw.pick(tuple(COLOURS))
    # The wall spans the picture, whatever a large reference shows around it.
    size = draw.pixels(PICTURE_SIZE)
    template = draw.pick(
        ("replace the background with {} wall", "put the objects in front of {} wall")
    )
    after = replace(scene, background=wall(colour, size))
    return _Edit(template.format(article(colour)), scene, after.render)


def _shift(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(PAIRS))
    way = draw.pick(tuple(DIRECTIONS))
    x, y = (draw.pixels(length) for length in DIRECTIONS[way])

    def after() -> Picture:
        size = draw.pixels(PICTURE_SIZE)
        top, left = (draw.size - size) // 2 + y, (draw.size - size) // 2 + x
        return scene.render()[top : top + size, left : left + size]

    template = draw.pick(("move the camera {}", "shift the view {}"))
    return _Edit(template.format(way), scene, after)


def _zoom(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=draw.pick(PAIRS))
    size = draw.pixels(PICTURE_SIZE)
    is_out = draw.is_large and draw.chance(0.5)

    def after() -> Picture:
        image = Image.fromarray(scene.render())
        if not is_out:
            margin = (draw.size - size // 2) // 2
            image = image.crop((margin, margin, margin + size // 2, margin + size // 2))
        method = Image.Resampling.BOX if is_out else Image.Resampling.BICUBIC
        return np.asarray(image.resize((size, size), method))

    if is_out:
        return _Edit(draw.pick(("zoom out", "show more of the scene")), scene, after)
    return _Edit(draw.pick(("zoom in", "zoom in on the middle")), scene, after)


def _second_picture(draw: _Draw, item: Item) -> Scene:
    size = draw.pixels(PICTURE_SIZE)
    background = wall(draw.pick(tuple(COLOURS)), size) if draw.chance(0.5) else _cut(draw, size)
    return Scene(background=background, items=(replace(item, x=0, y=0),))


def _insert(draw: _Draw) -> _Edit:
    scene = _scene(draw, main=None, num_free=1)
    cell = draw.pick(_free_cells(draw, scene))
    new = _placed(draw, draw.pick(PAIRS), cell)
    template = draw.pick(
        (
            "put the object from the second picture at the {}",
            "add the object of the second picture in the {} corner",
        )
    )
    after = replace(scene, items=(*scene.items, new))
    return _Edit(template.format(cell), scene, after.render, _second_picture(draw, new))


def _swap(draw: _Draw) -> _Edit:
    new, old = draw.pick(PAIRS), draw.pick(PAIRS)
    while old == new:
        old = draw.pick(PAIRS)
    scene = _scene(draw, main=old)
    item = scene.items[0]
    placed = replace(item, colour=new[0], shape=new[1], radius=draw.pixels(NEW_RADIUS))
    template = draw.pick(
        (
            "replace the {} {} with the object from the second picture",
            "swap the {} {} for the object of the second picture",
        )
    )
    after = scene.exchanged(item, placed)
    return _Edit(template.format(*old), scene, after.render, _second_picture(draw, placed))


_SAMPLERS: dict[str, Callable[[_Draw], _Edit]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "resize": _resize,
    "tone": _tone,
    "season": _season,
    "background": _change_background,
    "shift": _shift,
    "zoom": _zoom,
    "insert": _insert,
    "swap": _swap,
}


def sample_edit(
    rng: np.random.Generator,
    kind: str,
    photographs: Sequence[Picture],
    *,
    reference: Literal["same", "large"] = "same",
    picture_size: int = PICTURE_SIZE,
) -> EditExample:
    """Draw one edit of a kind over one of `photographs`.

    `reference` is the first reference's size: "same" 256 x 256, "large" 512 x 512. Everything is
    smaller in proportion where `picture_size` is. Raises `ValueError` for an unknown kind, and for
    a shift with a reference of the same size.
    """
    if kind not in _SAMPLERS:
        raise ValueError(f"kind {kind!r} is unknown; allowed: {', '.join(_SAMPLERS)}")
    if kind == "shift" and reference == "same":
        raise ValueError("a shift needs what lies outside the picture; pass reference='large'")
    unit = picture_size / PICTURE_SIZE
    draw = _Draw(rng, photographs, is_large=reference == "large", unit=unit)
    edit = _SAMPLERS[kind](draw)
    first, target = edit.before.render(), _middle(draw, edit.after())
    source = _middle(draw, first)
    items = edit.before.items + (() if edit.second is None else edit.second.items)
    return EditExample(
        category=next(name for name, kinds in KINDS.items() if kind in kinds),
        kind=kind,
        prompt=edit.prompt,
        references=(first,) if edit.second is None else (first, edit.second.render()),
        source=source,
        target=target,
        edit_mask=np.any(source != target, axis=-1),
        pairs=tuple(item.pair for item in items),
    )


def training_generator(seed: int, number: int) -> np.random.Generator:
    """The generator of one training edit, apart from every held-out one."""
    return np.random.default_rng((_TRAIN_WORD, seed, number))


@functools.lru_cache(maxsize=1)
def held_out_photographs() -> tuple[Picture, ...]:
    """Read the shipped photographs, of which no part was trained on, in the order of their names.

    Raises `FileNotFoundError` where the installation lacks them.
    """
    folder = Path(__file__).resolve().parent / "photographs"
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise FileNotFoundError(
            f"this installation of ditrim lacks the held-out photographs ({folder}); install the "
            "package again"
        )
    return tuple(np.asarray(Image.open(file).convert("RGB")) for file in files)


def held_out_edits(count: int, seed: int = 0, category: str | None = None) -> list[EditExample]:
    """The first `count` held-out edits; item i is the same whatever `count` is.

    The kinds take turns, within `category` where given, and so do the reference sizes.
    """
    kinds = [k for name in CATEGORIES if category in (None, name) for k in KINDS[name]]
    if not kinds:
        raise ValueError(f"category {category!r} is unknown; allowed: {', '.join(CATEGORIES)}")
    examples = []
    for index in range(count):
        turn, kind = index // len(kinds), kinds[index % len(kinds)]
        reference: Literal["same", "large"] = "same"
        if kind == "shift" or turn % 4 == 3:
            reference = "large"
        rng = np.random.default_rng((_HELD_OUT_WORD, seed, list(_SAMPLERS).index(kind), turn))
        examples.append(sample_edit(rng, kind, held_out_photographs(), reference=reference))
    return examples
