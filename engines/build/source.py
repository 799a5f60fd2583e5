"""Where a build's weights come from, known by their content before anything is loaded.

Replaces: hashing 41 GB at every call. Limits: a file whose size, times and inode are those of the
last build is taken to be unchanged. Trade-off: the first build reads the weights once more.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from ditrim.engines.build.options import BuildOptions
from ditrim.engines.json_file import NotEmpty, Whole, parse_json, read_file, value_from
from ditrim.engines.presets import small_editor_folder
from ditrim.engines.sets.engine_set import sha256_of
from ditrim.export.checkpoint import (
    Checkpoint,
    check_config,
    fetch_checkpoint,
    find_checkpoint,
    is_hub_id,
)
from ditrim.export.lora import LoraChoice, find_lora, settings_file
from ditrim.export.single_file import describe_single_file
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import CheckpointError, UsageError

_BLOCK_BYTES = 16 * 1024 * 1024
# Longer than the clock tick by which file systems stamp files.
_TICK_NS = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSource:
    """A LoRA that was found but not read: its file, how it was named, and its scale."""

    path: Path
    location: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Weights that were found but not read.

    Attributes:
        kind: "small", "folder", "hub" or "random".
        location: the folder, hub id or preset's name.
        revision: the commit of a hub id.
        seed: of random weights.
        checkpoint: the files; none for random weights.
        variant: of the files.
        is_single_file: the files are one, in names of its own, and have to be converted.
        loras: to be merged, in order.
        config: the transformer's configuration as found, or for random weights as asked for.
        calibration: K and L that were measured on these very weights, if any.
    """

    kind: str
    location: str
    revision: str | None = None
    seed: int | None = None
    checkpoint: Checkpoint | None = None
    variant: str | None = None
    is_single_file: bool = False
    loras: tuple[LoraSource, ...] = ()
    config: Mapping[str, Any]
    calibration: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChoice:
    """K and L of a build, and why."""

    num_layers: int
    front_depth: int
    representative_layers: tuple[int, ...]
    layers_source: str


def find_source(options: BuildOptions) -> Source:
    """Find the weights that the options ask for; fetches those on the hub, reads none.

    Raises:
        CheckpointError: they are missing or belong to another model.
    """
    family = options.family
    if options.preset is not None:
        folder = small_editor_folder()
        source = Source(
            kind="small",
            location=options.preset,
            checkpoint=(found := find_checkpoint(folder / "transformer")),
            config=found.config,
            calibration=read_calibration(folder / "calibration.json"),
        )
    elif options.weights == "random":
        config = {**family.config, **_cut_depth(options), **options.config}
        config["_class_name"] = family.transformer_class
        seed, loras = options.seed or 0, _find_loras(options)
        return Source(kind="random", location="random", seed=seed, config=config, loras=loras)
    else:
        source = _find_real(options)
    assert source.checkpoint is not None
    where = source.location
    if not source.is_single_file:
        where = str(source.checkpoint.folder / "config.json")
    check_config(family, source.config, where)
    return replace(source, loras=_find_loras(options), variant=options.variant)


def _find_loras(options: BuildOptions) -> tuple[LoraSource, ...]:
    choices = [LoraChoice.parse(text) for text in options.lora]
    return tuple(
        LoraSource(path=find_lora(choice.location), location=choice.location, scale=choice.scale)
        for choice in choices
    )


def _find_real(options: BuildOptions) -> Source:
    text = options.weights or options.family.hub_id
    path = Path(text).expanduser()
    if options.weights is not None and (path.exists() or not is_hub_id(text)):
        if options.revision is not None:
            raise UsageError(f"--revision needs weights from the hub, and {text} is a folder")
        if not path.exists() and not text.startswith((".", "/", "~")) and "/" not in text:
            raise CheckpointError(
                f"--weights {text!r} is neither a folder or file that exists, nor a hub id "
                "(owner/name), nor 'random'"
            )
        if path.is_file():
            if options.variant is not None:
                raise UsageError(f"--variant {options.variant}: --weights {text} is one file")
            described = describe_single_file(Path(os.path.abspath(path)), options.family)
            return Source(
                kind="file",
                location=os.path.abspath(path),
                checkpoint=described,
                is_single_file=True,
                config=described.config,
            )
        found = find_checkpoint(path, options.variant)
        return Source(
            kind="folder",
            location=os.path.abspath(path),
            checkpoint=found,
            config=found.config,
        )
    found, commit = fetch_checkpoint(text, options.revision, options.variant)
    return Source(kind="hub", location=text, revision=commit, checkpoint=found, config=found.config)


