"""The tables of `bench.py`'s results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.tables import Section, machine_text, markdown, share

MOST_OTHERS, MOST_NOISE = 0.05, 0.1


def document_text(result: dict[str, Any]) -> str:
    """The tables as Markdown, with what they were measured on."""
    seen = f"{machine_text(result['machine'])}, float32; {result['seconds'] / 60:.0f} minutes."
    return f"{seen}\n\n```\n{result['command']}\n```\n\n{markdown(tables(result))}"


def tables(result: dict[str, Any]) -> Iterator[Section]:
    """Bounds first, then model by model edits, steps and rungs."""
    yield _bounds(result)
    for case in result["cases"].values():
        yield _edits(case)
        yield _steps(case)
        yield _rungs(case)


def _bounds(result: dict[str, Any]) -> Section:
    rows = []
    for bound in result["bounds"]:
        limit = f"≥ {bound['least']:g}" if bound["most"] is None else f"≤ {share(bound['most'])}"
        show = "{:.3f}".format if bound["most"] is None else share
        of = f" ({bound['of']})" if bound["of"] else ""
        rows.append(
            (
                f"{bound['case']}: {bound['bound']}{of}",
                limit,
                "not measured" if bound["value"] is None else show(bound["value"]),
                "" if bound["interval"] is None else " to ".join(map(show, bound["interval"])),
                _verdict(bound),
            )
        )
    notes = [
        "Ratios are paired round by round; the interval is that of the median, from order "
        "statistics (95 % where there are six rounds or more, all of them where there are fewer)."
    ]
    notes += noise_complaints(result)
    if result["is_quick"]:
        notes.append("A quick run of few rounds, on a tiny second model: it says nothing of speed.")
    return Section(
        title="Bounds",
        columns=("bound", "limit", "measured", "interval", ""),
        rows=rows,
        notes=tuple(notes),
    )


def _verdict(bound: dict[str, Any]) -> str:
    """Met or missed, and whether the interval leaves that open."""
    if bound["is_met"] is None:
        return ""
    low, high = bound["interval"]
    limit = bound["most"] if bound["least"] is None else bound["least"]
    is_open = low < limit < high
    return ("met" if bound["is_met"] else "**missed**") + (", within noise" if is_open else "")


def noise_complaints(result: dict[str, Any]) -> list[str]:
    """Return complaints on cases that were measured on a busy machine."""
    found = []
    for name, case in result["cases"].items():
        for what, part in (("single steps", case), ("whole edits", case["edits"])):
            others = part["others_share"]
            if others is not None and others > MOST_OTHERS:
                found.append(
                    f"{name}: other processes took {others:.0%} of the cores during {what}: too "
                    "much to trust these figures; stop other work and measure again."
                )
        noises = sorted(row["ms"]["noise"] for row in [*case["steps"], *case["rungs"]])
        noise = noises[len(noises) // 2]
        if noise > MOST_NOISE:
            found.append(
                f"{name}: over half of the medians of single steps are known no better than "
                f"+-{noise:.0%}: this machine is too noisy to say anything; raise the rounds."
            )
    return found


def _edits(case: dict[str, Any]) -> Section:
    edits = case["edits"]
    is_picture = edits["quality"] == "psnr_db"
    rows = []
    for row in edits["ways"]:
        quality = "" if row["quality"] is None else _quality(row["quality"], is_picture=is_picture)
        rows.append(
            (
                row["way"],
                f"{row['s']['median']:.3g}",
                _ratio(row["against_eager"]),
                f"{row['computed']:.3g}",
                "" if row["kept_ratio"] is None else f"{row['kept_ratio']:.0%}",
                "-" if row["way"] == "diffusers eager" else quality,
            )
        )
    turns = "every way in turn" if is_picture else "one step of every way in turn"
    number = "1 edit" if edits["runs"] == 1 else f"{edits['runs']} edits"
    notes = [f"{number} of {edits['steps']} steps, {turns}."]
    if is_picture:
        notes.append(
            "PSNR against the picture that diffusers eager makes of the same noise, capped at 100."
        )
    else:
        notes.append(
            "Random weights make no picture: what stands there is the relative L2 difference of "
            "the last latents from those of diffusers eager."
        )
    prepared = ", ".join(f"{name} {seconds:g} s" for name, seconds in case["prepare_s"].items())
    if case["build_s"] is not None:
        prepared += f", engine set {case['build_s']:g} s" if prepared else ""
    if prepared:
        notes.append(f"Made once beforehand, not counted: {prepared}.")
    quality = "PSNR, dB (least)" if is_picture else "difference"
    return Section(
        title=f"Whole edits: {case['title']}",
        columns=("way", "s", "times as fast", "steps computed", "kept", quality),
        rows=rows,
        notes=tuple(notes),
    )


def _steps(case: dict[str, Any]) -> Section:
    rows = [
        (
            row["way"],
            f"{row['ms']['median']:.4g}",
            f"{row['ms']['spread']:.0%}",
            _ratio(row["against_eager"]),
        )
        for row in case["steps"]
    ]
    products, scoring = case["products"], case["scoring"]
    rates = ", ".join(
        f"{name} {rate:g}" + (" (the faster)" if name == products["fastest"] else "")
        for name, rate in products["product_gflop_s"].items()
    )
    shares = "; ".join(
        f"{share(part['share'])} with {kept} tokens kept (scoring {share(part['scoring'])}, "
        f"selection {share(part['selection'])}, gather {share(part['gather'])})"
        for kept, part in scoring["shares"].items()
    )
    low, high = scoring["scoring_ms_interval"]
    full = case["outside_engines"]["ditrim, full context"]["median"]
    return Section(
        title=f"One step: {case['title']}",
        columns=("way", "ms", "spread", "times as fast"),
        rows=rows,
        notes=(
            f"{case['rounds']} rounds; the spread is (p90 - p10) / median.",
            f"The full step does {products['gflop']:g} GFLOP at {products['step_gflop_s']:g} "
            f"GFLOP/s; plain products of the same shapes in the same rounds, in GFLOP/s: {rates}. "
            f"{_ratio(products['step_of_products'])} of the faster library's rate.",
            f"Scoring takes {scoring['scoring_ms']:.3g} ms of an anchor ({low:.3g} to {high:.3g}, "
            f"{scoring['pairs']} pairs), selection {scoring['selection_ms']:.3g} ms. Scoring, "
            f"selection and gather of a run of 40 steps with an anchor every 10: {shares}.",
            f"Outside the engines the runtime spends {share(full)} of a full step.",
        ),
    )


def _rungs(case: dict[str, Any]) -> Section:
    return Section(
        title=f"Reduced steps: {case['title']}",
        columns=(
            "reference tokens", "ms", "spread", "times as fast as full", "by operations", "ratio",
            "against eager",
        ),
        rows=[
            (
                str(row["rung"]),
                f"{row['ms']['median']:.4g}",
                f"{row['ms']['spread']:.0%}",
                f"{row['speedup']['median']:.3f}",
                f"{row['predicted']:.3f}",
                f"{row['of_predicted']['median']:.3f}",
                _ratio(row["against_eager"]),
            )
            for row in case["rungs"]
        ],
    )  # fmt: skip


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}"


def _quality(values: Sequence[float], *, is_picture: bool) -> str:
    if is_picture:
        return f"{values[0]:.1f} ({values[1]:.1f})"
    return f"{values[0]:.2g}"
