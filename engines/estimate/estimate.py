"""A plan before the build: what a set will weigh, on disk, in the build and on a device.

From the options and the transformer's configuration only: no weights are read or fetched, nothing
is built, and torch is imported only to ask for the GPU that is present. What each figure was
compared with, and how far off it was: `docs/guide/dry-run.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ditrim.engines.build.options import PLAN_BACKENDS, BuildOptions
from ditrim.engines.build.source import Source, choose_split, find_source
from ditrim.engines.cost.devices import DEVICES, Device, device_named, present_device
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.memory import (
    activation_bytes,
    scoring_code_bytes,
    seam_bytes,
)
from ditrim.engines.cost.parameters import complete_config, count_parameters
from ditrim.engines.estimate.advice import Change, changes
from ditrim.engines.files import format_bytes
from ditrim.engines.sets.profiles import is_scored, plan_roles
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import Companion
from ditrim.plugins.blocks import TOKEN_PIXELS
from ditrim.plugins.precision import PRECISIONS

# A plan's kernels of all that is not a block, for each profile. Read off TensorRT-RTX 1.7.1.
_PROFILE_BYTES = {"front": 1_350_000, "back": 800_000}
# An ONNX graph without weights, for each block.
_GRAPH_BLOCK_BYTES = 20_000
# Host memory of a process that has imported torch and diffusers, and of a builder with nothing yet.
_TORCH_BYTES = 700_000_000
_BUILDER_BYTES = 560_000_000
# How often the builder holds the weights of a plan: once as mapped files, which the system can drop
# where memory is short, and about twice of its own. Read off TensorRT-RTX 1.7.1 up to 1.2 GB.
_BUILDER_COPIES = 3.0
# The same of TensorRT's and the device: NVIDIA/TensorRT#4214, 49.9 GiB for FLUX.1's 23.8 GB.
_BUILDER_DEVICE_COPIES = 2.1
# CUDA's context, libraries and caches. An allowance, not measured.
_RESERVE_BYTES = 1 << 30
# A set fits if it leaves the rest free, for what is not counted: workspaces of convolutions,
# fragmentation, and the errors of this estimate.
_USABLE = 0.95
# Capabilities that TensorRT-RTX 1.7 builds for.
_RTX_CAPABILITIES = {(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """One plan of a set; with `onnxruntime`, one graph.

    Attributes:
        role: "front", "back" or "anchor".
        num_parameters: that it holds.
        weights_bytes: of them, in the set's precision.
        file_bytes: of the plan with its weights, or of a graph and its weights.
        activation_bytes: on each rung, at the largest batch, picture and text.
    """

    role: str
    num_parameters: int
    weights_bytes: int
    file_bytes: int
    activation_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Device memory while an edit is made.

    Attributes:
        engines: plans, resident.
        companions: text encoder and VAE, resident.
        denoising, text, pictures: what each phase adds; they run in turn.
        reserve: CUDA's own.
    """

    engines: int
    companions: int
    denoising: int
    text: int
    pictures: int
    reserve: int

    @property
    def total(self) -> int:
        """Peak device memory, bytes."""
        phases = max(self.denoising, self.text, self.pictures)
        return self.engines + self.companions + phases + self.reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Holds what `build-engine --dry-run` reports.

    Attributes:
        command: that the estimate is of.
        model, backend, precision: of the set.
        device: that it is for.
        usable_bytes: of its memory that are counted on.
        rungs: reference lengths.
        batch, num_noisy, num_text: the limits that activations are for.
        front_depth, num_layers, layers: K, the number of blocks, and those that score.
        num_parameters: of the whole transformer.
        plans: by role, in the order in which they are built.
        disk_bytes: of the finished set.
        build_disk_bytes: while it is built, beside a set that it replaces.
        build_graphs_bytes: host memory while the graphs are written.
        build_plans_bytes: host memory of the process that builds a plan; 0 without plans.
        build_device_bytes: 0 where the build needs no device.
        companions: what else is on the device.
        need: device memory while an edit is made.
        every_shape_bytes: of it, what serving every shape of pictures and long prompts takes beyond
            square pictures and short prompts; 0 where lengths were given.
        fits: whether the device has that much.
        changes: what to do if not, in order, up to where it fits.
        fits_on: other devices of the table that have enough as it is.
        notes: what else to know.
    """

    command: str
    model: str
    backend: str
    precision: str
    device: Device
    usable_bytes: int
    rungs: tuple[int, ...]
    batch: int
    num_noisy: int
    num_text: int
    front_depth: int
    num_layers: int
    layers: tuple[int, ...]
    num_parameters: int
    plans: tuple[PlanEstimate, ...]
    disk_bytes: int
    build_disk_bytes: int
    build_graphs_bytes: int
    build_plans_bytes: int
    build_device_bytes: int
    companions: tuple[Companion, ...]
    need: Need
    every_shape_bytes: int
    fits: bool
    changes: tuple[Change, ...]
    fits_on: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values."""
        result: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "device":
                result[name] = asdict(value) | {"sources": dict(value.sources)}
            elif name == "need":
                result[name] = asdict(value) | {"total": value.total}
            elif name in ("plans", "changes"):
                result[name] = [asdict(item) for item in value]
            elif name == "companions":
                result[name] = [_companion_dict(item) for item in value]
            else:
                result[name] = value
        return _listed(result)


