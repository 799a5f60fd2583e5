"""Transformers from safetensors checkpoints: every tensor is accounted for before any is loaded.

Replaces: `from_pretrained`, which fills missing tensors with noise and warns. Limits: the diffusers
layout (a pipeline folder or its `transformer/`), safetensors only. Nothing is ever unpickled.
Trade-off: the model is first made without memory, so a wrong checkpoint costs seconds.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.export.family import FAMILIES, Family
from ditrim.plugins.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
# The safetensors format's own limit.
_HEADER_BYTES = 100_000_000
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Keys that tell one family from another in config.json; absent means false.
_TELLING_KEYS = ("zero_cond_t", "guidance_embeds")
_LAYERED_KEYS = ("use_additional_t_cond", "use_layer3d_rope")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A transformer's files on disk.

    Attributes:
        folder: holds config.json and the weights.
        config: config.json.
        weights: the safetensors files, by name.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: tuple[str, ...]


def is_hub_id(source: str) -> bool:
    """Whether a source that is no folder can be an "owner/name" on the hub."""
    return _HUB_ID.fullmatch(source) is not None


def find_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Find a transformer's configuration and weights in a folder; reads no weights.

    Args:
        folder: a whole pipeline (with `transformer/`) or a transformer.

    Raises:
        CheckpointError: something is missing; names it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise CheckpointError(
            f"checkpoint {root} {what}; pass a folder that holds a diffusers pipeline or its "
            "transformer"
        )
    path = root / "transformer" if (root / "transformer").is_dir() else root
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {path} has no config.json; pass a folder in the diffusers layout: a "
            "pipeline with transformer/, or the transformer's own folder"
        )
    config = _read_json(path / "config.json")
    return Checkpoint(folder=path, config=config, weights=_weight_files(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): truncated, or not downloaded completely"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _weight_files(folder: Path) -> tuple[str, ...]:
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX_NAME} names the shard {name!r}; only .safetensors files in "
                    "the same folder are read"
                )
            if not (folder / name).is_file():
                num_lost = sum(shard == name for shard in weight_map.values())
                raise CheckpointError(
                    f"checkpoint {folder} lacks the shard {name} ({num_lost} tensors, among them "
                    f"{min(key for key, shard in weight_map.items() if shard == name)}); download "
                    "it again"
                )
        return tuple(names)
    if (folder / WEIGHTS_NAME).is_file():
        return (WEIGHTS_NAME,)
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"checkpoint {folder} holds its weights as pickles ({', '.join(pickles[:3])}), which "
            "can run code and are never opened; convert them with save_pretrained("
            "safe_serialization=True) or download the safetensors files"
        )
    others = [name for name in found if name.endswith(".safetensors")]
    hint = f"; found {', '.join(others[:3])}, which has another name" if others else ""
    raise CheckpointError(
        f"checkpoint {folder} has no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}{hint}"
    )


def fetch_checkpoint(hub_id: str, revision: str | None = None) -> tuple[Checkpoint, str]:
    """A transformer from the hub: what the local cache has is used, the rest is downloaded.

    Args:
        hub_id: "owner/name".
        revision: branch, tag or commit; none means the newest that the cache or the hub has.

    Returns:
        the checkpoint and its commit.

    Raises:
        CheckpointError: unknown, gated or unreachable; one sentence that says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["transformer/config.json", "transformer/*.safetensors", f"transformer/{INDEX_NAME}"]
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=wanted, local_files_only=True
        )
        return find_checkpoint(Path(folder) / "transformer"), Path(folder).name
    except (LocalEntryNotFoundError, CheckpointError) as error:
        logger.info("%s is not complete in the cache: %s", hub_id, error)
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=wanted)
    except Exception as error:
        raise CheckpointError(_hub_failure(hub_id, revision, error)) from error
    return find_checkpoint(Path(folder) / "transformer"), Path(folder).name


def _hub_failure(hub_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    instead = "or pass a downloaded copy: --weights <folder>"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id} is gated on the hub: accept its licence there and log in with "
            f"`hf auth login`, {instead}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no revision {revision!r} on the hub; choose another, {instead}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub_id} is not on the hub, or is private; check the name, {instead}"
    if isinstance(error, errors.HFValidationError):
        return f"{hub_id!r} is not a name on the hub ({error}); check the name, {instead}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{hub_id} is not in the local cache and the hub cannot be reached; go online, "
            f"{instead}"
        )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{hub_id} cannot be fetched from the hub ({first}); try again, {instead}"


