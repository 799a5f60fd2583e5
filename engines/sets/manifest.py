"""What an engine set says about itself: `manifest.json`, parsed strictly and sealed by a hash."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from ditrim.engines.cost.parameters import check_sizes
from ditrim.engines.json_file import Count, NotEmpty, Whole, check_header, parse_json, value_from
from ditrim.engines.sets.command import Options, command_of, options_in
from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.profiles import PLAN_ROLES, ProfileSpec
from ditrim.engines.sets.specs import AXES, Limits, TensorSpec
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import EngineSetError, UsageError
from ditrim.plugins.precision import PRECISIONS

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
ROLES = ("front", "back")
_SEAL = "manifest_sha256"


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """A graph file and its tensors, in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """A built engine of TensorRT or TensorRT-RTX.

    Attributes:
        file: its serialized form.
        profiles: its optimisation profiles, in order; one a rung.
        device_memory_bytes: activation memory of each profile, where the builder could ask for it.
        inputs, outputs: its tensors, in order.
    """

    file: str
    profiles: Annotated[tuple[ProfileSpec, ...], NotEmpty]
    device_memory_bytes: tuple[int, ...] | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        axes = {axis for spec in (*self.inputs, *self.outputs) for axis in spec.shape}
        unknown = sorted(axis for axis in axes if isinstance(axis, str) and axis not in AXES)
        if unknown:
            raise ValueError(f"it has the axis {unknown[0]!r}; allowed: {', '.join(AXES)}")
        if any((profile.rows is None) == ("rows" in axes) for profile in self.profiles):
            raise ValueError("the rows of its profiles do not fit its inputs")
        sizes, expected = self.device_memory_bytes, len(self.profiles)
        if sizes is not None and len(sizes) != expected:
            raise ValueError(
                f"device_memory_bytes has {len(sizes)} entries for {expected} profiles"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the set: its path inside the folder, its size and its SHA-256 in hex."""

    path: str
    num_bytes: Whole
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    driver: str | None
    weights: Literal["included", "stripped"]
    separate_anchor: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Holds everything that a runtime needs of an engine set without opening its graphs.

    Attributes:
        format_version: of this file.
        identity: SHA-256 over all that the build depended on.
        ditrim_version: of the builder.
        model: the family's name.
        architecture: its name in `ARCHITECTURES`.
        transformer_class, pipeline_class: names in diffusers.
        transformer_config: the transformer's whole configuration.
        num_layers: blocks in all (FLUX: double-stream, then single-stream).
        front_depth: K; blocks [0, K) are FRONT.
        representative_layers: L, the layers whose attention is scored.
        detailed_layers: layers of BACK whose scores it returns one by one (`layer_scores`); none
            unless the set was built for it. Older manifests lack it.
        layers_source: where L comes from.
        ladder: reference lengths.
        limits: of the other axes.
        precision: of weights and hidden states, "fp32", "fp16" or "bf16".
        backend, backend_version: what the set was built for; no version where the set holds graphs
            only, for a backend that builds plans.
        graphs: "front" and "back"; in a set of plans `file` is the plan that has these tensors.
        plans: "front", "back" and, where it is separate, "anchor"; empty where the backend runs the
            graphs themselves, or where they are all that was asked for.
        target: what the plans run on and how they were built, empty without plans:
            "compute_capabilities" (as "8.9"), "gpu" and "driver" (null where none was needed),
            "weights" ("included" or "stripped"), "separate_anchor".
        files: every other file of the set.
        source: where the weights came from ("kind", "location", "revision", "seed", "files"), and
            the LoRAs that were merged into them ("loras": "file", "sha256", "scale").
        weights: samples of every weight of the source, by name in diffusers' state dict
            (`fingerprints`). Older manifests lack it.
        merged_weights: those of the weights that LoRAs changed, after the merge.
        options: that the set is built with (`command`). Older manifests hold the command line.
        created: UTC time, ISO 8601.
    """

    format_version: int
    identity: str
    ditrim_version: str
    model: str
    architecture: str
    transformer_class: str
    pipeline_class: str
    transformer_config: Mapping[str, Any]
    num_layers: Count
    front_depth: Whole
    representative_layers: tuple[int, ...]
    detailed_layers: tuple[int, ...] = ()
    layers_source: str
    ladder: Ladder
    limits: Limits
    precision: str
    backend: str
    backend_version: str
    graphs: Mapping[str, GraphSpec]
    plans: Mapping[str, PlanSpec]
    target: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    source: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    merged_weights: Mapping[str, str] = field(default_factory=dict)
    options: Options
    created: str

    @property
    def command(self) -> str:
        """The command line that builds the set."""
        return command_of(self.options)

    def to_json(self) -> str:
        """The text of `manifest.json`, with the hash of its own content in `manifest_sha256`."""
        content = asdict(self)
        return (
            json.dumps(content | {_SEAL: digest_of(content)}, indent=2, ensure_ascii=False) + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check the text of `manifest.json`.

        Raises:
            EngineSetError: it is no JSON, of another format version, has unknown, missing or
                ill-typed keys (named), or was changed after it was written.
        """
        try:
            content = parse_json(text)
            check_header(content, "manifest", {"format_version": FORMAT_VERSION})
            seal = content.pop(_SEAL, None)
            manifest = value_from(Manifest, current_content(content))
            _check(manifest)
        except UsageError as error:
            raise EngineSetError(f"{MANIFEST_NAME}: {error}") from error
        if seal != digest_of(content):
            raise EngineSetError(
                f"{MANIFEST_NAME} was edited after the build: its content does not match its own "
                f"{_SEAL}"
            )
        return manifest


def current_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's content with options, where an older one holds a command line in their place.

    Raises:
        UsageError: that is no command line.
    """
    if "command" not in content or "options" in content:
        return dict(content)
    current = dict(content)
    command = current.pop("command")
    try:
        return current | {"options": options_in(command)}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"key 'command': {error}") from error


def _check(manifest: Manifest) -> None:
    """Check what the types do not express."""
    for name, allowed in (("architecture", ARCHITECTURES), ("precision", PRECISIONS)):
        if (value := getattr(manifest, name)) not in allowed:
            raise UsageError(f"key {name!r} is {value!r}; allowed: {', '.join(allowed)}")
    try:
        check_sizes(manifest.transformer_config, manifest.architecture)
    except ValueError as error:
        raise UsageError(f"key 'transformer_config': {error}") from error
    _check_roles(manifest)
    if manifest.target:
        value_from(_Target, dict(manifest.target), where="target")
    for key in ("weights", "merged_weights"):
        for name, text in getattr(manifest, key).items():
            if not _holds_samples(text):
                raise UsageError(f"key '{key}.{name}' holds no samples: {text[:20]!r}")
    shapes = [spec.shape for spec in manifest.graphs["back"].outputs if spec.name == "layer_scores"]
    count = len(manifest.detailed_layers)
    if shapes != ([("batch", count, 3, "reference")] if count else []):
        raise UsageError(
            f"key 'detailed_layers' names {count} layers, which does not fit the outputs of "
            "'graphs.back'"
        )


def _holds_samples(text: str) -> bool:
    """Whether a text is what `fingerprints.encode_samples` writes; numpy is not imported for it."""
    try:
        return len(base64.b64decode(text, validate=True)) % 4 == 0
    except ValueError:
        return False


def _check_roles(manifest: Manifest) -> None:
    plan_roles = PLAN_ROLES[:2] if manifest.plans else ()
    for key, needed, allowed in (("graphs", ROLES, ROLES), ("plans", plan_roles, PLAN_ROLES)):
        given = getattr(manifest, key)
        if not {*needed} <= {*given} <= {*allowed}:
            wrong = min({*needed} - {*given} or {*given} - {*allowed})
            raise UsageError(f"key '{key}.{wrong}' is {'unknown' if wrong in given else 'missing'}")
