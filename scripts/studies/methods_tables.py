#!/usr/bin/env python3
"""Markdown tables and the figure of docs/measured/methods.md, from folders of evaluate-policies.

PSNR is against the full-context picture of the same edit and seed, the mean over edits; seeds are
averaged within an edit first. Differences are paired, with a 95 % bootstrap interval over edits.

Example:
    python scripts/studies/methods_tables.py --methods comparison --curve curve \
        --figure docs/images/coverage.png --output docs/measured/methods.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the writer of tables is

from benchmarks.tables import Section, markdown
from ditrim.runtime.evaluation.summary import ALL, summarise_rows

FULL = "full context"
METRICS = (
    "psnr_db",
    "ssim",
    "psnr_edited_db",
    "psnr_unedited_db",
    "psnr_target_db",
    "kept_ratio",
    "token_share",
)
CURVE = ("topi", "coverage", "random")
# Reference tokens of the small editor's edits whose first reference has the picture's grid.
ON_GRID = (144, 288)
TITLES = {"topi": "ToPi (top-K)", "coverage": "CoverageToPi", "random": "random"}
COLOURS = {"topi": "#1f6feb", "coverage": "#d1570b", "random": "#767676"}


def read(folder: Path, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """The summary of a comparison, and its settings; of edits with so many reference tokens."""
    settings = json.loads((folder / "comparison.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text("utf-8").splitlines()]
    if lengths is not None:
        rows = [row for row in rows if row["reference_tokens"] in lengths]
    labels = list(dict.fromkeys(row["policy"] for row in rows))
    found = summarise_rows(rows, labels, FULL)
    choices = Counter(
        row["policy_notes"]["chosen"] for row in rows if "chosen" in row.get("policy_notes", {})
    )
    return {
        **found,
        "labels": labels,
        "settings": settings["fixed"],
        "policies": {entry["label"]: entry["text"] for entry in settings["policies"]},
        "auto_choices": dict(choices),
    }


def row_of(found: dict[str, Any], label: str) -> list[str]:
    """A policy's cells: PSNR overall and by category, SSIM, kept tokens, share of the work."""
    groups = [ALL, *(group for group in found["groups"] if group != ALL)]
    overall = found["summary"][ALL][label]
    psnr = overall["psnr_db"]
    return [
        label,
        f"{psnr['mean']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}]",
        *(f"{found['summary'][group][label]['psnr_db']['mean']:.2f}" for group in groups[1:]),
        f"{overall['ssim']['mean']:.3f}",
        f"{overall['psnr_unedited_db']['mean']:.2f}",
        f"{overall['psnr_target_db']['mean']:.2f}",
        f"{overall['kept_ratio']['mean']:.2f}",
        f"{overall['token_share']['mean']:.2f}",
    ]


def table(
    title: str, found: dict[str, Any], labels: Sequence[str], against: str | None = None
) -> Section:
    """Policies in descending order of PSNR."""
    groups = [group for group in found["groups"] if group != ALL]
    columns = ["policy", "PSNR, dB [95 %]", *groups, "SSIM", "unedited", "true edit", "kept",
               "tokens run"]  # fmt: skip
    ranked = sorted(labels, key=lambda label: -found["summary"][ALL][label]["psnr_db"]["mean"])
    rows = [row_of(found, label) for label in ranked]
    if against is not None:
        columns.append(f"less {against}, dB [95 %]")
        for row, label in zip(rows, ranked, strict=True):
            row.append("" if label == against else difference(found, ALL, label, against))
    return Section(title=title, columns=columns, rows=rows)


def shortened(found: dict[str, Any]) -> dict[str, Any]:
    """The summary with the metrics of the tables alone."""
    return {
        group: {
            label: {name: entry[name] for name in ("edits", "runs", *METRICS)}
            for label, entry in labels.items()
        }
        for group, labels in found["summary"].items()
    }


