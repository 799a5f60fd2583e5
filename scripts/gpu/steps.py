"""Steps of the full-width model: unmodified diffusers', and the torch backend's at every rung."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu.clock import rates_of, seconds_of, times_of
from gpu.model import FAMILY, Case
from gpu.part import Context

# A schedule as ToPi's: an anchor every tenth of 40 steps.
STEPS, INTERVAL = 40, 10
NUM_RUNGS = 8


@dataclass(frozen=True)
class Rates:
    """What the device can do: the table's peak, if it knows the device, and a measured product.

    Attributes:
        peak_tflops: dense bf16, by its maker; none where not established.
        product_tflops: of a large bf16 matrix product, measured.
    """

    peak_tflops: float | None
    product_tflops: float

    def shares(self, flops: int, milliseconds: float) -> dict[str, Any]:
        """A step's rate, and what that is of both."""
        tflops = flops / milliseconds / 1e9
        found = {"tflops": round(tflops, 3), "of_product": round(tflops / self.product_tflops, 3)}
        if self.peak_tflops:
            found["of_peak"] = round(tflops / self.peak_tflops, 3)
        return found


def measure_rates(context: Context) -> Rates:
    """Look the device up, and measure a product."""
    from ditrim.engines.cost.devices import present_device

    peak = None if context.is_rehearsal else present_device().peak_tflops("bf16")
    flops_per_s, bytes_per_s = rates_of(context.device, 10)
    product = flops_per_s / 1e12
    context.record.note(
        "device",
        peak_bf16_tflops=peak,
        product_bf16_tflops=round(product, 3),
        copy_gb_per_s=round(bytes_per_s / 1e9, 1),
    )
    return Rates(peak, product)


def torch_engines_of(
    model: Any, context: Context, *, compile: Any = None, cuda_graphs: int = 0
) -> Any:
    """The torch backend over a model; a rehearsal repeats calls in place of capturing them."""
    from ditrim.engines.backends.torch.cuda_graphs import CudaGraphs
    from ditrim.engines.live import torch_engines

    # Kept counts are not rounded here: each step has the length that its name says.
    asked = 0 if context.is_rehearsal else cuda_graphs
    engines = torch_engines(model, model=FAMILY, compile=compile, cuda_graphs=asked, granularity=1)
    if cuda_graphs and context.is_rehearsal:
        engines._graphs = CudaGraphs(cuda_graphs, capture=lambda run: run)
    return engines


def rungs_of(case: Case, context: Context) -> list[int]:
    """Kept counts that are measured: even parts of the references, the last is all of them."""
    from ditrim.engines.sets.ladder import Ladder

    number = NUM_RUNGS if case.references == 1 else NUM_RUNGS // 2  # long ones take their time
    number = 2 if context.is_quick else number // 2 if context.is_rehearsal else number
    return list(Ladder.even(case.num_reference, num_rungs=number).rungs)


@dataclass
class PlainSteps:
    """Unmodified diffusers at the full context."""

    model: Any
    case: Case
    arguments: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = self.case.plain_arguments()

    @torch.no_grad()
    def full(self) -> Tensor:
        """One step; (B, G, c), the noisy tokens' velocity."""
        velocity: Tensor = self.model(**self.arguments)[0]
        return velocity[:, : self.case.inputs.noisy_latents.shape[1]]

    @property
    def flops(self) -> int:
        """Operations of a step: no block leaves rows out."""
        from ditrim.engines.cost.flops import CallSize, graph_products

        config, inputs = dict(self.model.config), self.case.inputs
        noisy, width = inputs.noisy_latents.shape[1], self.model.inner_dim
        size = CallSize(
            num_noisy=noisy,
            num_reference=self.case.num_reference,
            num_text=inputs.text_embeds.shape[1],
        )
        layers = range(self.model.config.num_layers)
        products = graph_products(config, "qwen", layers, size, "front")
        channels = self.model.proj_out.out_features
        output = 2 * (noisy + self.case.num_reference) * width * channels
        return output + sum(product.flops for product in products)


