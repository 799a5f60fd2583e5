"""A small editor of the Qwen-Image-Edit configuration, trained on drawn scenes and shipped.

Public names are imported when they are first asked for, so that `import` stays light.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.engines.presets import small_editor_folder

if TYPE_CHECKING:
    from ditrim.runtime.small_editor.pipeline import SmallEditPipeline, fit_reference, picture_of
    from ditrim.runtime.small_editor.scenes import EditExample, held_out_edits, sample_edit
    from ditrim.runtime.small_editor.vocabulary import WordTokenizer

__all__ = [
    "EditExample",
    "SmallEditPipeline",
    "WordTokenizer",
    "fit_reference",
    "held_out_edits",
    "load_small_pipeline",
    "picture_of",
    "sample_edit",
    "samples_folder",
]

_HOMES = {
    "EditExample": "scenes",
    "SmallEditPipeline": "pipeline",
    "WordTokenizer": "vocabulary",
    "fit_reference": "pipeline",
    "held_out_edits": "scenes",
    "picture_of": "pipeline",
    "sample_edit": "scenes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def samples_folder() -> Path:
    """The folder of a few held-out pictures, listed in its `samples.jsonl`."""
    return Path(__file__).resolve().parent / "samples"


def load_small_pipeline() -> SmallEditPipeline:
    """The shipped small editor, in float32 on the CPU."""
    from ditrim.runtime.small_editor.pipeline import SmallEditPipeline

    return SmallEditPipeline.from_pretrained(small_editor_folder())
