"""The `evaluate-policies` command."""

from __future__ import annotations

import argparse
import os
import time
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
    check_packages,
    open_engines,
    request_of,
)
from ditrim.plugins.errors import LadderError, UsageError

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.evaluation.comparison import Comparison, Contender
    from ditrim.runtime.evaluation.edits import ComparedEdit
    from ditrim.runtime.evaluation.folder import ComparisonFolder

_EXAMPLES = """\
  evaluate-policies --engine engines-out/small --output comparison --count 16 \\
      --policy "topi tau=0.85" --policy "coverage tau=0.85" --policy "random ratio=0.5"
  evaluate-policies --engine <set> --edits ./edits --seeds 0,1 --steps 40 --output comparison \\
      --policy "ToPi: topi" --policy "ToPi with cache: topi cache=0.05"
The same command again goes on where it was interrupted; further policies, seeds and edits are
added to what is there."""
_MAX_SEEDS = 1000
# What a comparison is of, among the options and of its edits.
_ASKED = ("negative_prompt", "true_cfg_scale", "guidance", "size", "scheduler")
_OF_EDITS = ("name", "category", "prompt", "fingerprint")
_LINES = 20  # of progress where there is no terminal


class _ListPolicies(argparse.Action):
    """Print every policy with its options and what they take."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ditrim.runtime.policy_text import POLICIES, cache_options, options_of

        for name in POLICIES:
            print(name)
            for option, takes in options_of(name).items():
                print(f"  {option}=  {takes}")
        print("a step cache beside any of them")
        for option, takes in cache_options().items():
            print(f"  {option}=  {takes}")
        parser.exit()


def _parser() -> CommandParser:
    parser = CommandParser(
        "evaluate-policies",
        description="Compare reduction policies on the same edits from the same noise, against the "
        "full context:\nresults.csv, results.json and one page, report.html.",
        examples=_EXAMPLES,
    )
    compared = parser.add_argument_group("what is compared")
    add_engine_options(compared)
    compared.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="TEXT",
        help="'name option=value ...' or 'label: name option=value ...'; again for each policy. "
        "--list-policies prints names and options",
    )
    compared.add_argument(
        "--list-policies", action=_ListPolicies, nargs=0, help="names and options, then exit"
    )
    compared.add_argument(
        "--edits",
        default="held-out",
        metavar="FOLDER|held-out|train",
        help="a folder with pictures and edits.jsonl, or the small editor's scenes (default: "
        "held-out)",
    )
    text = "edits (default: 64 scenes, or all of a folder)"
    add_whole(compared, "--count", 1, 10**6, text)
    compared.add_argument(
        "--seeds", default="0", metavar="N,N,...", help="of the noise (default: 0)"
    )
    add_request_options(compared)
    add_machine_options(parser)
    results = parser.add_argument_group("results")
    results.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    text = "edits of each category whose pictures are shown"
    add_whole(results, "--strips", 0, 10**6, text, 2)
    results.add_argument("--no-lpips", action="store_true", help="leave LPIPS out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evaluate-policies`; returns the exit code."""
    return run_command(_parser, _evaluate, argv)


