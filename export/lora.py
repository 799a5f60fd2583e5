"""LoRAs, read strictly and merged into weights: W + scale * alpha / rank * up @ down, in float32.

Replaces: diffusers' converters, which drop what they do not know with a warning or none. Read are
linear layers' LoRAs under the names of diffusers and peft (`lora_A`, `lora_B`) and of Kohya
(`lora_down`, `lora_up`, `alpha`), with the usual prefixes, module names dotted or joined by
underscores, and for FLUX also in the original naming, whose fused projections are taken apart.
Limits: what a merge cannot express (DoRA, LoKr, LoHa, OFT, convolutions, biases) and parts for
text encoders are refused by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ditrim.export.checkpoint import is_hub_id
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.plugins.architectures.architecture import OriginalNames

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
_TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A", ".lora_down")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_B", ".lora_up")
_ALPHA = ".alpha"
# Other kinds of adapters, by parts of their keys between dots: whole ones, and beginnings.
_OTHER_PARTS = {
    "dora_scale": "DoRA",
    "diff": "a full difference of weights",
    "diff_b": "a full difference of biases",
    "processor": "the XLabs format",
    "set_weight": "a replaced weight",
}
_OTHER_BEGINNINGS = {
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "glora": "GLoRA",
    "lora_mid": "LoCon with a Tucker core",
}
_BIASES = (".lora_B.bias", ".lora_up.bias")
_USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_LARGEST_SCALE = 1e4
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChoice:
    """A LoRA as it was asked for: FILE[:SCALE].

    Attributes:
        location: a file, a folder, or a hub id, also with the file's name (owner/name/file).
        scale: what its change is multiplied by.
    """

    location: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraChoice:
        """Read FILE[:SCALE].

        Raises:
            CheckpointError: the scale is no number to multiply by.
        """
        location, colon, tail = text.rpartition(":")
        if not colon or os.path.exists(os.path.expanduser(text)):
            return cls(location=_checked(text))
        try:
            scale = float(tail)
        except ValueError:
            return cls(location=_checked(text))
        if not math.isfinite(scale) or abs(scale) > _LARGEST_SCALE or scale == 0:
            raise CheckpointError(
                f"--lora {text}: the scale {tail} must be a number other than 0, of at most "
                f"{_LARGEST_SCALE:g}; give it as FILE:0.8"
            )
        return cls(location=_checked(location), scale=scale)


def _checked(location: str) -> str:
    if not location.strip():
        raise CheckpointError("--lora is empty; give a file, as --lora style.safetensors:0.8")
    return location


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The part of a LoRA layer's product that one weight takes: rows, in an order."""

    weight: str
    rows: tuple[tuple[int, int], ...] | None = None  # none takes all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A change of one weight: factor * up[rows] @ down."""

    up: Tensor
    down: Tensor
    factor: float


@dataclass(slots=True)
class Merge:
    """Changes of weights by one LoRA or several, in order.

    Attributes:
        changes: by the weight's name in diffusers' state dict.
    """

    changes: dict[str, list[_Change]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.changes

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A weight with its changes, in float32; the weight itself where it has none."""
        import torch

        changes = self.changes.get(name)
        if not changes:
            return weight
        merged = weight.to(torch.float32)
        for change in changes:
            merged = torch.addmm(merged, change.up, change.down, alpha=change.factor)
        return merged


def find_lora(location: str) -> Path:
    """The file of a LoRA: itself, the one in a folder, or from the hub.

    Raises:
        CheckpointError: there is none, or it is unclear which one is meant.
    """
    place = os.path.expanduser(location)
    if os.path.isfile(place):
        if not place.endswith(".safetensors"):
            raise CheckpointError(
                f"--lora {location}: only .safetensors files are read; pickles can run code and "
                "are never opened"
            )
        return Path(place)
    if os.path.isdir(place):
        return _only_file(sorted(Path(place).glob("*.safetensors")), location)
    owner_and_name, name = "/".join(location.split("/")[:2]), "/".join(location.split("/")[2:])
    is_file_name = owner_and_name.endswith(".safetensors")
    if not is_hub_id(owner_and_name) or is_file_name or (name and not name.endswith(_SUFFIX)):
        raise CheckpointError(
            f"--lora {location} is neither a file or folder that exists, nor a hub id (owner/name "
            "or owner/name/file.safetensors)"
        )
    return _fetch(location, owner_and_name, name)


def _only_file(files: list[Path], location: str) -> Path:
    named = [file for file in files if file.name in _USUAL_FILES]
    candidates = named or files
    if len(candidates) != 1:
        names = ", ".join(file.name for file in files[:5]) or "none"
        raise CheckpointError(
            f"--lora {location} holds {len(files)} safetensors files ({names}); name the one to "
            "merge"
        )
    return candidates[0]


def _fetch(location: str, hub_id: str, name: str) -> Path:
    """A LoRA of the hub; what of its repository the cache holds already is not fetched again."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from ditrim.export.checkpoint import hub_failure

    patterns = [name, "adapter_config.json"] if name else [*_USUAL_FILES, "adapter_config.json"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=True))
        found = [folder / usual for usual in ([name] if name else _USUAL_FILES)]
        found = [path for path in found if path.is_file()]
        if len(found) == 1:
            return found[0]
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # asked for below, where every failure is reported
    try:
        if not name:  # the whole repository decides which one is meant, not its cached part
            files = [Path(file) for file in HfApi().list_repo_files(hub_id)]
            name = _only_file([f for f in files if f.suffix == _SUFFIX], location).as_posix()
        patterns = [name, "adapter_config.json"]
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except CheckpointError:
        raise
    except Exception as error:
        text = hub_failure(hub_id, None, error).replace("--weights <folder>", "--lora <file>")
        raise CheckpointError(f"--lora {location}: {text}") from error
    if not (folder / name).is_file():
        raise CheckpointError(f"--lora {location}: {hub_id} has no file {name} on the hub")
    return folder / name


