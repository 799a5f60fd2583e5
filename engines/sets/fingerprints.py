"""A few values of every weight: enough to distinguish checkpoints without reading it.

Replaces: a hash over 41 GB, which a pipeline's transformer in memory could not be compared with, as
its dtype may differ. Limits: weights that differ in none of the sampled places count as equal;
trained changes touch all places of a tensor. Trade-off: some 200 kB in the manifest of a model of
1,900 tensors.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

NUM_SAMPLES = 8
Floats = npt.NDArray[np.float32]


class Place(Protocol):
    """Place of a tensor in a file; `tensor_header.TensorPlace` is one."""

    @property
    def dtype(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def sample_positions(count: int) -> list[int]:
    """Places in a flat tensor of `count` values, evenly spread from the first to the last."""
    number = min(NUM_SAMPLES, count)
    return [i * (count - 1) // max(number - 1, 1) for i in range(number)]


def sample_places(shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], ...]:
    """`sample_positions` of a tensor of that shape, as one index an axis."""
    positions = np.array(sample_positions(math.prod(shape)), dtype=np.int64)
    return tuple(np.asarray(axis) for axis in np.unravel_index(positions, shape))


def encode_samples(values: Floats) -> str:
    """Samples as text: base64 of float32, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def decode_samples(text: str) -> Floats:
    """The samples that `encode_samples` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except binascii.Error as error:
        raise ValueError(f"{text[:20]!r} holds no samples: {error}") from error


def samples_of(tensor: Tensor) -> Floats:
    """Samples of a tensor in memory, whatever its strides; reads nothing else of it."""
    import torch

    if tensor.numel() == 0:
        return np.zeros(0, dtype=np.float32)
    if tensor.is_contiguous():
        places = torch.tensor(sample_positions(tensor.numel()), device=tensor.device)
        values = tensor.detach().view(-1)[places]
    else:
        axes = sample_places(tuple(tensor.shape))
        values = tensor.detach()[tuple(torch.from_numpy(a).to(tensor.device) for a in axes)]
    sampled: Floats = values.float().cpu().numpy()
    return sampled


def samples_of_file(path: Path, header: Mapping[str, Place]) -> dict[str, Floats]:
    """Samples of every tensor of a safetensors file, by name.

    Args:
        path: the file.
        header: of that file, checked against its size.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    found = {}
    for name, place in header.items():
        kind = np.dtype(_STORED[place.dtype])
        # Tensors of a file need not be aligned.
        part = content[place.offset : place.offset + place.num_bytes]
        places = sample_positions(place.num_bytes // kind.itemsize)
        size = kind.itemsize
        raw = np.concatenate([part[i * size : (i + 1) * size] for i in places] or [part[:0]])
        values = raw.view(kind)
        if place.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found[name] = values.astype(np.float32)
    return found
