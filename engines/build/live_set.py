"""What an engine set's manifest says, said of a transformer in memory: nothing is on a disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from ditrim.engines.backends.torch.engines import dtype_of
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.source import Source, choose_split, read_calibration
from ditrim.engines.presets import small_editor_folder
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.engines.sets.fingerprints import samples_of
from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.manifest import FORMAT_VERSION, GraphSpec, Manifest
from ditrim.engines.sets.specs import Limits, TensorSpec
from ditrim.export.family import FAMILIES, Family
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.transformers import architecture_of
from ditrim.plugins.errors import UsageError
from ditrim.plugins.precision import PRECISIONS, precision_of

# A length is a fact here, not something that was built: these only catch slips of the finger.
_MOST_BATCH = 1 << 10
_MOST_NOISY = _MOST_REFERENCE = 1 << 18
_MOST_TEXT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEngineSet(EngineSet):
    """A transformer in memory, described as an engine set; `folder` is where it came from.

    Attributes:
        family_edit: see `largest_edit`; the family's, though longer ones run too.
    """

    family_edit: tuple[int, int, int]

    @property
    def largest_edit(self) -> tuple[int, int, int]:
        """The most noisy, text and reference tokens of an edit of the family's pipeline."""
        return self.family_edit

    def rebuild_command(self, **changes: object) -> str:
        """Return the command of an engine set for other lengths; nothing was built here."""
        return (
            "build-engine --model "
            + self.manifest.model
            + "".join(f" --{name.replace('_', '-')} {value}" for name, value in changes.items())
        )


def family_of(transformer: Any, pipeline_class: str | None, model: str | None) -> Family:
    """The family of a transformer and of the pipeline that it runs in.

    Args:
        transformer: of diffusers.
        pipeline_class: its name; none where there is no pipeline.
        model: a family's name, which decides; none looks at the pipeline and the configuration.

    Raises:
        UsageError: no family has this transformer, or `model` is of another architecture.
    """
    architecture = architecture_of(transformer)
    fitting = [f for f in FAMILIES.values() if f.architecture == architecture]
    if model is not None:
        chosen = next((f for f in fitting if f.name == model), None)
        if chosen is None:
            raise UsageError(
                f"model={model!r} is no family of {type(transformer).__name__}; choose one of "
                f"{', '.join(f.name for f in fitting)}"
            )
        return chosen
    config = transformer.config

    def distance(family: Family) -> tuple[bool, bool]:
        switches = all(config.get(key) == value for key, value in family.config.items())
        is_plain = bool(config.get("zero_cond_t")) == bool(family.config.get("zero_cond_t"))
        return family.pipeline_class != pipeline_class, not (switches and is_plain)

    return min(fitting, key=distance)  # the first of equals


