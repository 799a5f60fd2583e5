"""What a caller can ask of a build, and what follows from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ditrim.engines.ladder import Ladder
from ditrim.engines.manifest import PRECISIONS, Limits
from ditrim.export.family import Family, family_named
from ditrim.plugins.errors import LadderError, UsageError

BACKENDS = ("onnxruntime",)
_PLANNED_BACKENDS = ("tensorrt", "tensorrt-rtx")
PRESETS = ("small",)
VERIFY = ("sizes", "hashes")
# Pixels a token spans: the VAE's factor 8 and patches of 2.
_TOKEN_PIXELS = 16
_DEFAULT_RESOLUTION = (1024, 1024)
_DEFAULT_REFERENCES = {
    "qwen-edit": 1,
    "qwen-edit-plus": 2,
    "qwen-edit-2511": 2,
    "flux-kontext": 1,
}
_DEFAULT_TEXT_TOKENS = {"qwen": 1024, "flux": 512}
_DEFAULT_BATCH = 4
_DEFAULT_RUNGS = 8
# The shipped editor: 12x12 tokens a picture, with one reference of 18x18 beside one of 12x12.
_SMALL_LIMITS = Limits(batch=_DEFAULT_BATCH, noisy=144, text=64)
_SMALL_REFERENCE = 324 + 144


def _expect(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} is {value!r}; allowed: {', '.join(allowed)}")


# Far beyond what a model is used with; what is larger is a slip of the finger.
_MOST = {
    "num_layers": 1000,
    "rungs": 1000,
    "granularity": 1 << 20,
    "num_references": 1000,
    "max_reference_tokens": 1 << 20,
    "max_noisy_tokens": 1 << 20,
    "max_text_tokens": 1 << 20,
    "max_batch": 1 << 16,
}


def _expect_count(option: str, value: Any, least: int = 1, most: int | None = None) -> None:
    if value is None:
        return
    if most is not None and isinstance(value, int) and value > most:
        raise UsageError(f"{option} is {value!r}; it must be at most {most}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{option} is {value!r}; it must be a whole number, {least} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Options of `build-engine`; None means the default of the model.

    Attributes:
        model: a family's name.
        preset: "small", the shipped trained editor.
        weights: a folder, a hub id, "random", or none for the family's hub id.
        revision: branch, tag or commit of a hub id.
        seed: of random weights.
        backend: "onnxruntime".
        precision: "fp32" or "fp16".
        front_depth: K.
        layers: L.
        num_layers: depth of a trial with random weights.
        config: changes of the configuration, with random weights.
        ladder: reference lengths.
        rungs: how many even ones, where no ladder is given.
        granularity: kept counts are rounded up to a multiple of it.
        resolution: (width, height) of the picture and of each reference, in pixels.
        num_references: how many references.
        max_reference_tokens, max_noisy_tokens, max_text_tokens, max_batch: limits, given directly.
        output: the target folder.
        force: build even if an unchanged set is there.
        verify: how a set that is there is checked before it is reused, "sizes" or "hashes".
    """

    model: str = "qwen-edit"
    preset: str | None = None
    weights: str | None = None
    revision: str | None = None
    seed: int | None = None
    backend: str = "onnxruntime"
    precision: str = "fp32"
    front_depth: int | None = None
    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    ladder: tuple[int, ...] | None = None
    rungs: int | None = None
    granularity: int = 1
    resolution: tuple[int, int] | None = None
    num_references: int | None = None
    max_reference_tokens: int | None = None
    max_noisy_tokens: int | None = None
    max_text_tokens: int | None = None
    max_batch: int | None = None
    output: str | None = None
    force: bool = False
    verify: str = "sizes"

    def __post_init__(self) -> None:
        family_named(self.model)
        if self.backend in _PLANNED_BACKENDS:
            raise UsageError(
                f"--backend {self.backend} is not available in this version; use --backend "
                "onnxruntime, whose graphs run on any CPU and, with onnxruntime-gpu, on CUDA"
            )
        _expect("--backend", self.backend, BACKENDS)
        _expect("--precision", self.precision, PRECISIONS)
        if self.precision == "bf16":
            raise UsageError(
                "--precision bf16 is not available with --backend onnxruntime: its CPU provider "
                "has no bf16 matrix product; use --precision fp32, or fp16 for the CUDA provider"
            )
        _expect("--verify", self.verify, VERIFY)
        for name in (
            "num_layers",
            "rungs",
            "granularity",
            "num_references",
            "max_reference_tokens",
            "max_noisy_tokens",
            "max_text_tokens",
            "max_batch",
        ):
            _expect_count(f"--{name.replace('_', '-')}", getattr(self, name), most=_MOST[name])
        _expect_count("--front-depth", self.front_depth, least=0)
        _expect_count("--seed", self.seed, least=0)
        if self.layers is not None and not self.layers:
            raise UsageError(
                "--layers is empty; name at least one layer of BACK, as --layers 35,37"
            )
        for layer in self.layers or ():
            _expect_count("--layers", layer, least=0)
        if self.output is not None and not self.output.strip():
            raise UsageError("--output is empty; give a folder")
        self._check_preset()
        self._check_source()
        self._check_geometry()
        _ = self.limits, self.reference_ladder

    def _check_preset(self) -> None:
        if self.preset is None:
            return
        _expect("--preset", self.preset, PRESETS)
        if self.model != "qwen-edit":
            raise UsageError(
                f"--preset {self.preset} is a qwen-edit model and cannot be combined with --model "
                f"{self.model}; leave one of them out"
            )
        for name in ("weights", "num_layers", "config", "resolution", "num_references"):
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
        if self.revision is not None and (self.preset is not None or is_random):
            raise UsageError("--revision needs weights from the hub: --weights <hub id>")
        for key, value in self.config.items():
            if isinstance(value, int) and not isinstance(value, bool):
                _expect_count(f"--config {key}", value, least=0 if key.endswith("layers") else 1)
        depths = {"num_layers", "num_single_layers"} & set(self.config)
        if self.num_layers is not None and depths:
            raise UsageError(
                f"--num-layers and --config {min(depths)}=... both set the depth; leave one out"
            )
        if self.num_layers is not None and self.family.architecture == "flux":
            _expect_count("--num-layers", self.num_layers, least=2)

    def _check_geometry(self) -> None:
        if self.resolution is not None:
            width, height = self.resolution
            for side, pixels in (("width", width), ("height", height)):
                _expect_count(f"--resolution: the {side}", pixels)
                if pixels % _TOKEN_PIXELS:
                    near = max(1, round(pixels / _TOKEN_PIXELS)) * _TOKEN_PIXELS
                    raise UsageError(
                        f"--resolution {width}x{height}: the {side} {pixels} is not a multiple of "
                        f"{_TOKEN_PIXELS} pixels, the side of a token; the nearest is {near}"
                    )
        if self.num_references is not None and self.num_references > self.family.max_references:
            raise UsageError(
                f"--num-references is {self.num_references}; {self.model} takes at most "
                f"{self.family.max_references}"
            )
        if self.ladder is not None:
            if self.rungs is not None:
                raise UsageError("--ladder and --rungs both set the ladder; leave one out")
            if not self.ladder:
                raise UsageError("--ladder is empty; name lengths, as --ladder 512,1024,4096")
            if self.max_reference_tokens not in (None, self.ladder[-1]):
                raise UsageError(
                    f"--ladder ends at {self.ladder[-1]}, but --max-reference-tokens is "
                    f"{self.max_reference_tokens}; make them equal or leave one out"
                )

    @property
    def family(self) -> Family:
        """The model family."""
        return family_named(self.model)

    @property
    def limits(self) -> Limits:
        """The largest batch, noisy and text lengths."""
        default = _SMALL_LIMITS
        if self.preset is None:
            width, height = self.resolution or _DEFAULT_RESOLUTION
            default = Limits(
                batch=_DEFAULT_BATCH,
                noisy=(width // _TOKEN_PIXELS) * (height // _TOKEN_PIXELS),
                text=_DEFAULT_TEXT_TOKENS[self.family.architecture],
            )
        return Limits(
            batch=self.max_batch or default.batch,
            noisy=self.max_noisy_tokens or default.noisy,
            text=self.max_text_tokens or default.text,
        )

    @property
    def reference_ladder(self) -> Ladder:
        """The reference lengths; all references together."""
        if self.ladder is not None:
            try:
                return Ladder(rungs=self.ladder, granularity=self.granularity)
            except LadderError as error:
                raise UsageError(f"--ladder: {error}") from error
        longest = self.max_reference_tokens
        if longest is None and self.preset is not None:
            longest = _SMALL_REFERENCE
        if longest is None:
            width, height = self.resolution or _DEFAULT_RESOLUTION
            count = self.num_references or _DEFAULT_REFERENCES[self.model]
            longest = count * (width // _TOKEN_PIXELS) * (height // _TOKEN_PIXELS)
        if self.granularity > longest:
            raise UsageError(
                f"--granularity is {self.granularity}; it must be at most {longest}, the longest "
                "reference length"
            )
        return Ladder.even(
            longest, num_rungs=self.rungs or _DEFAULT_RUNGS, granularity=self.granularity
        )

    @property
    def target(self) -> Path:
        """The folder to build, as given or by default."""
        if self.output is not None:
            return Path(self.output).expanduser()
        name = self.preset or self.model
        if self.weights == "random":
            name += "-random"
        if self.precision != "fp32":
            name += f"-{self.precision}"
        return Path("engines-out") / name

    def shaping(self) -> dict[str, Any]:
        """What the result depends on besides K, L, configuration and weights; no defaults left."""
        limits, ladder = self.limits, self.reference_ladder
        return {
            "model": self.model,
            "preset": self.preset,
            "precision": self.precision,
            "ladder": [list(ladder.rungs), ladder.granularity],
            "limits": [limits.batch, limits.noisy, limits.text],
        }

    def command(self) -> str:
        """The command line that asks for the same set; options at their defaults are left out."""
        arguments = ["build-engine"]
        for item in fields(self):
            value = getattr(self, item.name)
            default = {} if item.name == "config" else item.default
            is_needed = item.name == "model" and self.preset is None
            if item.name in ("force", "verify") or (value == default and not is_needed):
                continue
            option = f"--{item.name.replace('_', '-')}"
            if item.name == "config":
                for key in sorted(value):
                    arguments += [option, f"{key}={json.dumps(value[key])}"]
            elif item.name == "resolution":
                arguments += [option, f"{value[0]}x{value[1]}"]
            elif isinstance(value, tuple):
                arguments += [option, ",".join(map(str, value))]
            else:
                arguments += [option, str(value)]
        if self.output is None:
            arguments += ["--output", str(self.target)]
        return shlex.join(arguments)
