"""A folder of edits: pictures and a JSON Lines file of instructions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.plugins.errors import UsageError

FILE_NAME = "edits.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class EditTask:
    """One line of an edit set.

    Attributes:
        images: picture files, the references in order.
        prompt: the instruction.
        category: e.g. "local"; "all" if none is given.
        mask: picture over the result, white where the edit belongs.
        target: the true edit.
    """

    images: tuple[Path, ...]
    prompt: str
    category: str = "all"
    mask: Path | None = None
    target: Path | None = None


def load_edit_set(folder: Path) -> list[EditTask]:
    """Read `edits.jsonl`: one object a line with `image` (a name or a list) and `prompt`.

    `category`, `mask` and `target` may be there too.

    Raises:
        UsageError: the folder, the file, a line or a picture is missing or malformed; names it.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {FILE_NAME}; each of its lines is an object such as "
            '{"image": "cat.png", "prompt": "make the cat black", "category": "local"}'
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error
    tasks = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UsageError(f'{where} has no "prompt"')
        names = entry.get("image", entry.get("images"))
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise UsageError(f'{where} has no "image": a file name or a list of them')
        images = tuple(_picture(folder / name, where) for name in names)
        tasks.append(
            EditTask(
                images=images,
                prompt=entry["prompt"],
                category=str(entry.get("category", "all")),
                mask=_optional_picture(folder, entry, "mask", where),
                target=_optional_picture(folder, entry, "target", where),
            )
        )
    if not tasks:
        raise UsageError(f"{path} is empty; it needs at least one edit")
    return tasks


def _picture(path: Path, where: str) -> Path:
    if not path.is_file():
        raise UsageError(f"{where}: there is no picture {path}")
    return path


def _optional_picture(folder: Path, entry: dict[str, Any], key: str, where: str) -> Path | None:
    name = entry.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise UsageError(f'{where}: "{key}" must be a file name, got {name!r}')
    return _picture(folder / name, where)