def describe(
    transformer: Any,
    *,
    family: Family,
    pipeline_class: str,
    is_small: bool,
    front_depth: int | None,
    layers: tuple[int, ...] | None,
    few_lengths: bool,
    granularity: int | None,
) -> LiveEngineSet:
    """Describe a transformer as an engine set.

    Args:
        transformer: of diffusers.
        family: decides front depth, scored layers and ladder where they are not given.
        pipeline_class: that it runs in.
        is_small: it is the shipped small editor's.
        front_depth, layers: K and L in place of the family's.
        few_lengths: round kept counts so that few lengths occur, as for engines with contexts.
        granularity: what kept counts are rounded to, in place of that.

    Raises:
        UsageError: K, L or the granularity do not fit, or the transformer is no editor's.
    """
    config = {key: value for key, value in dict(transformer.config).items() if key[0] != "_"}
    reason = ARCHITECTURES[family.architecture].refusal(config)
    if reason is not None:
        raise UsageError(f"this transformer cannot run reduced: {reason}")
    precision = precision_of(dtype_of(transformer)).name
    options = BuildOptions(
        model=family.name,
        preset="small" if is_small else None,
        backend="tensorrt" if few_lengths else "onnxruntime",
        front_depth=front_depth,
        layers=layers,
        granularity=granularity,
    )
    calibration = {}
    if is_small:
        calibration = read_calibration(small_editor_folder() / "calibration.json")
    source = Source(
        kind="memory",
        location=str(config.get("_name_or_path", "")),
        checkpoint=cast(Any, None),
        config=config,
        calibration=calibration,
    )
    split = choose_split(options, source)
    graphs = _graphs(transformer, precision)
    facts = json.dumps([config, split.front_depth, split.representative_layers], default=str)
    limits, ladder = options.limits, options.reference_ladder
    return LiveEngineSet(
        family_edit=(limits.noisy, limits.text, ladder.longest),
        folder=Path(str(getattr(transformer, "name_or_path", "") or "memory")),
        manifest=Manifest(
            format_version=FORMAT_VERSION,
            identity=hashlib.sha256(facts.encode()).hexdigest(),
            ditrim_version=version("ditrim"),
            model=family.name,
            architecture=family.architecture,
            transformer_class=family.transformer_class,
            pipeline_class=pipeline_class,
            transformer_config=config,
            num_layers=split.num_layers,
            front_depth=split.front_depth,
            representative_layers=split.representative_layers,
            layers_source=split.layers_source,
            ladder=_open_ended(ladder),
            limits=Limits(batch=_MOST_BATCH, noisy=_MOST_NOISY, text=_MOST_TEXT),
            precision=precision,
            backend="torch",
            backend_version=torch.__version__,
            graphs=graphs,
            plans={},
            target={},
            files=(),
            source={
                "kind": "small" if is_small else "memory",
                "location": source.location,
                "files": {"weights in memory": {"sha256": _digest_of(transformer)}},
            },
            options={},
            created="",
        ),
    )


def _digest_of(transformer: Any) -> str:
    """SHA-256 over samples of the weights that can be read where they lie."""
    digest = hashlib.sha256()
    for name, weight in transformer.state_dict().items():
        for part, tensor in _plain_tensors(name, weight):
            if tensor.device.type != "meta":
                digest.update(part.encode() + samples_of(tensor).tobytes())
    return digest.hexdigest()


def _plain_tensors(name: str, weight: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight, or what a quantised one (a tensor subclass, as of torchao) is stored in."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield name, weight
        return
    for part in weight.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(weight, part))


def _open_ended(ladder: Ladder) -> Ladder:
    """A ladder that goes on by doubling: nothing was built for lengths that end."""
    rungs = list(ladder.rungs)
    while rungs[-1] < _MOST_REFERENCE:
        rungs.append(2 * rungs[-1])
    return Ladder(rungs=tuple(rungs), granularity=ladder.granularity)


def _graphs(transformer: Any, precision: str) -> dict[str, GraphSpec]:
    """Tensors of FRONT and BACK, as far as the runtime asks for them."""
    config, width = transformer.config, transformer.inner_dim
    dtype = PRECISIONS[precision].torch_name

    def spec(name: str, *shape: str | int, of: str = dtype) -> TensorSpec:
        return TensorSpec(name=name, dtype=of, shape=shape)

    channels = config.in_channels
    front = [
        spec("noisy_latents", "batch", "noisy", channels),
        spec("reference_latents", "batch", "reference", channels),
        spec("text_embeds", "batch", "text", config.joint_attention_dim),
        spec("timestep", "batch", of="float32"),
    ]
    known = ARCHITECTURES[architecture_of(transformer)]
    extra = {
        "guidance": spec("guidance", "batch", of="float32"),
        "pooled_text": spec("pooled_text", "batch", config.get("pooled_projection_dim", 1)),
    }
    front += [extra[name] for name in known.front_inputs(config)]
    hidden = [
        spec("noisy", "batch", "noisy", width),
        spec("reference", "batch", "reference", width),
        spec("text", "batch", "text", width),
        spec("temb", "batch", width),
    ]
    if known.has_reference_temb(config):
        hidden.append(spec("reference_temb", "batch", width))
    rows = spec("score_rows", "rows", of="int64")
    out_channels = config.patch_size**2 * (config.get("out_channels") or channels)
    back = (
        spec("velocity", "batch", "noisy", out_channels),
        spec("influence", "batch", "reference", of="float32"),
    )
    return {
        "front": GraphSpec(file="", inputs=tuple(front), outputs=tuple(hidden)),
        "back": GraphSpec(file="", inputs=(*hidden, rows), outputs=back),
    }
