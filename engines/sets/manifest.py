"""What an engine set says about itself: `manifest.json`, parsed strictly and sealed by a hash."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ditrim.engines.cost.parameters import check_sizes
from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.profiles import PLAN_ROLES, AxisRange, ProfileSpec
from ditrim.engines.sets.specs import AXES, Limits, TensorSpec
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import EngineSetError, LadderError
from ditrim.plugins.precision import PRECISIONS

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
ROLES = ("front", "back")
WEIGHTS = ("included", "stripped")
_SEAL = "manifest_sha256"
_SAMPLE_BYTES = 4
_T = TypeVar("_T")


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


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
    profiles: tuple[ProfileSpec, ...]
    device_memory_bytes: tuple[int, ...] | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the set: its path inside the folder, its size and its SHA-256 in hex."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a runtime needs to know of an engine set without opening its graphs.

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
        detailed_layers: layers of BACK whose scores it tells one by one (`layer_scores`); none
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
        command: the command line that builds the set.
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
    num_layers: int
    front_depth: int
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
    command: str
    created: str

    def to_json(self) -> str:
        """The text of `manifest.json`, with the hash of its own content in `manifest_sha256`."""
        content = _plain(self)
        return json.dumps(content | {_SEAL: _seal_of(content)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check the text of `manifest.json`.

        Raises:
            EngineSetError: it is no JSON, of another format version, has unknown, missing or
                ill-typed keys (named), or was changed after it was written.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineSetError(
                f"{MANIFEST_NAME} is not JSON ({error}): it is truncated or damaged"
            ) from error
        if not isinstance(content, dict):
            raise EngineSetError(f"{MANIFEST_NAME} must hold an object, not {_kind(content)}")
        version = content.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise EngineSetError(
                f"{MANIFEST_NAME} is of format version {version!r}; this version of ditrim reads "
                f"format version {FORMAT_VERSION}"
            )
        seal = content.pop(_SEAL, None)
        manifest = _manifest_from(content)
        if seal != _seal_of(content):
            raise EngineSetError(
                f"{MANIFEST_NAME} was edited after the build: its content does not match its own "
                f"{_SEAL}"
            )
        return manifest


def _seal_of(content: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()
    except ValueError as error:
        raise EngineSetError(f"{MANIFEST_NAME} holds a number that JSON does not have") from error


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON has."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


class _Reader:
    """Takes each key of an object once, with its type, and knows which were never asked for."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise EngineSetError(
                f"{MANIFEST_NAME}: key {where!r} must be an object, not {_kind(content)}"
            )
        self._left = dict(content)
        self._prefix = f"{where}." if where else ""

    def name(self, key: str) -> str:
        return f"{self._prefix}{key}"

    def take(self, key: str, kind: type[_T]) -> _T:
        if key not in self._left:
            raise EngineSetError(f"{MANIFEST_NAME}: key {self.name(key)!r} is missing")
        value = self._left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise EngineSetError(
                f"{MANIFEST_NAME}: key {self.name(key)!r} must be {_kind(kind())}, "
                f"not {_kind(value)}"
            )
        return value

    def count(self, key: str, least: int = 0) -> int:
        value = self.take(key, int)
        if value < least:
            raise EngineSetError(
                f"{MANIFEST_NAME}: key {self.name(key)!r} is {value}; it must be {least} or more"
            )
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.take(key, str)
        if value not in allowed:
            raise EngineSetError(
                f"{MANIFEST_NAME}: key {self.name(key)!r} is {value!r}; allowed: "
                f"{', '.join(allowed)}"
            )
        return value

    def has(self, key: str) -> bool:
        return key in self._left

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        if key in self._left and self._left[key] is None:
            del self._left[key]
            return None
        return self.take(key, kind)

    def items(self, key: str, make: Callable[[Any, str], _T]) -> tuple[_T, ...]:
        values = self.take(key, list)
        return tuple(make(value, f"{self.name(key)}[{i}]") for i, value in enumerate(values))

    def optional_items(self, key: str, make: Callable[[Any, str], _T]) -> tuple[_T, ...] | None:
        if key in self._left and self._left[key] is None:
            del self._left[key]
            return None
        return self.items(key, make)

    def close(self) -> None:
        if self._left:
            names = ", ".join(repr(self.name(key)) for key in sorted(self._left))
            raise EngineSetError(f"{MANIFEST_NAME}: unknown key {names}")


