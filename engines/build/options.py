"""What a caller can ask of a build, and what follows from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ditrim.engines.build.checks import expect_count, expect_one_of, option_of
from ditrim.engines.build.lengths import (
    check_lengths,
    ladder_of,
    limits_of,
    ranges_of,
    usual_references,
)
from ditrim.engines.sets.command import command_of
from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.profiles import ProfileSpec, Ranges, ladder_profiles, plan_roles
from ditrim.engines.sets.specs import Limits
from ditrim.export.family import Family, family_named
from ditrim.export.lora import LoraChoice
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import UsageError
from ditrim.plugins.precision import PRECISIONS

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
# These build plans; the other runs the graphs.
PLAN_BACKENDS = ("tensorrt", "tensorrt-rtx")
_DEFAULT_PRECISION = {"onnxruntime": "fp32", "tensorrt": "bf16", "tensorrt-rtx": "bf16"}
_MOST_OPTIMIZATION = 5
_LEAST_WORKSPACE = 1 << 20
# The compute capability from which GPUs multiply matrices of bf16.
_BF16_FROM = 8
# Options that say how plans are built, and those of one library only.
_ONLY_FOR = {
    "compute_capability": ("tensorrt-rtx", "a plan of tensorrt is for the GPU that builds it"),
    "timing_cache": ("tensorrt", "TensorRT-RTX times nothing while it builds"),
}
PRESETS = ("small",)
VERIFY = ("sizes", "hashes")
# Far beyond what a model is used with; what is larger is a slip of the finger. Those that are none
# have their limit in `lengths.py`.
_MOST = {
    "num_layers": 1000,
    "rungs": 1000,
    "granularity": 1 << 20,
    "max_reference_tokens": None,
    "max_noisy_tokens": None,
    "max_text_tokens": None,
    "max_batch": 1 << 16,
}
_MOST_SEED = (1 << 63) - 1
_MOST_WORKSPACE = 1 << 50
# Of positions: frame, height and width.
_NUM_AXES = 3
# Keys of a configuration that hold whole numbers; the value is the largest.
_MOST_CONFIG = {
    "num_layers": _MOST["num_layers"],
    "num_single_layers": _MOST["num_layers"],
    "num_attention_heads": 1 << 12,
    "attention_head_dim": 1 << 12,
    "in_channels": 1 << 16,
    "out_channels": 1 << 16,
    "patch_size": 1 << 8,
    "joint_attention_dim": 1 << 20,
    "pooled_projection_dim": 1 << 20,
}


def _check_axes(value: Any) -> None:
    is_list = isinstance(value, (list, tuple)) and len(value) == _NUM_AXES
    if not is_list or any(type(width) is not int or width < 2 or width % 2 for width in value):
        raise UsageError(
            f"--config axes_dims_rope is {value!r}; it must be a list of {_NUM_AXES} even numbers "
            "above 0 that add up to attention_head_dim, as [16,56,56]"
        )


def _sizes(given: Any) -> tuple[tuple[int, int], ...]:
    """One size or several, as several."""
    if not given:
        return ()
    return (given,) if isinstance(given[0], int) else tuple(given)


def _words_of(name: str, value: Any) -> tuple[str, ...]:
    """Return the words after an option, for each time that it is given; a switch has none."""
    if name == "config":
        return tuple(f"{key}={json.dumps(value[key])}" for key in sorted(value))
    if name == "lora":
        return tuple(value)
    if name in ("resolution", "reference_resolution"):
        return tuple(f"{width}x{height}" for width, height in _sizes(value))
    if value is True:
        return ()
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value),)


def _plan_option(default: Any, *, shapes: bool = True) -> Any:
    """An option of backends that build plans.

    Args:
        default: its value where it is not given.
        shapes: it enters the identity as it is. Others enter as what follows from them (ranges, the
            device), or only change how long a build takes.
    """
    return field(default=default, metadata={"shapes_plans": shapes})


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of `build-engine`; None means the default of the model.

    Attributes:
        model: a family's name.
        preset: "small", the shipped trained editor.
        weights: a folder, a hub id, "random", or none for the family's hub id.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, as "fp16".
        lora: LoRAs to merge, each FILE[:SCALE].
        seed: of random weights.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx".
        precision: "fp32", "fp16" or "bf16"; given as none it becomes the backend's default.
        front_depth: K.
        layers: L.
        score_details: BACK returns three scores of every layer of its own, for ToPi's ablations.
        num_layers: depth of a trial with random weights.
        config: changes of the configuration, with random weights.
        ladder: reference lengths.
        rungs: how many even ones, where no ladder is given.
        granularity: kept counts are rounded up to a multiple of it; none means 1 for graphs, and
            for plans the smallest power of two that leaves at most 64 kept counts.
        resolution: (width, height) in pixels of the picture in the making, or several of them, of
            which the largest sets the limit; none serves every shape that the pipeline makes.
        reference_resolution: the same of each reference; each adds its lengths to the ladder. None
            serves every shape that the pipeline makes of references, whatever the picture's size.
        num_references: how many references; none means as many as the model takes.
        max_reference_tokens, max_noisy_tokens, max_text_tokens, max_batch: limits, given directly.
        min_batch, opt_batch, min_noisy_tokens, opt_noisy_tokens, min_text_tokens, opt_text_tokens:
            the least sizes that plans serve and those that they are tuned for.
        separate_anchor: a plan of its own for the anchor step.
        allow_unfused: accept attention without a fused kernel.
        workspace: bytes that a layer may use for itself while it runs.
        optimization_level: 0 to 5; the library's own default is 3.
        timing_cache: a file that keeps kernel timings between builds; "none" for none.
        compute_capability: what a plan of tensorrt-rtx is for, as ("8.9", "12.0").
        graph_only: stop when the graphs are written.
        weights_stripped: plans without weights, which get them from the set's graphs when loaded.
        output: the target folder.
        force: build even if an unchanged set is there.
        verify: how a set that is there is checked before it is reused, "sizes" or "hashes".
    """

    model: str = "qwen-edit"
    preset: str | None = None
    weights: str | None = None
    revision: str | None = None
    variant: str | None = None
    lora: tuple[str, ...] = ()
    seed: int | None = None
    backend: str = "onnxruntime"
    precision: str = ""
    front_depth: int | None = None
    layers: tuple[int, ...] | None = None
    score_details: bool = False
    num_layers: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    ladder: tuple[int, ...] | None = None
    rungs: int | None = None
    granularity: int | None = None
    resolution: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    reference_resolution: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    num_references: int | None = None
    max_reference_tokens: int | None = None
    max_noisy_tokens: int | None = None
    max_text_tokens: int | None = None
    max_batch: int | None = None
    min_batch: int | None = _plan_option(None, shapes=False)
    opt_batch: int | None = _plan_option(None, shapes=False)
    min_noisy_tokens: int | None = _plan_option(None, shapes=False)
    opt_noisy_tokens: int | None = _plan_option(None, shapes=False)
    min_text_tokens: int | None = _plan_option(None, shapes=False)
    opt_text_tokens: int | None = _plan_option(None, shapes=False)
    separate_anchor: bool = _plan_option(False)
    allow_unfused: bool = _plan_option(False)
    workspace: int | None = _plan_option(None)
    optimization_level: int | None = _plan_option(None)
    timing_cache: str | None = _plan_option(None, shapes=False)
    compute_capability: tuple[str, ...] | None = _plan_option(None, shapes=False)
    graph_only: bool = False
    weights_stripped: bool = _plan_option(False)
    output: str | None = None
    force: bool = False
    verify: str = "sizes"

    def __post_init__(self) -> None:
        family_named(self.model)
        expect_one_of("--backend", self.backend, BACKENDS)
        if not self.precision:
            object.__setattr__(self, "precision", _DEFAULT_PRECISION[self.backend])
        expect_one_of("--precision", self.precision, tuple(PRECISIONS))
        if self.precision == "bf16" and self.backend == "onnxruntime":
            raise UsageError(
                "--precision bf16 is not available with --backend onnxruntime: its CPU provider "
                "has no bf16 matrix product; use --precision fp32, or fp16 for the CUDA provider"
            )
        expect_one_of("--verify", self.verify, VERIFY)
        for name, most in _MOST.items():
            expect_count(option_of(name), getattr(self, name), most=most)
        expect_count("--front-depth", self.front_depth, least=0)
        expect_count("--seed", self.seed, least=0, most=_MOST_SEED)
        if self.layers is not None and not self.layers:
            raise UsageError(
                "--layers is empty; name at least one layer of BACK, as --layers 35,37"
            )
        for layer in self.layers or ():
            expect_count("--layers", layer, least=0)
        if self.output is not None and not self.output.strip():
            raise UsageError("--output is empty; give a folder")
        if self.weights is not None and not self.weights.strip():
            raise UsageError("--weights is empty; give a folder, a hub id or random")
        self._check_preset()
        self._check_source()
        check_lengths(self)
        self._check_plan_options()
        _ = self.limits, self.reference_ladder, self.ranges

    def _check_preset(self) -> None:
        if self.preset is None:
            return
        expect_one_of("--preset", self.preset, PRESETS)
        if self.model != "qwen-edit":
            raise UsageError(
                f"--preset {self.preset} is a qwen-edit model and cannot be combined with --model "
                f"{self.model}; leave one of them out"
            )
        fixed = ("weights", "variant", "lora", "num_layers", "config", "num_references")
        for name in (*fixed, "resolution", "reference_resolution"):
            if getattr(self, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} cannot be combined with --preset {self.preset}, "
                    "which fixes it; for other lengths use --max-reference-tokens and "
                    "--max-noisy-tokens"
                )

    def _check_source(self) -> None:
        is_random = self.weights == "random"
        for name in ("num_layers", "config", "seed"):
            if not is_random and getattr(self, name) not in (None, {}):
                raise UsageError(
                    f"--{name.replace('_', '-')} needs --weights random: real weights have their "
                    "own configuration"
                )
        if self.variant is not None and is_random:
            raise UsageError(
                "--variant names files of a checkpoint; leave it out with random weights"
            )
        if self.variant is not None and not re.fullmatch(r"[\w-]+", self.variant):
            raise UsageError(f"--variant {self.variant!r} is not valid; give a word, as fp16")
        for text in self.lora:
            LoraChoice.parse(text)
        if self.revision is not None and (self.preset is not None or is_random):
            raise UsageError("--revision needs weights from the hub: --weights <hub id>")
        self._check_config()

    def _check_config(self) -> None:
        for key, value in self.config.items():
            if key in _MOST_CONFIG and (value is not None or key != "out_channels"):
                least = 0 if key.endswith("layers") else 1
                given = "null" if value is None else value
                expect_count(f"--config {key}", given, least, _MOST_CONFIG[key])
            elif key == "axes_dims_rope":
                _check_axes(value)
        architecture = ARCHITECTURES[self.family.architecture]
        depths = set(architecture.depths) & set(self.config)
        if self.num_layers is not None and depths:
            raise UsageError(
                f"--num-layers and --config {min(depths)}=... both set the depth; leave one out"
            )
        if self.num_layers is not None:
            expect_count("--num-layers", self.num_layers, least=len(architecture.blocks))

    def _check_plan_options(self) -> None:
        names = [item.name for item in fields(self) if "shapes_plans" in item.metadata]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        for name in given:
            option = option_of(name)
            if self.backend not in PLAN_BACKENDS:
                raise UsageError(
                    f"{option} is for backends that build plans ({', '.join(PLAN_BACKENDS)}); "
                    f"leave it out with --backend {self.backend}"
                )
            only, reason = _ONLY_FOR.get(name, (self.backend, ""))
            if only != self.backend:
                raise UsageError(f"{option} is for --backend {only} only: {reason}; leave it out")
        if self.graph_only and (self.separate_anchor or self.weights_stripped):
            name = "separate-anchor" if self.separate_anchor else "weights-stripped"
            raise UsageError(
                f"--{name} says how plans are built, and --graph-only stops before; leave one out"
            )
        if self.backend == "tensorrt" and self.precision == "fp32":
            raise UsageError(
                "--precision fp32 is not available with --backend tensorrt: the scoring kernel "
                "takes bf16 or fp16; use one of them"
            )
        expect_count("--workspace", self.workspace, most=_MOST_WORKSPACE)
        if self.workspace is not None and self.workspace < _LEAST_WORKSPACE:
            raise UsageError(
                f"--workspace is {self.workspace} bytes; give {_LEAST_WORKSPACE} or more, with a "
                "unit as in 8GiB"
            )
        expect_count("--optimization-level", self.optimization_level, 0, _MOST_OPTIMIZATION)
        for name in ("min_batch", "opt_batch", "min_noisy_tokens", "opt_noisy_tokens"):
            expect_count(option_of(name), getattr(self, name))
        expect_count("--min-text-tokens", self.min_text_tokens)
        expect_count("--opt-text-tokens", self.opt_text_tokens)
        if self.timing_cache is not None and not self.timing_cache.strip():
            raise UsageError("--timing-cache is empty; give a file, or none")
        self._check_capabilities()

    def _check_capabilities(self) -> None:
        if self.compute_capability is None:
            return
        if not self.compute_capability:
            raise UsageError("--compute-capability is empty; give one or more, as 8.9,12.0")
        for text in self.compute_capability:
            if not re.fullmatch(r"[1-9]\d?\.\d", text):
                raise UsageError(f"--compute-capability {text!r} is not valid; give it as 8.9")
            if self.precision == "bf16" and int(text.split(".")[0]) < _BF16_FROM:
                raise UsageError(
                    f"--compute-capability {text} has no bf16; use --precision fp16, or a "
                    f"capability of {_BF16_FROM}.0 or more"
                )
        if len(set(self.compute_capability)) != len(self.compute_capability):
            raise UsageError(
                f"--compute-capability {','.join(self.compute_capability)} repeats itself"
            )

    @property
    def builds_plans(self) -> bool:
        """Whether plans are built from the graphs."""
        return self.backend in PLAN_BACKENDS and not self.graph_only

    @property
    def needs_library(self) -> bool:
        """Whether the backend's library has to be there; graphs for it can be made without."""
        return self.builds_plans or self.backend not in PLAN_BACKENDS

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """Every resolution that was given for the picture; empty for the pipeline's own."""
        return _sizes(self.resolution)

    @property
    def reference_resolutions(self) -> tuple[tuple[int, int], ...]:
        """Every resolution that was given for references; empty for the pipeline's own."""
        return _sizes(self.reference_resolution)

    @property
    def serves_every_shape(self) -> bool:
        """Whether limits are those of every shape that the pipeline makes."""
        given = (self.ladder, self.max_reference_tokens, self.max_noisy_tokens, self.preset)
        return not any((*given, self.resolution, self.reference_resolution))

    @property
    def family(self) -> Family:
        """The model family that `model` names."""
        return family_named(self.model)

    @property
    def needs_contexts(self) -> bool:
        """Whether every shape that is run is an execution context of its own."""
        return self.backend in PLAN_BACKENDS

    @property
    def limits(self) -> Limits:
        """The largest batch, noisy and text lengths."""
        return limits_of(self)

    @property
    def ranges(self) -> Ranges:
        """Least, best and largest sizes of the axes besides the references."""
        return ranges_of(self)

    @property
    def reference_ladder(self) -> Ladder:
        """The reference lengths; all references together."""
        return ladder_of(self)

    def profiles(self) -> dict[str, tuple[ProfileSpec, ...]]:
        """Optimisation profiles of every plan of the set, by role."""
        return {
            role: ladder_profiles(
                self.reference_ladder,
                self.ranges,
                role,
                separate_anchor=self.separate_anchor,
                usual=usual_references(self),
            )
            for role in plan_roles(separate_anchor=self.separate_anchor)
        }

    @property
    def target(self) -> Path:
        """The folder to build, as given or by default."""
        if self.output is not None:
            return Path(self.output).expanduser()
        name = self.preset or self.model
        if self.weights == "random":
            name += "-random"
        if self.backend != "onnxruntime":
            name += f"-{self.backend}"
        if self.precision != _DEFAULT_PRECISION[self.backend]:
            name += f"-{self.precision}"
        if self.score_details:
            name += "-details"
        if self.graph_only:
            name += "-graphs"
        return Path("engines-out") / name

    def shaping(self) -> dict[str, Any]:
        """Return what decides the set besides K, L, configuration and weights, all resolved."""
        limits, ladder = self.limits, self.reference_ladder
        shaping: dict[str, Any] = {
            "model": self.model,
            "preset": self.preset,
            "precision": self.precision,
            "ladder": [list(ladder.rungs), ladder.granularity],
            "limits": [limits.batch, limits.noisy, limits.text],
            "graph_only": self.graph_only,
            "score_details": self.score_details,
        }
        if self.builds_plans:
            shaping["ranges"] = asdict(self.ranges)
            shaping |= {
                item.name: getattr(self, item.name)
                for item in fields(self)
                if item.metadata.get("shapes_plans")
            }
        return shaping

    def given(self) -> dict[str, tuple[str, ...]]:
        """The options that ask for the same set, by name; those at their defaults are left out."""
        given = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = {} if item.name == "config" else item.default
            if item.name == "precision":
                default = _DEFAULT_PRECISION[self.backend]
            is_needed = item.name == "model" and self.preset is None
            if item.name not in ("force", "verify") and (value != default or is_needed):
                given[item.name] = _words_of(item.name, value)
        return given if self.output is not None else given | {"output": (str(self.target),)}

    def command(self) -> str:
        """The command line that asks for the same set."""
        return command_of(self.given())