class ReducedSteps:
    """Steps through the seam of engines, as the runtime makes them: FRONT, gathering, BACK."""

    def __init__(self, engines: Any, case: Case) -> None:
        from ditrim.runtime.denoising.calls import Clock, EngineCalls
        from ditrim.runtime.profiling.measure import model_cost_of

        self.engines, self.case = engines, case
        self._calls, self._clock = EngineCalls(engines), Clock(None)
        self._cost = model_cost_of(engines.engine_set.manifest)
        device, noisy = engines.device, case.inputs.noisy_latents.shape[1]
        self._all_rows = torch.arange(noisy, device=device)
        self._one_row = torch.zeros(1, dtype=torch.int64, device=device)
        self._rope: dict[int, Any] = {}

    def front(self) -> Any:
        """FRONT alone."""
        group = (torch.arange(1), None)
        return self._calls.run_front(self.case.inputs, group, None, self._clock)

    def full(self) -> Tensor:
        """A step at the full context, without scoring."""
        return self._back("back", None, self._one_row).velocity  # type: ignore[no-any-return]

    def anchor(self) -> Any:
        """A step at the full context that scores every noisy row; has `influence`."""
        return self._back("anchor", None, self._all_rows)

    def reduced(self, count: int) -> Callable[[], Tensor]:
        """A step at so many reference tokens, evenly spread; the position rows are kept."""
        from ditrim.runtime.policy import Reduction

        if count == self.case.num_reference:
            return self.full
        last = self.case.num_reference - 1
        kept = torch.linspace(0, last, count, device=self.engines.device).long()[None]
        reduction = Reduction(kept=kept)
        if count not in self._rope:
            self._rope[count] = self._calls.rope_rows(self.front().tables, kept)
        rope = self._rope[count]
        return lambda: self._back("back", reduction, self._one_row, rope).velocity

    def _back(self, graph: str, reduction: Any, rows: Tensor, rope: Any = None) -> Any:
        clock = self._clock
        return self._calls.run_back(self.front(), graph, reduction, rows, clock, rope=rope)

    def select(self, influence: Tensor) -> Any:
        """ToPi's choice after an anchor, with the wait for its count."""
        from ditrim.runtime.policies.topi import ToPi
        from ditrim.runtime.policy import CallView

        view = CallView(
            step=0,
            branch="cond",
            ladder=self.engines.engine_set.manifest.ladder,
            grids=self.case.inputs.grids,
            influence=influence,
        )
        return ToPi().select(view)

    def flops(self, count: int, *, rows: int = 0) -> int:
        """Operations of a step."""
        from ditrim.engines.cost.flops import CallSize

        inputs = self.case.inputs
        lengths = inputs.noisy_latents.shape[1], inputs.text_embeds.shape[1]
        full, kept = (
            CallSize(num_noisy=lengths[0], num_reference=length, num_text=lengths[1])
            for length in (self.case.num_reference, count)
        )
        return self._cost.front(full).flops + self._cost.back(kept, num_rows=rows).flops

    def run(self, share: float) -> Any:
        """A whole schedule with ToPi at a share of the references; its report."""
        from ditrim.runtime.denoising.denoiser import Denoiser
        from ditrim.runtime.policies.topi import ToPi

        request = Denoiser(self.engines, ToPi(ratio=share, interval=INTERVAL)).begin()
        latents = self.case.inputs.noisy_latents
        for noise, next_noise in itertools.pairwise(noise_levels()):
            request.begin_step(noise)
            velocity = request.predict("cond", self.case.with_latents(latents))
            latents = latents + (next_noise - noise) * velocity.to(latents.dtype)
            request.end_step()
        return request.report


def noise_levels() -> list[float]:
    """From 1 to 0 in `STEPS` steps."""
    return [1 - step / STEPS for step in range(STEPS + 1)]


