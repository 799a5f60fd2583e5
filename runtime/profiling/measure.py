"""Times FRONT, BACK, anchors and what stands between them, round by round.

Only the first round, which warms up, goes from short to long, so that memory that is kept for reuse
shows how much each length needs. CPUs are timed by the monotonic clock, GPUs by events on the
current stream.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

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
from ditrim.runtime.profiling.rounds import SETTLE_SECONDS, Rounds

_COPY, _COPY_BYTES = "copy", 64 << 20
_SCHEDULER_STEPS = 1000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One size that is measured.

    Attributes:
        batch, num_text: B and T.
        noisy_grid, reference_grid: (height, width) in tokens.
        num_references: so many of that grid.
    """

    batch: int
    num_text: int
    noisy_grid: tuple[int, int]
    reference_grid: tuple[int, int]
    num_references: int = 1

    @property
    def size(self) -> CallSize:
        """The token counts and batch of a call at this geometry."""
        return CallSize(
            num_noisy=self.noisy_grid[0] * self.noisy_grid[1],
            num_reference=self.layout.num_reference,
            num_text=self.num_text,
            batch=self.batch,
        )

    @property
    def layout(self) -> Layout:
        """The token grids of the noisy picture and the references."""
        return Layout(self.noisy_grid, (self.reference_grid,) * self.num_references)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """The tuple (batch, noisy, text, reference), as `Row.geometry` has it."""
        size = self.size
        return size.batch, size.num_noisy, size.num_text, size.num_reference


def grid_of(num_tokens: int) -> tuple[int, int]:
    """(height, width) as square as the number of tokens allows."""
    height = next(h for h in range(int(num_tokens**0.5), 0, -1) if num_tokens % h == 0)
    return height, num_tokens // height