def _manifest_from(content: dict[str, Any]) -> Manifest:
    reader = _Reader(content, "")
    try:
        manifest = Manifest(
            format_version=reader.take("format_version", int),
            identity=reader.take("identity", str),
            ditrim_version=reader.take("ditrim_version", str),
            model=reader.take("model", str),
            architecture=reader.choice("architecture", tuple(ARCHITECTURES)),
            transformer_class=reader.take("transformer_class", str),
            pipeline_class=reader.take("pipeline_class", str),
            transformer_config=reader.take("transformer_config", dict),
            num_layers=reader.count("num_layers", 1),
            front_depth=reader.count("front_depth"),
            representative_layers=reader.items("representative_layers", _whole),
            detailed_layers=reader.items("detailed_layers", _whole)
            if reader.has("detailed_layers")
            else (),
            layers_source=reader.take("layers_source", str),
            ladder=_ladder_from(reader.take("ladder", dict)),
            limits=_limits_from(reader.take("limits", dict)),
            precision=reader.choice("precision", tuple(PRECISIONS)),
            backend=reader.take("backend", str),
            backend_version=reader.take("backend_version", str),
            graphs=_graphs_from(reader.take("graphs", dict)),
            plans=_plans_from(reader.take("plans", dict)),
            target=_target_from(reader.take("target", dict)),
            files=reader.items("files", _file_from),
            source=reader.take("source", dict),
            weights=_samples_from(reader, "weights"),
            merged_weights=_samples_from(reader, "merged_weights"),
            command=reader.take("command", str),
            created=reader.take("created", str),
        )
    except LadderError as error:
        raise EngineSetError(f"{MANIFEST_NAME}: key 'ladder': {error}") from error
    reader.close()
    try:
        check_sizes(manifest.transformer_config, manifest.architecture)
    except ValueError as error:
        raise EngineSetError(f"{MANIFEST_NAME}: key 'transformer_config': {error}") from error
    told = [spec.shape for spec in manifest.graphs["back"].outputs if spec.name == "layer_scores"]
    count = len(manifest.detailed_layers)
    if told != ([("batch", count, 3, "reference")] if count else []):
        raise EngineSetError(
            f"{MANIFEST_NAME}: key 'detailed_layers' names {count} layers, which does not fit the "
            "outputs of 'graphs.back'"
        )
    return manifest


def _samples_from(reader: _Reader, key: str) -> dict[str, str]:
    if not reader.has(key):
        return {}
    content = reader.take(key, dict)
    for name, text in content.items():
        try:
            num_bytes = len(base64.b64decode(_text(text, f"{key}.{name}"), validate=True))
        except ValueError as error:
            raise EngineSetError(f"{MANIFEST_NAME}: key '{key}.{name}': {error}") from error
        if num_bytes % _SAMPLE_BYTES:
            raise EngineSetError(f"{MANIFEST_NAME}: key '{key}.{name}' holds no float32 values")
    return content


def _ladder_from(content: dict[str, Any]) -> Ladder:
    reader = _Reader(content, "ladder")
    rungs = reader.items("rungs", _whole)
    ladder = Ladder(rungs=rungs, granularity=reader.count("granularity", 1))
    reader.close()
    return ladder


def _limits_from(content: dict[str, Any]) -> Limits:
    reader = _Reader(content, "limits")
    limits = Limits(
        batch=reader.count("batch", 1), noisy=reader.count("noisy", 1), text=reader.count("text", 1)
    )
    reader.close()
    return limits


def _graphs_from(content: dict[str, Any]) -> dict[str, GraphSpec]:
    reader = _Reader(content, "graphs")
    graphs = {role: _graph_from(reader.take(role, dict), reader.name(role)) for role in ROLES}
    reader.close()
    return graphs


def _graph_from(content: dict[str, Any], where: str) -> GraphSpec:
    reader = _Reader(content, where)
    graph = GraphSpec(
        file=reader.take("file", str),
        inputs=reader.items("inputs", _tensor_from),
        outputs=reader.items("outputs", _tensor_from),
    )
    reader.close()
    return graph


