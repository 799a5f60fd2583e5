"""Checkpoints of one file, as ComfyUI keeps them, brought into diffusers' layout.

The conversion is diffusers' own (`from_single_file`). What it would drop or leave out is an error
here. Limits: a file's configuration is read off its tensors' shapes, and heads of another width
than the released 128 are not known. Trade-off: the model is in memory, and for the time of a build
on the disk once more.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.export.checkpoint import Checkpoint, find_checkpoint
from ditrim.export.family import Family
from ditrim.export.tensor_header import TensorPlace, read_header
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_PREFIX = "model.diffusion_model."
# ComfyUI marks Qwen-Image-Edit-2511's transformer, whose references are modulated at t = 0.
_ZERO_TIME = "__index_timestep_zero__"
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".scale_input")
_HEAD_DIM = 128
# float8 without scales becomes bfloat16, float64 float32.
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SHARDS = "10GB"


def is_single_file(path: Path) -> bool:
    """Whether weights are named as one file, of whatever kind."""
    return path.is_file()


def describe_single_file(path: Path, family: Family) -> Checkpoint:
    """A checkpoint of one file, its configuration read off its header.

    Args:
        path: a safetensors file.
        family: what it is to be.

    Raises:
        CheckpointError: it is of another format, quantised, or another model's.
    """
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"checkpoint {path} is GGUF, which is quantised; download the safetensors files, or "
            f"convert it once: load it with diffusers.{family.transformer_class}.from_single_file("
            "path, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)), call "
            "its dequantize() and save_pretrained(folder), and pass the folder"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"checkpoint {path} is not a safetensors file; pickles can run code and are never "
            "opened. Pass safetensors, or a folder in the diffusers layout"
        )
    header = read_header(path)
    scaled = [name for name in header if any(part in name for part in _SCALES)]
    if scaled:
        raise CheckpointError(
            f"checkpoint {path} holds float8 weights with scales ({scaled[0]}), which diffusers "
            "does not convert; pass the file in bfloat16, or a folder in the diffusers layout"
        )
    strange = [name for name, place in header.items() if place.dtype not in _DTYPES]
    if strange:
        raise CheckpointError(
            f"checkpoint {path}: the tensor {strange[0]} is of dtype {header[strange[0]].dtype}; "
            f"allowed: {', '.join(_DTYPES)}. Pass weights that are not quantised"
        )
    shapes = {name.removeprefix(_PREFIX): place.shape for name, place in header.items()}
    if len(shapes) != len(header):
        raise CheckpointError(
            f"checkpoint {path} holds tensors twice, with and without {_PREFIX!r}; pass the "
            "transformer's own file"
        )
    return Checkpoint(
        folder=path.parent,
        config={**_config_of(shapes, path, family), "_class_name": family.transformer_class},
        weights=(path.name,),
    )


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int, path: Path) -> int:
    if len(shapes.get(name, ())) <= axis:
        raise CheckpointError(
            f"checkpoint {path} has no tensor {name} of that many axes, so it is not this model in "
            "the names of a single file (FLUX's are those of its own code); pass a folder in the "
            "diffusers layout, or choose another --model"
        )
    return shapes[name][axis]


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    numbers = {name.split(".")[1] for name in shapes if name.startswith(f"{prefix}.")}
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _heads(width: int, head_dim: int, path: Path) -> dict[str, int]:
    if head_dim != _HEAD_DIM or width % head_dim:
        raise CheckpointError(
            f"checkpoint {path} has heads of {head_dim} channels at a width of {width}; the "
            f"released models have {_HEAD_DIM}. Pass a folder in the diffusers layout, whose "
            "config.json says how positions are spread over them"
        )
    return {"attention_head_dim": head_dim, "num_attention_heads": width // head_dim}


def _config_of(shapes: Mapping[str, tuple[int, ...]], path: Path, family: Family) -> dict[str, Any]:
    names = ARCHITECTURES[family.architecture].single_file
    if names is None:
        raise CheckpointError(
            f"checkpoint {path} is one file, which {family.name} is not converted from; pass a "
            "folder in the diffusers layout"
        )
    width, head_dim = (_size(shapes, *place, path) for place in (names.width, names.head_dim))
    if _ZERO_TIME in shapes and not family.config.get("zero_cond_t"):
        raise CheckpointError(
            f"checkpoint {path} is marked as Qwen-Image-Edit-2511 ({_ZERO_TIME}); use --model "
            "qwen-edit-2511"
        )
    return {
        **family.config,
        **_heads(width, head_dim, path),
        **{key: _count(shapes, prefix) for key, prefix in names.depths.items()},
        **{
            key: _size(shapes, tensor, axis, path) // divisor
            for key, (tensor, axis, divisor) in names.sizes.items()
        },
        **{key: tensor in shapes for key, tensor in names.flags.items()},
    }


def convert_single_file(described: Checkpoint, family: Family, folder: Path) -> Checkpoint:
    """Write a checkpoint of one file anew, in diffusers' layout.

    Args:
        described: what `describe_single_file` returned.
        family: what it is.
        folder: does not exist yet.

    Raises:
        CheckpointError: diffusers cannot convert it, or would drop tensors of it.
    """
    import json

    import diffusers
    from safetensors.torch import load_file

    path = described.folder / described.weights[0]
    header = read_header(path)
    dtype = _dtype_of(header)
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in load_file(path).items()
        if name.removeprefix(_PREFIX) != _ZERO_TIME
    }
    num_values = sum(value.numel() for value in weights.values())
    with tempfile.TemporaryDirectory() as configured:
        (Path(configured) / "config.json").write_text(json.dumps(dict(described.config)), "utf-8")
        try:
            model = getattr(diffusers, family.transformer_class).from_single_file(
                weights, config=configured, torch_dtype=dtype, local_files_only=True
            )
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be converted by diffusers ({error}); pass a folder in "
                "the diffusers layout"
            ) from error
    empty = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    taken = sum(value.numel() for value in model.parameters())
    if empty or taken != num_values:
        what = f"lacks {empty[0]}" if empty else f"{num_values} values, of which {taken} are used"
        raise CheckpointError(
            f"checkpoint {path} is not this model alone ({what}); pass the transformer's own file, "
            "or a folder in the diffusers layout"
        )
    model.save_pretrained(folder, max_shard_size=_SHARDS)
    return find_checkpoint(folder)


def _dtype_of(header: Mapping[str, TensorPlace]) -> torch.dtype:
    """The type that most of a file's values have; float8 becomes bfloat16."""
    import torch

    sizes: dict[str, int] = {}
    for place in header.values():
        sizes[place.dtype] = sizes.get(place.dtype, 0) + math.prod(place.shape)
    name = max(sizes, key=lambda key: sizes[key])
    known = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16}
    return known.get(name, torch.bfloat16)
