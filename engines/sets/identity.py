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

from ditrim.engines.sets.manifest import FORMAT_VERSION, digest_of
from ditrim.plugins.errors import BackendError

# Distributions that hold a backend, in the order in which they win when several are installed.
BACKEND_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_INSTALL = {
    "onnxruntime": "onnxruntime",
    "tensorrt": "'ditrim[tensorrt]'",
    "tensorrt-rtx": "'ditrim[tensorrt-rtx]'",
}
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")
# Packages whose sources shape what is built; whole folders, so that a new file is never missed.
_SHAPING = ("ditrim.export", "ditrim.plugins", "ditrim.engines.build", "ditrim.engines.sets")
_SHAPING_BACKENDS = {
    "onnxruntime": "ditrim.engines.backends.onnxruntime",
    "tensorrt": "ditrim.engines.backends.tensorrt",
    "tensorrt-rtx": "ditrim.engines.backends.tensorrt",
}


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
        f"pip install {_INSTALL[backend]}"
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


def source_digest(backend: str) -> str:
    """SHA-256 over this package's own sources that shape what is built for a backend."""
    files: list[tuple[str, Path]] = []
    for package in (*_SHAPING, _SHAPING_BACKENDS[backend]):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for place in map(Path, spec.submodule_search_locations or []):
            files += [(f"{package}/{p.relative_to(place)}", p) for p in place.rglob("*.py")]
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def identity_of(
    *,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: Any,
    backend: str,
    device: Any = "any",
    is_graph_only: bool = False,
) -> str:
    """The identity of a build as SHA-256 in hex.

    Args:
        options: every option that shapes the result.
        config: the transformer's configuration.
        weights: content hashes by file name, or the seed of random weights.
        backend: name of the backend.
        device: what the result runs on; graphs hold nothing of the machine that they were built on.
        is_graph_only: whether the backend's library has no part in it.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "options": options,
        "config": config,
        "weights": weights,
        "sources": source_digest(backend),
        "libraries": library_versions(),
        "backend": [backend, "" if is_graph_only else backend_version(backend)],
        "device": device,
    }
    return digest_of(content)
