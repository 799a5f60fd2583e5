"""The weights that are shipped: `small`, the small editor as a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

from ditrim.plugins.errors import CheckpointError


def small_editor_folder() -> Path:
    """Returns the folder of the small editor, in the layout of any diffusers pipeline.

    Raises:
        CheckpointError: this installation does not have it.
    """
    folder = Path(__file__).resolve().parent / "small"
    if not (folder / "transformer").is_dir():
        raise CheckpointError(
            "this installation of ditrim lacks the small editor's weights "
            "(ditrim/engines/presets/small); install the package again, or name weights with "
            "--model and --weights"
        )
    return folder
