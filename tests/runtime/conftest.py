"""The small editor's engine set, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_engine_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `build-engine --preset small` leaves; never change it."""
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    folder = tmp_path_factory.mktemp("small") / "engine"
    build_engine_set(BuildOptions(preset="small", output=str(folder)))
    return folder
