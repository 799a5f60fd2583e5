"""The full-depth model on the torch backend, next to unmodified diffusers.

`stack` runs both as they are and with CUDA graphs, `compiled` both with their blocks compiled. What
is worth most is measured first, so that a part that is stopped has it.
"""

from __future__ import annotations

import math
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
    measure_main,
    measure_rates,
    measure_rungs,
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
    layers = size.layers
    if device == "cuda":
        layers = fitting_layers(size, torch.cuda.mem_get_info()[0])
    rates = measure_rates(context)
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
    """Eager steps, a measured run, then CUDA graphs; three references after one."""
    opened = open_stack(context)
    plains = []
    for case in opened.cases():
        plain, expected, bound = measure_plain(opened, case, "diffusers, eager")
        plains.append((plain, case))
        steps = ReducedSteps(torch_engines_of(opened.model, context), case)
        found = measure_mode(opened, steps, "eager", plain, ("diffusers", expected, bound))
        if context.has_time(f"{case.name}, CUDA graphs", 5):
            engines = torch_engines_of(opened.model, context, cuda_graphs=NUM_GRAPHS)
            referee = "eager", found, LARGEST_ERROR
            measure_mode(opened, ReducedSteps(engines, case), "CUDA graphs", plain, referee)
            del engines
    if not context.is_quick:
        measure_plain_run(opened, *plains[0])


def compiled(context: Context) -> None:
    """Steps with compiled blocks, and with CUDA graphs of them; diffusers' blocks compiled."""
    opened = open_stack(context)
    engines = torch_engines_of(opened.model, context, compile="blocks")
    for case in opened.cases():
        if not context.has_time(f"{case.name}", 5):
            break
        _, expected, bound = measure_plain(opened, case, "diffusers, eager")
        steps, referee = ReducedSteps(engines, case), ("diffusers", expected, bound)
        found = measure_mode(opened, steps, "compiled", None, referee)
        context.record.note(case.name, "compiled", graphs_compiled=_graphs_compiled())
        if context.has_time(f"{case.name}, diffusers, compiled", 10):
            opened.model.compile_repeated_blocks(fullgraph=True)
            measure_plain(opened, case, "diffusers, compiled")
            for block in opened.model.transformer_blocks:
                block._compiled_call_impl = None
        if case.references == 1 and context.has_time("compiled, CUDA graphs", 10):
            graphed = torch_engines_of(
                opened.model, context, compile="blocks", cuda_graphs=NUM_GRAPHS
            )
            steps, referee = ReducedSteps(graphed, case), ("compiled", found, LARGEST_ERROR)
            measure_mode(opened, steps, "compiled, CUDA graphs", None, referee)
            del graphed, steps


def _graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


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


def measure_mode(
    opened: Stack,
    steps: ReducedSteps,
    mode: str,
    plain: Bench | None,
    referee: tuple[str, Tensor, float],
) -> Tensor:
    """Every step of the torch backend in one mode, and what they make of a schedule.

    Args:
        opened: what it works on.
        steps: of one case, in this mode.
        mode: its name.
        plain: of unmodified diffusers; none where no schedule is to be run.
        referee: whose velocity at the full context has to come out, that, and the largest error.

    Returns:
        the velocity at the full context.
    """
    bench = opened.bench(steps.case, mode)
    bench.note(choice=steps.engines.choice)
    steps.engines.hold()  # as an attachment does
    try:
        return _measure_mode(bench, steps, plain, referee)
    finally:
        steps.engines.release()


def _measure_mode(
    bench: Bench, steps: ReducedSteps, plain: Bench | None, referee: tuple[str, Tensor, float]
) -> Tensor:
    context, case = bench.context, steps.case
    rungs = rungs_of(case, context)
    measure_main(bench, steps, rungs[len(rungs) // 2 - 1])
    found = steps.full()
    check_same(bench, found, *referee)
    plain_ms = plain.times.get("full") if plain else None
    if plain_ms is not None and "full" in bench.times:
        bench.note(full_step_over_diffusers=round(plain_ms / bench.times["full"], 3))
    note_schedules(bench, rungs, plain_ms)
    measure_rungs(bench, steps, rungs)
    note_schedules(bench, rungs, plain_ms)
    if plain is not None and case.references == 1:
        measure_run(bench, steps, plain_ms)
    bench.note(memory=peak_gb(context.device))
    return found


def check_same(bench: Bench, found: Tensor, whose: str, expected: Tensor, bound: float) -> None:
    """Check a velocity against another way's."""
    error = relative_error(found, expected)
    bench.note(errors={whose: error}, largest_error=bound)
    bench.check(f"full context gives the velocity of {whose}", error <= bound)


def measure_run(bench: Bench, steps: ReducedSteps, plain_ms: float | None) -> None:
    """Run a whole schedule."""
    likely = 1.3 * STEPS * max(bench.times.values(), default=0.0) / 1e3
    if not bench.context.has_time(f"{bench.case}, {bench.mode}: a measured run", likely):
        return
    steps.anchor()  # so that no graph is captured in the run
    steps.reduced(math.ceil(RUN_SHARE * steps.case.num_reference))()
    seconds, report = seconds_of(lambda: steps.run(RUN_SHARE), bench.context.device)
    roles = [record.role for record in report.steps]
    kept = {record.num_kept for record in report.steps if record.role == "reduced"}
    anchors = STEPS // INTERVAL
    held = (roles.count("anchor"), roles.count("reduced")) == (anchors, STEPS - anchors)
    bench.check("a run has its anchors and reduced steps", held)
    found = {"share": RUN_SHARE, "kept": sorted(kept), "seconds": round(seconds, 3)}
    if plain_ms is not None:
        found["speedup_over_diffusers"] = round(STEPS * plain_ms / 1e3 / seconds, 3)
    bench.note(run=found)


def measure_plain_run(opened: Stack, plain: Bench, case: Case) -> None:
    """Run the same schedule on unmodified diffusers, whose single steps were measured."""
    likely = 1.2 * STEPS * plain.times.get("full", 0.0) / 1e3
    if opened.context.has_time(f"{plain.case}, {plain.mode}: a measured run", likely):
        steps = PlainSteps(opened.model, case)
        seconds, _ = seconds_of(lambda: run_plain(steps), opened.context.device)
        plain.note(run={"seconds": round(seconds, 3)})
