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
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_INSTALL = {
    "onnxruntime": "onnxruntime",
    "tensorrt": "'ditrim[tensorrt]'",
    "tensorrt-rtx": "'ditrim[tensorrt-rtx]'",
}
_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")
_SOURCE_PACKAGES = ("ditrim.export", "ditrim.plugins")
_ENGINE_MODULES = (
    "build.py",
    "build_task.py",
    "fingerprints.py",
    "graph_files.py",
    "ladder.py",
    "lengths.py",
    "manifest.py",
    "options.py",
)
_RUNTIME_MODULES = ("onnxruntime_graph.py",)
_PLAN_MODULES = (
    "profiles.py",
    "tensorrt_builder.py",
    "tensorrt_graph.py",
    "tensorrt_library.py",
    "tensorrt_worker.py",
)
# What only this backend's plans hold.
_PLUGIN_BACKEND = "tensorrt"
_PLUGIN_MODULES = ("compiled.py", "kernel.py", "strip.py", "tensorrt_plugin.py")


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
    for package in _SOURCE_PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or []:
            files += [(f"{package}/{path.name}", path) for path in Path(folder).glob("*.py")]
    if backend != _PLUGIN_BACKEND:
        files = [item for item in files if item[1].name not in _PLUGIN_MODULES]
    names = _ENGINE_MODULES + (_RUNTIME_MODULES if backend == "onnxruntime" else _PLAN_MODULES)
    files += [(f"engines/{name}", Path(__file__).with_name(name)) for name in names]
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
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
