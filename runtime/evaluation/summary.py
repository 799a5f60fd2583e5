"""What the runs of a comparison say together: means, intervals, ranks and paired differences.

The unit is the edit: seeds are averaged within an edit first, then edits are resampled. Edits of
one seed are no independent samples of another.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ditrim.runtime.evaluation.folder import Row
from ditrim.runtime.metrics import mean_intervals

ALL = "all"
# Name -> whether more is better; none where neither is.
METRICS: dict[str, bool | None] = {
    "psnr_db": True,
    "ssim": True,
    "lpips": False,
    "psnr_edited_db": True,
    "psnr_unedited_db": True,
    "ssim_edited": True,
    "ssim_unedited": True,
    "lpips_edited": False,
    "lpips_unedited": False,
    "psnr_target_db": True,
    "ssim_target": True,
    "kept_ratio": None,
    "noisy_kept_ratio": None,
    "token_share": False,
    "back_calls": False,
    "transformer_ms": False,
    "seconds": False,
    "speedup": True,
    "wall_speedup": True,
}
PAIRED = ("psnr_db", "ssim", "lpips", "psnr_edited_db", "psnr_unedited_db", "psnr_target_db")
_COLUMNS = (
    "edit",
    "category",
    "seed",
    "policy",
    "noise_seed",
    "session",
    *METRICS,
    "is_equal",
    "reference_tokens",
    "calls",
)
Table = dict[str, dict[str, npt.NDArray[np.float64]]]  # label -> metric -> (edits,), NaN: none


def summarise_rows(rows: Iterable[Row], labels: Sequence[str], reference: str) -> dict[str, Any]:
    """Summary statistics of all runs, as JSON-ready values.

    Args:
        rows: of finished runs; (edit, seed) pairs that some policy has not run are left out.
        labels: the policies, in order.
        reference: the label of the full context: it has no rank.

    Returns:
        `groups` ("all", then the categories), `metrics` (those that the rows have), `summary`
        [group][label] and `differences` [group][metric] (first minus second, of every pair).
    """
    complete = complete_rows(rows, labels)
    metrics = [name for name in METRICS if any(name in row for row in complete)]
    categories = list(dict.fromkeys(row["category"] for row in complete))
    groups = [ALL, *categories] if len(categories) > 1 or categories != [ALL] else [ALL]
    summary: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for group in groups:
        chosen = [row for row in complete if group in (ALL, row["category"])]
        table = by_edit(chosen, labels, metrics)
        summary[group] = _summary(chosen, table, labels, metrics, reference)
        differences[group] = {
            metric: paired_differences({label: table[label][metric] for label in labels}, metric)
            for metric in PAIRED
            if metric in metrics
        }
    return {
        "groups": groups,
        "metrics": metrics,
        "summary": summary,
        "differences": differences,
    }


def complete_rows(rows: Iterable[Row], labels: Sequence[str]) -> list[Row]:
    """The rows of edits and seeds that every policy has run."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["policy"] in labels:
            found.setdefault((row["edit"], row["seed"]), {})[row["policy"]] = row
    return [runs[label] for runs in found.values() if len(runs) == len(labels) for label in labels]


def by_edit(rows: Sequence[Row], labels: Sequence[str], metrics: Sequence[str]) -> Table:
    """Each metric of each policy, an entry an edit: the mean over its seeds, NaN without any."""
    places = {edit: i for i, edit in enumerate(dict.fromkeys(row["edit"] for row in rows))}
    table: Table = {}
    for label in labels:
        values: dict[str, list[list[float]]] = {name: [[] for _ in places] for name in metrics}
        for row in rows:
            if row["policy"] == label:
                for name in metrics:
                    if row.get(name) is not None:
                        values[name][places[row["edit"]]].append(float(row[name]))
        table[label] = {
            name: np.array([np.mean(seeds) if seeds else np.nan for seeds in per_edit])
            for name, per_edit in values.items()
        }
    return table


