"""The `calibrate-auto` command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditrim.commands.console import CommandParser, Terminal, run_command
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.quality import LEAST_RUNS, METHODS, Outlook, QualityModel

_EXAMPLES = """\
  evaluate-policies --engine <set> --edits train --count 48 --output auto-runs \\
      --policy "auto only=coverage min_gain=0 min_influence=0.3" \\
      --policy "auto only=coverage min_gain=0 min_influence=0.6" \\
      --policy "auto only=coverage min_gain=0 min_influence=0.85" \\
      --policy "auto only=tokendrop min_gain=0 min_influence=0"
  calibrate-auto --comparison auto-runs --output auto.json
  edit-image --engine <set> ... --policy "auto min_psnr=30 predictor=auto.json\""""


def _parser() -> CommandParser:
    parser = CommandParser(
        "calibrate-auto",
        description="Fit what the policy auto predicts PSNR with, from runs of evaluate-policies: "
        "what a first step showed, and the PSNR against the full context that came of it.",
        examples=_EXAMPLES,
    )
    group = parser.add_argument_group("fit")
    group.add_argument(
        "--comparison",
        required=True,
        metavar="FOLDER",
        help="from evaluate-policies, with runs of auto at several floors",
    )
    group.add_argument("--output", required=True, metavar="FILE", help="the fit, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `calibrate-auto`; returns the exit code."""
    return run_command(_parser, _calibrate, argv)


def _calibrate(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    from ditrim.engines.files import write_file
    from ditrim.runtime.editing.pictures import check_output
    from ditrim.runtime.evaluation.folder import read_comparison

    check_output(args.output, "--output")
    folder = Path(args.comparison).expanduser()
    settings, rows = read_comparison(folder)
    runs: dict[str, list[tuple[Outlook, float]]] = {}
    for method, outlook, psnr in _seen(rows):
        runs.setdefault(method, []).append((outlook, psnr))
    if "coverage" not in runs:
        raise UsageError(
            f"{folder} has no runs that auto served with coverage; calibrate-auto --help shows "
            "which policies to run"
        )
    for method in METHODS:
        if method != "coverage" and 0 < len(runs.get(method, ())) < LEAST_RUNS:
            terminal.note(
                f"{len(runs.pop(method))} runs of {method} are too few for a fit (at least "
                f"{LEAST_RUNS}): with this predictor, auto leaves it out"
            )
    fixed = settings["fixed"]
    fitted = QualityModel.fit(str(fixed["model"]), str(fixed["engine"]), runs)
    # The share of runs that came out no worse than predicted, on the runs that were fitted.
    kept = {
        method: sum(psnr >= fitted.predict(method, outlook) for outlook, psnr in pairs) / len(pairs)
        for method, pairs in runs.items()
    }
    write_file(args.output, (json.dumps(fitted.as_dict(), indent=2) + "\n").encode())
    for method, pairs in runs.items():
        terminal.say(
            f"{method}: {len(pairs)} runs, error {fitted.residual_db[method]:.2f} dB (one standard "
            f"deviation); {kept[method]:.0%} came out no worse than predicted"
        )
    terminal.say(f"predictor: {args.output}")
    return {"output": str(args.output), **fitted.as_dict(), "no_worse_than_predicted": kept}


def _seen(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Outlook, float]]:
    """Yield of each run of auto its method, what was known then, and the PSNR in dB."""
    for row in rows:
        notes = row.get("policy_notes") or {}
        method = notes.get("chosen")
        if method not in METHODS or row.get("psnr_db") is None:
            continue
        for item in notes["candidates"]:
            if item["policy"] == method and "ruled_out" not in item:
                outlook = Outlook(
                    ratio=item["kept_ratio"],
                    influence=item["kept_influence"],
                    spread=item.get("residual_spread"),
                )
                yield method, outlook, row["psnr_db"]
