"""What a failed build of a plan means, and what to do."""

from __future__ import annotations

import signal

from ditrim.engines.backends.tensorrt.request import TITLES, PlanRequest

_MOST_SHOWN = 3


# What the lines that say something have in common.
_SIGNS = ("Error Code", "ERROR:", "While parsing node")


_MOST_CHARACTERS = 600


def _size_of(request: PlanRequest | None) -> str:
    """The options that decide how much memory a build takes."""
    if request is None:
        return ""
    limits = request.options.limits
    ladder = request.options.reference_ladder
    return (
        f" Now: {len(ladder.rungs)} rungs up to {ladder.longest} reference tokens, "
        f"{limits.noisy} noisy and {limits.text} text tokens, batch {limits.batch}."
    )


_LOWER = (
    "lower --max-batch, --resolution (or --max-noisy-tokens and --max-reference-tokens), --rungs "
    "or --workspace, or use a shallower front (--front-depth) so that the larger plan is smaller"
)


def explain_failure(lines: list[str], backend: str, request: PlanRequest | None) -> str:
    """Return the cause of a failed build and the remedy, from the library's messages.

    Args:
        lines: its complaints, the most specific of which is chosen.
        backend: "tensorrt" or "tensorrt-rtx".
        request: what was to be built; none for questions to the library.
    """
    text = "\n".join(lines)
    role = "" if request is None else f" the {request.role} plan"
    precision = "" if request is None else request.options.precision
    head = f"{TITLES[backend]} cannot build{role}"
    is_stripped = request is not None and request.options.weights_stripped
    if "supported by a dedicated kernel" in text or "is_decomposable" in text:
        what = (
            f"{head}: it has no fused kernel for this attention in {precision}. Unfused, each "
            "attention writes its whole score matrix to memory and takes several times as long. "
            "Use --precision bf16 or fp16 and a head width that the library supports, or accept "
            "it with --allow-unfused"
        )
    elif _is_about(text, "out of memory", "outofmemory", "bad_alloc", "memoryallocation"):
        what = f"{head}: memory ran out.{_size_of(request)} To use less, {_LOWER}"
    elif _is_about(text, "tensor volume exceeds"):
        what = (
            f"{head}: a tensor would have more elements than the library takes."
            f"{_size_of(request)} To use less, {_LOWER}"
        )
    elif _is_about(text, "could not find any implementation", "no implementation"):
        what = (
            f"{head}: it found no implementation for a layer. Often the workspace is too small: "
            "raise or leave out --workspace; otherwise use another --precision, lower "
            f"--max-batch or --resolution, or set --optimization-level 3.{_size_of(request)}"
        )
    elif is_stripped and "graph_jit" in text and "CUDA_SUCCESS" in text:
        what = (
            f"{head} without weights: it wants to run code on a GPU for that, and none can be "
            "used here. Build on a machine with a GPU, or leave out --weights-stripped"
        )
    elif _is_about(text, "hw-specific datatypes", "does not support bf16", "platform"):
        what = (
            f"{head}: {precision} does not exist on a GPU that it is built for; use --precision "
            "fp16, or leave that GPU out of --compute-capability"
        )
    elif _is_about(text, "driver version is insufficient", "no cuda-capable device", "cuinit"):
        what = (
            f"{head}: it needs a GPU, and the CUDA driver is missing or too old. Install a "
            "driver, or name what to build for with --compute-capability (tensorrt-rtx)"
        )
    elif _is_about(text, "could not parse onnx", "failed to parse onnx"):
        what = (
            f"{head}: its parser does not take the graph. Use a newer version of the library; if "
            "it is the newest, please report this"
        )
    else:
        what = f"{head}"
    return f"{what}. It said: {_shortened(lines)}"


def _is_about(text: str, *phrases: str) -> bool:
    lowered = text.lower()
    return any(phrase in lowered for phrase in phrases)


def _shortened(lines: list[str]) -> str:
    """The first complaints, on one line and without repetitions."""
    shown = [" ".join(line.split()) for line in dict.fromkeys(lines) if line.strip()]
    errors = [line for line in shown if any(sign in line for sign in _SIGNS)]
    text = " | ".join((errors or shown)[:_MOST_SHOWN])
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."


def explain_end(code: int, text: str, backend: str, request: PlanRequest | None) -> str:
    """Return the likely cause where the worker died without a message."""
    role = "" if request is None else f" while it built the {request.role} plan"
    if code == -signal.SIGKILL:
        return (
            f"the process of {TITLES[backend]} was killed{role}, as the system does when memory "
            f"runs out.{_size_of(request)} Free some memory, or {_LOWER}"
        )
    if code < 0:
        name = signal.Signals(-code).name
        return (
            f"{TITLES[backend]} crashed{role} ({name}); this is a fault of the library. Another "
            f"version of it, another --precision or fewer --rungs may do. {_tail(text)}"
        )
    return f"the process of {TITLES[backend]} failed{role} (exit code {code}). {_tail(text)}"


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return f"Its last words: {' | '.join(lines[-_MOST_SHOWN:])}" if lines else ""
