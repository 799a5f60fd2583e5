"""The identity of a build: a hash over all that its result depends on.

Replaces: a path that encodes some of the configuration. Limits: library versions are those of the
installed distributions, so an edited library is not noticed. Nothing heavy is imported, so that an
unchanged build is recognised before torch would have started.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ditrim.engines.manifest import FORMAT_VERSION, canonical_json
from ditrim.plugins.errors import BackendError

# Distributions that hold a backend, in the order in which they win when several are installed.
BACKEND_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
}
# The graphs of these backends hold nothing of the machine that they were built on.
_DEVICES = {"onnxruntime": "any"}
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")
_SOURCE_PACKAGES = ("ditrim.export", "ditrim.plugins")
# Patterns, so that a backend's graph passes count from the day they exist.
_ENGINE_MODULES = ("build.py", "ladder.py", "manifest.py", "options.py", "*_graph.py")


def backend_version(backend: str) -> str:
    """The installed version of a backend, read without importing it.

    Raises:
        BackendError: it is not installed.
    """
    for name in BACKEND_DISTRIBUTIONS[backend]:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise BackendError(
        f"the backend {backend!r} is not installed; install it with: "
        f"pip install {BACKEND_DISTRIBUTIONS[backend][-1]}"
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape a graph."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError as error:
            raise BackendError(
                f"building needs {name}, which is not installed; install it with: "
                f"pip install {name}"
            ) from error
    return versions


def source_digest() -> str:
    """SHA-256 over this package's own sources that shape a graph."""
    files: list[tuple[str, Path]] = []
    for package in _SOURCE_PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or []:
            files += [(f"{package}/{path.name}", path) for path in Path(folder).glob("*.py")]
    for pattern in _ENGINE_MODULES:
        files += [(f"engines/{path.name}", path) for path in Path(__file__).parent.glob(pattern)]
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def identity_of(
    *, options: Mapping[str, Any], config: Mapping[str, Any], weights: Any, backend: str
) -> str:
    """The identity of a build as SHA-256 in hex.

    Args:
        options: every option that shapes the result.
        config: the transformer's configuration.
        weights: content hashes by file name, or the seed of random weights.
        backend: name of the backend.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "options": options,
        "config": config,
        "weights": weights,
        "sources": source_digest(),
        "libraries": library_versions(),
        "backend": [backend, backend_version(backend)],
        "device": _DEVICES[backend],
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
