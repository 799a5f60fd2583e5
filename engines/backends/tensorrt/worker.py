"""One plan, built in a process of its own: `python -m ditrim.engines.backends.tensorrt.worker`.

Replaces: building in the process of the command. Between two calls of TensorRT's progress monitor
many seconds can pass, minutes for a large model; a process can be stopped at once. Where the
library crashes, it alone dies; it gives back all the memory that it took, and it fixes which of
the two libraries Polygraphy works with (POLYGRAPHY_USE_TENSORRT_RTX) without changing the caller's
environment. Trade-off: it starts anew for every plan, a second or two.

The job comes as JSON on stdin; what happens goes, a line of JSON each, to the descriptor that the
job names. `tensorrt_builder` is the other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditrim.engines.backends.tensorrt.graph import NEW_OPERATORS, graph_for_backend
from ditrim.engines.backends.tensorrt.library import (
    Library,
    capability_name,
    log_captured,
    open_library,
    rtx_capabilities,
    rtx_default_capabilities,
    version_numbers,
)
from ditrim.plugins.blocks import num_row_blocks
from ditrim.plugins.errors import BackendError, DitrimError

LEAST_POLYGRAPHY = (0, 53, 6)
_TELL_SECONDS = 0.2
_PARTS = 1000  # of a step of the builder
_MOST_LINES = 40
_PR_SET_PDEATHSIG = 1
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


class _Line:
    """Sends JSON lines to the caller."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._told = 0.0

    def send(self, **content: Any) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def send_sometimes(self, **content: Any) -> None:
        """Leave out what comes too soon after the last."""
        if (now := time.monotonic()) - self._told >= _TELL_SECONDS:
            self._told = now
            self.send(**content)


def _make_monitor(module: Any, line: _Line) -> Any:
    """An `IProgressMonitor` that reports the outermost phase and the one inside it."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: list[tuple[str, int]] = []  # outermost first
            self.steps, self.parts = 0, 0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.phases.append((name, num_steps))
            if len(self.phases) == 2:
                self.parts = 0
                line.send(phase=name)

        def phase_finish(self, name: str) -> None:
            while self.phases and self.phases.pop()[0] != name:
                pass

        def step_complete(self, name: str, step: int) -> bool:
            if self.phases and name == self.phases[0][0]:
                self.steps, self.parts = step + 1, 0
            elif len(self.phases) > 1 and name == self.phases[1][0]:
                self.parts = _PARTS * (step + 1) // max(1, self.phases[1][1])
            if self.phases:
                total = self.phases[0][1] * _PARTS
                line.send_sometimes(
                    done=min(total, self.steps * _PARTS + min(self.parts, _PARTS)), total=total
                )
            return True  # to stop, the process is killed

    return Monitor()


def _import_polygraphy() -> str:
    """Check that Polygraphy is there and new enough; its version."""
    try:
        import polygraphy
    except ImportError as error:
        raise BackendError(
            "building plans needs Polygraphy, which is not installed; install it with: "
            "pip install 'polygraphy>=0.53.6'"
        ) from error
    found = str(polygraphy.__version__)
    if version_numbers(found) < LEAST_POLYGRAPHY:
        raise BackendError(
            f"Polygraphy is of version {found}; building plans needs 0.53.6 or newer: "
            "pip install -U polygraphy"
        )
    return found


def _missing_operators(library: Library) -> list[str]:
    """Operators that graphs hold and this library's parser lacks."""
    network = library.module.Builder(library.logger).create_network(0)
    parser = library.module.OnnxParser(network, library.logger)
    return [name for name in NEW_OPERATORS if not parser.supports_operator(name)]


def _describe(library: Library) -> dict[str, Any]:
    capabilities = rtx_capabilities(library) if library.is_rtx else ()
    defaults = rtx_default_capabilities(library) if library.is_rtx else ()
    return {
        "version": library.version,
        "polygraphy": _import_polygraphy(),
        "capabilities": [capability_name(item) for item in capabilities],
        "default_capabilities": [capability_name(item) for item in defaults],
        "missing_operators": _missing_operators(library),
    }


