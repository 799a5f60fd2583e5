"""A comparison as one self-contained page: tables, plots and pictures; nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.runtime import page
from ditrim.runtime.evaluation.comparison import REFERENCE, shown_edits
from ditrim.runtime.evaluation.summary import ALL, METRICS
from ditrim.runtime.metrics import CAP_DB, pareto_front

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.runtime.evaluation.edits import ComparedEdit
    from ditrim.runtime.evaluation.folder import ComparisonFolder, Row

TEMPLATE = Path(__file__).with_name("page.html")
_COLOURS = (
    *("#4269d0", "#e07b00", "#d63c4f", "#3a9e8f", "#3a8f3a"),
    *("#a05bb5", "#8a6a4f", "#c2569a", "#5d7386", "#a08500"),
)
_MARKERS = "osD^v"
_THUMB, _OVERLAY_THUMB = 320, 144
_TOP_DB = 60.0  # plots end here: one grey level everywhere is 48 dB


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of policies."""

    metric: str
    title: str
    hint: str
    form: str  # of one value
    statistic: str = "mean"
    has_interval: bool = False


COLUMNS = (
    Column("psnr_db", "PSNR dB", "against the full context, mean", "{:.2f}", has_interval=True),
    Column("ssim", "SSIM", "against the full context, mean", "{:.4f}"),
    Column("lpips", "LPIPS", "against the full context, mean; less is better", "{:.4f}"),
    Column("psnr_target_db", "true edit dB", "PSNR against the true edit, mean", "{:.2f}"),
    Column("kept_ratio", "kept", "reference tokens that BACK ran on in reduced steps", "{:.1%}"),
    Column("noisy_kept_ratio", "noisy kept", "noisy tokens, in reduced steps", "{:.1%}"),
    Column("token_share", "BACK tokens", "share of all tokens that BACK ran on", "{:.1%}"),
    Column("back_calls", "BACK calls", "mean", "{:.1f}"),
    Column("speedup", "speed-up", "of the transformer, median", "{:.2f}", "median"),
    Column("wall_speedup", "wall speed-up", "prompt to picture, median", "{:.2f}", "median"),
    Column("transformer_ms", "ms", "in the transformer, a run, median", "{:,.0f}", "median"),
    Column("seconds", "s", "prompt to picture, median", "{:.2f}", "median"),
    Column("psnr_edited_db", "edited dB", "PSNR where the edit belongs, mean", "{:.2f}"),
    Column("psnr_unedited_db", "unedited dB", "PSNR elsewhere, mean", "{:.2f}"),
    Column("ssim_edited", "edited SSIM", "where the edit belongs, mean", "{:.4f}"),
    Column("ssim_unedited", "unedited SSIM", "elsewhere, mean", "{:.4f}"),
)


def write_page(
    path: Path,
    results: Mapping[str, Any],
    edits: Sequence[ComparedEdit],
    folder: ComparisonFolder,
) -> None:
    """Write the page of a comparison.

    Args:
        path: of the HTML file.
        results: the folder's settings, the result of `summarise_rows`, and `runs`.
        edits: for their pictures.
        folder: where the kept pictures are.

    Raises:
        DitrimError: the page cannot be written.
    """
    from ditrim.engines.files import write_file

    policies = [
        {"number": number, **entry, "colour": colour_of(number)}
        for number, entry in enumerate(results["policies"])
    ]
    text = page.render(
        TEMPLATE,
        results=results,
        facts=_facts(results),
        policies=policies,
        reference=REFERENCE,
        cap_db=CAP_DB,
        columns=_columns_of(results),
        tables={group: _table(results, group, policies) for group in results["groups"]},
        plots={group: _plots(results, group) for group in results["groups"]},
        differences=_compact(results),
        better={metric: METRICS[metric] for metric in METRICS},
        strips=_strips(results, edits, folder),
        late=_measured_later(results),
    )
    write_file(path, text.encode())


def colour_of(number: int) -> str:
    """A policy's colour; the full context is grey."""
    return "#777777" if number == 0 else _COLOURS[(number - 1) % len(_COLOURS)]


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    fixed = results["fixed"]
    counts = ", ".join(
        f"{sum(edit['category'] == group for edit in results['edits'])} {group}"
        for group in results["groups"]
        if group != ALL
    )
    edits = f"{len(results['edits'])} from {fixed['edits']}"
    asked = ", ".join(
        f"{key.replace('_', ' ')} {fixed[key]}"
        for key in ("true_cfg_scale", "negative_prompt", "guidance", "size", "scheduler")
        if fixed.get(key) not in (None, "auto")
    )
    facts = [
        ("engine set", f"{fixed['model']} {fixed['engine'][:12]}, {fixed['precision']}"),
        ("backend", fixed["backend"]),
        ("edits", f"{edits} ({counts})" if counts else edits),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("steps", f"{fixed['steps']}, {asked}" if asked else str(fixed["steps"])),
        ("machine", fixed["machine"] + (f", {fixed['threads']} threads" * bool(fixed["threads"]))),
        ("versions", ", ".join(f"{k} {v}" for k, v in fixed["versions"].items())),
        ("measured", ", ".join(session["started"] for session in results["sessions"])),
        ("perceptual metric", results["lpips"]),
    ]
    return facts


