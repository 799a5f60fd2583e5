"""The full-depth model on the torch backend, next to unmodified diffusers.

`stack` runs both as they are and with CUDA graphs, `compiled` both with their blocks compiled. What
is worth most is measured first, so that a part that is stopped has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.clock import begin_peak, peak_gb, seconds_of
from gpu.model import Case, Size, case_of, fitting_layers, full_size, random_model, toy_size
from gpu.part import Context, need, need_gpu
from gpu.steps import (
    INTERVAL,
    STEPS,
    Bench,
    PlainSteps,
    Rates,
    ReducedSteps,
    is_finite,
    measure_rates,
    measure_reduced,
    note_schedules,
    relative_error,
    run_plain,
    rungs_of,
    torch_engines_of,
)

# Of a velocity in bf16, unless another attention kernel changes diffusers' own by a third of more.
LARGEST_ERROR = 0.02
RUN_SHARE = 0.5
# FRONT, BACK at one length and the anchor.
NUM_GRAPHS = 3


@dataclass(frozen=True)
class Stack:
    """What both parts work on.

    Attributes:
        context: of the part.
        size: of the model and its pictures.
        model: the transformer, with random weights.
        rates: of the device.
    """

    context: Context
    size: Size
    model: Any
    rates: Rates

    def cases(self) -> tuple[Case, ...]:
        """Edits with one reference and with three; a quick run has the first."""
        counts = (1,) if self.context.is_quick else (1, 3)
        device = self.context.device
        return tuple(case_of(self.size, self.model, count, device) for count in counts)

    def bench(self, case: Case, mode: str) -> Bench:
        """What measures one way to run a case."""
        begin_peak(self.context.device)
        return Bench(self.context, self.rates, case.name, mode)


def open_stack(context: Context) -> Stack:
    """Make the model, as deep as memory allows."""
    need_gpu(context)
    need("diffusers")
    device, size = context.device, toy_size() if context.is_rehearsal else full_size()
    rates = measure_rates(context)
    layers = size.layers
    if device == "cuda":
        layers = fitting_layers(size, torch.cuda.mem_get_info()[0])
    seconds, model = seconds_of(lambda: random_model(size, layers, device), device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    context.record.note(
        "model",
        width=model.inner_dim,
        layers=layers,
        layers_of_the_model=size.layers,
        parameters=parameters,
        weights_gb=round(2 * parameters / 1e9, 2),
        seconds_to_make=round(seconds, 2),
        schedule=f"{STEPS} steps, an anchor every {INTERVAL}",
    )
    if layers < size.layers:
        context.record.note("model", why_fewer_layers="free memory does not hold them all")
    return Stack(context, size, model, rates)


def stack(context: Context) -> None:
    """Eager steps, a measured run, then CUDA graphs."""
    opened = open_stack(context)
    cases = opened.cases()
    eager: dict[str, tuple[Bench, Tensor]] = {}
    for case in cases:
        plain, expected, bound = measure_plain(opened, case, "diffusers, eager")
        engines = torch_engines_of(opened.model, context)
        bench = measure_engines(opened, case, engines, "eager", plain)
        found = ReducedSteps(engines, case).full()
        check_same(bench, "diffusers", found, expected, bound)
        eager[case.name] = plain, found
        if case.references == 1:
            measure_run(bench, ReducedSteps(engines, case), plain, PlainSteps(opened.model, case))
    for case in cases:
        plain, expected = eager[case.name]
        if not context.has_time(f"{case.name}, CUDA graphs", 5):
            continue
        engines = torch_engines_of(opened.model, context, cuda_graphs=NUM_GRAPHS)
        bench = measure_engines(opened, case, engines, "CUDA graphs", plain)
        steps = ReducedSteps(engines, case)
        check_same(bench, "eager", steps.full(), expected, LARGEST_ERROR)
        if case.references == 1:
            measure_run(bench, steps, plain)


def compiled(context: Context) -> None:
    """Steps with compiled blocks, and with CUDA graphs of them; diffusers' blocks compiled."""
    opened = open_stack(context)
    cases = opened.cases()
    engines = torch_engines_of(opened.model, context, compile="blocks")
    done: dict[str, tuple[Bench, Tensor]] = {}
    for case in cases:
        _, expected, bound = measure_plain(opened, case, "diffusers, eager")
        bench = measure_engines(opened, case, engines, "compiled", None)
        found = ReducedSteps(engines, case).full()
        check_same(bench, "diffusers", found, expected, bound)
        bench.note(graphs_compiled=_graphs_compiled())
        done[case.name] = bench, found
        if case.references > 1 or not context.has_time("compiled, CUDA graphs", 10):
            continue
        graphed = torch_engines_of(
            opened.model, context, compile="blocks", cuda_graphs=NUM_GRAPHS
        )
        bench = measure_engines(opened, case, graphed, "compiled, CUDA graphs", None)
        check_same(bench, "compiled", ReducedSteps(graphed, case).full(), found, LARGEST_ERROR)
        del graphed
    opened.model.compile_repeated_blocks(fullgraph=True)
    for case in cases:
        if not context.has_time(f"{case.name}, diffusers, compiled", 10):
            continue
        plain, _, _ = measure_plain(opened, case, "diffusers, compiled")
        note_schedules(done[case.name][0], _rungs(opened, case), plain.times.get("full"))