def _plans_from(content: dict[str, Any]) -> dict[str, PlanSpec]:
    reader = _Reader(content, "plans")
    roles = [role for role in PLAN_ROLES if reader.has(role)]
    plans = {role: _plan_from(reader.take(role, dict), reader.name(role)) for role in roles}
    reader.close()
    missing = [role for role in PLAN_ROLES[:2] if plans and role not in plans]
    if missing:
        raise EngineSetError(f"{MANIFEST_NAME}: key 'plans.{missing[0]}' is missing")
    return plans


def _plan_from(content: dict[str, Any], where: str) -> PlanSpec:
    reader = _Reader(content, where)
    plan = PlanSpec(
        file=reader.take("file", str),
        profiles=reader.items("profiles", _profile_from),
        device_memory_bytes=reader.optional_items("device_memory_bytes", _whole),
        inputs=reader.items("inputs", _tensor_from),
        outputs=reader.items("outputs", _tensor_from),
    )
    reader.close()
    if not plan.profiles:
        raise EngineSetError(f"{MANIFEST_NAME}: key '{where}.profiles' is empty")
    axes = {axis for spec in (*plan.inputs, *plan.outputs) for axis in spec.shape}
    unknown = sorted(axis for axis in axes if isinstance(axis, str) and axis not in AXES)
    if unknown:
        raise EngineSetError(
            f"{MANIFEST_NAME}: key '{where}.inputs' names the axis {unknown[0]!r}; allowed: "
            f"{', '.join(AXES)}"
        )
    for index, profile in enumerate(plan.profiles):
        if (profile.rows is not None) != ("rows" in axes):
            raise EngineSetError(
                f"{MANIFEST_NAME}: key '{where}.profiles[{index}].rows' does not fit the plan's "
                "inputs"
            )
    if plan.device_memory_bytes is not None:
        count, expected = len(plan.device_memory_bytes), len(plan.profiles)
        if count != expected:
            raise EngineSetError(
                f"{MANIFEST_NAME}: key '{where}.device_memory_bytes' has {count} entries for "
                f"{expected} profiles"
            )
    return plan


def _profile_from(content: Any, where: str) -> ProfileSpec:
    reader = _Reader(content, where)
    rows = reader.optional("rows", dict)
    profile = ProfileSpec(
        batch=_range_from(reader.take("batch", dict), reader.name("batch")),
        noisy=_range_from(reader.take("noisy", dict), reader.name("noisy")),
        reference=_range_from(reader.take("reference", dict), reader.name("reference")),
        text=_range_from(reader.take("text", dict), reader.name("text")),
        rows=None if rows is None else _range_from(rows, reader.name("rows")),
    )
    reader.close()
    return profile


def _range_from(content: dict[str, Any], where: str) -> AxisRange:
    reader = _Reader(content, where)
    sizes = {key: reader.count(key, 1) for key in ("least", "best", "most")}
    reader.close()
    try:
        return AxisRange(**sizes)
    except LadderError as error:
        raise EngineSetError(f"{MANIFEST_NAME}: key {where!r}: {error}") from error


def _target_from(content: dict[str, Any]) -> dict[str, Any]:
    if not content:
        return {}
    reader = _Reader(content, "target")
    target = {
        "compute_capabilities": list(reader.items("compute_capabilities", _text)),
        "gpu": reader.optional("gpu", str),
        "driver": reader.optional("driver", str),
        "weights": reader.choice("weights", WEIGHTS),
        "separate_anchor": reader.take("separate_anchor", bool),
    }
    reader.close()
    return target


def _tensor_from(content: Any, where: str) -> TensorSpec:
    reader = _Reader(content, where)
    tensor = TensorSpec(
        name=reader.take("name", str),
        dtype=reader.take("dtype", str),
        shape=reader.items("shape", _axis),
    )
    reader.close()
    return tensor


def _file_from(content: Any, where: str) -> FileEntry:
    reader = _Reader(content, where)
    entry = FileEntry(
        path=reader.take("path", str),
        num_bytes=reader.count("num_bytes"),
        sha256=reader.take("sha256", str),
    )
    reader.close()
    return entry


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise EngineSetError(
            f"{MANIFEST_NAME}: key {where!r} must be a whole number, not {_kind(value)}"
        )
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise EngineSetError(f"{MANIFEST_NAME}: key {where!r} must be text, not {_kind(value)}")
    return value


def _axis(value: Any, where: str) -> str | int:
    return value if isinstance(value, str) else _whole(value, where)
