"""Plans of TensorRT and TensorRT-RTX: what is asked of the builder, and what it says.

A plan is built in a process of its own, `worker`, with what it shares between the two
libraries in one place. This side decides, shows progress, stops it, and explains its failures.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ditrim.engines.backends.tensorrt.failures import explain_end, explain_failure
from ditrim.engines.backends.tensorrt.library import Gpu
from ditrim.engines.backends.tensorrt.request import TITLES, PlanOptions, PlanRequest, Target
from ditrim.engines.files import format_bytes
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.plugins.errors import BackendError, UsageError

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

_WORKER = "ditrim.engines.backends.tensorrt.worker"
_BF16_FROM = (8, 0)


class Steps(Protocol):
    """Receives the progress of a plan; `ditrim.engines.build.progress.Progress` is one."""

    def stage(self, name: str) -> None: ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None: ...


def choose_target(options: PlanOptions, gpu: Gpu | None) -> Target:
    """Return the build target, checked against the GPU of this machine.

    Raises:
        BackendError: a GPU is needed and there is none, or it cannot do what is asked.
    """
    if options.backend == "tensorrt" and gpu is None:
        raise BackendError(
            "--backend tensorrt builds on the GPU that will run the plans, and the CUDA driver "
            "shows none here; build on that machine, or use --graph-only here. --backend "
            "tensorrt-rtx needs no GPU to build"
        )
    target = Target(
        backend=options.backend,
        capabilities=options.compute_capability,
        gpu=gpu,
        allow_unfused=options.allow_unfused,
    )
    is_for_gpu = gpu is not None and target.capabilities is None
    if is_for_gpu and options.precision == "bf16":
        assert gpu is not None
        if gpu.capability < _BF16_FROM:
            raise BackendError(
                f"{gpu.name} has compute capability {gpu.capability_name} and no bf16; use "
                "--precision fp16"
            )
    return target


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFacts:
    """Version and defaults of the library that the worker imports.

    Attributes:
        version: the library's.
        polygraphy: Polygraphy's version.
        capabilities: compute capabilities that TensorRT-RTX can build for.
        default_capabilities: those it builds for when none is named.
        missing_operators: those of `tensorrt_graph.NEW_OPERATORS` that its parser lacks.
    """

    version: str
    polygraphy: str
    capabilities: tuple[str, ...]
    default_capabilities: tuple[str, ...]
    missing_operators: tuple[str, ...] = ()


def ask_library(target: Target) -> LibraryFacts:
    """Check, before anything long begins, that the library can build for a target.

    Raises:
        BackendError: it is missing, too old, cannot be loaded, or does not know a GPU.
        UsageError: it cannot build for a compute capability that was named.
    """
    answer = _run_worker({"backend": target.backend, "graph": None}, None, None)
    facts = LibraryFacts(
        version=answer["version"],
        polygraphy=answer["polygraphy"],
        capabilities=tuple(answer["capabilities"]),
        default_capabilities=tuple(answer["default_capabilities"]),
        missing_operators=tuple(answer["missing_operators"]),
    )
    check_attention(target, facts)
    if target.backend != "tensorrt-rtx":
        return facts
    known = ", ".join(facts.capabilities)
    for name in target.capabilities or ():
        if name not in facts.capabilities:
            raise UsageError(
                f"--compute-capability {name}: TensorRT-RTX {facts.version} builds for {known}"
            )
    if target.capabilities is None and target.gpu is not None:
        name = target.gpu.capability_name
        if name not in facts.capabilities:
            raise BackendError(
                f"TensorRT-RTX {facts.version} builds for compute capability {known}; "
                f"{target.gpu.name} has {name}. Use --backend tensorrt for it, or build for "
                "another GPU with --compute-capability"
            )
    return facts


def check_attention(target: Target, facts: LibraryFacts) -> None:
    """Check that attention which the library may not fuse was accepted.

    Raises:
        BackendError: its parser has no attention operator, and `--allow-unfused` was not given.
    """
    if "Attention" not in facts.missing_operators:
        return
    title = f"{TITLES[target.backend]} {facts.version}"
    if not target.allow_unfused:
        raise BackendError(
            f"{title} has no attention operator, so that attention would be taken apart for it, "
            "and whether it runs fused again nothing can tell: unfused it takes several times as "
            "long. Use a newer version (TensorRT has the operator from 10.14 on), or accept it "
            "with --allow-unfused"
        )
    logger.warning("%s gets attention taken apart; it may run unfused", title)


def describe_target(target: Target, facts: LibraryFacts, options: PlanOptions) -> dict[str, Any]:
    """Return what the manifest's `target` holds: the GPUs and libraries that plans are for."""
    if target.backend == "tensorrt":
        assert target.gpu is not None
        built_for = [target.gpu.capability_name]
    elif target.capabilities is not None:
        built_for = list(target.capabilities)
    elif target.gpu is not None:
        built_for = [target.gpu.capability_name]
    else:
        built_for = list(facts.default_capabilities)
    return {
        "compute_capabilities": built_for,
        "gpu": None if target.gpu is None else target.gpu.name,
        "driver": None if target.gpu is None else target.gpu.driver,
        "weights": "stripped" if options.weights_stripped else "included",
        "separate_anchor": options.separate_anchor,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlan:
    """A plan that was built.

    Attributes:
        spec: for the manifest.
        num_bytes: of the file.
        weights_bytes: of the weights in it, as the library logged; none where it did not.
        peak_bytes: of host memory that the builder took.
        num_attentions: attention layers, each kept whole unless unfused ones were allowed.
        seconds: wall time.
    """

    spec: PlanSpec
    num_bytes: int
    weights_bytes: int | None
    peak_bytes: int
    num_attentions: int
    seconds: float


def build_plan(request: PlanRequest, progress: Steps) -> BuiltPlan:
    """Build a plan. An exception that is raised meanwhile, as by Ctrl-C, stops it at once.

    Raises:
        BackendError: it cannot be built; says why and what to lower.
    """
    answer = _run_worker(request.job(), request, progress)
    # One figure a profile; a library that logs otherwise says nothing that can be relied on.
    activations = tuple(int(item) for item in answer["activation_bytes"])
    is_known = len(activations) == len(request.profiles)
    built = BuiltPlan(
        spec=PlanSpec(
            file=request.plan.name,
            profiles=request.profiles,
            device_memory_bytes=activations if is_known else None,
            inputs=request.inputs,
            outputs=request.outputs,
        ),
        num_bytes=answer["num_bytes"],
        weights_bytes=answer["weights_bytes"],
        peak_bytes=answer["peak_bytes"],
        num_attentions=answer["num_attentions"],
        seconds=answer["seconds"],
    )
    logger.info(
        "%s plan: %s, %d profiles, %d attention layers, %.1f s, %s of memory",
        request.role,
        format_bytes(built.num_bytes),
        len(request.profiles),
        built.num_attentions,
        built.seconds,
        format_bytes(built.peak_bytes),
    )
    return built


def _run_worker(
    job: Mapping[str, Any], request: PlanRequest | None, progress: Steps | None
) -> dict[str, Any]:
    """Do a job in the worker and return its result."""
    backend = str(job["backend"])
    environment = {
        **os.environ,
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == "tensorrt-rtx" else "0",
    }
    reading, writing = os.pipe()
    result: dict[str, Any] | None = None
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as printed,
        os.fdopen(reading, encoding="utf-8", errors="replace") as lines,
    ):
        # -P: the folder where the command was started is no place to import from.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            env=environment,
            pass_fds=[writing],
            start_new_session=True,  # a terminal's Ctrl-C is for this process only
        )
        try:
            with _stopped_at_exit(process):
                assert process.stdin is not None
                task = {**job, "descriptor": writing, "parent": os.getpid()}
                try:
                    process.stdin.write(json.dumps(task).encode())
                    process.stdin.close()
                except BrokenPipeError:
                    logger.info("the builder ended before it read its job")
                os.close(writing)
                writing = -1
                for last in _messages(lines):
                    if "result" in last:
                        result = last["result"]
                    elif "phase" in last and progress is not None and request is not None:
                        progress.stage(f"Build {request.role} plan: {last['phase']}")
                    elif "done" in last and progress is not None:
                        progress.update(last["done"], last["total"], "steps")
                code = process.wait()
        finally:
            if writing >= 0:
                os.close(writing)
        if code == 0 and result is not None:
            return result
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    logger.info("the builder of %s ended with %d: %s", backend, code, text)
    if "refusal" in last:
        make = UsageError if last["exit_code"] == UsageError.exit_code else BackendError
        raise make(last["refusal"])
    if "failure" in last:
        raise BackendError(explain_failure([last["failure"], *last["lines"]], backend, request))
    raise BackendError(explain_end(code, text, backend, request))


def _messages(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed in the middle of a line
            logger.info("an incomplete message of the builder: %r", line)


@contextmanager
def _stopped_at_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process and its children if it still runs when the block is left."""
    try:
        yield
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


__all__ = [
    "BuiltPlan",
    "LibraryFacts",
    "PlanRequest",
    "Target",
    "ask_library",
    "build_plan",
    "check_attention",
    "choose_target",
    "describe_target",
    "explain_failure",
]