def _companion_dict(item: Companion) -> dict[str, Any]:
    names = ("name", "part", "num_parameters", "weights_bytes", "phase", "source")
    return {name: getattr(item, name) for name in names}


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def usable_bytes(device: Device) -> int:
    """Return the memory that a set may take of a device: 95 % of what CUDA reports."""
    return round(_USABLE * device.memory_bytes)


def estimate(
    options: BuildOptions, config: Mapping[str, Any], device: Device | str | None = None
) -> Estimate:
    """Say what a build would take and whether its set would fit a device.

    Args:
        options: of the build.
        config: the transformer's configuration, as `source.planned_config` finds it.
        device: or its name; none means the GPU that is present.

    Raises:
        UsageError: the device is not known, or none is named and none is present; a split or
            length does not fit the model.
    """
    if device is None:
        device = present_device()
    elif isinstance(device, str):
        device = device_named(device)
    figures = _Figures.of(options, config)
    need = figures.need()
    fits = need.total <= usable_bytes(device)
    return Estimate(
        command=options.command(),
        model=options.preset or options.model,
        backend=options.backend,
        precision=options.precision,
        device=device,
        usable_bytes=usable_bytes(device),
        rungs=options.reference_ladder.rungs,
        batch=options.limits.batch,
        num_noisy=options.limits.noisy,
        num_text=options.limits.text,
        front_depth=figures.front_depth,
        num_layers=figures.num_layers,
        layers=figures.layers,
        num_parameters=figures.num_parameters,
        plans=figures.plans,
        disk_bytes=figures.disk_bytes(),
        build_disk_bytes=figures.build_disk_bytes(),
        build_graphs_bytes=figures.build_graphs_bytes(),
        build_plans_bytes=figures.build_plans_bytes(),
        build_device_bytes=figures.build_device_bytes(),
        companions=figures.companions,
        need=need,
        every_shape_bytes=need.total - figures.usual(config).need().total,
        fits=fits,
        changes=()
        if fits
        else tuple(
            changes(
                options,
                usable_bytes(device),
                lambda other, without: _Figures.of(other, config, without).need().total,
            )
        ),
        fits_on=()
        if fits
        else tuple(
            item.name
            for item in DEVICES.values()
            if need.total <= usable_bytes(item) and _is_known(options.backend, item)
        ),
        notes=tuple(_notes(options, device, figures)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """Figures that follow from options and configuration, whatever the device."""

    options: BuildOptions
    config: Mapping[str, Any]
    front_depth: int
    num_layers: int
    layers: tuple[int, ...]
    num_parameters: int
    plans: tuple[PlanEstimate, ...]
    companions: tuple[Companion, ...]

    @classmethod
    def of(
        cls,
        options: BuildOptions,
        config: Mapping[str, Any],
        without: frozenset[str] = frozenset(),
    ) -> _Figures:
        """Count; `without` names companions that are kept off the device."""
        family = options.family
        source = Source(kind="random", location="", config=config)
        if options.preset is not None:
            source = find_source(options)
        split = choose_split(options, source)
        config = complete_config(config, family.architecture)
        counts = count_parameters(config, family.architecture, split.front_depth)
        companions = ARCHITECTURES[family.architecture].companions
        if options.preset is not None:
            companions = ()
        layers = split.representative_layers
        if options.score_details:
            layers = tuple(range(split.front_depth, split.num_layers))
        return cls(
            options=options,
            config=config,
            front_depth=split.front_depth,
            num_layers=split.num_layers,
            layers=layers,
            num_parameters=counts.total,
            plans=tuple(
                _plan(
                    options,
                    config,
                    role,
                    range(split.front_depth)
                    if role == "front"
                    else range(split.front_depth, split.num_layers),
                    counts.front if role == "front" else counts.back,
                    len(layers),
                )
                for role in plan_roles(separate_anchor=options.separate_anchor)
            ),
            companions=tuple(item for item in companions if item.part not in without),
        )

    @property
    def size(self) -> CallSize:
        """The token counts and batch of the largest call."""
        options = self.options
        return CallSize(
            num_noisy=options.limits.noisy,
            num_reference=options.reference_ladder.longest,
            num_text=options.limits.text,
            batch=options.limits.batch,
        )

    def usual(self, config: Mapping[str, Any]) -> _Figures:
        """Those of a set for square pictures and short prompts; its own where lengths are given."""
        options = self.options
        if not options.serves_every_shape:
            return self
        side = math.isqrt(options.family.sizing.usual_tokens) * TOKEN_PIXELS
        usual = options.ranges.text.best
        narrow = replace(
            options,
            resolution=(side, side),
            reference_resolution=(side, side),
            max_text_tokens=options.max_text_tokens or usual,
            granularity=options.granularity or options.reference_ladder.granularity,
        )
        return _Figures.of(narrow, config)

    def need(self) -> Need:
        """Device memory while an edit is made."""
        options, size = self.options, self.size
        arena = max(max(plan.activation_bytes) for plan in self.plans)
        seams = seam_bytes(
            self.config, options.family.architecture, size, precision=options.precision
        )
        phases = {"text": 0, "pictures": 0}
        for item in self.companions:
            added = item.transient_bytes(size.num_noisy * TOKEN_PIXELS**2, size.num_text)
            phases[item.phase] = max(phases[item.phase], added)
        return Need(
            engines=sum(plan.file_bytes for plan in self.plans),
            companions=sum(item.weights_bytes for item in self.companions),
            denoising=arena + seams,
            reserve=_RESERVE_BYTES,
            **phases,
        )

    def disk_bytes(self) -> int:
        """Disk space of the finished engine set, bytes."""
        if self.options.graph_only or self.options.weights_stripped:
            # Graphs point into the checkpoint's own files, which cost nothing where linked.
            kernels = sum(plan.file_bytes - plan.weights_bytes for plan in self.plans)
            graphs = self._weights_once() + _GRAPH_BLOCK_BYTES * self.num_layers
            return graphs + kernels * self.options.weights_stripped
        return sum(plan.file_bytes for plan in self.plans)

    def build_disk_bytes(self) -> int:
        """Disk space at the end of a build, bytes: graphs with weights, plans, and the old set."""
        needed = 2 * self.disk_bytes()
        options = self.options
        if options.builds_plans and not options.weights_stripped and not self._is_linked():
            needed += sum(plan.weights_bytes for plan in self.plans)
        return needed

    def _is_linked(self) -> bool:
        """Whether graphs point into the checkpoint's own files."""
        options = self.options
        has_files = options.weights != "random" and options.preset is None
        return has_files and (options.graph_only or options.builds_plans)

    def _weights_once(self) -> int:
        return sum(plan.weights_bytes for plan in self.plans if plan.role != "anchor")

    def build_graphs_bytes(self) -> int:
        """Host memory while the graphs are written."""
        # Random weights are drawn in float32.
        is_random = self.options.weights == "random"
        element = 4 if is_random else PRECISIONS[self.options.precision].num_bytes
        return _TORCH_BYTES + (0 if self._is_linked() else self.num_parameters * element)

    def build_plans_bytes(self) -> int:
        """Host memory of the process that builds the largest plan."""
        if not self.options.builds_plans:
            return 0
        largest = max(self.plans, key=lambda plan: plan.file_bytes)
        kernels = largest.file_bytes - largest.weights_bytes
        return round(_BUILDER_BYTES + _BUILDER_COPIES * largest.weights_bytes + kernels)

    def build_device_bytes(self) -> int:
        """The builder's copies of the largest plan's weights, and what its kernels run in."""
        if self.options.backend != "tensorrt" or not self.options.builds_plans:
            return 0
        return _RESERVE_BYTES + max(
            round(_BUILDER_DEVICE_COPIES * plan.weights_bytes)
            + max(plan.activation_bytes)
            + (self.options.workspace or 0)
            for plan in self.plans
        )


def _plan(
    options: BuildOptions,
    config: Mapping[str, Any],
    role: str,
    layers: range,
    num_parameters: int,
    num_scored: int,
) -> PlanEstimate:
    architecture, ladder = options.family.architecture, options.reference_ladder
    weights = num_parameters * PRECISIONS[options.precision].num_bytes
    scores = is_scored(role, separate_anchor=options.separate_anchor)
    if options.backend in PLAN_BACKENDS:
        known = ARCHITECTURES[architecture]
        kernels = (
            _PROFILE_BYTES["front" if role == "front" else "back"]
            + sum(known.stream_of(config, layer).plan_bytes for layer in layers)
            + scoring_code_bytes(options.backend, options.limits.noisy) * num_scored * scores
        )
        more = kernels * len(ladder.rungs)
    else:
        more = _GRAPH_BLOCK_BYTES * max(1, len(layers))
    return PlanEstimate(
        role=role,
        num_parameters=num_parameters,
        weights_bytes=weights,
        file_bytes=weights + more,
        activation_bytes=tuple(
            activation_bytes(
                config,
                architecture,
                layers,
                CallSize(
                    num_noisy=options.limits.noisy,
                    num_reference=rung,
                    num_text=options.limits.text,
                    batch=options.limits.batch,
                ),
                backend=options.backend,
                precision=options.precision,
                num_rows=options.limits.noisy * scores,
                num_scored=num_scored,
            )
            for rung in ladder.rungs
        ),
    )


def _is_known(backend: str, device: Device) -> bool:
    """Whether a backend builds for a device at all."""
    return backend != "tensorrt-rtx" or device.compute_capability in _RTX_CAPABILITIES


def _notes(options: BuildOptions, device: Device, figures: _Figures) -> Iterator[str]:
    major, minor = device.compute_capability
    if not _is_known(options.backend, device):
        known = ", ".join(f"{a}.{b}" for a, b in sorted(_RTX_CAPABILITIES))
        yield (
            f"TensorRT-RTX 1.7 builds for compute capability {known}, not for Hopper or B200; "
            f"{device.title} has {major}.{minor}: use --backend tensorrt"
        )
    if options.precision == "bf16" and major < 8:
        yield f"{device.title} has no bf16: use --precision fp16"
    if options.backend == "tensorrt":
        yield (
            "activations and kernels are those of TensorRT-RTX; no plan of TensorRT has been "
            "measured yet"
        )
        needed = figures.build_device_bytes()
        if needed > device.memory_bytes:
            yield (
                f"the build takes about {format_bytes(needed)} of the device at its peak, and "
                f"{device.title} has {format_bytes(device.memory_bytes)}: the builder holds the "
                "weights of the larger plan about twice (NVIDIA/TensorRT#4214). Divide the layers "
                f"evenly with --front-depth {figures.num_layers // 2}, which leaves fewer of them "
                "to reduced steps, or try --weights-stripped, whose peak was not seen"
            )
    if options.backend == "onnxruntime":
        yield "activations are those of ONNX Runtime's CPU provider; CUDA's was not measured"
    if options.builds_plans:
        yield (
            "the builder's host memory is extrapolated from plans of up to 1.2 GB; a third of it "
            "is mapped files"
        )
    if options.weights_stripped:
        yield "stripped plans get their weights when they are loaded: less disk, as much memory"
    if figures.companions:
        yield (
            "text encoder and VAE in 16 bit; one picture at a time in the VAE "
            "(pipe.vae.enable_slicing() for a batch)"
        )
