"""The edits that policies are compared and calibrations made on: a folder's, or drawn scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.runtime.editing.edit_set import EditTask
    from ditrim.runtime.metrics import Mask, Picture
    from ditrim.runtime.small_editor.scenes import EditExample

SCENE_SPLITS = ("held-out", "train")
Purpose = Literal["comparison", "cache", "layers"]
# What seeds the training scenes of each: none is tuned on the scenes of another.
_PURPOSE_WORDS: dict[Purpose, int] = {"comparison": 0x7E57, "cache": 0xCAC4E, "layers": 0xCA11}
_DEFAULT_SCENES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EditPictures:
    """The pictures of one edit.

    Attributes:
        images: references in order, RGB.
        mask: over the result, white where the edit belongs.
        target: the true edit.
    """

    images: tuple[Image.Image, ...]
    mask: Image.Image | None = None
    target: Image.Image | None = None

    def region(self, size: tuple[int, int]) -> Mask | None:
        """The mask at a result's (width, height): (H, W) bool."""
        if self.mask is None:
            return None
        mask: Any = self.mask.convert("L")
        if mask.size != size:
            from PIL import Image

            mask = mask.resize(size, Image.Resampling.BOX)
        return np.asarray(mask) >= 128

    def target_pixels(self, size: tuple[int, int]) -> Picture | None:
        """The true edit at a result's (width, height): (H, W, 3) uint8."""
        from ditrim.runtime.editing.overlay import enlarge

        return None if self.target is None else np.asarray(enlarge(self.target, size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedEdit:
    """One edit to run.

    Attributes:
        name: unique in its set.
        category: e.g. "local".
        prompt: the instruction.
        fingerprint: of its prompt, category and pictures.
        open: reads the pictures.
    """

    name: str
    category: str
    prompt: str
    fingerprint: str
    open: Callable[[], EditPictures]


def choose_edits(source: str, count: int | None) -> list[ComparedEdit]:
    """The first `count` edits of a source; a longer list begins with the shorter ones.

    Args:
        source: "held-out" or "train" for drawn scenes (tune on these, report on those), or a
            folder, see `load_edit_set`.
        count: 64 scenes, or all edits of a folder, where it is none.

    Raises:
        UsageError: the folder is malformed, or has fewer edits than `count`.
    """
    if count is not None and count < 1:
        raise UsageError(f"--count must be at least 1, got {count}")
    if source in SCENE_SPLITS:
        return _scene_edits(source, scenes(source, count or _DEFAULT_SCENES))
    folder = Path(source)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise UsageError(
            f"--edits {source} is {what}; give a folder with pictures and edits.jsonl, or "
            f"{' or '.join(SCENE_SPLITS)} for the small editor's scenes"
        )
    edits = _folder_edits(folder, count)
    if count is not None and count > len(edits):
        raise UsageError(f"--count {count}: {folder} has {len(edits)} edits")
    return edits


def choose_samples(
    folder: Path | None, count: int, purpose: Purpose, seed: int
) -> list[ComparedEdit]:
    """Return at most `count` edits to calibrate on: a folder's, or else training scenes.

    Raises:
        UsageError: the folder is malformed.
    """
    if folder is not None:
        return _folder_edits(folder, count)
    return _scene_edits("train", scenes("train", count, seed, purpose))


def scenes(
    split: str, count: int, seed: int = 0, purpose: Purpose = "comparison"
) -> list[EditExample]:
    """Held-out edits to report on, or training scenes to tune on, categories in turn."""
    from ditrim.runtime.small_editor import scenes as drawn

    if split == "held-out":
        return drawn.held_out_edits(count, seed=seed)
    return [
        drawn.sample_edit(
            np.random.default_rng([seed, index, _PURPOSE_WORDS[purpose]]),
            category=drawn.CATEGORIES[index % len(drawn.CATEGORIES)],
            split="train",
        )
        for index in range(count)
    ]


def _scene_edits(split: str, examples: Iterable[EditExample]) -> list[ComparedEdit]:
    return [_scene(f"{split}-{index:04d}", example) for index, example in enumerate(examples)]


def _folder_edits(folder: Path, most: int | None) -> list[ComparedEdit]:
    from ditrim.runtime.editing.edit_set import load_edit_set

    tasks = load_edit_set(folder)[:most]
    return [_task(f"edit-{index:04d}", task) for index, task in enumerate(tasks)]


def _scene(name: str, example: EditExample) -> ComparedEdit:
    def open_pictures() -> EditPictures:
        from PIL import Image

        return EditPictures(
            images=tuple(Image.fromarray(picture) for picture in example.references),
            mask=Image.fromarray(example.edit_mask.astype(np.uint8) * 255),
            target=Image.fromarray(example.target),
        )

    parts = (*example.references, example.target, example.edit_mask)
    return ComparedEdit(
        name=name,
        category=example.category,
        prompt=example.prompt,
        fingerprint=_digest(
            example.category, example.prompt, *(repr(p.shape).encode() + p.tobytes() for p in parts)
        ),
        open=open_pictures,
    )


def _task(name: str, task: EditTask) -> ComparedEdit:
    from ditrim.runtime.editing.pictures import open_picture

    def open_pictures() -> EditPictures:
        return EditPictures(
            images=tuple(open_picture(path) for path in task.images),
            mask=None if task.mask is None else open_picture(task.mask),
            target=None if task.target is None else open_picture(task.target),
        )

    return ComparedEdit(
        name=name,
        category=task.category,
        prompt=task.prompt,
        fingerprint=_digest(
            task.category,
            task.prompt,
            *(path.read_bytes() for path in task.images),
            *(
                key.encode() + path.read_bytes()
                for key, path in (("mask", task.mask), ("target", task.target))
                if path is not None
            ),
        ),
        open=open_pictures,
    )


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]