def run_plain(steps: PlainSteps) -> None:
    """The same schedule by unmodified diffusers."""
    num_noisy = steps.case.inputs.noisy_latents.shape[1]
    hidden = steps.arguments["hidden_states"].clone()
    arguments = steps.arguments | {"hidden_states": hidden}
    with torch.no_grad():
        for noise, next_noise in itertools.pairwise(noise_levels()):
            velocity = steps.model(**arguments)[0][:, :num_noisy]
            hidden[:, :num_noisy] += (next_noise - noise) * velocity


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the whole tensor: the norm of the difference over the norm."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def is_finite(*tensors: Tensor) -> bool:
    """Whether all values of all tensors are."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@dataclass
class Bench:
    """Measures one way to run one case, and writes each figure at once.

    Attributes:
        context: of the part.
        rates: of the device.
        case, mode: where figures go in the document.
        times: milliseconds by the name of a step.
    """

    context: Context
    rates: Rates
    case: str
    mode: str
    times: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, run: Callable[[], Any], flops: int | None = None) -> float | None:
        """Time a step, if there is time for it; its milliseconds."""
        context, likely = self.context, 7 * max(self.times.values(), default=0.0) / 1e3
        if not context.has_time(f"{self.case}, {self.mode}: {name}", likely):
            return None
        first, _ = seconds_of(run, context.device)  # compiles, captures
        repeats = 3 if context.is_quick or likely > 5 else 5
        repeats = 1 if context.is_rehearsal else repeats
        found: dict[str, Any] = times_of(run, context.device, repeats, warm_ups=0)
        found["first_call_s"] = round(first, 2)
        if flops is not None:
            found |= {"flops": flops} | self.rates.shares(flops, found["median_ms"])
        self.times[name] = found["median_ms"]
        context.record.note(self.case, self.mode, "steps", **{name: found})
        return self.times[name]

    def note(self, **values: Any) -> None:
        """Write something else of this way."""
        self.context.record.note(self.case, self.mode, **values)

    def check(self, name: str, held: bool) -> None:
        """Write whether a check held."""
        self.context.record.check(f"{self.case}, {self.mode}: {name}", held)


def measure_main(bench: Bench, steps: ReducedSteps, half: int) -> None:
    """The steps that matter most: full, half of the references, anchor; and what scoring costs."""
    full, num_noisy = steps.case.num_reference, steps.case.inputs.noisy_latents.shape[1]
    bench.step("full", steps.full, steps.flops(full))
    _measure_rung(bench, steps, half)
    if bench.step("anchor", steps.anchor, steps.flops(full, rows=num_noisy)) is not None:
        result = steps.anchor()
        found = float(result.influence.sum())
        bench.check("anchor is finite and scores", is_finite(result.velocity) and found > 0)
        _measure_selection(bench, steps, result.influence)
    if {"full", f"reduced {half}"} <= set(bench.times) and not bench.context.is_rehearsal:
        is_faster = bench.times[f"reduced {half}"] < bench.times["full"]
        bench.check("half of the references are faster than all", is_faster)


def measure_rungs(bench: Bench, steps: ReducedSteps, rungs: list[int]) -> None:
    """Reduced steps at the other rungs, and FRONT alone."""
    bench.step("front", steps.front)
    for rung in rungs[:-1]:
        if f"reduced {rung}" not in bench.times:
            _measure_rung(bench, steps, rung)


def _measure_rung(bench: Bench, steps: ReducedSteps, rung: int) -> None:
    run = steps.reduced(rung)
    if bench.step(f"reduced {rung}", run, steps.flops(rung)) is not None:
        bench.check(f"reduced {rung} is finite", is_finite(run()))


def _measure_selection(bench: Bench, steps: ReducedSteps, influence: Tensor) -> None:
    steps.select(influence)
    seconds = [
        seconds_of(lambda: steps.select(influence), bench.context.device)[0] for _ in range(5)
    ]
    bench.times["select"] = sorted(seconds)[2] * 1e3
    costs = {"selection_ms": round(bench.times["select"], 3)}
    if "full" in bench.times:
        costs["scoring_ms"] = round(bench.times["anchor"] - bench.times["full"], 3)
    bench.note(**costs)


def note_schedules(bench: Bench, rungs: list[int], plain_ms: float | None) -> None:
    """Speed-ups of a whole schedule at each rung, computed from the measured steps.

    Args:
        bench: with all steps measured.
        rungs: kept counts.
        plain_ms: of a step of unmodified diffusers; none where it was not measured.
    """
    times, anchors = bench.times, STEPS // INTERVAL
    if not {"full", "anchor", "select"} <= set(times):
        return
    for rung in rungs[:-1]:
        reduced = times.get(f"reduced {rung}")
        if reduced is None:
            continue
        total = anchors * (times["anchor"] + times["select"]) + (STEPS - anchors) * reduced
        found = {
            "share": round(rung / rungs[-1], 3),
            "seconds": round(total / 1e3, 3),
            "speedup_over_full_steps": round(STEPS * times["full"] / total, 3),
        }
        if plain_ms is not None:
            found["speedup_over_diffusers"] = round(STEPS * plain_ms / total, 3)
        bench.context.record.note(bench.case, bench.mode, "schedules", **{str(rung): found})
