"""What the commands that run edits share: options, engines and the pipeline."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import MAX_STEPS, MAX_THREADS, Terminal, add_number, add_whole
from ditrim.plugins.errors import UsageError
from ditrim.runtime.editing.opening import ModelSource, Opened, open_model

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.runtime.editing.pipelines import EditRequest

_PACKAGES = {
    "skimage": "scikit-image",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}  # module -> where its name is another


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


def source_of(args: argparse.Namespace) -> ModelSource:
    """What `--engine` and the options of the machine name."""
    return ModelSource(
        engine=args.engine,
        pipeline=getattr(args, "pipeline", None),
        device=args.device,
        threads=args.threads,
        verify=args.verify,
        scheduler=getattr(args, "scheduler", None),
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
    )


def is_torch(args: argparse.Namespace) -> bool:
    """Whether `--engine` asks for the torch backend."""
    return args.engine is not None and ModelSource(engine=args.engine).is_torch


def open_engines(args: argparse.Namespace, terminal: Terminal) -> Opened:
    """Load what `--engine` names: an engine set, or with `torch` a pipeline's own transformer.

    Raises:
        UsageError, EngineSetError, DitrimError: see `load_engines`, `load_whole_pipeline`.
    """
    return open_model(source_of(args), terminal.stage)


def check_packages(what: str, *modules: str, extra: str = "report") -> None:
    """Refuse what needs packages that the runtime itself does not."""
    missing = [_PACKAGES.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}: pip install 'ditrim[{extra}]'")
