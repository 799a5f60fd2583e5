"""Runs parts in processes of their own, on a machine where this project is not installed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.part import outcome_of

ROOT = Path(__file__).resolve().parent.parent.parent
DOOR = ROOT / "scripts" / "gpu_check.py"
PACKAGES = ("engines", "export", "plugins", "runtime")


def run_apart(name: str, seconds: float, options: list[str], folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own; what it wrote stands, however it ended."""
    lines, said = folder / f"{name}.jsonl", folder / f"{name}.err"
    command = [sys.executable, str(DOOR), "--part", name, "--folder", str(folder)]
    command += ["--seconds", f"{seconds:.1f}", *options]
    start = time.monotonic()
    with said.open("w") as errors:
        # A group of its own, so that what a compiler started ends with it.
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            code = process.wait(timeout=max(seconds, 1))
            tail = said.read_text(errors="replace").strip()[-500:]
            ending = f"its process ended with {code}: {tail}"
        except subprocess.TimeoutExpired:
            ending = f"it was not done after {seconds:.0f} s"
        finally:
            _end(process)
    written = lines.read_text().splitlines() if lines.exists() else []
    return outcome_of(written, ending) | {"seconds": round(time.monotonic() - start, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a part's group."""
    with contextlib.suppress(ProcessLookupError):  # nothing is
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_importable(folder: Path) -> None:
    """Let this process and its children import the checkout, installed or not."""
    links = folder / "links" / "ditrim"
    links.mkdir(parents=True)
    (links / "__init__.py").symlink_to(ROOT / "runtime" / "_top" / "__init__.py")
    for package in PACKAGES:
        (links / package).symlink_to(ROOT / package)
    # What `importlib.metadata` finds of an installed project: engine sets name the version.
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    described = links.parent / f"ditrim-{version}.dist-info"
    described.mkdir()
    described.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: ditrim\nVersion: {version}\n"
    )
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(links.parent), inherited)))


def commit() -> str | None:
    """Of this checkout, with a + where files were changed."""
    said = []
    for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]):
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")


def without_paths(value: Any) -> Any:
    """The same with places of this machine taken out of every text."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(?<![\w:/])/(?:[^\s/'\"<>:]+/)*([^\s/'\"<>:]+)", r"<path>/\1", value)
