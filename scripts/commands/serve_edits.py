"""The `serve-edits` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ditrim.commands.console import CommandParser, Terminal, add_number, add_whole, run_command
from ditrim.commands.editing import add_machine_options, check_packages
from ditrim.plugins.errors import UsageError
from ditrim.runtime.editing.opening import ModelSource

_EXAMPLES = """\
  serve-edits --engine torch --pipeline small
  serve-edits --engine engines-out/qwen-edit --warm-size 1024x1024 --queue 32 --deadline 120
  serve-edits --engine fast=engines-out/lightning --engine good=engines-out/qwen-edit --max-loaded 2
  curl -F image=@photo.png -F prompt="make the car red" localhost:8000/v1/images/edits"""


def _parser() -> CommandParser:
    parser = CommandParser(
        "serve-edits",
        description="Serve edits over HTTP, as OpenAI's image edits, until SIGTERM.",
        examples=_EXAMPLES,
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--engine",
        required=True,
        action="append",
        metavar="[NAME=]FOLDER|torch",
        help="engine set, or torch for the transformer of --pipeline; again for further ones, the "
        "first is the default",
    )
    models.add_argument(
        "--compile", action="store_true", help="with --engine torch: compile each kind of block"
    )
    add_whole(models, "--cuda-graphs", 0, 1000, "with --engine torch: CUDA graphs to keep", 0)
    add_whole(models, "--max-loaded", 1, 64, "models in memory at once", 1)
    models.add_argument("--policy", default="topi", metavar="TEXT", help="of requests without one")
    models.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME=POLICY",
        help="a name that requests may use in place of a policy; 'exact' is there",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1)")
    add_whole(server, "--port", 1, 65535, "to listen on", 8000)
    add_whole(server, "--workers", 1, 64, "edits that run at once", 1)
    add_whole(server, "--queue", 0, 10_000, "edits that may wait; one more gets status 429", 16)
    add_number(server, "--deadline", 0.001, 86_400, "seconds until an edit gets status 504")
    add_whole(server, "--drain-seconds", 0, 86_400, "for accepted edits after SIGTERM (all)")
    server.add_argument(
        "--warm-size",
        action="append",
        default=[],
        metavar="WxH",
        help="a size of results to warm up at; again for more (default: the pipeline's own)",
    )
    server.add_argument("--no-warm-up", action="store_true", help="be ready once models are loaded")
    limits = parser.add_argument_group("limits of a request")
    add_whole(limits, "--max-steps", 1, 1000, "denoising steps", 100)
    add_whole(limits, "--max-megabytes", 1, 4096, "of its body", 64)
    add_whole(limits, "--max-megapixels", 1, 100, "of a picture", 50)
    limits.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    add_machine_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `serve-edits`; returns the exit code."""
    return run_command(_parser, _serve, argv)


def _serve(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    modules = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    check_packages("serve-edits", *modules, extra="serve")
    from ditrim.runtime.editing.result_size import parse_size
    from ditrim.runtime.policy_text import policy_from_text
    from ditrim.runtime.service import EditService, ServiceOptions
    from ditrim.runtime.serving.server import serve
    from ditrim.runtime.serving.settings import ServingSettings

    presets = {"exact": "full"} | dict(_named(text, "--preset") for text in args.preset)
    for text in (args.policy, *presets.values()):
        policy_from_text(text)
    sizes = [parse_size(text) for text in args.warm_size]
    options = ServiceOptions(
        workers=args.workers,
        queue_size=args.queue,
        deadline_s=args.deadline,
        max_loaded=args.max_loaded,
        warm_up=not args.no_warm_up,
        warm_sizes=tuple(size for size in sizes if size is not None),
        max_steps=args.max_steps,
    )
    settings = ServingSettings(
        max_body_bytes=args.max_megabytes << 20,
        max_pixels=args.max_megapixels * 1_000_000,
        presets=presets,
        default_policy=args.policy,
        log_prompts=args.log_prompts,
    )
    service = EditService(_models(args), options)
    terminal.say(f"http://{args.host}:{args.port}/v1/images/edits")
    serve(service, settings, host=args.host, port=args.port, drain_s=args.drain_seconds)
    return {"edits": dict(service.metrics().outcomes)}


def _models(args: argparse.Namespace) -> dict[str, ModelSource]:
    common = ModelSource(
        engine="",
        pipeline=args.pipeline,
        device=args.device,
        threads=args.threads,
        verify=args.verify,
        scheduler=args.scheduler,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
    )
    models: dict[str, ModelSource] = {}
    for text in args.engine:
        name, engine = _named(text, "--engine") if "=" in text else ("default", text)
        if name in models:
            raise UsageError(f"--engine: {name} is given twice; write --engine NAME=FOLDER")
        models[name] = replace(common, engine=engine)
    return models


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"{option} {text!r}: write NAME=VALUE")
    return name, value
