"""An engine set on disk, opened with every check that needs no weights in memory."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from ditrim.engines.json_file import parse_json, value_from
from ditrim.engines.sets.command import rebuild_command
from ditrim.engines.sets.identity import BACKEND_DISTRIBUTIONS, backend_version
from ditrim.engines.sets.manifest import (
    MANIFEST_NAME,
    GraphSpec,
    Manifest,
    PlanSpec,
    current_content,
)
from ditrim.engines.sets.staging import recover
from ditrim.plugins.errors import BackendError, EngineSetError, UsageError

if TYPE_CHECKING:
    import onnx

# An honest manifest has some tens of kilobytes; a larger file is not read into memory.
_MANIFEST_BYTES = 16 * 1024 * 1024
_GRAPH_SUFFIX, _PLAN_SUFFIX = ".onnx", ".plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSet:
    """A folder whose files were checked against its manifest."""

    folder: Path
    manifest: Manifest

    def path_of(self, role: str) -> Path:
        """The file of "front", "back" or "anchor": its plan, or where there are none its graph."""
        if role in self.manifest.plans:
            return self.folder / self.manifest.plans[role].file
        return self.folder / self.manifest.graphs[role].file

    @property
    def largest_edit(self) -> tuple[int, int, int]:
        """The most noisy, text and reference tokens of an edit."""
        limits = self.manifest.limits
        return limits.noisy, limits.text, self.manifest.ladder.longest

    def rebuild_command(self, **changes: object) -> str:
        """The command line that builds this set again, in its present folder.

        Args:
            changes: options to replace, as `max_reference_tokens=512`; a value of None drops one.
        """
        return rebuild_command(self.manifest.options, self.folder, **changes)


def load_engine_set(
    folder: str | os.PathLike[str],
    *,
    verify: Literal["sizes", "hashes"] = "sizes",
    allow_other_version: bool = False,
) -> EngineSet:
    """Open an engine set. Nothing is unpickled and no weight is read, except to hash it.

    Args:
        folder: what build-engine wrote.
        verify: "sizes" checks that every file is there with its size, and the SHA-256 of the
            graphs; "hashes" that of the weights and plans too.
        allow_other_version: accept another version of the backend than the set was built for.

    Raises:
        EngineSetError: the set is missing, damaged, edited, of another format version or from
            another version of its backend; says which, and how to build it again.
    """
    if verify not in ("sizes", "hashes"):
        raise EngineSetError(f"verify is {verify!r}; allowed: sizes, hashes")
    path = Path(folder)
    recover(Path(os.path.realpath(path)))
    engine_set = EngineSet(folder=path, manifest=read_manifest(path))
    check_files(engine_set, hashes=verify == "hashes")
    _check_backend(engine_set, allow_other_version=allow_other_version)
    for entry in engine_set.manifest.files:
        if entry.path.endswith(_GRAPH_SUFFIX):
            _check_graph(engine_set, path / entry.path)
    return engine_set


def read_manifest(folder: Path) -> Manifest:
    """Read and parse a folder's manifest; its files are not looked at.

    Raises:
        EngineSetError: there is none, or it is no manifest of this format version.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise EngineSetError(
            f"engine set {folder} {what}; build one with: build-engine --preset small "
            f"--output {shlex.quote(str(folder))}"
        )
    if not path.is_file():
        raise EngineSetError(
            f"{folder} is not an engine set: it has no {MANIFEST_NAME}. build-engine writes one"
        )
    if path.stat().st_size > _MANIFEST_BYTES:
        raise EngineSetError(f"{path} is larger than {_MANIFEST_BYTES} bytes: not a manifest")
    try:
        text = path.read_text(encoding="utf-8")
        return Manifest.from_json(text)
    except UnicodeDecodeError as error:
        raise EngineSetError(f"engine set {folder}: {MANIFEST_NAME} is not text") from error
    except EngineSetError as error:
        raise EngineSetError(f"engine set {folder}: {error}. {_remedy(folder, text)}") from error


def _remedy(folder: Path, text: str) -> str:
    """Return how to build a set again whose manifest cannot be trusted."""
    try:
        options = current_content(parse_json(text))["options"]
        command = rebuild_command(value_from(dict[str, tuple[str, ...]], options), folder)
    except (UsageError, KeyError, TypeError):
        return "Build it again with build-engine --force"
    return f"Build it again with: {command} --force"


def safe_path(folder: Path, location: str) -> Path:
    """The path of a file that a manifest or a graph names.

    Raises:
        EngineSetError: it is not a plain relative path to a place inside the folder, or links
            lead out of the folder and of the hub cache that it lies in.
    """
    parts = PurePosixPath(location).parts
    is_plain = (
        location != ""
        and "\0" not in location
        and "\\" not in location
        and not location.startswith("/")
        and ".." not in parts
        and str(PurePosixPath(location)) == location
        and location != "."
    )
    if not is_plain:
        raise EngineSetError(
            f"engine set {folder} names the file {location!r}; only plain paths inside the folder "
            "are allowed. The set was tampered with: delete it and build it again"
        )
    path, real = folder / location, (folder / location).resolve()
    if not any(real.is_relative_to(place) for place in _own_places(folder)):
        raise EngineSetError(
            f"engine set {folder}: {location} is a link to a place outside the folder "
            f"({real}). Replace it by a copy of the file"
        )
    return path