def _summary(
    rows: Sequence[Row],
    table: Table,
    labels: Sequence[str],
    metrics: Sequence[str],
    reference: str,
) -> dict[str, Any]:
    ranked = [label for label in labels if label != reference]
    ranks, mean_ranks = ranks_of({label: table[label]["psnr_db"] for label in ranked})
    found: dict[str, Any] = {}
    for label in labels:
        own = [row for row in rows if row["policy"] == label]
        found[label] = {
            "edits": len({row["edit"] for row in own}),
            "runs": len(own),
            "equal_pictures": sum(row["is_equal"] for row in own),
            "rank": ranks.get(label),
            "mean_rank": mean_ranks.get(label),
            **{name: described(table[label][name]) for name in metrics},
        }
    return found


def described(values: npt.NDArray[np.float64]) -> dict[str, float] | None:
    """Mean, median and the mean's 95 % interval of a metric over edits; none without any."""
    present = values[~np.isnan(values)]
    if not len(present):
        return None
    low, high = mean_intervals(present[:, None])
    return {
        "mean": round(float(present.mean()), 6),
        "median": round(float(np.median(present)), 6),
        "low": round(float(low[0]), 6),
        "high": round(float(high[0]), 6),
        "edits": len(present),
    }


def ranks_of(
    values: Mapping[str, npt.NDArray[np.float64]],
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks from 1 (the highest): of the means, and the mean of the ranks within each edit.

    Equal values share a rank: the lowest of theirs for means, the middle one within an edit.
    """
    labels = list(values)
    if not labels:
        return {}, {}
    means = {label: float(np.mean(values[label])) for label in labels}
    ranks = {label: 1 + sum(means[o] > means[label] for o in labels) for label in labels}
    stacked = np.stack([values[label] for label in labels])  # (policies, edits)
    above = (stacked[None] > stacked[:, None]).sum(axis=1)
    same = (stacked[None] == stacked[:, None]).sum(axis=1)
    within = above + (same + 1) / 2
    return ranks, {label: round(float(within[i].mean()), 4) for i, label in enumerate(labels)}


def paired_differences(
    values: Mapping[str, npt.NDArray[np.float64]], metric: str
) -> list[dict[str, Any]]:
    """Every pair of policies, first minus second, over the edits that have both.

    Each has `mean`, `low` and `high` (95 %), `edits`, `wins` and `losses` (edits in which the first
    is better, or worse), and `is_separated`: the interval does not hold 0.
    """
    pairs = list(itertools.combinations(values, 2))
    found: list[dict[str, Any]] = []
    sign = 1 if METRICS[metric] else -1
    # Pairs that miss the same edits are resampled together.
    together: dict[bytes, list[tuple[str, str]]] = {}
    for first, second in pairs:
        missing = np.isnan(values[first]) | np.isnan(values[second])
        together.setdefault(missing.tobytes(), []).append((first, second))
    for missing_bytes, members in together.items():
        is_there = ~np.frombuffer(missing_bytes, dtype=np.bool_)
        if not is_there.any():
            continue
        gaps = np.stack([(values[a] - values[b])[is_there] for a, b in members], axis=1)
        low, high = mean_intervals(gaps)
        for place, (first, second) in enumerate(members):
            gap = gaps[:, place]
            found.append(
                {
                    "first": first,
                    "second": second,
                    "mean": round(float(gap.mean()), 6),
                    "low": round(float(low[place]), 6),
                    "high": round(float(high[place]), 6),
                    "edits": len(gap),
                    "wins": int((sign * gap > 0).sum()),
                    "losses": int((sign * gap < 0).sum()),
                    "is_separated": bool(low[place] > 0 or high[place] < 0),
                }
            )
    order = {pair: place for place, pair in enumerate(pairs)}
    return sorted(found, key=lambda entry: order[entry["first"], entry["second"]])


def rows_as_csv(rows: Sequence[Row]) -> str:
    """One line a run; columns that no run has are left out."""
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    roles = list(dict.fromkeys(role for row in rows for role in row["calls_by_role"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"{role}_calls" for role in roles)])
    for row in rows:
        counts = [row["calls_by_role"].get(role, 0) for role in roles]
        writer.writerow([*(row.get(name) for name in columns), *counts])
    return text.getvalue()
