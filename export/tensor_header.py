"""The tensors of safetensors files, read from the headers: no weight is opened."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditrim.export.checkpoint import Checkpoint
from ditrim.plugins.errors import CheckpointError

# The safetensors format's own limit.
_HEADER_BYTES = 100_000_000
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: as safetensors writes it ("F32", "BF16", ...).
        shape: its axes.
        offset: of its first byte, from the start of the file.
        num_bytes: its length.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name; reads its header only.

    Raises:
        CheckpointError: the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _HEADER_BYTES:
            raise CheckpointError(
                f"{path} ({size} bytes) is truncated, or is not a safetensors file"
            )
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path} is truncated: its header has {length} bytes and the file {size}; download it "
            "again"
        )
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        header = {
            str(name): TensorPlace(
                dtype=str(entry["dtype"]),
                shape=tuple(int(axis) for axis in entry["shape"]),
                offset=8 + length + int(entry["data_offsets"][0]),
                num_bytes=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
        }
        end = max((place.offset + place.num_bytes for place in header.values()), default=8 + length)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged safetensors header; download it again"
        ) from error
    if end != size:
        what = "is truncated" if end > size else "has bytes too many"
        raise CheckpointError(
            f"{path} {what}: its tensors need {end} bytes and the file has {size}; download it "
            "again"
        )
    return header


def read_headers(checkpoint: Checkpoint) -> dict[str, dict[str, TensorPlace]]:
    """`read_header` of every weight file, by the file's name.

    Raises:
        CheckpointError: a file is damaged, or two hold the same tensor.
    """
    headers: dict[str, dict[str, TensorPlace]] = {}
    seen: set[str] = set()
    for file in checkpoint.weights:
        headers[file] = read_header(checkpoint.folder / file)
        for name in headers[file]:
            if name in seen:
                raise CheckpointError(
                    f"checkpoint {checkpoint.folder} has the tensor {name} twice ({file})"
                )
            seen.add(name)
    return headers


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorPlace],
    where: str,
) -> None:
    """Check that a checkpoint has the model's tensors, all of them and no others.

    Args:
        expected: shapes by name.
        found: what there is by name, as from `read_header`.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: names the first tensor that does not fit, and how many there are.
    """
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    adapters = [name for name in unexpected if ".base_layer." in name or ".lora_" in name]
    if adapters:
        raise CheckpointError(
            f"checkpoint {where} was saved with an adapter in it ({adapters[0]}"
            f"{_and_more(adapters)}): after pipe.fuse_lora(), call pipe.unload_lora_weights() and "
            "save it again; or save it without the LoRA and build with --lora FILE"
        )
    if missing:
        near = difflib.get_close_matches(missing[0], unexpected, n=1)
        hint = f" It has {near[0]}, which the model does not." if near else ""
        raise CheckpointError(
            f"checkpoint {where} lacks the tensor {missing[0]}{_and_more(missing)}.{hint} Its "
            "config.json and its weights do not belong together, or a file is incomplete"
        )
    if unexpected:
        raise CheckpointError(
            f"checkpoint {where} has the tensor {unexpected[0]}{_and_more(unexpected)}, which the "
            "model of its config.json does not have; the two do not belong together"
        )
    for name, shape in expected.items():
        place = found[name]
        if place.shape != shape:
            raise CheckpointError(
                f"checkpoint {where}: the tensor {name} has shape {list(place.shape)}, and the "
                f"model of its config.json needs {list(shape)}"
            )
        if place.dtype not in _FLOATS:
            raise CheckpointError(
                f"checkpoint {where}: the tensor {name} is of dtype {place.dtype}; allowed: "
                f"{', '.join(_FLOATS)}. Pass weights that are not quantised"
            )
        num_bytes = _FLOATS[place.dtype] * math.prod(shape)
        if place.num_bytes != num_bytes:
            raise CheckpointError(
                f"checkpoint {where}: the tensor {name} has {place.num_bytes} bytes, and "
                f"{list(shape)} of {place.dtype} need {num_bytes}; the file's header is damaged, "
                "download it again"
            )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
