"""One writer of tables: on a terminal by rich, and as Markdown; and how figures are written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEGABYTE, GIGABYTE = 1e6, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table, or where it has no columns, lines of text.

    Attributes:
        title: above it; empty where there is none.
        columns: the first is left-aligned.
        rows: cells; anything that has a text.
        notes: below it.
    """

    title: str = ""
    columns: Sequence[str] = ()
    rows: Iterable[Sequence[object]] = ()
    notes: Sequence[str] = ()


def show(sections: Iterable[Section]) -> None:
    """Print tables on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        stderr=True, width=None if os.isatty(2) else 130, markup=False, highlight=False
    )
    for section in sections:
        if section.columns:
            table = Table(title=section.title or None, title_justify="left")
            for number, column in enumerate(section.columns):
                table.add_column(column, justify="right" if number else "left")
            for row in section.rows:
                table.add_row(*map(str, row))
            console.print(table)
        for note in section.notes:
            console.print(f"- {note}")


def markdown(sections: Iterable[Section], level: int = 3) -> str:
    """The same as Markdown, titles as headings of this level."""
    parts = []
    for section in sections:
        if section.title:
            parts.append(f"{'#' * level} {section.title}")
        if section.columns:
            head, *rows = (" | ".join(map(str, row)) for row in (section.columns, *section.rows))
            lines = [f"| {head} |", "|" + "---|" * len(section.columns)]
            parts.append("\n".join(lines + [f"| {row} |" for row in rows]))
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts)


def replace_section(path: Path, text: str, name: str = "bench") -> None:
    """Put a text between the two marks of a file.

    Raises:
        SystemExit: the marks are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise SystemExit(f"error: {path} needs one line {begin!r} and one {end!r} after it")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    beside = path.with_name(path.name + ".partial")
    beside.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    os.replace(beside, path)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value and abs(value) >= 10**digits else f"{value:.{digits}g}"


def share(value: float) -> str:
    """A share in percent, with three significant digits."""
    return f"{100 * value:.3g} %"


def size_text(num_bytes: float) -> str:
    """Bytes in MB, or in GB from one on."""
    if num_bytes >= GIGABYTE:
        return f"{num_bytes / GIGABYTE:.2f} GB"
    return f"{num_bytes / MEGABYTE:.0f} MB"


def machine_text(machine: dict[str, Any]) -> str:
    """A machine in words; its instruction sets where they were recorded."""
    versions = machine["versions"]
    words = [machine["name"], f"{machine['cores']} cores"]
    if "instruction_sets" in machine:
        words.append(f"kernels of torch for {machine['instruction_sets']['torch']}")
    if "threads" in machine:
        words.append(f"{machine['threads']} threads")
    names = ("onnxruntime", "torch", "diffusers")
    return ", ".join([*words, *(f"{name} {versions[name]}" for name in names if name in versions)])