def difference(found: dict[str, Any], group: str, first: str, second: str) -> str:
    """First minus second, with its interval."""
    for entry in found["differences"][group]["psnr_db"]:
        if {entry["first"], entry["second"]} == {first, second}:
            sign = 1 if entry["first"] == first else -1
            low, high = sorted((sign * entry["low"], sign * entry["high"]))
            return f"{sign * entry['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
    raise KeyError((first, second))


def curve_tables(found: dict[str, Any], ratios: Sequence[str]) -> Iterator[Section]:
    """PSNR at each kept ratio with what coverage gains, over all edits and by category."""
    rows, gains_by_category = [], []
    groups = [group for group in found["groups"] if group != ALL]
    for ratio in ratios:
        means = [found["summary"][ALL][f"{name} {ratio}"]["psnr_db"]["mean"] for name in CURVE]
        coverage, others = f"coverage {ratio}", [f"topi {ratio}", f"random {ratio}"]
        gains = [difference(found, ALL, coverage, other) for other in others]
        rows.append([ratio, *(f"{mean:.2f}" for mean in means), *gains])
        gains_by_category.append(
            [ratio, *(difference(found, group, coverage, others[0]) for group in groups)]
        )
    columns = ("kept", *(TITLES[name] for name in CURVE), "coverage less top-K", "less random")
    yield Section(title="curve", columns=columns, rows=rows)
    yield Section(
        title="coverage less top-K, by category", columns=("kept", *groups), rows=gains_by_category
    )


def draw_curve(found: dict[str, Any], ratios: Sequence[str], path: Path) -> None:
    """PSNR against the kept ratio, overall and by category, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = found["groups"]
    figure, axes = plt.subplots(1, len(groups), figsize=(3.1 * len(groups), 3.3), sharey=True)
    for axis, group in zip(axes, groups, strict=True):
        for name in CURVE:
            cells = [found["summary"][group][f"{name} {ratio}"]["psnr_db"] for ratio in ratios]
            places = [float(ratio) for ratio in ratios]
            axis.plot(
                places,
                [cell["mean"] for cell in cells],
                color=COLOURS[name],
                label=TITLES[name],
                marker="o",
                markersize=3,
            )
            axis.fill_between(
                places,
                [cell["low"] for cell in cells],
                [cell["high"] for cell in cells],
                color=COLOURS[name],
                alpha=0.15,
                linewidth=0,
            )
        axis.set_title(group, fontsize=10)
        axis.set_xlabel("reference tokens kept")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("PSNR against full context, dB")
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", type=Path, required=True, help="comparison of methods")
    parser.add_argument(
        "--curve",
        type=Path,
        required=True,
        help="comparison whose labels are 'topi 0.25', 'coverage 0.25', 'random 0.25', ...",
    )
    parser.add_argument("--figure", type=Path, required=True, help="a PNG of the curve")
    parser.add_argument("--output", type=Path, required=True, help="the summaries, as JSON")
    arguments = parser.parse_args()
    methods, curve = read(arguments.methods), read(arguments.curve)
    ratios = sorted({label.split()[1] for label in curve["labels"] if label != FULL}, key=float)
    on_grid = read(arguments.methods, ON_GRID)
    sections = []
    apart = ("static", "tau", "auto", "TokenDrop", "omega")
    for title, found, starts in (
        ("half of the tokens, an anchor every 10 steps", methods, None),
        ("half of the tokens, one anchor", methods, ("static",)),
        ("thresholds", methods, ("tau", "auto")),
        ("TokenDrop, where the source has the picture's grid", on_grid, ("TokenDrop", "omega")),
    ):
        chosen = [
            label
            for label in found["labels"]
            if label != FULL
            and (label.startswith(starts) if starts else not label.startswith(apart))
        ]
        if chosen:
            sections.append(table(title, found, chosen, chosen[0]))
    print(markdown([*sections, *curve_tables(curve, ratios)]))
    draw_curve(curve, ratios, arguments.figure)
    kept = {
        name: {**found, "differences": {}, "metrics": METRICS, "summary": shortened(found)}
        for name, found in (("methods", methods), ("on_grid", on_grid), ("curve", curve))
    }
    arguments.output.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    print(json.dumps({"figure": str(arguments.figure), "output": str(arguments.output)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
