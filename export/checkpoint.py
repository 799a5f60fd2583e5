"""Checkpoints: found in a folder or on the hub, and checked for the family that they are to be.

Limits: the diffusers layout (a pipeline folder or its `transformer/`), safetensors only. Nothing is
ever unpickled, and no weight is read here.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.export.family import FAMILIES, Family
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import CheckpointError

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = WEIGHTS_NAME + ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Keys that distinguish the families in config.json; absent means false.
_TELLING_KEYS = ("zero_cond_t", "guidance_embeds")


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


def find_checkpoint(folder: str | os.PathLike[str], variant: str | None = None) -> Checkpoint:
    """Find a transformer's configuration and weights in a folder; reads no weights.

    Args:
        folder: a whole pipeline (with `transformer/`) or a transformer.
        variant: of the files, as "fp16" in diffusion_pytorch_model.fp16.safetensors.

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
    return Checkpoint(folder=path, config=config, weights=_weight_files(path, variant))


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


def _names_of(variant: str | None) -> tuple[str, str]:
    """Names of the one weight file, and of the index of several, as diffusers writes them."""
    if variant is None:
        return WEIGHTS_NAME, INDEX_NAME
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return f"{stem}.{variant}.safetensors", f"{WEIGHTS_NAME}.index.{variant}.json"


def _weight_files(folder: Path, variant: str | None) -> tuple[str, ...]:
    weights_name, index_name = _names_of(variant)
    if (folder / index_name).is_file():
        return _shards_of(folder, index_name)
    if (folder / weights_name).is_file():
        return (weights_name,)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"checkpoint {folder} holds its weights as pickles ({', '.join(pickles[:3])}), which "
            "can run code and are never opened; convert them with save_pretrained("
            "safe_serialization=True) or download the safetensors files"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    hint = f"; found {', '.join(others[:3])}, which has another name" if others else ""
    variants = _variants_in(names)
    if variants - {variant}:
        choices = " or ".join(
            "none" if name is None else f"--variant {name}" for name in sorted(variants, key=str)
        )
        hint = f"; it has other variants: give {choices}"
    raise CheckpointError(
        f"checkpoint {folder} has no weights: neither {weights_name} nor {index_name}{hint}"
    )


def _shards_of(folder: Path, index_name: str) -> tuple[str, ...]:
    """Files that an index names, all of them there."""
    weight_map = _read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / index_name} names the shard {name!r}; only .safetensors files in the "
                "same folder are read"
            )
        if not (folder / name).is_file():
            lost = [key for key, shard in weight_map.items() if shard == name]
            raise CheckpointError(
                f"checkpoint {folder} lacks the shard {name} ({len(lost)} tensors, among them "
                f"{min(lost)}); download it again"
            )
    return tuple(names)


def _variants_in(names: list[str]) -> set[str | None]:
    """Variants whose files are there; none for files without one."""
    stem = re.escape(WEIGHTS_NAME.removesuffix(".safetensors"))
    patterns = (
        rf"{stem}(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json",
    )
    matches = (re.fullmatch(pattern, name) for name in names for pattern in patterns)
    return {match["variant"] for match in matches if match is not None}


def fetch_checkpoint(
    hub_id: str, revision: str | None = None, variant: str | None = None
) -> tuple[Checkpoint, str]:
    """A transformer from the hub: what the local cache has is used, the rest is downloaded.

    Args:
        hub_id: "owner/name".
        revision: branch, tag or commit; none means the newest that the cache or the hub has.
        variant: of the files, see `find_checkpoint`.

    Returns:
        the checkpoint and its commit.

    Raises:
        CheckpointError: unknown, gated or unreachable; one sentence that says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    infix = "" if variant is None else f".{variant}"
    wanted = [
        "transformer/config.json",
        f"transformer/*{infix}*.safetensors",
        f"transformer/{_names_of(variant)[1]}",
    ]
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=wanted, local_files_only=True
        )
        return find_checkpoint(Path(folder) / "transformer", variant), Path(folder).name
    except (LocalEntryNotFoundError, CheckpointError) as error:
        logger.info("%s is not complete in the cache: %s", hub_id, error)
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=wanted)
    except Exception as error:
        raise CheckpointError(hub_failure(hub_id, revision, error)) from error
    return find_checkpoint(Path(folder) / "transformer", variant), Path(folder).name


def hub_failure(hub_id: str, revision: str | None, error: Exception) -> str:
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
    reason = ARCHITECTURES[family.architecture].refusal(config)
    if reason is not None:
        raise CheckpointError(f"{where}: {reason}")
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