def _prepare_graph(path: Path, job: Mapping[str, Any], missing: list[str]) -> None:
    """Give the graph the form that the library takes, in place."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    changed = graph_for_backend(
        model,
        job["backend"],
        num_blocks=num_row_blocks(job["scored_rows"]),
        missing=missing,
        is_stripped=job["weights_stripped"],
    )
    if changed is not model:
        path.write_bytes(changed.SerializeToString())


def _allow_unfused(module: Any, network: Any, is_allowed: bool) -> int:
    """Say of every attention whether it may be decomposed; how many there are."""
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        # Older libraries have no such layer.
        if layer.type == getattr(module.LayerType, "ATTENTION_INPUT", None):
            # The bindings return plain layers; their class says which accessors they have.
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = is_allowed
            count += 1
    return count


def _make_profiles(shapes: list[Mapping[str, Any]]) -> list[Any]:
    from polygraphy.backend.trt import Profile

    class FrugalProfile(Profile):  # type: ignore[misc]
        """A profile that asks for no weights of its own."""

        def to_trt(self, builder: Any, network: Any) -> Any:
            profile = super().to_trt(builder, network)
            profile.extra_memory_target = 0.0
            return profile

    profiles = []
    for index, item in enumerate(shapes):
        profile = FrugalProfile() if index else Profile()
        for name, (least, best, most) in item.items():
            profile.add(name, tuple(least), tuple(best), tuple(most))
        profiles.append(profile)
    return profiles


def _make_config(library: Library, job: Mapping[str, Any], monitor: Any) -> Any:
    """Polygraphy's loader of the builder's configuration."""
    module = library.module
    common: dict[str, Any] = {
        "profiles": _make_profiles(job["profiles"]),
        "progress_monitor": monitor,
        "profiling_verbosity": module.ProfilingVerbosity.LAYER_NAMES_ONLY,
    }
    if job["workspace"] is not None:
        common["memory_pool_limits"] = {module.MemoryPoolType.WORKSPACE: job["workspace"]}
    if job["optimization_level"] is not None:
        common["builder_optimization_level"] = job["optimization_level"]
    if job["weights_stripped"]:
        common["strip_plan"] = True
    if library.is_rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        if job["capabilities"] == "current":
            loader = CreateConfigRTX(use_gpu=True, **common)
        elif job["capabilities"] is None:
            loader = CreateConfigRTX(**common)
        else:
            asked = [tuple(map(int, name.split("."))) for name in job["capabilities"]]
            loader = CreateConfigRTX(compute_capabilities=asked, **common)
    else:
        from polygraphy.backend.trt import CreateConfig

        cache = job["timing_cache"]
        known = cache if cache is not None and Path(cache).is_file() else None
        loader = CreateConfig(load_timing_cache=known, **common)

    def finished(builder: Any, network: Any) -> Any:
        config = loader(builder, network)
        if job["weights_stripped"]:
            # The weights that come back are those that were built with: nothing else has to be
            # kept general for them. Plain REFIT can lose the bias of a matrix product.
            config.set_flag(module.BuilderFlag.REFIT_IDENTICAL)
        if library.is_rtx and hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # Without it a plan may allocate while it runs, which no CUDA graph can capture.
            config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    return finished


def _peak_bytes() -> int:
    """Most memory that this process held; `ru_maxrss` would start from the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _build(job: Mapping[str, Any], library: Library, line: _Line) -> dict[str, Any]:
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import util as trt_util
    from polygraphy.logger import G_LOGGER

    start, module, path = time.monotonic(), library.module, Path(job["graph"])
    # What the library logs goes where `log_captured` reads it, and not to stdout.
    trt_util.TRT_LOGGER = library.logger
    missing = _missing_operators(library)
    _prepare_graph(path, job, missing)
    if job["plugin_capability"] is not None:
        from ditrim.plugins.tensorrt_plugin import register_plugin

        register_plugin(tuple(job["plugin_capability"]))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), log_captured() as lines:
        is_typed = hasattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        monitor = _make_monitor(module, line)
        try:
            taken_apart = "Attention" in missing
            line.send(phase="Parse (attention taken apart)" if taken_apart else "Parse")
            builder, network, parser = NetworkFromOnnxPath(str(path), strongly_typed=is_typed)()
            num_attentions = _allow_unfused(module, network, job["allow_unfused"])
            config = _make_config(library, job, monitor)
            plan = EngineBytesFromNetwork(
                (builder, network, parser), config, save_timing_cache=job["timing_cache"]
            )()
        except Exception as error:
            line.send(failure=str(error), lines=_errors_of(lines))
            raise SystemExit(1) from error
    line.send(phase="Write")
    with open(job["plan"], "wb") as file:
        file.write(memoryview(plan))
    text = "\n".join(message for _, message in lines)
    weights = _WEIGHTS.findall(text)
    return {
        "num_bytes": plan.nbytes,
        "activation_bytes": [int(item) for item in _ACTIVATIONS.findall(text)],
        "weights_bytes": int(weights[-1]) if weights else None,
        "peak_bytes": _peak_bytes(),
        "num_attentions": num_attentions,
        "seconds": time.monotonic() - start,
    }


def _errors_of(lines: list[tuple[str, str]]) -> list[str]:
    """What the library complained of, the first complaints first."""
    errors = [text for severity, text in lines if severity in ("ERROR", "INTERNAL_ERROR")]
    return errors[:_MOST_LINES]


def main() -> int:
    """Do the job on stdin."""
    # A builder that nobody waits for is of no use: die with the process that started this one.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.load(sys.stdin)
    line = _Line(job["descriptor"])
    if os.getppid() != job["parent"]:
        return 1
    try:
        library = open_library(job["backend"])
        if job["graph"] is None:
            line.send(result=_describe(library))
        else:
            _import_polygraphy()
            line.send(result=_build(job, library, line))
    except DitrimError as error:
        line.send(refusal=str(error), exit_code=error.exit_code)
        return 1
    except MemoryError:
        line.send(failure="out of memory", lines=[])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