def _measured_later(results: Mapping[str, Any]) -> list[str]:
    """Policies with runs that were not made beside those of the full context."""
    full = {
        (row["edit"], row["seed"]): row["session"]
        for row in results["runs"]
        if row["policy"] == REFERENCE
    }
    late = {
        row["policy"] for row in results["runs"] if row["session"] != full[row["edit"], row["seed"]]
    }
    return [entry["label"] for entry in results["policies"] if entry["label"] in late]


def _columns_of(results: Mapping[str, Any]) -> list[Column]:
    """Those that the results have, and that say something."""
    overall = results["summary"][ALL]
    shown = []
    for column in COLUMNS:
        entries = [entry.get(column.metric) for entry in overall.values()]
        if not any(entries):
            continue
        is_plain = column.metric == "noisy_kept_ratio"
        if is_plain and all(entry["mean"] == 1.0 for entry in entries if entry):
            continue
        shown.append(column)
    return shown


def _table(
    results: Mapping[str, Any], group: str, policies: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for policy in policies:
        entry = results["summary"][group][policy["label"]]
        cells = []
        for column in _columns_of(results):
            figures = entry[column.metric]
            if figures is None:
                cells.append({"text": "", "value": "", "interval": "", "title": "no pixels"})
                continue
            low, high = column.form.format(figures["low"]), column.form.format(figures["high"])
            cells.append(
                {
                    "text": column.form.format(figures[column.statistic]),
                    "value": figures[column.statistic],
                    "interval": f"{low} to {high}" if column.has_interval else "",
                    "title": f"mean {column.form.format(figures['mean'])} [{low}, {high}], median "
                    f"{column.form.format(figures['median'])}, {figures['edits']} edits",
                }
            )
        rows.append({"policy": policy, "entry": entry, "cells": cells})
    return rows


def _compact(results: Mapping[str, Any]) -> dict[str, dict[str, list[list[float]]]]:
    """[group][metric]: lists of first, second, mean, low, high, wins, losses, edits."""
    place = {entry["label"]: number for number, entry in enumerate(results["policies"])}
    return {
        group: {
            metric: [
                [
                    place[pair["first"]],
                    place[pair["second"]],
                    *(round(pair[key], 4) for key in ("mean", "low", "high")),
                    *(pair[key] for key in ("wins", "losses", "edits")),
                ]
                for pair in pairs
                if REFERENCE not in (pair["first"], pair["second"]) or "target" in metric
            ]
            for metric, pairs in by_metric.items()
        }
        for group, by_metric in results["differences"].items()
    }


_PLOTS = {
    "psnr_db": "PSNR to the full context, dB",
    "psnr_target_db": "PSNR to the true edit, dB",
}
# metric, title, statistic, whether more is better
_COSTS = (
    ("speedup", "speed-up of the transformer (median)", "median", True),
    ("kept_ratio", "reference tokens kept in reduced steps", "mean", False),
    ("token_share", "share of tokens that BACK ran on", "mean", False),
)


def _plots(results: Mapping[str, Any], group: str) -> list[dict[str, str]]:
    found = []
    for quality, title in _PLOTS.items():
        if quality in results["metrics"]:
            svg = draw_plots(results["summary"][group], quality, title, salt=f"{group} {quality}")
            found.append({"title": f"{title} against what it costs", "svg": svg})
    return found


def draw_plots(
    summary: Mapping[str, Mapping[str, Any]], quality: str, title: str, salt: str
) -> str:
    """Quality against speed-up, kept ratio and BACK's tokens, each with its Pareto front, as SVG.

    Points bear the policies' numbers; bars are 95 % intervals of the mean. What lies beyond 60 dB
    is drawn at 60 dB, with an arrow.

    Args:
        summary: label -> metrics of a group, in the order of the numbers.
        quality: the metric of the vertical axis; more is better.
        title: of that axis.
        salt: makes the SVG's ids its own on a page with several.
    """
    from matplotlib.figure import Figure

    labels = list(summary)
    shown = [
        number
        for number, label in enumerate(labels)
        if summary[label].get(quality) is not None
        and (label != REFERENCE or quality == "psnr_target_db")
    ]
    with page.drawing(salt):
        figure = Figure(figsize=(12.4, 4.1))
        figure.subplots_adjust(left=0.05, right=0.995, bottom=0.13, top=0.98, wspace=0.06)
        for place, (axes, (cost, name, statistic, is_gain)) in enumerate(
            zip(figure.subplots(1, 3, sharey=True), _COSTS, strict=True)
        ):
            found = [summary[labels[n]][quality] for n in shown]
            xs = [summary[labels[n]][cost][statistic] for n in shown]
            ys = [entry["mean"] for entry in found]
            front = pareto_front([-x if is_gain else x for x in xs], ys)
            axes.plot(
                [xs[i] for i in front],
                [min(ys[i], _TOP_DB) for i in front],
                "--",
                color=page.FAINT,
                zorder=1,
            )
            for x, y, entry, number in zip(xs, ys, found, shown, strict=True):
                top = min(y, _TOP_DB)
                colour, marker = colour_of(number), _MARKERS[(number - 1) // 10 % len(_MARKERS)]
                ends = [min(entry["low"], _TOP_DB), min(entry["high"], _TOP_DB)]
                axes.plot([x, x], ends, color=colour, lw=1, alpha=0.5)
                (point,) = axes.plot(x, top, marker, color=colour, ms=6.5, mec="white", mew=0.6)
                point.set_gid(f"policy-{number}")
                text = str(number) if y == top else f"{number} ↑ {y:.0f}"
                axes.annotate(
                    text, (x, top), (4, 4), textcoords="offset points", color=colour, size=8
                )
            axes.set_xlabel(name + (" →" if is_gain else ", ← less is cheaper"))
            axes.grid(visible=True)
            axes.locator_params(axis="x", nbins=6)
            axes.margins(x=0.1)
            if place == 0:
                axes.set_ylabel(title)
                axes.axvline(1.0, color=page.FAINT, lw=1, zorder=0)
        svg = page.svg(figure)

    def named(match: re.Match[str]) -> str:
        number = int(match.group(1))
        label = labels[number]
        text = f"{number} {label}: {summary[label][quality]['mean']:.2f} dB"
        return f'<g class="point"><title>{html.escape(text)}</title>'

    return re.sub(r'<g id="policy-(\d+)">', named, svg)


def _strips(
    results: Mapping[str, Any], edits: Sequence[ComparedEdit], folder: ComparisonFolder
) -> list[dict[str, Any]]:
    """Pictures of a few edits: the references, the true edit, every policy's and what it kept."""
    from ditrim.runtime.editing.overlay import side_by_side

    seed = results["seeds"][0]
    rows = {(row["edit"], row["policy"]): row for row in results["runs"] if row["seed"] == seed}
    finished = {row["edit"] for row in results["runs"]}
    strips = []
    for index in shown_edits(edits, len(edits)):
        edit = edits[index]
        runs = [(entry, rows.get((edit.name, entry["label"]))) for entry in results["policies"]]
        if edit.name not in finished or not any(
            row and "picture" in row for entry, row in runs if entry["label"] != REFERENCE
        ):
            continue
        pictures = edit.open()
        cards = [
            {"title": "source", "picture": data_uri(side_by_side(pictures.images)), "kept": []}
        ]
        if pictures.target is not None:
            cards.append({"title": "true edit", "picture": data_uri(pictures.target), "kept": []})
        for number, (entry, row) in enumerate(runs):
            if row is not None and "picture" in row:
                cards.append(_card(number, entry["label"], row, folder))
        strips.append(
            {
                "name": edit.name,
                "category": edit.category,
                "prompt": edit.prompt,
                "seed": seed,
                "cards": cards,
            }
        )
    return strips


def _card(number: int, label: str, row: Row, folder: ComparisonFolder) -> dict[str, Any]:
    from ditrim.runtime.editing.pictures import open_picture

    is_reference = label == REFERENCE
    note = f"{row['psnr_db']:.1f} dB, {row['kept_ratio']:.0%} kept"
    if row["is_equal"]:
        note = f"equal, {row['kept_ratio']:.0%} kept"
    return {
        "title": label if is_reference else f"{number} {label}",
        "note": f"{row['reference_tokens']} reference tokens" if is_reference else note,
        "picture": data_uri(open_picture(folder.picture(row["picture"]))),
        "kept": [
            {
                "picture": data_uri(open_picture(folder.picture(kept["file"])), _OVERLAY_THUMB),
                "title": f"step {kept['step']}: {kept['ratio']:.0%}",
            }
            for kept in row.get("kept", ())
        ],
    }


def data_uri(image: Image.Image, height: int = _THUMB) -> str:
    """A picture as text, no higher than `height` pixels: PNG while it is small, else JPEG."""
    from PIL import Image as Pillow

    if image.height > height:
        width = max(1, math.ceil(image.width * height / image.height))
        image = image.resize((width, height), Pillow.Resampling.LANCZOS)
    is_small = image.width * image.height <= 96 * 96
    buffer = io.BytesIO()
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if is_small else 'jpeg'};base64,{text}"
