"""Times FRONT, BACK, anchors and what stands between them, round by round.

Every round runs everything once, in an order that is drawn anew, so that what slows the machine for
a while, and whatever ran before, slows all parts alike. Only the first round, which warms up, goes
from short to long, so that memory that is kept for reuse tells how much each length needs. Before
each part torch's threads are given time to stop spinning, which would slow the engine's. CPUs are
timed by the monotonic clock, GPUs by events on the current stream.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditrim.engines.backend import Engines
from ditrim.engines.cost.cost import Cost, ModelCost, Peak
from ditrim.engines.cost.devices import present_device
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.sets.manifest import Manifest
from ditrim.plugins.layout import Layout
from ditrim.runtime.denoising.calls import Clock, EngineCalls, FrontResult, RopeRows
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.denoising.event_clock import EventClock
from ditrim.runtime.denoising.inputs import ModelInputs
from ditrim.runtime.denoising.rope import rope_for
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import CallView, FullContext, Reduction
from ditrim.runtime.profiling.machine import begin_peak, peak_bytes
from ditrim.runtime.profiling.product import PRODUCT_COST, PRODUCT_SIDE, plain_products
from ditrim.runtime.profiling.profile import PARTS, PRODUCT, Profile, Row

_COPY_BYTES = 64 << 20
_SCHEDULER_STEPS = 1000
_SETTLE_SECONDS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One size that is measured.

    Attributes:
        batch, num_text: B and T.
        noisy_grid, reference_grid: (height, width) in tokens; all references as one picture.
    """

    batch: int
    num_text: int
    noisy_grid: tuple[int, int]
    reference_grid: tuple[int, int]

    @property
    def size(self) -> CallSize:
        """Its lengths."""
        return CallSize(
            num_noisy=self.noisy_grid[0] * self.noisy_grid[1],
            num_reference=self.reference_grid[0] * self.reference_grid[1],
            num_text=self.num_text,
            batch=self.batch,
        )

    @property
    def layout(self) -> Layout:
        """Its pictures."""
        return Layout(self.noisy_grid, (self.reference_grid,))

    @property
    def key(self) -> tuple[int, int, int, int]:
        """As `Row.geometry`."""
        size = self.size
        return size.batch, size.num_noisy, size.num_text, size.num_reference


def grid_of(num_tokens: int) -> tuple[int, int]:
    """(height, width) as square as the number of tokens allows."""
    height = next(h for h in range(int(num_tokens**0.5), 0, -1) if num_tokens % h == 0)
    return height, num_tokens // height


@dataclass(slots=True)
class _Series:
    """Samples of one row."""

    row: dict[str, Any]
    cost: Cost
    samples: list[float] = field(default_factory=list)
    warmup: tuple[float, ...] = ()
    memory_bytes: int | None = None


