"""Where each tensor of a checkpoint lies, and the checkpoint's own files beside a graph.

Replaces: a second copy of the weights in the engine set. Limits: a hard link needs the checkpoint
and the set on one file system; elsewhere the files are copied. Trade-off: a linked file is the
checkpoint's own, so whoever writes into one in place changes the set too (its hashes reveal it).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.export.checkpoint import WEIGHTS_NAME, Checkpoint
from ditrim.export.family import FAMILIES, Family
from ditrim.export.tensor_header import TensorPlace, compare_tensors, read_headers
from ditrim.export.transformer import empty_transformer
from ditrim.plugins.errors import CheckpointError
from ditrim.plugins.precision import precision_of

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

# Hard links that a file system refuses: another device, not supported, not allowed, too many.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedTensor(TensorPlace):
    """A `TensorPlace` and the name of its file.

    Attributes:
        file: a plain name, in the folder of its index.
    """

    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightIndex:
    """Where the tensors of a transformer lie.

    Attributes:
        folder: holds the files; none if there are none (`index_placeholder`).
        tensors: by the names of diffusers' state dict.
        own_files: names of files that lie in the set already, as those of merged weights.
    """

    folder: Path | None
    tensors: Mapping[str, LinkedTensor]
    own_files: frozenset[str] = frozenset()

    @property
    def is_placeholder(self) -> bool:
        """Whether the weights are a layout only, which nothing can run."""
        return self.folder is None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, in order; without those that the set has of its own."""
        names = {tensor.file for tensor in self.tensors.values()}
        return tuple(sorted(names - self.own_files))


def index_weights(checkpoint: Checkpoint) -> WeightIndex:
    """Find every tensor of a checkpoint; reads the files' headers only.

    Raises:
        CheckpointError: a file is damaged, or its tensors are not those of the model that
            config.json describes; names the first tensor.
    """
    where = str(checkpoint.folder / "config.json")
    kind = checkpoint.config.get("_class_name")
    families = [family for family in FAMILIES.values() if family.transformer_class == kind]
    if not families:
        known = sorted({family.transformer_class for family in FAMILIES.values()})
        raise CheckpointError(f"{where}: key '_class_name' is {kind!r}; known: {', '.join(known)}")
    index = WeightIndex(
        folder=checkpoint.folder,
        tensors={
            name: LinkedTensor(
                file=file,
                dtype=place.dtype,
                shape=place.shape,
                offset=place.offset,
                num_bytes=place.num_bytes,
            )
            for file, header in read_headers(checkpoint).items()
            for name, place in header.items()
        },
    )
    check_weights(index, empty_transformer(families[0], checkpoint.config, where))
    return index


def index_placeholder(family: Family, config: Mapping[str, Any], dtype: torch.dtype) -> WeightIndex:
    """The layout that a checkpoint of one file would have, for graphs without weights at hand.

    Args:
        family: what model.
        config: its configuration.
        dtype: of every tensor.
    """
    model = empty_transformer(family, config, "the configuration")
    offset, tensors = 0, {}
    for name, value in model.state_dict().items():
        num_bytes = value.numel() * dtype.itemsize
        tensors[name] = LinkedTensor(
            file=WEIGHTS_NAME,
            dtype=precision_of(dtype).safetensors,
            shape=tuple(value.shape),
            offset=offset,
            num_bytes=num_bytes,
        )
        offset += num_bytes
    return WeightIndex(folder=None, tensors=tensors)


def check_weights(weights: WeightIndex, transformer: nn.Module) -> None:
    """Check that an index has a transformer's tensors, all of them and no others.

    Raises:
        CheckpointError: names the first tensor that does not fit.
    """
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    where = "that was planned" if weights.folder is None else str(weights.folder)
    compare_tensors(expected, weights.tensors, where)


def link_weights(files: Iterable[str], weights: WeightIndex, folder: Path) -> None:
    """Put files of an index into a folder, as hard links or, where there can be none, as copies.

    Raises:
        OSError: a file can be neither linked nor copied; names it.
    """
    assert weights.folder is not None
    for name in files:
        if name in weights.own_files:
            continue
        # Files of the hub's cache are symbolic links; runtimes accept plain files only.
        source, target = Path(os.path.realpath(weights.folder / name)), folder / name
        if target.exists() and _is_same(source, target):
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            logger.info("%s is copied, a hard link is not possible: %s", name, error.strerror)
            shutil.copy2(source, target)


def num_bytes_to_copy(weights: WeightIndex, folder: Path) -> int:
    """Bytes of an index's files that `link_weights` would have to copy: another file system's."""
    if weights.folder is None:
        return 0
    device = folder.stat().st_dev
    statuses = [(weights.folder / name).stat() for name in weights.files]
    return sum(status.st_size for status in statuses if status.st_dev != device)


def _is_same(source: Path, target: Path) -> bool:
    """Whether a file is a link to another, or the copy that `link_weights` makes of it."""
    if source.samefile(target):
        return True
    ours, theirs = target.stat(), source.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)
