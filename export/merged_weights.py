"""Merged weights of a checkpoint in a file of their own, beside the files that they came from.

Replaces: a second copy of a checkpoint for each LoRA. Limits: the rest of the weights stays in the
checkpoint's files. Trade-off: a merged tensor is stored in the dtype that the graphs compute in, so
it is rounded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.export.lora import Merge
from ditrim.export.weights import LinkedTensor, WeightIndex
from ditrim.plugins.precision import precision_of

if TYPE_CHECKING:
    import torch

MERGED_NAME = "merged_weights.safetensors"


def num_bytes_merged(merge: Merge, weights: WeightIndex, dtype: torch.dtype) -> int:
    """Bytes of the tensors that `write_merged` writes."""
    return sum(math.prod(weights.tensors[name].shape) for name in merge.changes) * dtype.itemsize


def write_merged(
    merge: Merge,
    weights: WeightIndex,
    dtype: torch.dtype,
    folder: Path,
    on_weight: Callable[[str, torch.Tensor], None],
) -> WeightIndex:
    """Write the weights that LoRAs change, one after the other, into `MERGED_NAME`.

    Args:
        merge: the changes.
        weights: where the unchanged weights lie.
        dtype: of the tensors that are written.
        folder: of the engine set.
        on_weight: called with the name of each and its merged values, in float32.

    Returns:
        an index in which the changed weights lie in the new file.
    """
    from safetensors import safe_open

    assert weights.folder is not None
    names = sorted(merge.changes, key=lambda name: (weights.tensors[name].file, name))
    places = _places(names, weights, dtype)
    with open(folder / MERGED_NAME, "wb") as target:
        target.write(_header(places))
        offset = target.tell()
        for name in names:
            with safe_open(
                weights.folder / weights.tensors[name].file, framework="pt", device="cpu"
            ) as source:
                merged = merge.apply(name, source.get_tensor(name))
            on_weight(name, merged)
            target.write(_bytes_of(merged.to(dtype)))
    moved = {name: replace(place, offset=place.offset + offset) for name, place in places.items()}
    return replace(
        weights, tensors={**weights.tensors, **moved}, own_files=frozenset({MERGED_NAME})
    )


def _places(names: list[str], weights: WeightIndex, dtype: torch.dtype) -> dict[str, LinkedTensor]:
    """Where each tensor goes, from the end of the header."""
    label = precision_of(dtype).safetensors
    offset, places = 0, {}
    for name in names:
        shape = weights.tensors[name].shape
        num_bytes = math.prod(shape) * dtype.itemsize
        places[name] = LinkedTensor(
            file=MERGED_NAME, dtype=label, shape=shape, offset=offset, num_bytes=num_bytes
        )
        offset += num_bytes
    return places


def _header(places: dict[str, LinkedTensor]) -> bytes:
    """The header of a safetensors file: its length, and JSON padded to eight bytes."""
    entries: dict[str, Any] = {
        name: {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.offset, place.offset + place.num_bytes],
        }
        for name, place in places.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    content: bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return content