class Meter:
    """Measures one engine set at several sizes."""

    def __init__(
        self, engines: Engines, geometries: Sequence[Geometry], rungs: Sequence[int], tau: float
    ) -> None:
        """Prepare inputs.

        Args:
            engines: from `load_engines`.
            geometries: sizes, within the set's limits.
            rungs: reference lengths that BACK is measured at; those longer than a geometry's
                references are left out there, and its own length is always measured.
            tau: of the selection that is timed.
        """
        self.engines = engines
        self.manifest = engines.engine_set.manifest
        self.is_cuda = engines.device.type == "cuda"
        self.cost = model_cost_of(self.manifest)
        self._series: dict[tuple[str, CallSize, int], _Series] = {}
        self._is_first = True
        self._sites = [_Site(self, geometry, rungs, tau) for geometry in geometries]
        self._products = () if self.is_cuda else tuple(plain_products(self.manifest.backend))
        self._copies: list[float] = []
        self._buffers = (
            () if self.is_cuda else tuple(torch.zeros(_COPY_BYTES // 4) for _ in range(2))
        )

    def clock(self) -> Clock:
        """Of this device."""
        return EventClock(self.engines.device) if self.is_cuda else Clock(None)

    def begin_part(self) -> None:
        """Before each part; looking at memory takes time, so only in the first round."""
        if self._is_first:
            begin_peak(self.engines.device)

    def add(
        self, part: str, size: CallSize, num_kept: int, milliseconds: float, cost: Cost
    ) -> None:
        """One more sample."""
        key = (part, size, num_kept)
        if key not in self._series:
            row = {
                "part": part,
                "batch": size.batch,
                "num_noisy": size.num_noisy,
                "num_text": size.num_text,
                "num_reference": size.num_reference,
                "num_kept": num_kept,
            }
            self._series[key] = _Series(row, cost)
        series = self._series[key]
        # A clock's tick is the least that it can tell.
        series.samples.append(max(milliseconds, 1e-6))
        if self._is_first and part != PRODUCT:
            series.memory_bytes = peak_bytes(self.engines.device)

    @torch.no_grad()
    def measure(self, repeats: int, warmup: int, on_round: Callable[[int, str], None]) -> None:
        """Run all rounds.

        Args:
            repeats: rounds that count.
            warmup: rounds before them.
            on_round: called with the number of finished rounds and a word about them.
        """
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            for number in range(warmup + repeats):
                self._is_first = number == 0
                if number == warmup:
                    for series in self._series.values():
                        series.warmup = tuple(series.samples)
                        series.samples.clear()
                    self._copies.clear()
                self._round(number)
                on_round(number + 1, "warming up" if number < warmup else "measuring")
        finally:
            if was_enabled:
                gc.enable()

    def _round(self, number: int) -> None:
        for name, run in self._products:
            start = time.perf_counter()
            run()
            self.add(PRODUCT, _PRODUCT_SIZE[name], 0, _since(start), PRODUCT_COST)
        if self._products:
            start = time.perf_counter()
            self._buffers[0].copy_(self._buffers[1])
            self._copies.append(_since(start))
        for site in self._sites:
            site.run_round(number)

    def peak(self) -> Peak:
        """What the device can do: by its data sheet, or on a CPU as measured in these rounds."""
        if self.is_cuda:
            device = present_device(self.engines.device.index or 0)
            precision = self.manifest.precision
            rate = device.peak_tflops(precision) if precision != "fp32" else None
            source = "not established" if rate is None else device.peak_source(precision)
            return Peak(tflops=rate, gb_s=device.bandwidth_gb_s, source=source)
        least = {
            name: min(self._series[PRODUCT, _PRODUCT_SIZE[name], 0].samples)
            for name, _ in self._products
        }
        best = min(least, key=lambda name: least[name])
        return Peak(
            tflops=PRODUCT_COST.flops / least[best] / 1e9,
            gb_s=2 * _COPY_BYTES / min(self._copies) / 1e6,
            source="measured beside the rest, the best of all rounds: a float32 product of "
            f"{PRODUCT_SIDE} x {PRODUCT_SIDE} by {best}, the faster of {' and '.join(least)}; a "
            f"copy of {_COPY_BYTES >> 20} MiB, read and written. No bound: a library can be faster "
            "on other shapes",
        )

    def rows(self) -> tuple[Row, ...]:
        """What was measured: products, then size by size its parts, short before long."""
        order = [site.size for site in self._sites]
        names = (PRODUCT, *PARTS)

        def place(key: tuple[str, CallSize, int]) -> tuple[int, int, int]:
            part, size, num_kept = key
            return order.index(size) if size in order else -1, names.index(part), num_kept

        return tuple(
            Row(
                **series.row,
                samples_ms=tuple(series.samples),
                warmup_ms=series.warmup,
                flops=series.cost.flops,
                num_bytes=series.cost.num_bytes,
                memory_bytes=series.memory_bytes,
            )
            for _, series in sorted(self._series.items(), key=lambda item: place(item[0]))
        )


class _Site:
    """One geometry: its inputs, and a round over its parts."""

    def __init__(self, meter: Meter, geometry: Geometry, rungs: Sequence[int], tau: float) -> None:
        self.meter, self.size = meter, geometry.size
        manifest, engines = meter.manifest, meter.engines
        self.calls = EngineCalls(engines)
        self.inputs = random_inputs(manifest, geometry, engines.device)
        self.grids = geometry.layout.grids
        self.group = (torch.arange(geometry.batch), None)
        length = self.size.num_reference
        lengths = sorted({rung for rung in rungs if rung < length} | {length})
        generator = torch.Generator().manual_seed(0)
        self.reductions: dict[int, Reduction | None] = {
            kept: Reduction(kept=_some_tokens(geometry.batch, length, kept, generator, engines))
            for kept in lengths
            if kept < length
        }
        self.reductions[length] = None
        self.ropes: dict[int, RopeRows] = {}
        self.policy = ToPi(tau=tau)
        self.influence = torch.rand(
            geometry.batch, length, generator=generator, dtype=torch.float32
        ).to(engines.device)
        device = engines.device
        self.one_row = torch.zeros(1, dtype=torch.int64, device=device)
        self.all_rows = torch.arange(self.size.num_noisy, device=device)
        self.step = Denoiser(engines, FullContext(), timing=meter.is_cuda).begin()
        self.scheduler = _SchedulerStep(self.inputs.noisy_latents)

    def run_round(self, number: int) -> None:
        self._settle()
        self.meter.begin_part()
        front = self._front()
        parts: list[Callable[[], None]] = [
            *(partial(self._back, front, kept) for kept in self.reductions),
            partial(self._anchor, front),
            self._select,
            partial(self._rope, front),
            self._schedule,
            self._step,
        ]
        if number > 0:
            random.Random(number).shuffle(parts)
        for run in parts:
            self._settle()
            self.meter.begin_part()
            run()

    def _settle(self) -> None:
        if not self.meter.is_cuda:
            time.sleep(_SETTLE_SECONDS)

    def _add(self, part: str, kept: int, milliseconds: float, cost: Cost | None = None) -> None:
        self.meter.add(part, self.size, kept, milliseconds, cost or Cost())

    def _at(self, kept: int) -> CallSize:
        return replace(self.size, num_reference=kept)

    def _front(self) -> FrontResult:
        clock = self.meter.clock()
        front = self.calls.run_front(self.inputs, self.group, None, clock)
        _finish(clock)
        cost = self.meter.cost.front(self.size)
        self._add("front", self.size.num_reference, clock.parts["front"], cost)
        return front

    def _back(self, front: FrontResult, kept: int) -> None:
        reduction = self.reductions[kept]
        if reduction is not None and kept not in self.ropes:
            assert reduction.kept is not None
            self.ropes[kept] = self.calls.rope_rows(front.tables, reduction.kept)
        rope = self.ropes.get(kept)
        clock = self.meter.clock()
        self.calls.run_back(front, "back", reduction, self.one_row, clock, rope=rope)
        _finish(clock)
        is_scored = not self.meter.manifest.target.get("separate_anchor")
        cost = self.meter.cost.back(self._at(kept), num_rows=int(is_scored))
        self._add("back", kept, clock.parts["back"], cost)
        if self.reductions[kept] is not None:
            cost = self.meter.cost.gather(self._at(kept))
            self._add("gather", kept, clock.parts["gather"], cost)

    def _anchor(self, front: FrontResult) -> None:
        clock = self.meter.clock()
        self.calls.run_back(front, "anchor", None, self.all_rows, clock)
        _finish(clock)
        cost = self.meter.cost.back(self.size, num_rows=self.size.num_noisy)
        self._add("anchor", self.size.num_reference, clock.parts["back"], cost)

    def _select(self) -> None:
        view = CallView(
            step=0,
            branch="cond",
            ladder=self.meter.manifest.ladder,
            grids=self.grids,
            influence=self.influence,
        )
        clock = self.meter.clock()
        self.policy.select(view)
        clock.lap("select")
        _finish(clock)
        self._add("selection", self.size.num_reference, clock.parts["select"])

    def _rope(self, front: FrontResult) -> None:
        """The rows of the position tables that the steps after an anchor share."""
        reduced = [reduction for reduction in self.reductions.values() if reduction is not None]
        if not reduced:
            return
        kept = reduced[-1].kept
        assert kept is not None
        clock = self.meter.clock()
        for table in front.tables.reference:
            _ = table.index_select(0, kept.flatten()).unflatten(0, kept.shape)
        clock.lap("rope")
        _finish(clock)
        self._add("rope", kept.shape[1], clock.parts["rope"])

    def _schedule(self) -> None:
        self.scheduler.rewind()
        clock = self.meter.clock()
        self.scheduler.run()
        clock.lap("scheduler")
        _finish(clock)
        self._add("scheduler", self.size.num_reference, clock.parts["scheduler"])

    def _step(self) -> None:
        """A full-context call as the runtime makes it: what it takes besides the two graphs."""
        self.step.begin_step(0.7)
        self.step.predict("cond", self.inputs)
        self.step.end_step()
        record = self.step.report.steps.pop()
        length = self.size.num_reference
        cost = self.meter.cost.front(self.size) + self.meter.cost.back(self.size, num_rows=1)
        self._add("step", length, record.total_ms, cost)
        self._add("overhead", length, record.total_ms - record.front_ms - record.back_ms)


class _SchedulerStep:
    """Euler's step by diffusers, on latents of this size."""

    def __init__(self, latents: Tensor) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._scheduler = FlowMatchEulerDiscreteScheduler()
        self._scheduler.set_timesteps(_SCHEDULER_STEPS, device=latents.device)
        self._scheduler.set_begin_index(0)
        self._latents, self._velocity = latents, torch.randn_like(latents)

    def rewind(self) -> None:
        """Make the next step the first, so that they never run out."""
        self._scheduler._step_index = 0

    def run(self) -> None:
        """One step."""
        time_step = self._scheduler.timesteps[0]
        self._scheduler.step(self._velocity, time_step, self._latents, return_dict=False)


def model_cost_of(manifest: Manifest) -> ModelCost:
    """The cost model of an engine set."""
    return ModelCost(
        config=manifest.transformer_config,
        architecture=manifest.architecture,
        front_depth=manifest.front_depth,
        num_layers=manifest.num_layers,
        num_scored=len(manifest.detailed_layers or manifest.representative_layers),
        precision=manifest.precision,
        backend=manifest.backend,
    )


def random_inputs(manifest: Manifest, geometry: Geometry, device: torch.device) -> ModelInputs:
    """Inputs of a size; their values do not matter for the time."""
    config, size = manifest.transformer_config, geometry.size
    names = {spec.name: spec for spec in manifest.graphs["front"].inputs}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, *lengths: int) -> Tensor:
        channels = int(names[name].shape[-1])
        return torch.randn(size.batch, *lengths, channels, generator=generator).to(device)

    return ModelInputs(
        noisy_latents=draw("noisy_latents", size.num_noisy),
        reference_latents=draw("reference_latents", size.num_reference),
        text_embeds=draw("text_embeds", size.num_text),
        timestep=torch.full((size.batch,), 0.7),
        time=0.7,
        layout=geometry.layout,
        guidance=torch.full((size.batch,), 2.5) if "guidance" in names else None,
        pooled_text=draw("pooled_text") if "pooled_text" in names else None,
        rope_key=("profile", geometry),
        make_rope=partial(
            rope_for,
            manifest.architecture,
            geometry.layout,
            size.num_text,
            config["axes_dims_rope"],
            device,
        ),
    )


def profile_of(meter: Meter, settings: dict[str, Any], machine: dict[str, Any]) -> Profile:
    """What a meter measured, with everything that it was measured on."""
    manifest = meter.manifest
    return Profile(
        engine={
            "model": manifest.model,
            "architecture": manifest.architecture,
            "config": dict(manifest.transformer_config),
            "front_depth": manifest.front_depth,
            "num_layers": manifest.num_layers,
            "num_scored": meter.cost.num_scored,
            "precision": manifest.precision,
            "backend": manifest.backend,
            "backend_version": manifest.backend_version,
            "identity": manifest.identity,
            "rungs": list(manifest.ladder.rungs),
            "granularity": manifest.ladder.granularity,
            "limits": {
                "batch": manifest.limits.batch,
                "noisy": manifest.limits.noisy,
                "text": manifest.limits.text,
            },
        },
        machine=machine,
        peak=meter.peak(),
        settings=settings,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rows=meter.rows(),
    )


_PRODUCT_SIZE = {  # products have no lengths; the batch tells whose they are
    "torch": CallSize(num_noisy=0, num_reference=0, num_text=0, batch=0),
    "onnxruntime": CallSize(num_noisy=0, num_reference=0, num_text=0, batch=1),
}


def _some_tokens(
    batch: int, length: int, kept: int, generator: torch.Generator, engines: Engines
) -> Tensor:
    """(B, K') int64, ascending: tokens drawn at random."""
    rows = [torch.randperm(length, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows).to(engines.device)


def _finish(clock: Clock) -> None:
    if isinstance(clock, EventClock):
        clock.finish()


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