class Meter:
    """Measures one engine set at several sizes.

    Attributes:
        rounds: the samples; those of a row are under its part, size and kept tokens.
        is_finite: whether every influence that came out of a first round was.
    """

    def __init__(
        self,
        engines: Engines,
        geometries: Sequence[Geometry],
        rungs: Sequence[int],
        tau: float,
        *,
        parts: Sequence[str] = PARTS,
        products_a_part: int = 0,
    ) -> None:
        """Prepare inputs.

        Args:
            engines: from `load_engines`.
            geometries: sizes, within the set's limits.
            rungs: reference lengths that BACK is measured at; those longer than a geometry's
                references are left out there, and its own length is always measured.
            tau: of the selection that is timed.
            parts: what is measured, besides FRONT.
            products_a_part: so many plain products are timed before each part, where a CPU's speed
                changes within a round; their median is the round's. With 0, one a round.
        """
        self.engines = engines
        self.manifest = engines.engine_set.manifest
        self.is_cuda = engines.device.type == "cuda"
        self.cost = model_cost_of(self.manifest)
        self.rounds = Rounds(0 if self.is_cuda else SETTLE_SECONDS)
        self.is_finite = True
        self.parts = frozenset(parts)
        self._costs: dict[tuple[str, CallSize, int], Cost] = {}
        self._memory: dict[tuple[str, CallSize, int], int | None] = {}
        self._sites = [_Site(self, geometry, rungs, tau) for geometry in geometries]
        self._products = () if self.is_cuda else tuple(plain_products(self.manifest.backend))
        self._products_a_part = products_a_part
        self._beats: dict[str, list[float]] = {}
        self._buffers = (
            () if self.is_cuda else tuple(torch.zeros(_COPY_BYTES // 4) for _ in range(2))
        )

    def clock(self) -> Clock:
        """Return a clock for the engines' device."""
        return EventClock(self.engines.device) if self.is_cuda else Clock(None)

    @property
    def is_first(self) -> bool:
        """Whether this is the first round, the only one to measure memory, which takes time."""
        return self.rounds.number == 0

    def turn(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run every part once, as `Rounds.turn` does."""
        self.rounds.turn([partial(self._run_part, run) for run in parts])

    def alone(self, run: Callable[[], _T]) -> _T:
        """Run a part that others need, as `Rounds.alone` does."""
        return self.rounds.alone(partial(self._run_part, run))

    def _run_part(self, run: Callable[[], _T]) -> _T:
        if self._products_a_part:
            self._beat(self._products_a_part)
            self.rounds.settle()
        if self.is_first:
            begin_peak(self.engines.device)
        return run()

    def _beat(self, times: int) -> None:
        for name, run in self._products:
            for _ in range(times):
                start = time.perf_counter()
                run()
                self._beats.setdefault(name, []).append(_since(start))

    def add(
        self, part: str, size: CallSize, num_kept: int, milliseconds: float, cost: Cost
    ) -> None:
        """Add a sample of a part, with its cost."""
        key = (part, size, num_kept)
        self._costs[key] = cost
        self.rounds.add(key, milliseconds)
        if self.is_first and part != PRODUCT:
            self._memory[key] = peak_bytes(self.engines.device)

    @torch.no_grad()
    def measure(
        self,
        repeats: int,
        warmup: int,
        on_round: Callable[[int, str], None] = lambda done, word: None,
        *,
        budget_s: float | None = None,
    ) -> None:
        """Run all rounds of all sizes, as `Rounds.run` does."""
        self.rounds.run(self._round, repeats, warmup, on_round, budget_s=budget_s)

    def _round(self) -> None:
        self._beats.clear()
        self._beat(1)
        if self._products:
            self.rounds.timed(_COPY, lambda: self._buffers[0].copy_(self._buffers[1]))
        for site in self._sites:
            site.run_round()
        for name, beats in self._beats.items():
            self.add(PRODUCT, _PRODUCT_SIZE[name], 0, statistics.median(beats), PRODUCT_COST)

    def peak(self) -> Peak:
        """Return the device's peak: of its data sheet, or on a CPU as measured in these rounds."""
        if self.is_cuda:
            device = present_device(self.engines.device.index or 0)
            precision = self.manifest.precision
            rate = device.peak_tflops(precision) if precision != "fp32" else None
            source = "not established" if rate is None else device.peak_source(precision)
            return Peak(tflops=rate, gb_s=device.bandwidth_gb_s, source=source)
        least = {
            name: min(self.rounds.samples[PRODUCT, _PRODUCT_SIZE[name], 0])
            for name, _ in self._products
        }
        best = min(least, key=lambda name: least[name])
        return Peak(
            tflops=PRODUCT_COST.flops / least[best] / 1e9,
            gb_s=2 * _COPY_BYTES / min(self.rounds.samples[_COPY]) / 1e6,
            source="measured beside the rest, the best of all rounds: a float32 product of "
            f"{PRODUCT_SIDE} x {PRODUCT_SIDE} by {best}, the faster of {' and '.join(least)}; a "
            f"copy of {_COPY_BYTES >> 20} MiB, read and written. No bound: a library can be faster "
            "on other shapes",
        )

    def rows(self) -> tuple[Row, ...]:
        """Return all rows: products, then size by size its parts, short before long."""
        order = [site.size for site in self._sites]
        names = (PRODUCT, *PARTS)

        def place(key: tuple[str, CallSize, int]) -> tuple[int, int, int]:
            part, size, num_kept = key
            return order.index(size) if size in order else -1, names.index(part), num_kept

        return tuple(
            Row(
                part=part,
                batch=size.batch,
                num_noisy=size.num_noisy,
                num_text=size.num_text,
                num_reference=size.num_reference,
                num_kept=num_kept,
                samples_ms=tuple(self.rounds.samples[part, size, num_kept]),
                warmup_ms=tuple(self.rounds.warmup.get((part, size, num_kept), ())),
                flops=self._costs[part, size, num_kept].flops,
                num_bytes=self._costs[part, size, num_kept].num_bytes,
                memory_bytes=self._memory.get((part, size, num_kept)),
            )
            for part, size, num_kept in sorted(self._costs, key=place)
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

    def run_round(self) -> None:
        front = self.meter.alone(self._front)
        parts: list[tuple[str, Callable[[], None]]] = [
            *(("back", partial(self._back, front, kept)) for kept in self.reductions),
            ("anchor", partial(self._anchor, front)),
            ("selection", self._select),
            ("rope", partial(self._rope, front)),
            ("scheduler", self._schedule),
            ("step", self._step),
        ]
        self.meter.turn([run for name, run in parts if name in self.meter.parts])

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
        scored = self.calls.run_back(front, "anchor", None, self.all_rows, clock)
        _finish(clock)
        if self.meter.is_first:
            self.meter.is_finite &= bool(torch.isfinite(scored.influence).all())
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
        """Run one scheduler step."""
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
    """Return a meter's profile: its rows, with the engine set, the machine and the settings."""
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


_PRODUCT_SIZE = {  # products have no lengths; the batch says which library's they are
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
