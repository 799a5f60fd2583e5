"""From a folder to engines that run, loaded once however often they are asked for.

Replaces: a copy of the weights for every session that opens the same folder. Engines are shared
while somebody holds them, and freed with the last holder. Limits: sharing is within one process,
and needs the files of the set to be the very same ones: a set that was built again is loaded again.
Trade-off: every load looks at each file's status, and checks the set as the first load did.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditrim.engines.forking import check_not_forked, note_loaded
from ditrim.engines.sets.engine_set import EngineSet, load_engine_set
from ditrim.engines.sets.manifest import MANIFEST_NAME
from ditrim.engines.sets.staging import recover
from ditrim.plugins.errors import EngineSetError, UsageError

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines


class _Turn:
    """Lock that makes concurrent loads of one engine set wait for the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_GUARD = threading.Lock()
_TURNS: weakref.WeakValueDictionary[tuple[Any, ...], _Turn] = weakref.WeakValueDictionary()
_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


def load_engines(
    engine_set: EngineSet | str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int = 0,
    max_contexts: int = 16,
    cuda_graphs: Literal["auto", "on", "off"] = "auto",
    verify: Literal["sizes", "hashes"] = "sizes",
    allow_other_version: bool = False,
    share: bool = True,
) -> Engines:
    """Load an engine set once; any number of sessions and threads can share the result.

    Args:
        engine_set: a folder, or what `load_engine_set` returned.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of a graph; 0 means one a core. ONNX Runtime only.
        max_contexts, cuda_graphs: see `TensorRTEngines`. TensorRT and TensorRT-RTX only.
        verify: check file sizes, or also every SHA-256.
        allow_other_version: accept another version of the backend than the set was built for.
        share: return the engines that this process has loaded already from the same files, for the
            same device and with the same options, if somebody still holds them. Then `choice` says
            what it said to the first. False loads a copy that nobody else gets.

    Raises:
        EngineSetError: the set is missing, damaged, made by another version, or was replaced while
            it was loaded.
        BackendError: its backend is not there or cannot run it, or this process was forked from
            one that had loaded engines.
    """
    check_not_forked()
    note_loaded()
    opened = engine_set.folder if isinstance(engine_set, EngineSet) else Path(engine_set)
    recover(Path(os.path.realpath(opened)))
    # A build puts another folder into this one's place.
    folder = _stamp(opened)
    if not isinstance(engine_set, EngineSet):
        engine_set = load_engine_set(
            engine_set, verify=verify, allow_other_version=allow_other_version
        )
    options: dict[str, Any] = {"device": device}
    if engine_set.manifest.backend == "onnxruntime":
        options |= {"threads": threads}
    else:
        options |= {"max_contexts": max_contexts, "cuda_graphs": cuda_graphs}
    key = (folder, *_key(engine_set, options))
    with _GUARD:
        turn = _TURNS.setdefault(key, _Turn()) if share else _Turn()
    with turn.lock:
        engines = _LOADED.get(key) if share else None
        if engines is None:
            engines = _load(engine_set, options)
            if (_stamp(opened), *_key(engine_set, options)) != key:
                raise EngineSetError(
                    f"engine set {engine_set.folder} was replaced or changed while it was loaded; "
                    "load it again"
                )
            if share:
                _LOADED[key] = engines
    return engines


def _load(engine_set: EngineSet, options: dict[str, Any]) -> Any:
    backend = engine_set.manifest.backend
    if backend == "onnxruntime":
        from ditrim.engines.backends.onnxruntime.engines import OnnxRuntimeEngines

        return OnnxRuntimeEngines(engine_set, **options)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from ditrim.engines.backends.tensorrt.engines import TensorRTEngines

        return TensorRTEngines(engine_set, **options)
    raise UsageError(
        f"{engine_set.folder} was built for the backend {backend!r}, which this version cannot "
        "run; known: onnxruntime, tensorrt, tensorrt-rtx"
    )


def _key(engine_set: EngineSet, options: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for loads whose results are the same."""
    manifest = engine_set.manifest
    files = sorted({MANIFEST_NAME, *(entry.path for entry in manifest.files)})
    return (
        os.path.realpath(engine_set.folder),
        hashlib.sha256(manifest.to_json().encode()).hexdigest(),
        tuple(_stamp(engine_set.folder / name) for name in files),
        _device_name(manifest.backend, options["device"]),
        tuple(sorted((name, repr(value)) for name, value in options.items() if name != "device")),
    )


def _device_name(backend: str, device: str) -> str:
    """One name for each device, whatever the caller called it."""
    if backend == "onnxruntime":
        from ditrim.engines.backends.onnxruntime.engines import choose_device

        return str(choose_device(device)[0])
    return {"auto": "cuda:0", "cuda": "cuda:0"}.get(device, device)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return file status that changes with each write, or a folder's identity; empty if missing."""
    try:
        info = path.stat()
    except OSError:
        return ()
    if stat.S_ISDIR(info.st_mode):
        return (info.st_dev, info.st_ino)
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
