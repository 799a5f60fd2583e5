"""What a document of `gpu_check.py` says, as text to read at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_STACKS = ("stack", "compiled")
STEPS = 40  # of a schedule; this module imports neither torch nor what does


def tables_of(parts: Mapping[str, Any]) -> str:
    """Tables of the parts, of the full-depth model's steps and of its schedules."""
    blocks = [_parts(parts)]
    for case in ("1 reference", "3 references"):
        modes = _modes(parts, case)
        if modes:
            blocks += list(_case(case, modes))
    return "\n\n".join(blocks)


def _parts(parts: Mapping[str, Any]) -> str:
    rows = []
    for name, part in parts.items():
        left_out = part.get("measured", {}).get("left_out", {})
        said = part.get("reason") or (f"left out: {'; '.join(left_out)}" if left_out else "")
        rows.append([name, part["status"], f"{part.get('seconds', 0):.1f} s", said[:160]])
    return _aligned(["part", "status", "time", ""], rows)


def _modes(parts: Mapping[str, Any], case: str) -> dict[str, Any]:
    """What was measured of a case, by mode; the first part that has a mode counts."""
    modes: dict[str, Any] = {}
    for name in _STACKS:
        found = parts.get(name, {}).get("measured", {}).get(case, {})
        for mode, measured in found.items():
            if measured.get("steps"):
                modes.setdefault(mode, measured)
    return modes


def _case(case: str, modes: Mapping[str, Any]) -> Iterator[str]:
    lengths = next((m["lengths"] for m in modes.values() if "lengths" in m), {})
    title = f"{case}: " + ", ".join(f"{count} {name}" for name, count in lengths.items())
    names = dict.fromkeys(name for mode in modes.values() for name in mode["steps"])
    rows = [
        [name, *(_step(mode["steps"].get(name)) for mode in modes.values())]
        for name in sorted(names, key=_place)
    ]
    for label, key in (("scoring", "scoring_ms"), ("selection", "selection_ms")):
        rows.append([label, *(_number(mode.get(key)) for mode in modes.values())])
    memory = [_number(mode.get("memory", {}).get("allocated_gb")) for mode in modes.values()]
    rows.append(["peak memory, GB", *memory])
    yield f"{title}; ms of a step (share of the peak)\n" + _aligned(["", *modes], rows)
    kept = {rung for mode in modes.values() for rung in mode.get("schedules", {})}
    if kept:
        rows = [
            [rung, *(_schedule(mode.get("schedules", {}).get(rung)) for mode in modes.values())]
            for rung in sorted(kept, key=int)
        ]
        whole = [_whole(mode["steps"].get("full")) for mode in modes.values()]
        rows += [["all of them", *whole]]
        rows += [["measured run", *(_run(mode.get("run")) for mode in modes.values())]]
        heading = f"{case}: seconds of a schedule at so many kept tokens (x own full steps)"
        yield f"{heading}\n" + _aligned(["kept", *modes], rows)


def _place(name: str) -> tuple[int, int]:
    first = {"full": 0, "front": 1, "anchor": 2}
    return first.get(name, 3), -int(name.split()[-1]) if name not in first else 0


def _step(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    share = found.get("of_peak")
    return f"{found['median_ms']:.2f}" + (f" ({share:.0%})" if share else "")


def _schedule(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['seconds']:.2f} (x{found['speedup_over_full_steps']:.2f})"


def _whole(full: Mapping[str, Any] | None) -> str:
    return "" if full is None else f"{STEPS * full['median_ms'] / 1e3:.2f}"


def _run(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    share = found.get("share")
    return f"{found['seconds']:.2f}" + (f" at {share:.0%}" if share else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