def read_merge(
    loras: Iterable[tuple[Path, float]], shapes: Mapping[str, tuple[int, ...]], architecture: str
) -> Merge:
    """Read LoRAs for a model.

    Args:
        loras: file and scale of each, in order.
        shapes: of the model's weights, by name.
        architecture: its name in `ARCHITECTURES`.

    Raises:
        CheckpointError: one holds something that cannot be merged; names it.
    """
    merge = Merge()
    targets = _targets(shapes, architecture)
    for path, scale in loras:
        for name, change in _changes_of(path, scale, targets, shapes):
            merge.changes.setdefault(name, []).append(change)
    return merge


def _targets(
    shapes: Mapping[str, tuple[int, ...]], architecture: str
) -> dict[str, tuple[_Part, ...]]:
    """Return the weights by every module name that a LoRA can use: dotted, or with underscores."""
    parts: dict[str, tuple[_Part, ...]] = {
        name.removesuffix(".weight"): (_Part(weight=name),)
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    original = ARCHITECTURES[architecture].original_names
    if original is not None:
        parts = dict(_original_modules(original, parts, shapes)) | parts
    return {name.replace(".", "_"): part for name, part in parts.items()} | parts


def _original_modules(
    names: OriginalNames, modules: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[_Part, ...]]]:
    """Modules of a model's own code and the weights of diffusers' model that they became."""
    for old, new in names.top.items():
        if new in modules:
            yield old, (_Part(weight=f"{new}.weight"),)
    old, new = names.swapped
    if new in modules:
        half = shapes[f"{new}.weight"][0] // 2
        yield old, (_Part(weight=f"{new}.weight", rows=((half, 2 * half), (0, half))),)
    for kind, block, table in names.blocks:
        numbers = {name.split(".")[1] for name in modules if name.startswith(f"{block}.")}
        for number in sorted(numbers, key=int):
            for old, parts in table.items():
                weights = [f"{block}.{number}.{part}.weight" for part in parts]
                yield f"{kind}.{number}.{old}", tuple(_stacked(weights, shapes))


def _stacked(weights: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Part]:
    start = 0
    for name in weights:
        end = start + shapes[name][0]
        yield _Part(weight=name, rows=None if len(weights) == 1 else ((start, end),))
        start = end


@dataclass(slots=True)
class _Layer:
    """The tensors that a file holds of one module."""

    up: str | None = None
    down: str | None = None
    alpha: str | None = None


def _changes_of(
    path: Path,
    scale: float,
    targets: Mapping[str, tuple[_Part, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, _Change]]:
    from safetensors import SafetensorError, safe_open

    from ditrim.export.lora_settings import read_settings

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            layers = _layers_of(list(file.keys()), targets, path)
            settings = read_settings(path, file.metadata() or {}, settings_file(path))
            for module, layer in layers.items():
                assert layer.up is not None
                assert layer.down is not None
                up, down = file.get_tensor(layer.up), file.get_tensor(layer.down)
                _check_shapes(up, down, targets[module], shapes, f"--lora {path}: {layer.up}")
                alpha = None if layer.alpha is None else file.get_tensor(layer.alpha)
                factor = scale * settings.factor(module, up.shape[1], alpha, f"{path}: {layer.up}")
                up = _finite(up, f"--lora {path}: {layer.up}")
                down = _finite(down, f"--lora {path}: {layer.down}")
                yield from _parts_of(up, down, factor, targets[module])
    except SafetensorError as error:
        raise CheckpointError(f"--lora {path} is no safetensors file: {error}") from error


def _layers_of(
    keys: list[str], targets: Mapping[str, tuple[_Part, ...]], path: Path
) -> dict[str, _Layer]:
    """The keys of a file by module.

    Raises:
        CheckpointError: keys that are not merged; lists them.
    """
    layers: dict[str, _Layer] = {}
    unknown: list[str] = []
    names = {parts: name for name, parts in targets.items()}  # one of each module's
    for key in sorted(keys):
        _refuse_other_kinds(key, path)
        role, stem = _split_key(key)
        module = _module_of(stem, targets) if role is not None else None
        if role is None or module is None:
            unknown.append(key)
            continue
        layer = layers.setdefault(names[targets[module]], _Layer())
        if getattr(layer, role) is not None:
            raise CheckpointError(
                f"--lora {path} holds {key} twice: it is {getattr(layer, role)} too"
            )
        setattr(layer, role, key)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"--lora {path} holds keys that match nothing of this model: "
            f"{', '.join(unknown[:5])}{more}; is it for another model?"
        )
    if not layers:
        raise CheckpointError(f"--lora {path} holds no LoRA: it has no tensors")
    for module, layer in layers.items():
        if layer.up is None or layer.down is None:
            raise CheckpointError(
                f"--lora {path} holds only one half of the LoRA of {module} "
                f"({layer.up or layer.down or layer.alpha}); the file is incomplete"
            )
    _check_apart(layers, targets, path)
    return layers