def check_config(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Check that a configuration is of a family.

    Args:
        family: what `--model` named.
        config: config.json.
        where: the file, for messages.

    Raises:
        CheckpointError: names the key and the model to use instead.
    """
    name = config.get("_class_name")
    if name != family.transformer_class:
        others = [other.name for other in FAMILIES.values() if other.transformer_class == name]
        hint = (
            f"use --model {' or '.join(others)}"
            if others
            else "no supported model has such a transformer"
        )
        raise CheckpointError(
            f"{where}: key '_class_name' is {name!r}, but {family.name} has a "
            f"{family.transformer_class}; {hint}"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: key 'quantization_config' says that the weights are quantised; pass the "
            "original ones in float32, bfloat16 or float16"
        )
    for key in _LAYERED_KEYS:
        if config.get(key):
            raise CheckpointError(
                f"{where}: key {key!r} is true: this is a layered Qwen-Image transformer, which "
                "is not an in-context editor and is not supported"
            )
    for key in _TELLING_KEYS:
        found, expected = bool(config.get(key)), bool(family.config.get(key))
        if found == expected:
            continue
        others = [
            other.name
            for other in FAMILIES.values()
            if other.transformer_class == family.transformer_class
            and bool(other.config.get(key)) == found
        ]
        hint = f"use --model {' or '.join(others)}" if others else "no supported model is like that"
        raise CheckpointError(
            f"{where}: key {key!r} is {str(found).lower()}, and {family.name} has "
            f"{str(expected).lower()}; {hint}"
        )
    inputs, outputs = config.get("in_channels", 64), config.get("out_channels")
    if family.architecture == "flux" and outputs is not None and inputs != outputs:
        raise CheckpointError(
            f"{where}: key 'in_channels' is {inputs} and 'out_channels' {outputs}: this FLUX "
            "takes its condition as channels, not in context, and has no reference tokens to trim"
        )


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


def empty_transformer(family: Family, config: Mapping[str, Any], where: str) -> nn.Module:
    """The model of a configuration, with parameters that have shapes but no memory.

    Raises:
        CheckpointError: diffusers cannot make it; says why.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        return _instantiate(family, config, where)


def _instantiate(family: Family, config: Mapping[str, Any], where: str) -> nn.Module:
    import inspect

    import diffusers

    make = getattr(diffusers, family.transformer_class)
    known = set(inspect.signature(make.__init__).parameters) - {"self"}
    for key in sorted(set(config) - known):
        if not key.startswith("_"):
            logger.warning("%s: key %r is not one of %s's; ignored", where, key, make.__name__)
    arguments = {key: value for key, value in config.items() if key in known}
    try:
        model: Any = make(**arguments)
    except Exception as error:
        raise CheckpointError(
            f"{where}: diffusers cannot make a {make.__name__} of this configuration: {error}"
        ) from error
    head_dim, axes = arguments.get("attention_head_dim", 128), model.config.axes_dims_rope
    if sum(axes) != head_dim:
        raise CheckpointError(
            f"{where}: key 'attention_head_dim' is {head_dim}, and 'axes_dims_rope' {list(axes)} "
            f"adds up to {sum(axes)}; the two must be equal"
        )
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def check_overrides(family: Family, overrides: Iterable[str]) -> None:
    """Check keys that a caller wants to change in a configuration.

    Raises:
        UsageError: names the key, the nearest one and all that exist.
    """
    import inspect

    import diffusers

    make = getattr(diffusers, family.transformer_class)
    known = sorted(set(inspect.signature(make.__init__).parameters) - {"self"})
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"--config: {make.__name__} has no key {key!r}.{hint} Known keys: "
                f"{', '.join(known)}"
            )


def load_transformer(
    family: Family,
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A family's transformer in evaluation mode, from a folder, the hub, or random.

    Args:
        family: what it must be.
        source: a folder, a hub id, "random", or what `find_checkpoint` returned.
        dtype: of all parameters.
        revision: for a hub id.
        seed: for random weights.
        config: for random weights, differences from the family's configuration.
        on_bytes: told the bytes loaded so far and the bytes in all.

    Raises:
        CheckpointError: the checkpoint is missing or does not match; names the tensor or file.
    """
    if source == "random":
        check_overrides(family, config or {})
        return random_transformer(family, {**family.config, **(config or {})}, seed, dtype)
    if config:
        raise UsageError("a configuration can only be given with random weights")
    if not isinstance(source, Checkpoint):
        text = os.fspath(source)
        if not Path(text).expanduser().exists() and is_hub_id(text):
            source, _ = fetch_checkpoint(text, revision)
        else:
            source = find_checkpoint(text)
    return _load_checkpoint(family, source, dtype, on_bytes or (lambda done, total: None))


def _load_checkpoint(
    family: Family,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    on_bytes: Callable[[int, int], None],
) -> nn.Module:
    from safetensors import SafetensorError, safe_open

    where = str(checkpoint.folder)
    check_config(family, checkpoint.config, str(checkpoint.folder / "config.json"))
    headers = read_headers(checkpoint)
    found = {name: place for header in headers.values() for name, place in header.items()}
    model = empty_transformer(family, checkpoint.config, str(checkpoint.folder / "config.json"))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    compare_tensors(expected, found, where)
    total = sum(place.num_bytes for place in found.values())
    done = 0
    for name, header in headers.items():
        try:
            with safe_open(checkpoint.folder / name, framework="pt", device="cpu") as file:
                for tensor_name in header:
                    _place(model, tensor_name, file.get_tensor(tensor_name).to(dtype))
                    done += header[tensor_name].num_bytes
                    on_bytes(done, total)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint.folder / name} cannot be read: {error}") from error
    left = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    assert not left, left
    return _converted(model, dtype)  # buffers; the parameters are of the dtype already


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert in place, past diffusers' own `to`, which warns at every call."""
    from torch import nn

    return nn.Module.to(model, dtype=dtype)


def _place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter or buffer its value without a copy."""
    import torch

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def random_transformer(
    family: Family, config: Mapping[str, Any], seed: int, dtype: torch.dtype
) -> nn.Module:
    """A family's transformer with random weights; equal seeds give equal weights.

    Args:
        family: which class.
        config: its configuration; keys left out have the class's defaults.
        seed: of the initialisation; the caller's random state is left as it was.
        dtype: of all parameters.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _instantiate(family, config, "the configuration of the random weights")
    return _converted(model, dtype)