def _own_places(folder: Path) -> list[Path]:
    """Return the folders that may hold a set's files: its own, or the hub cache that keeps it.

    A cache has `<repository>/snapshots/<commit>/`, whose files are links into
    `<repository>/blobs/`.
    """
    real = folder.resolve()
    places = [real]
    for parent in real.parents:
        blobs = parent.parent / "blobs"
        if parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            places.append(blobs)
            break
    return places


def check_files(engine_set: EngineSet, *, hashes: bool) -> None:
    """Check the listed files against the manifest: place, size and, if asked for, SHA-256."""
    folder, manifest = engine_set.folder, engine_set.manifest
    again = f"Build it again with: {engine_set.rebuild_command()} --force"
    listed = {entry.path for entry in manifest.files}
    specs: dict[str, Mapping[str, GraphSpec] | Mapping[str, PlanSpec]] = {
        "graph": manifest.graphs,
        "plan": manifest.plans,
    }
    for kind, entries in specs.items():
        for role, graph in entries.items():
            if graph.file not in listed:
                raise EngineSetError(
                    f"engine set {folder}: the {role} {kind} {graph.file!r} is not among the "
                    f"listed files. {again}"
                )
            if not graph.file.endswith(_PLAN_SUFFIX if manifest.plans else _GRAPH_SUFFIX):
                raise EngineSetError(
                    f"engine set {folder}: {graph.file!r} is not a {kind} by its name. {again}"
                )
    for entry in manifest.files:
        path = safe_path(folder, entry.path)
        try:
            info = path.stat()
        except FileNotFoundError:
            raise EngineSetError(
                f"engine set {folder}: the file {entry.path} is missing. {again}"
            ) from None
        if not stat.S_ISREG(info.st_mode):
            raise EngineSetError(f"engine set {folder}: {entry.path} is not a file. {again}")
        if info.st_size != entry.num_bytes:
            raise EngineSetError(
                f"engine set {folder}: the file {entry.path} has {info.st_size} bytes, expected "
                f"{entry.num_bytes}: it is truncated or was changed. {again}"
            )
        # Graphs are small: they are always hashed.
        if (hashes or path.suffix == _GRAPH_SUFFIX) and sha256_of(path) != entry.sha256:
            raise EngineSetError(
                f"engine set {folder}: the file {entry.path} was changed: its SHA-256 is not the "
                f"manifest's. {again}"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_backend(engine_set: EngineSet, *, allow_other_version: bool) -> None:
    manifest = engine_set.manifest
    if manifest.backend not in BACKEND_DISTRIBUTIONS:
        raise EngineSetError(
            f"engine set {engine_set.folder} was built for the backend {manifest.backend!r}, which "
            f"this version of ditrim does not know; known: {', '.join(BACKEND_DISTRIBUTIONS)}"
        )
    if not manifest.backend_version:  # graphs only, made without the library
        return
    try:
        installed = backend_version(manifest.backend)
    except BackendError as error:
        raise EngineSetError(f"engine set {engine_set.folder} cannot run here: {error}") from error
    if installed != manifest.backend_version and not allow_other_version:
        raise EngineSetError(
            f"engine set {engine_set.folder} was built for {manifest.backend} "
            f"{manifest.backend_version}, and {installed} is installed: another version may run "
            f"the graphs differently. Build it again with: {engine_set.rebuild_command()}, or "
            "pass allow_other_version=True"
        )


def _check_graph(engine_set: EngineSet, path: Path) -> None:
    """Check that a graph's external weights are files of the set; their content is not read."""
    import onnx
    from google.protobuf.message import DecodeError

    folder = engine_set.folder
    again = f"Build it again with: {engine_set.rebuild_command()} --force"
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError(f"{path} holds no graph")
    except (DecodeError, ValueError) as error:
        raise EngineSetError(f"engine set {folder}: {path.name} is not ONNX. {again}") from error
    sizes = {entry.path: entry.num_bytes for entry in engine_set.manifest.files}
    safe: set[str] = set()
    for tensor in _tensors_of(model):
        if tensor.data_location != tensor.EXTERNAL and not tensor.external_data:
            continue
        entries = {item.key: item.value for item in tensor.external_data}
        location = entries.get("location", "")
        if location not in safe:
            safe_path(folder, location)
            safe.add(location)
        if location not in sizes:
            raise EngineSetError(
                f"engine set {folder}: {path.name} keeps the weight {tensor.name} in {location!r}, "
                f"which is not a file of the set. {again}"
            )
        try:
            start, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
        except ValueError:
            start, length = -1, 0
        if start < 0 or length < 0 or start + length > sizes[location]:
            raise EngineSetError(
                f"engine set {folder}: {path.name} points past the end of {location} for the "
                f"weight {tensor.name}. {again}"
            )


def _tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, in subgraphs, attributes and functions too."""
    nodes: list[Any] = [node for function in model.functions for node in function.node]
    graphs: list[Any] = [model.graph]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse_tensors = [*attribute.sparse_tensors]
            if attribute.HasField("sparse_tensor"):
                sparse_tensors.append(attribute.sparse_tensor)
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)
            graphs += attribute.graphs
            if attribute.HasField("g"):
                graphs.append(attribute.g)
