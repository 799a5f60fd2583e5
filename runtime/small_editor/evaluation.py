"""How well the small editor edits: PSNR and SSIM against the true edits, by category and kind."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ditrim.engines.files import write_file
from ditrim.runtime.metrics import psnr_db, ssim_and_map
from ditrim.runtime.small_editor.scenes import CATEGORIES, EditExample, held_out_edits

if TYPE_CHECKING:
    from ditrim.runtime.small_editor.drawing import Picture
    from ditrim.runtime.small_editor.pipeline import SmallEditPipeline

# Which of the held-out edits are shipped as pictures, by their number in `held_out_edits`.
SAMPLES: tuple[int, ...] = (1, 11, 13, 17, 18, 9)
_MARGIN = 4


def _batches(edits: Sequence[EditExample], size: int) -> Iterator[list[int]]:
    """Indices of edits that can run together: those whose references have the same sizes."""
    layouts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, edit in enumerate(edits):
        layouts[tuple(reference.shape[0] for reference in edit.references)].append(index)
    for indices in layouts.values():
        for first in range(0, len(indices), size):
            yield indices[first : first + size]


def run_edits(
    pipeline: SmallEditPipeline,
    edits: Sequence[EditExample],
    *,
    num_inference_steps: int = 40,
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> list[Picture]:
    """The pipeline's answers to `edits`, each from noise of its own that its index seeds."""
    import torch

    answers: dict[int, Picture] = {}
    for indices in _batches(edits, batch_size):
        (pictures,) = pipeline(
            image=[[Image.fromarray(r) for r in edits[i].references] for i in indices],
            prompt=[edits[i].prompt for i in indices],
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i in indices],
            num_inference_steps=num_inference_steps,
            return_dict=False,
            **call,
        )
        for index, picture in zip(indices, pictures, strict=True):
            answers[index] = np.asarray(picture)
    return [answers[index] for index in range(len(edits))]


def summarise(edits: Iterable[EditExample], answers: Iterable[Picture]) -> dict[str, Any]:
    """Means by category and by kind of PSNR, SSIM and the PSNR of returning the source."""
    rows: list[dict[str, Any]] = [
        {
            "category": edit.category,
            "kind": edit.kind,
            "psnr_db": psnr_db(answer, edit.target),
            "ssim": ssim_and_map(answer, edit.target)[0],
            "source_psnr_db": psnr_db(edit.source, edit.target),
        }
        for edit, answer in zip(edits, answers, strict=True)
    ]

    def means(name: str, value: str) -> dict[str, Any]:
        chosen = [row for row in rows if row[name] == value]
        columns = ("psnr_db", "ssim", "source_psnr_db")
        values = {c: float(np.mean([row[c] for row in chosen])) for c in columns}
        worst = min(row["psnr_db"] for row in chosen)
        return {
            "count": len(chosen),
            "psnr_db": round(values["psnr_db"], 2),
            "psnr_db_min": round(float(worst), 2),
            "ssim": round(values["ssim"], 4),
            "source_psnr_db": round(values["source_psnr_db"], 2),
            "gain_over_source_db": round(values["psnr_db"] - values["source_psnr_db"], 2),
        }

    return {
        f"by_{name}": {v: means(name, v) for v in dict.fromkeys(row[name] for row in rows)}
        for name in ("category", "kind")
    }


def evaluate(
    pipeline: SmallEditPipeline,
    *,
    count: int = 64,
    num_inference_steps: int = 40,
    seed: int = 0,
    categories: Sequence[str] = CATEGORIES,
) -> tuple[dict[str, Any], list[EditExample], list[Picture]]:
    """Run `count` held-out edits of each category; returns the metrics, the edits, the answers.

    `seed` chooses the edits.
    """
    edits = [edit for name in categories for edit in held_out_edits(count, seed, name)]
    answers = run_edits(pipeline, edits, num_inference_steps=num_inference_steps)
    settings = {
        "num_inference_steps": num_inference_steps,
        "edits_per_category": count,
        "held_out_seed": seed,
    }
    return settings | summarise(edits, answers), edits, answers


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside the target, then replace it."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def write_samples(folder: Path, numbers: Sequence[int] = SAMPLES) -> None:
    """Write held-out edits as PNG files with a `samples.jsonl` that lists them.

    Each line has `category`, `kind`, `prompt`, `images` (the references, in order) and `target`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    edits = held_out_edits(max(numbers) + 1)
    lines = []
    for edit in (edits[number] for number in numbers):
        names = [f"{edit.kind}-{part}.png" for part in ("source", "second")]
        images = names[: len(edit.references)]
        target = f"{edit.kind}-target.png"
        for name, picture in zip((*images, target), (*edit.references, edit.target), strict=True):
            Image.fromarray(picture).save(folder / name)
        entry = {"category": edit.category, "kind": edit.kind, "prompt": edit.prompt}
        lines.append(json.dumps(entry | {"images": images, "target": target}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_contact_sheet(
    edits: Sequence[EditExample], answers: Sequence[Picture], *, columns: int = 4, scale: int = 2
) -> Image.Image:
    """A sheet of edits, each as its references, then the true edit, then the answer."""
    strips: list[npt.NDArray[np.uint8]] = []
    for edit, answer in zip(edits, answers, strict=True):
        pictures = (*edit.references, edit.target, answer)
        height = max(picture.shape[0] for picture in pictures)
        width = sum(picture.shape[1] + _MARGIN for picture in pictures)
        strip = np.full((height + _MARGIN, width, 3), 255, np.uint8)
        x = 0
        for picture in pictures:
            strip[: picture.shape[0], x : x + picture.shape[1]] = picture
            x += picture.shape[1] + _MARGIN
        strips.append(strip)
    cell_width = max(strip.shape[1] for strip in strips) + 2 * _MARGIN
    cell_height = max(strip.shape[0] for strip in strips)
    rows = -(-len(strips) // columns)
    sheet = np.full((rows * cell_height, columns * cell_width, 3), 255, np.uint8)
    for number, strip in enumerate(strips):
        y, x = (number // columns) * cell_height, (number % columns) * cell_width
        sheet[y : y + strip.shape[0], x : x + strip.shape[1]] = strip
    size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    return Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST)