def _check_apart(
    layers: Mapping[str, _Layer], targets: Mapping[str, tuple[_Part, ...]], path: Path
) -> None:
    """No weight is changed twice, as under FLUX's original and under diffusers' names."""
    seen: dict[str, str] = {}
    for module in layers:
        for part in targets[module]:
            if part.weight in seen and seen[part.weight] != module:
                raise CheckpointError(
                    f"--lora {path} changes {part.weight} twice, as {seen[part.weight]} and as "
                    f"{module}"
                )
            seen[part.weight] = module


def _refuse_other_kinds(key: str, path: Path) -> None:
    kind = "a LoRA with biases" if key.endswith(_BIASES) else None
    for part in key.split("."):
        kind = kind or _OTHER_PARTS.get(part)
        kind = kind or next((k for b, k in _OTHER_BEGINNINGS.items() if part.startswith(b)), None)
    if kind is not None:
        raise CheckpointError(
            f"--lora {path} holds {key}, which is {kind}; only plain LoRAs of linear layers "
            "can be merged: convert it, or merge it into the weights with the tool that made "
            "it and build from those"
        )
    if key.startswith(_TEXT_PREFIXES):
        raise CheckpointError(
            f"--lora {path} holds {key}, a part for a text encoder, which an engine set does not "
            "contain: save the transformer's part alone and merge that, and load the whole file's "
            "text encoder part into the pipeline"
        )


def _split_key(key: str) -> tuple[str | None, str]:
    """Which tensor of a layer a key names ("up", "down", "alpha"), and the rest of it."""
    key = key.replace(".default.", ".").removesuffix(".default")
    if key.endswith(_ALPHA):
        return "alpha", key.removesuffix(_ALPHA)
    for kind, endings in (("down", _DOWN), ("up", _UP)):
        for ending in endings:
            if key.endswith(ending):
                return kind, key.removesuffix(ending)
    return None, key


def _module_of(stem: str, targets: Mapping[str, object]) -> str | None:
    """The module that a key's stem names, as it stands among the targets."""
    if stem in targets:
        return stem
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            found = _module_of(stem.removeprefix(prefix), targets)
            if found is not None:
                return found
    return None


def settings_file(path: Path) -> Path | None:
    """peft's settings beside a LoRA's file, which say how strong it is; none if there are none."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == "adapter_model.safetensors" and beside.is_file() else None


def _check_shapes(
    up: Tensor,
    down: Tensor,
    parts: tuple[_Part, ...],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    rows = sum(shapes[part.weight][0] for part in parts)
    columns = shapes[parts[0].weight][1]
    rank = up.shape[1] if up.dim() == 2 else 0
    if rank < 1 or up.shape != (rows, rank) or down.shape != (rank, columns):
        raise CheckpointError(
            f"{where} {list(up.shape)} with {list(down.shape)} does not make a change of {rows} x "
            f"{columns}; is it for another model?"
        )


def _finite(tensor: Tensor, where: str) -> Tensor:
    """Return the tensor in float32; raise where a value is not finite."""
    import torch

    values = tensor.to(torch.float32)
    if not tensor.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{where} holds values that are no finite numbers")
    return values


def _parts_of(
    up: Tensor, down: Tensor, factor: float, parts: tuple[_Part, ...]
) -> Iterator[tuple[str, _Change]]:
    """The changes of one layer, its rows given to the weights that they belong to."""
    import torch

    for part in parts:
        own = up if part.rows is None else torch.cat([up[a:b] for a, b in part.rows])
        yield part.weight, _Change(up=own, down=down, factor=factor)