def planned_config(options: BuildOptions) -> Mapping[str, Any]:
    """The transformer's configuration of a build that is only planned: nothing is fetched.

    For weights on the hub it is the family's, as released.

    Raises:
        CheckpointError: a folder that was named is missing or belongs to another model.
    """
    text = options.weights
    is_hub = text is None or (is_hub_id(text) and not Path(text).expanduser().exists())
    if options.preset is None and text != "random" and is_hub:
        return {**options.family.config, "_class_name": options.family.transformer_class}
    return find_source(options).config


def _cut_depth(options: BuildOptions) -> dict[str, int]:
    """Depths of a trial of `--num-layers` blocks, double and single ones in the model's ratio."""
    count = options.num_layers
    if count is None:
        return {}
    return ARCHITECTURES[options.family.architecture].cut(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calibration:
    front_depth: Whole
    representative_layers: Annotated[tuple[Whole, ...], NotEmpty]

    def __post_init__(self) -> None:
        layers = self.representative_layers
        if list(layers) != sorted(set(layers)) or layers[0] < self.front_depth:
            raise ValueError(
                f"representative_layers {layers} must increase from front_depth {self.front_depth}"
            )


def read_calibration(path: Path) -> dict[str, Any]:
    """K and L that were measured on a preset's weights; empty without the file.

    Raises:
        CheckpointError: the file is damaged; names it.
    """
    if not path.is_file():
        return {}
    return read_file(
        path,
        lambda text: asdict(value_from(_Calibration, parse_json(text), extra="ignore")),
        what="the calibration",
        remedy="install the package again",
        error=CheckpointError,
    )


def choose_split(options: BuildOptions, source: Source) -> SplitChoice:
    """K and L: as given, as measured on these weights, or the family's scaled to the depth.

    Raises:
        UsageError: they do not fit the model's depth; names the option.
    """
    family, depths = options.family, ARCHITECTURES[options.family.architecture].depths
    sizes = [source.config.get(key, default) for key, default in depths.items()]
    for key, size in zip(depths, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UsageError(f"the configuration's {key} is {size!r}; it must be a whole number")
    count, full = sum(sizes), sum(depths.values())
    if count < 1:
        raise UsageError("the configuration has no layers; it needs at least one")
    front_depth: int = family.front_depth
    layers: tuple[int, ...] = family.representative_layers
    reason = family.layers_source
    if source.calibration:
        front_depth = source.calibration["front_depth"]
        layers = source.calibration["representative_layers"]
        reason = "measured by calibrate-layers on these weights"
    elif count != full:
        front_depth = min(max(1, round(front_depth * count / full)), count - 1)
        # Layers spread over a deep model can fall together in a shallow one.
        scaled = (round(layer * count / full) for layer in layers)
        layers = tuple(sorted({min(max(layer, front_depth), count - 1) for layer in scaled}))
        reason = (
            f"scaled from {full} layers to {count}, not measured; calibrate-layers measures this "
            "model's"
        )
    if options.layers is not None:
        layers, reason = options.layers, "given with --layers"
    if options.front_depth is not None:
        front_depth = options.front_depth
        if options.layers is None and source.calibration == {} and count != full:
            layers = tuple(sorted({max(layer, front_depth) for layer in layers}))
    split = SplitChoice(
        num_layers=count,
        front_depth=front_depth,
        representative_layers=layers,
        layers_source=reason,
    )
    _check_split(split, options, _origin_of(options, source, reason))
    return split


def _check_split(split: SplitChoice, options: BuildOptions, origin: str) -> None:
    front_depth, count, layers = split.front_depth, split.num_layers, split.representative_layers
    if front_depth >= count:
        given = (
            "--front-depth" if options.front_depth is not None else "the calibration's front depth"
        )
        raise UsageError(
            f"{given} is {front_depth}; allowed: 0 to {count - 1}, since the model has {count} "
            "layers and BACK needs one of them; give another with --front-depth"
        )
    if list(layers) != sorted(set(layers)):
        raise UsageError(f"--layers {','.join(map(str, layers))} must increase and not repeat")
    for layer in layers:
        if not front_depth <= layer < count:
            raise UsageError(
                f"layer {layer}, {origin}, is not a layer of BACK, which are {front_depth} to "
                f"{count - 1}; choose others with --layers, or another --front-depth"
            )


def _origin_of(options: BuildOptions, source: Source, reason: str) -> str:
    """Return the origin of the choice of scored layers, for messages."""
    if options.layers is not None:
        return reason
    if source.calibration:
        return f"from the calibration shipped with the {source.location!r} model"
    return f"from the model's own ({reason})"


def fingerprint(
    source: Source,
    known: Mapping[str, Any],
    on_bytes: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """SHA-256 and file status of every weight file, by name; empty for random weights.

    Args:
        source: what `find_source` returned.
        known: fingerprints of an earlier build, trusted where the file status is the same.
        on_bytes: called with the bytes hashed so far and the bytes to hash.
    """
    if source.checkpoint is None:
        return {}
    folder = source.checkpoint.folder
    statuses = {name: _status_of(folder / name) for name in source.checkpoint.weights}
    prints: dict[str, dict[str, Any]] = {}
    for name, status in statuses.items():
        entry = known.get(name)
        if isinstance(entry, Mapping) and isinstance(entry.get("sha256"), str):
            same = all(entry.get(key) == value for key, value in status.items())
            if same:
                prints[name] = {**status, "sha256": entry["sha256"]}
    total = sum(status["num_bytes"] for name, status in statuses.items() if name not in prints)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(done, total)

    for name in statuses:
        if name not in prints:
            prints[name] = _hash_stably(folder / name, advance)
    return {name: prints[name] for name in statuses}


def check_unchanged(
    source: Source, prints: Mapping[str, Mapping[str, Any]], *, were_linked: bool = False
) -> dict[str, dict[str, Any]]:
    """Check that no weight file was touched since its fingerprint.

    Args:
        source: what `find_source` returned.
        prints: what `fingerprint` returned.
        were_linked: the build made and removed hard links to the files, which stamps their status
            (ctime) but leaves content and modification time.

    Returns:
        the fingerprints with the files' present status.

    Raises:
        CheckpointError: one was touched; names it.
    """
    if source.checkpoint is None:
        return {}
    now: dict[str, dict[str, Any]] = {}
    for name, entry in prints.items():
        status = _status_of(source.checkpoint.folder / name)
        stamped = {"ctime_ns"} if were_linked else set()
        if any(entry[key] != value for key, value in status.items() if key not in stamped):
            raise CheckpointError(
                f"{source.checkpoint.folder / name} changed while the engine set was built; "
                "nothing was replaced. Build again when the file is complete"
            )
        now[name] = {**entry, **status}
    return now


def _status_of(path: Path) -> dict[str, int]:
    info = path.stat()
    return {
        "num_bytes": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
        "inode": info.st_ino,
    }


def _hash_stably(path: Path, on_bytes: Callable[[int], None]) -> dict[str, Any]:
    """Hash a file so that any later change shows in its status."""
    status = _status_of(path)
    while time.time_ns() - status["ctime_ns"] in range(_TICK_NS):
        time.sleep(_TICK_NS / 1e9)  # a write within the same tick would leave the times as they are
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    if _status_of(path) != status:
        raise CheckpointError(f"{path} changed while it was read; build again when it is complete")
    return {**status, "sha256": digest.hexdigest()}


def fingerprint_loras(source: Source, known: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the manifest's entry of each LoRA: file, scale, SHA-256 and file status.

    Args:
        source: what `find_source` returned.
        known: what an earlier build said, trusted where the file status is the same.
    """
    described = []
    for lora in source.loras:
        status = _status_of(lora.path)
        entries = (entry for entry in known if isinstance(entry, Mapping))
        same = (
            entry
            for entry in entries
            if isinstance(entry.get("sha256"), str)
            and all(entry.get(key) == value for key, value in status.items())
        )
        settings = settings_file(lora.path)
        printed = next(same, None) or _hash_stably(lora.path, lambda count: None)
        described.append(
            {
                **status,
                "file": os.path.abspath(lora.path),
                "sha256": printed["sha256"],
                "scale": lora.scale,
                "settings_sha256": None if settings is None else sha256_of(settings),
            }
        )
    return described


def describe(
    source: Source,
    prints: Mapping[str, Mapping[str, Any]],
    loras: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what the manifest's `source` holds: where weights came from, and their hashes."""
    return {
        "kind": source.kind,
        "location": source.location,
        "revision": source.revision,
        "seed": source.seed,
        "variant": source.variant,
        "loras": [dict(lora) for lora in loras],
        "files": {name: dict(entry) for name, entry in prints.items()},
    }


def weights_identity(
    source: Source,
    prints: Mapping[str, Mapping[str, Any]],
    loras: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Return what of the weights enters the identity: their content, wherever it lies."""
    content: dict[str, Any] = {name: entry["sha256"] for name, entry in prints.items()}
    if source.kind == "random":
        content = {"seed": source.seed}
    if loras:
        content = {
            "base": content,
            "loras": [
                [lora["sha256"], lora["scale"], lora.get("settings_sha256")] for lora in loras
            ],
        }
    return content
