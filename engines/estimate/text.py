"""An estimate as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ditrim.engines.files import format_bytes

if TYPE_CHECKING:
    from ditrim.engines.estimate.estimate import Estimate


def lines_of(plan: Estimate) -> Iterator[str]:
    """Yield the lines that `--dry-run` prints of an estimate."""
    device, size = plan.device, format_bytes
    yield (
        f"{plan.model}, {plan.precision}, {plan.backend}: {plan.num_parameters / 1e9:.2f} G "
        f"parameters, {plan.num_layers} layers, front depth {plan.front_depth}, scored layers "
        f"{', '.join(map(str, plan.layers))}"
    )
    yield (
        f"for {device.title}: {size(device.memory_bytes)} of memory as CUDA reports it, "
        f"{size(plan.usable_bytes)} counted on"
    )
    yield ""
    yield (
        f"activations at batch {plan.batch}, {plan.num_noisy} noisy and {plan.num_text} text "
        "tokens, by reference tokens"
    )
    header = ["", "weights", "file", *map(str, plan.rungs)]
    rows = [
        [item.role, size(item.weights_bytes), size(item.file_bytes)]
        + [size(value) for value in item.activation_bytes]
        for item in plan.plans
    ]
    yield from _table([header, *rows])
    yield ""
    needs_device = plan.build_device_bytes
    yield f"disk          {size(plan.disk_bytes)}; {size(plan.build_disk_bytes)} during a rebuild"
    host = max(plan.build_graphs_bytes, plan.build_plans_bytes)
    yield (
        f"build memory  {size(host)} of the host, "
        + (f"{size(needs_device)} of the device" if needs_device else "none of a device")
    )
    yield f"while an edit is made, of {size(plan.usable_bytes)}:"
    need = plan.need
    yield f"  engines       {size(need.engines)}, resident"
    for item in plan.companions:
        yield f"  {item.name}: {size(item.weights_bytes)}, resident"
    yield (
        f"  at most one of: denoising {size(need.denoising)} (one arena for all plans), prompt "
        f"{size(need.text)}, VAE {size(need.pictures)}"
    )
    yield f"  CUDA          {size(need.reserve)} (an allowance)"
    yield f"  in all        {size(need.total)}"
    if plan.every_shape_bytes:
        yield (
            f"of it, serving every shape of pictures from 1:8 to 8:1 and prompts of up to 1,024 "
            f"tokens takes {size(plan.every_shape_bytes)} against square pictures and short "
            "prompts alone"
        )
    yield ""
    yield from _verdict(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join([first, *others])


def _verdict(plan: Estimate) -> Iterator[str]:
    spare = plan.usable_bytes - plan.need.total
    if plan.fits:
        yield f"it fits, with {format_bytes(spare)} to spare"
        return
    yield f"it does not fit: {format_bytes(-spare)} too much"
    changes = plan.changes
    if not changes:
        yield "no option makes it smaller"
    elif all(change.fits for change in changes):
        yield "enough is" if len(changes) == 1 else "enough is any one of"
    elif changes[-1].fits:
        yield "enough are all of"
    else:
        yield "not enough are even all of"
    for change in changes:
        yield f"  - {change.action} ({format_bytes(change.needed_bytes)} in all)"
    if plan.fits_on:
        yield f"as it is, it fits on: {', '.join(plan.fits_on)}"
