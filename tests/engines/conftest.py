"""Small engine sets and checkpoints for the tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_build
import pytest

from ditrim.engines.build import build
from ditrim.engines.build.options import BuildOptions

TINY_CONFIG: dict[str, Any] = {
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [4, 6, 6],
    "in_channels": 16,
    "out_channels": 4,
}


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module `fake_build`."""
    return fake_build


@pytest.fixture
def fake_graphs(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let builds in this process have fake graphs."""
    monkeypatch.setattr(build, "write_graphs", fake.write_graphs)
    return fake


@pytest.fixture
def engine_folder(fake_graphs: ModuleType, tmp_path: Path) -> Path:
    """A whole engine set with fake graphs."""
    folder = tmp_path / "set"
    build.build_engine_set(BuildOptions(output=str(folder), **fake_graphs.OPTIONS))
    return folder


@pytest.fixture
def build_process(fake: ModuleType) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `build-engine` with fake graphs in a process of its own."""

    def run(
        *arguments: str | Path,
        moment: str | None = None,
        send: str = "SIGKILL",
        **kwargs: Any,
    ) -> subprocess.CompletedProcess[str]:
        head = [] if moment is None else ["--at", moment, "--send", send]
        return subprocess.run(
            [
                sys.executable,
                fake_build.__file__,
                *head,
                "--",
                *fake.ARGUMENTS,
                *map(str, arguments),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **kwargs,
        )

    return run


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """Changes that make a Qwen transformer of 0.1 M parameters."""
    return dict(TINY_CONFIG)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in the real layout with a tiny sharded transformer; never change it."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(**TINY_CONFIG)
    model.save_pretrained(folder / "transformer", max_shard_size="200KB")
    (folder / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
