"""Plans of TensorRT and TensorRT-RTX: what is asked of the builder, and what it says.

A plan is built in a process of its own, `tensorrt_worker`, with what it shares between the two
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditrim.engines.backends.tensorrt.library import Gpu
from ditrim.engines.files import format_bytes
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.engines.sets.profiles import ProfileSpec, shape_of
from ditrim.engines.sets.specs import TensorSpec
from ditrim.plugins.errors import BackendError, UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.ladder import Ladder
    from ditrim.engines.sets.specs import Limits

logger = logging.getLogger(__name__)

TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_WORKER = "ditrim.engines.backends.tensorrt.worker"
_BF16_FROM = (8, 0)
_MOST_SHOWN = 3
# What the lines that say something have in common.
_SIGNS = ("Error Code", "ERROR:", "While parsing node")
_MOST_CHARACTERS = 600


class Steps(Protocol):
    """Who is told how far a plan is; `ditrim.engines.build.progress.Progress` is one."""

    def stage(self, name: str) -> None: ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None: ...


class PlanOptions(Protocol):
    """What of a build's options decides its plans; see `BuildOptions`."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compute_capability(self) -> tuple[str, ...] | None: ...
    @property
    def allow_unfused(self) -> bool: ...
    @property
    def separate_anchor(self) -> bool: ...
    @property
    def weights_stripped(self) -> bool: ...
    @property
    def workspace(self) -> int | None: ...
    @property
    def optimization_level(self) -> int | None: ...
    @property
    def timing_cache(self) -> str | None: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def reference_ladder(self) -> Ladder: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What plans are built for.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        capabilities: compute capabilities that were asked for; none means that of the GPU, or
            without one what TensorRT-RTX builds for by default.
        gpu: the GPU that is there.
        allow_unfused: whether attention may be without a fused kernel.
    """

    backend: str
    capabilities: tuple[str, ...] | None
    gpu: Gpu | None
    allow_unfused: bool = False

    def identity(self) -> dict[str, Any]:
        """What of the target a plan depends on."""
        if self.backend == "tensorrt":
            assert self.gpu is not None
            return {
                "gpu": self.gpu.name,
                "compute_capability": self.gpu.capability_name,
                "driver": self.gpu.driver,
            }
        here = None if self.gpu is None else [self.gpu.capability_name]
        return {"compute_capabilities": sorted(self.capabilities or ()) or here or "default"}


def choose_target(options: PlanOptions, gpu: Gpu | None) -> Target:
    """What to build for, checked against the GPU that is there.

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
    """What the library in the worker says of itself.

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
    """The manifest's `target`."""
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
class PlanRequest:
    """A plan to build.

    Attributes:
        role: "front", "back" or "anchor".
        graph: the ONNX file; it is changed to what the library parses.
        plan: the file to write.
        inputs, outputs: the graph's tensors.
        profiles: optimisation profiles.
        target: what it is for.
        options: how to build it.
    """

    role: str
    graph: Path
    plan: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[ProfileSpec, ...]
    target: Target
    options: PlanOptions

    @property
    def is_scored(self) -> bool:
        """Whether the graph scores, and so needs the plugin with TensorRT."""
        return any(spec.name == "influence" for spec in self.outputs)

    def job(self) -> dict[str, Any]:
        """What the worker is told."""
        options, gpu = self.options, self.target.gpu
        shapes = [
            {
                spec.name: [shape_of(spec, profile, which) for which in ("least", "best", "most")]
                for spec in self.inputs
            }
            for profile in self.profiles
        ]
        capabilities: Any = self.target.capabilities
        if capabilities is None and gpu is not None:
            capabilities = "current"
        needs_plugin = self.target.backend == "tensorrt" and self.is_scored
        rows = self.profiles[-1].rows
        return {
            "backend": self.target.backend,
            "graph": str(self.graph),
            "plan": str(self.plan),
            "profiles": shapes,
            "scored_rows": 1 if rows is None else rows.most,
            "workspace": options.workspace,
            "optimization_level": options.optimization_level,
            "allow_unfused": options.allow_unfused,
            "weights_stripped": options.weights_stripped,
            "capabilities": capabilities,
            "timing_cache": _timing_cache(options, gpu),
            "plugin_capability": gpu.capability if gpu is not None and needs_plugin else None,
        }


def _timing_cache(options: PlanOptions, gpu: Gpu | None) -> str | None:
    """The file that keeps kernel timings; a GPU of another kind has another."""
    if options.backend != "tensorrt" or options.timing_cache == "none":
        return None
    if options.timing_cache is not None:
        path = Path(options.timing_cache).expanduser()
    else:
        import platformdirs

        assert gpu is not None
        name = "-".join(gpu.name.split()) + f"-sm{''.join(map(str, gpu.capability))}.timing"
        path = Path(platformdirs.user_cache_dir("ditrim")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path.absolute())


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
    raise BackendError(_explain_end(code, text, backend, request))


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
    """What a failed build means and what to do, from what the library said.

    Args:
        lines: its complaints, the most telling of which is looked for.
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


def _explain_end(code: int, text: str, backend: str, request: PlanRequest | None) -> str:
    """What it means that the worker died without a word."""
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