def _graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _rungs(opened: Stack, case: Case) -> list[int]:
    return rungs_of(case.num_reference, opened.context.is_quick)


def measure_plain(opened: Stack, case: Case, mode: str) -> tuple[Bench, Tensor, float]:
    """Unmodified diffusers at the full context.

    Returns:
        its bench, its velocity, and the error that another may have.
    """
    bench, steps = opened.bench(case, mode), PlainSteps(opened.model, case)
    bench.note(
        lengths={
            "noisy": opened.size.num_noisy,
            "references": case.num_reference,
            "text": opened.size.text[case.references],
        }
    )
    bench.step("full", steps.full, steps.flops)
    velocity = steps.full()
    bench.check("full is finite", is_finite(velocity))
    bench.note(memory=peak_gb(opened.context.device))
    error = 0.0
    if mode == "diffusers, eager" and case.references == 1:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            error = relative_error(steps.full(), velocity)
        bench.note(error_of_another_attention_kernel=error)
    return bench, velocity, max(LARGEST_ERROR, 3 * error)


def measure_engines(
    opened: Stack, case: Case, engines: Any, mode: str, plain: Bench | None
) -> Bench:
    """Every step of the torch backend in one mode, and what they make of a schedule."""
    bench, rungs = opened.bench(case, mode), _rungs(opened, case)
    bench.note(choice=engines.choice)
    measure_reduced(bench, ReducedSteps(engines, case), rungs)
    bench.note(memory=peak_gb(opened.context.device))
    note_schedules(bench, rungs, plain.times.get("full") if plain else None)
    if plain is not None and {"full"} <= set(bench.times) & set(plain.times):
        ratio = plain.times["full"] / bench.times["full"]
        bench.note(full_step_over_diffusers=round(ratio, 3))
    return bench


def check_same(bench: Bench, whose: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Check a velocity against another way's."""
    error = relative_error(found, expected)
    bench.note(errors={whose: error}, largest_error=bound)
    bench.check(f"full context gives the velocity of {whose}", error <= bound)


def measure_run(
    bench: Bench, steps: ReducedSteps, plain: Bench, baseline: PlainSteps | None = None
) -> None:
    """Run a whole schedule; then, where `baseline` is given, unmodified diffusers' too."""
    context, times = bench.context, bench.times
    likely = 1.3 * STEPS * max(times.values(), default=0.0) / 1e3
    if not context.has_time(f"{bench.case}, {bench.mode}: a measured run", likely):
        return
    seconds, report = seconds_of(lambda: steps.run(RUN_SHARE), context.device)
    roles = [record.role for record in report.steps]
    kept = {record.num_kept for record in report.steps if record.role == "reduced"}
    bench.check(
        "a run has its anchors and reduced steps",
        roles.count("anchor") == STEPS // INTERVAL and roles.count("reduced") == STEPS - STEPS // INTERVAL,
    )
    found = {"share": RUN_SHARE, "kept": sorted(kept), "seconds": round(seconds, 3)}
    if "full" in plain.times:
        found["speedup_over_diffusers_steps"] = round(
            STEPS * plain.times["full"] / 1e3 / seconds, 3
        )
    bench.note(run=found)
    likely = 1.3 * STEPS * plain.times.get("full", 0.0) / 1e3
    what = f"{bench.case}, diffusers, eager: a measured run"
    if baseline is None or context.is_quick or not context.has_time(what, likely):
        return
    whole, _ = seconds_of(lambda: run_plain(baseline), context.device)
    plain.note(run={"seconds": round(whole, 3)})
    bench.note(run={"speedup_over_diffusers_run": round(whole / seconds, 3)})