def _evaluate(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything that can be refused is refused before the first run."""
    with warnings_noted(terminal):
        seeds = _seeds_of(args.seeds)
        _contenders(args.policy, None)
        check_packages("evaluate-policies", "skimage", "jinja2")
        from ditrim.runtime.evaluation.edits import choose_edits
        from ditrim.runtime.evaluation.folder import open_folder
        from ditrim.runtime.metrics import load_lpips

        edits = choose_edits(args.edits, args.count)
        opened = open_engines(args, terminal)
        engines = opened.engines
        contenders = _contenders(args.policy, opened.engine_set)
        pipe = opened.pipeline()
        request = request_of(args)
        _check_edits(pipe, engines, edits, request)
        lpips, lpips_note = (None, "LPIPS was left out with --no-lpips")
        if not args.no_lpips:
            lpips, lpips_note = load_lpips()
            if lpips is None:
                terminal.note(lpips_note)
        settings = _settings(args, engines, pipe, edits, seeds, contenders, lpips is not None)
        with open_folder(args.output, settings) as folder:
            from ditrim.runtime.evaluation.comparison import Comparison

            comparison = Comparison(
                pipe=pipe,
                engines=engines,
                contenders=_named_contenders(folder, engines),
                edits=edits,
                seeds=folder.settings["seeds"],
                request=request,
                folder=folder,
                num_strips=args.strips,
                lpips=lpips,
                session=len(folder.settings["sessions"]) - 1,
            )
            _run(comparison, terminal)
            return _write(comparison, lpips_note, terminal)


def _seeds_of(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--seeds must be whole numbers with commas between, got {text!r}"
        ) from None
    if len(set(seeds)) != len(seeds) or not 1 <= len(seeds) <= _MAX_SEEDS:
        raise UsageError(f"--seeds must be different, {_MAX_SEEDS} at most, got {text!r}")
    if not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise UsageError(f"--seeds must lie in [0, {MAX_SEED}], got {text!r}")
    return seeds


def _contenders(texts: Sequence[str], engine_set: EngineSet | None) -> list[Contender]:
    """The full context, and what was given."""
    from ditrim.runtime.evaluation.comparison import REFERENCE, Contender
    from ditrim.runtime.policy import FullContext
    from ditrim.runtime.policy_text import policy_from_text, split_label

    found = [Contender(label=REFERENCE, policy=FullContext())]
    for text in texts:
        label, spec = split_label(text)
        policy, cache = policy_from_text(spec, engine_set=engine_set)
        if label in (contender.label for contender in found):
            raise UsageError(
                f"--policy {text!r}: {label!r} is there already"
                + (
                    " (the full context is always run)"
                    if label == REFERENCE
                    else "; give one of the two another label, as in 'label: policy'"
                )
            )
        found.append(Contender(label=label, policy=policy, cache=cache))
    return found


def _named_contenders(folder: ComparisonFolder, engines: Engines) -> list[Contender]:
    """All policies of the folder, those of earlier calls too."""
    from ditrim.runtime.evaluation.comparison import Contender
    from ditrim.runtime.policy_text import policy_from_text

    found = []
    for entry in folder.settings["policies"]:
        policy, cache = policy_from_text(entry["text"], engine_set=engines.engine_set)
        found.append(Contender(label=entry["label"], policy=policy, cache=cache))
    return found


def _check_edits(
    pipe: Any, engines: Engines, edits: Sequence[ComparedEdit], request: EditRequest
) -> None:
    """Every picture is opened once, and the pipeline takes every request."""
    from dataclasses import replace

    from ditrim.runtime.editing.pipelines import prepare_request

    for edit in edits:
        if not edit.prompt.strip():
            raise UsageError(f"edit {edit.name}: the prompt is empty")
        images = edit.open().images
        try:
            prepare_request(
                pipe, engines.engine_set, replace(request, images=images, prompt=edit.prompt)
            )
        except (UsageError, LadderError) as error:
            raise type(error)(f"edit {edit.name}: {error}") from error


def _settings(
    args: argparse.Namespace,
    engines: Engines,
    pipe: Any,
    edits: Sequence[ComparedEdit],
    seeds: Sequence[int],
    contenders: Sequence[Contender],
    has_lpips: bool,
) -> dict[str, Any]:
    """Return the settings of a comparison, as `open_folder` takes them."""
    from ditrim.runtime.editing.pipelines import default_steps
    from ditrim.runtime.policy_text import policy_to_text
    from ditrim.runtime.profiling.machine import library_versions

    manifest = engines.engine_set.manifest
    return {
        "fixed": {
            "engine": manifest.identity,
            "model": manifest.model,
            "backend": f"{manifest.backend} {manifest.backend_version}",
            "precision": manifest.precision,
            "pipeline": args.pipeline,
            "edits": args.edits,
            "steps": args.steps or default_steps(pipe, engines.engine_set),
            **{name: getattr(args, name) for name in _ASKED},
            "lpips": "AlexNet" if has_lpips else "left out",
            "machine": machine_name(engines),
            "threads": args.threads,
            "versions": library_versions(),
        },
        "edits": [{name: getattr(edit, name) for name in _OF_EDITS} for edit in edits],
        "seeds": list(seeds),
        "policies": [
            {"label": c.label, "text": policy_to_text(c.policy, c.cache)} for c in contenders
        ],
        "sessions": [{"started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}],
    }


def machine_name(engines: Engines) -> str:
    """Return the name of the machine that the runs are timed on."""
    if engines.device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(engines.device)} ({engines.choice})"
    from ditrim.runtime.profiling.machine import processor_name

    return f"{processor_name()}, {os.cpu_count()} cores"


def _run(comparison: Comparison, terminal: Terminal) -> None:
    """Make the missing runs under a bar; an interrupt says how to go on."""
    from ditrim.runtime.evaluation.comparison import WARMING_UP

    total = sum(len(wanted) for _, _, wanted in comparison.missing())
    present = len(comparison.folder.rows)
    if present:
        terminal.note(f"{comparison.folder.folder} holds {present} finished runs; {total} to make")
    if not total:
        return

    comparison.on_step = terminal.check_interrupt
    done = 0
    try:
        with steps_shown(terminal, "comparing", total, "runs", lines=_LINES) as advance:

            def on_run(edit: str, seed: int, label: str) -> None:
                nonlocal done
                advance(done, f"{edit}, {label}")
                done += not label.endswith(WARMING_UP)

            comparison.on_run = on_run
            comparison.run()
            advance(total, "")
    except KeyboardInterrupt:
        made = len(comparison.folder.rows)
        terminal.note(f"{made} runs are kept; the same command again goes on from there")
        raise


def _write(comparison: Comparison, lpips_note: str, terminal: Terminal) -> dict[str, Any]:
    """The results' files; returns what `--json` prints."""
    import json

    from ditrim.engines.files import write_file
    from ditrim.runtime.evaluation.comparison import REFERENCE
    from ditrim.runtime.evaluation.page import write_page
    from ditrim.runtime.evaluation.summary import complete_rows, rows_as_csv, summarise_rows

    folder = comparison.folder
    labels = [contender.label for contender in comparison.contenders]
    rows = complete_rows(folder.rows.values(), labels)
    summarised = summarise_rows(rows, labels, REFERENCE)
    results = {**folder.settings, "lpips": lpips_note, **summarised, "runs": rows}
    files = {name: folder.folder / f"results.{name}" for name in ("csv", "json")}
    files["html"] = folder.folder / "report.html"
    write_file(files["csv"], rows_as_csv(rows).encode())
    write_file(files["json"], (json.dumps(results, allow_nan=False) + "\n").encode())
    terminal.stage("drawing the page")
    write_page(files["html"], results, comparison.edits, folder)
    overall = summarised["summary"]["all"]
    _say(terminal, labels, overall, REFERENCE)
    terminal.say("\n".join(str(path) for path in files.values()))
    return {
        "output": str(folder.folder),
        "runs": len(rows),
        "edits": overall[REFERENCE]["edits"],
        "policies": {
            label: {
                "psnr_db": _mean(overall[label], "psnr_db"),
                "ssim": _mean(overall[label], "ssim"),
                "kept_ratio": _mean(overall[label], "kept_ratio"),
                "median_speedup": overall[label]["speedup"]["median"],
                "rank": overall[label]["rank"],
            }
            for label in labels
        },
        **{key: str(path) for key, path in files.items()},
    }


def _mean(entry: dict[str, Any], metric: str) -> float:
    return round(float(entry[metric]["mean"]), 4)


def _say(
    terminal: Terminal, labels: Sequence[str], overall: dict[str, Any], reference: str
) -> None:
    """The policies by rank, a line each."""
    width = max(map(len, labels))
    terminal.say(f"{'':{width}}    PSNR [95 % interval] dB   kept  BACK  speed-up")
    ordered = sorted(labels, key=lambda label: overall[label]["rank"] or 0)
    for label in ordered:
        entry = overall[label]
        psnr = entry["psnr_db"]
        quality = "reference"
        if label != reference:
            quality = f"{psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}]"
        terminal.say(
            f"{label:{width}}  {quality:>25}  {entry['kept_ratio']['mean']:5.0%} "
            f"{entry['back_calls']['mean']:5.1f}  {entry['speedup']['median']:7.2f}x"
        )
