"""What the commands that run edits share: options, engines and the pipeline."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import MAX_STEPS, MAX_THREADS, Terminal, add_number, add_whole
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.runtime.editing.pipelines import EditRequest

# What --engine takes in place of an engine set.
TORCH = "torch"
_PACKAGES = {"skimage": "scikit-image"}  # module -> where its name is another


def add_step_options(group: Any, least_steps: int = 1) -> None:
    """Add the options that every request has besides its pictures and its prompt."""
    add_whole(group, "--steps", least_steps, MAX_STEPS, "default: the pipeline's")
    text = "true classifier-free guidance, above 1 (two model calls a step)"
    add_number(group, "--true-cfg-scale", 0, 1000, text)
    add_number(group, "--guidance", 0, 1000, "embedded guidance scale (FLUX.1-Kontext)")


def add_request_options(group: Any) -> None:
    """Add the options of a request whose result is kept."""
    add_step_options(group)
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help='for true guidance (without it, " ")'
    )
    group.add_argument(
        "--size",
        default="auto",
        metavar="WxH|auto",
        help="of the result in pixels; auto (default) is the first picture's shape at the "
        "pipeline's own area",
    )


def add_engine_options(group: Any, *, is_required: bool = True) -> None:
    """Add the options that say what runs."""
    group.add_argument(
        "--engine",
        required=is_required,
        metavar="FOLDER|torch",
        help="from build-engine; or torch: the transformer of --pipeline itself, without a build",
    )
    group.add_argument(
        "--compile", action="store_true", help="with --engine torch: compile each kind of block"
    )
    text = "with --engine torch: keep up to so many CUDA graphs, one a length"
    add_whole(group, "--cuda-graphs", 0, 1000, text, 0)


def add_device_options(group: Any) -> None:
    """Add the options of every command that runs an engine set."""
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N"
    )
    add_whole(group, "--threads", 0, MAX_THREADS, "CPU threads; 0 means one a core", 0)
    group.add_argument(
        "--verify",
        choices=("sizes", "hashes"),
        default="sizes",
        help="how the engine set's files are checked (default: sizes)",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that runs an engine set in its pipeline."""
    machine = parser.add_argument_group("machine")
    add_device_options(machine)
    machine.add_argument(
        "--pipeline",
        metavar="FOLDER|HUB-ID",
        help="where VAE, text encoder and scheduler are (default: where the engine set's weights "
        "came from); with --engine torch all of it, or small for the shipped editor",
    )
    machine.add_argument(
        "--scheduler",
        metavar="FILE|lightning",
        help="in place of the pipeline's: a scheduler_config.json, or lightning for distilled "
        "editors (4 or 8 steps without guidance)",
    )


def request_of(
    args: argparse.Namespace,
    images: tuple[Image.Image, ...] = (),
    prompt: str = "",
    seed: int = 0,
) -> EditRequest:
    """The request that the options ask for.

    Raises:
        UsageError: the size is none.
    """
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.editing.result_size import parse_size

    return EditRequest(
        images=images,
        prompt=prompt,
        negative_prompt=args.negative_prompt,
        true_cfg_scale=args.true_cfg_scale,
        guidance=args.guidance,
        steps=args.steps,
        size=parse_size(args.size),
        seed=seed,
    )


@dataclass(slots=True)
class Opened:
    """Engines, and the pipeline that they run in, which is loaded when it is first asked for.

    Attributes:
        engines: ready to run.
    """

    engines: Engines
    _make: Callable[[], Any]
    _pipe: Any = None

    @property
    def engine_set(self) -> EngineSet:
        """The engine set that the engines run."""
        return self.engines.engine_set

    def pipeline(self) -> Any:
        """Load the pipeline around the engines with `load_pipeline`, on their device."""
        if self._pipe is None:
            self._pipe = self._make()
        return self._pipe


def is_torch(args: argparse.Namespace) -> bool:
    """Whether `--engine` asks for the torch backend."""
    return args.engine == TORCH and not os.path.isdir(TORCH)


def open_engines(args: argparse.Namespace, terminal: Terminal) -> Opened:
    """Load what `--engine` names: an engine set, or with `torch` a pipeline's own transformer.

    Raises:
        UsageError, EngineSetError, DitrimError: see `load_engines`, `load_whole_pipeline`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    if is_torch(args):
        pipe = _whole_pipeline(args, terminal)
        from ditrim.engines.live import torch_engines

        live = torch_engines(
            pipe, compile="blocks" if args.compile else None, cuda_graphs=args.cuda_graphs
        )
        return Opened(live, lambda: pipe)
    if args.compile or args.cuda_graphs:
        raise UsageError(
            f"--compile and --cuda-graphs are for --engine {TORCH}; an engine set is compiled "
            "already: leave them out"
        )
    terminal.stage(f"loading {args.engine}")
    from ditrim.engines.load import load_engines

    engines = load_engines(
        args.engine, device=args.device, threads=args.threads, verify=args.verify
    )

    def pipeline() -> Any:
        from ditrim.runtime.editing.pipelines import (
            component_dtype,
            load_pipeline,
            silence_libraries,
        )

        silence_libraries()
        pipe = load_pipeline(
            engines.engine_set,
            args.pipeline,
            dtype=component_dtype(engines),
            scheduler=args.scheduler,
        )
        return pipe.to(engines.device) if engines.device.type == "cuda" else pipe

    return Opened(engines, pipeline)


def _whole_pipeline(args: argparse.Namespace, terminal: Terminal) -> Any:
    """Load the pipeline of `--pipeline` with its transformer, on the device of `--device`."""
    import torch

    from ditrim.runtime.editing.pipelines import load_whole_pipeline, silence_libraries

    place = args.pipeline
    if place is None:
        raise UsageError(
            f"--engine {TORCH} runs a pipeline's own transformer: name the pipeline with "
            "--pipeline FOLDER|HUB-ID, or --pipeline small for the shipped editor"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device}: torch {torch.__version__} sees no GPU; use --device cpu, or "
            "install a build of torch for this GPU"
        )
    terminal.stage(f"loading {place}")
    silence_libraries()
    dtype = None if device == "cpu" else torch.bfloat16
    scheduler = getattr(args, "scheduler", None)
    return load_whole_pipeline(place, dtype=dtype, scheduler=scheduler).to(device)


def check_packages(what: str, *modules: str) -> None:
    """Refuse what needs packages that the runtime itself does not."""
    missing = [_PACKAGES.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: pip install 'ditrim[report]'")
