"""The `edit-images` command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import (
    MAX_SEED,
    CommandParser,
    Terminal,
    add_whole,
    run_command,
    steps_shown,
    warnings_noted,
)
from ditrim.commands.editing import (
    add_engine_options,
    add_machine_options,
    add_request_options,
    request_of,
    source_of,
)
from ditrim.plugins.errors import DitrimError, UsageError

if TYPE_CHECKING:
    from ditrim.runtime.service import EditService
    from ditrim.runtime.service.batch import BatchEdit, Failure
    from ditrim.runtime.service.job import EditJob

_EXAMPLES = """\
  edit-images photos --prompt "remove the watermark" --engine <set> --output results
  edit-images edits.jsonl --engine torch --pipeline small --output results --workers 2"""
FAILURES = "failures.jsonl"


def _parser() -> CommandParser:
    parser = CommandParser(
        "edit-images",
        description="Edit many pictures, each by itself: a folder of pictures with one prompt, or "
        'a file with a line an edit, as {"image": "cat.png", "prompt": "black", "seed": 3}. '
        "Run again, it makes what is not there yet.",
        examples=_EXAMPLES,
    )
    edit = parser.add_argument_group("edits")
    edit.add_argument("source", metavar="EDITS.jsonl|FOLDER", help="what to edit")
    add_engine_options(edit)
    edit.add_argument("--prompt", metavar="TEXT", help="of edits that have none of their own")
    edit.add_argument("--output", required=True, metavar="DIR", help="for <name>.png of each edit")
    add_whole(edit, "--seed", 0, MAX_SEED, "of edits that have none of their own", 0)
    edit.add_argument(
        "--policy", default="topi", metavar="TEXT", help="of edits that have none of their own"
    )
    add_request_options(edit)
    add_machine_options(parser)
    add_whole(edit, "--workers", 1, 64, "edits that run at once", 1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `edit-images`; returns the exit code."""
    return run_command(_parser, _edit_all, argv)


def _edit_all(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    with warnings_noted(terminal):
        from ditrim.runtime.service import EditService, ServiceOptions
        from ditrim.runtime.service.batch import read_batch, run_batch

        source, output = Path(args.source).expanduser(), Path(args.output).expanduser()
        edits = read_batch(source, prompt=args.prompt, seed=args.seed, policy=args.policy)
        request_of(args)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {output} cannot be made: {error.strerror}") from error
        options = ServiceOptions(workers=args.workers, queue_size=2 * args.workers, warm_up=False)
        terminal.stage(f"loading {args.engine}")
        with (
            EditService(source_of(args), options) as service,
            steps_shown(terminal, "editing", len(edits), "edits", lines=10) as tell,
        ):
            result = run_batch(
                service,
                edits,
                output,
                lambda edit: _job_of(edit, args),
                facts=_facts_of(service, args),
                on_done=tell,
            )
        _tell_failures(output, result.failed, len(edits), terminal)
        terminal.say(f"{len(result.made)} made, {len(result.kept)} were there: {output}")
        return {"output": str(output), "made": list(result.made), "kept": list(result.kept)}


def _job_of(edit: BatchEdit, args: argparse.Namespace) -> EditJob:
    from ditrim.runtime.editing.pictures import open_picture
    from ditrim.runtime.service.job import EditJob

    images = tuple(open_picture(path) for path in edit.images)
    mask = None if edit.mask is None else open_picture(edit.mask)
    request = request_of(args, images, edit.prompt, edit.seed)
    return EditJob(edit=request, policy=edit.policy, mask=mask)


def _facts_of(service: EditService, args: argparse.Namespace) -> dict[str, Any]:
    """What every result depends on besides its own edit; of VAE and text encoder the name only."""
    names = ("steps", "true_cfg_scale", "guidance", "negative_prompt", "size", "pipeline")
    model = service.loaded(service.names[0])
    assert model is not None
    manifest = model.engine_set.manifest
    # An engine set's identity holds its weights; that of a pipeline's own transformer does not.
    weights = manifest.source.get("files") if manifest.backend == "torch" else None
    return {name: getattr(args, name) for name in names} | {
        "engine": manifest.identity,
        "weights": weights,
        "scheduler": dict(model.pipe.scheduler.config),
    }


def _tell_failures(output: Path, failed: Sequence[Failure], count: int, terminal: Terminal) -> None:
    """Show a table of what failed and keep it beside the results.

    Raises:
        DitrimError: anything did.
    """
    from ditrim.engines.files import write_file

    path = output / FAILURES
    if not failed:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"name": item.name, "error": item.error}) + "\n" for item in failed]
    write_file(path, "".join(lines).encode())
    if not terminal.is_quiet:
        from rich.table import Table

        table = Table("edit", "why it failed")
        for item in failed:
            table.add_row(item.name, item.error)
        terminal.console.print(table)
    raise DitrimError(
        f"{len(failed)} of {count} edits failed ({failed[0].name}: {failed[0].error}); the others "
        f"are done. {path} lists them; mend them and run the command again"
    )
