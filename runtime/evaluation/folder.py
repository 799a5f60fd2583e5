"""A comparison on disk: what is compared, a line for every finished run, and some pictures.

`comparison.json` says what is compared and under what circumstances, `runs.jsonl` holds the runs.
An interrupted comparison goes on from them; edits, seeds and policies may be added, and nothing
else may change.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ditrim.engines.files import write_file
from ditrim.engines.json_file import check_header, parse_json, read_file, value_from
from ditrim.plugins.errors import DitrimError, UsageError

SETTINGS, RUNS, PICTURES = "comparison.json", "runs.jsonl", "pictures"
FORMAT_VERSION = 1
Row = dict[str, Any]
Key = tuple[str, int, str]  # edit, seed, policy


def key_of(row: Row) -> Key:
    """Return the key of a row: edit, seed and policy."""
    return row["edit"], row["seed"], row["policy"]


@dataclass(slots=True)
class ComparisonFolder:
    """An open comparison; made by `open_folder`.

    Attributes:
        folder: where it is.
        settings: see `merged_settings`.
        rows: of finished runs, by edit, seed and policy.
    """

    folder: Path
    settings: dict[str, Any]
    rows: dict[Key, Row] = field(default_factory=dict)
    _log: IO[str] | None = None

    def append(self, row: Row) -> None:
        """Keep a finished run; it survives whatever happens to this process."""
        assert self._log is not None
        self._log.write(json.dumps(row, allow_nan=False) + "\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self.rows[key_of(row)] = row

    def picture(self, name: str) -> Path:
        """The file of a picture."""
        return self.folder / PICTURES / name


@contextmanager
def open_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[ComparisonFolder]:
    """Begin or go on with a comparison; no other process can meanwhile.

    Args:
        folder: new, empty, or one that an earlier call left.
        settings: `fixed` (what must not change), `edits`, `seeds` and `policies`.

    Raises:
        UsageError: the folder cannot be written, holds something else, or another comparison.
        DitrimError: its files are damaged, or another process works in it.
    """
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        if not (folder / SETTINGS).exists():
            others = [path.name for path in folder.iterdir() if path.name not in (PICTURES, RUNS)]
            if others:
                raise UsageError(
                    f"--output {folder} holds other files ({sorted(others)[0]}, ...) and no "
                    "comparison; give a new folder"
                )
        (folder / RUNS).touch()
    except OSError as error:
        raise UsageError(
            f"--output {folder} is no folder that can be written: {error.strerror}"
        ) from error
    with open(folder / RUNS, "a+", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DitrimError(
                f"another process is at work in {folder}; wait for it, or give another --output"
            ) from error
        merged = merged_settings(folder, _read_settings(folder), settings)
        opened = ComparisonFolder(folder, merged, _read_rows(log), log)
        write_file(folder / SETTINGS, (json.dumps(merged, indent=1) + "\n").encode())
        yield opened


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    fixed: dict[str, Any]
    edits: list[dict[str, Any]]
    seeds: list[int]
    policies: list[dict[str, str]]
    sessions: list[Any]


def _settings_from(text: str) -> dict[str, Any]:
    settings: dict[str, Any] = parse_json(text)
    check_header(settings, "comparison", {"format_version": FORMAT_VERSION})
    value_from(_Settings, settings, extra="ignore")
    return settings


def _read_settings(folder: Path) -> dict[str, Any] | None:
    if not (folder / SETTINGS).exists():
        return None
    remedy = "give another --output, or delete the folder"
    return read_file(folder / SETTINGS, _settings_from, what="the comparison", remedy=remedy)


def read_comparison(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The settings and finished runs of a comparison, which is left as it is.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    what, remedy = "the comparison", "make one with evaluate-policies"
    settings = read_file(folder / SETTINGS, _settings_from, what=what, remedy=remedy)
    rows = read_file(folder / RUNS, _rows_in, what=what, remedy=remedy)
    return settings, list(rows.values())


def merged_settings(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of all sessions together: those of before, and what is new.

    Raises:
        UsageError: says what differs, and how to go on.
    """
    if before is None:
        return {"format_version": FORMAT_VERSION, **now}
    for key, value in now["fixed"].items():
        if before["fixed"].get(key) != value:
            raise UsageError(
                f"{folder} holds a comparison with {key} = {_short(before['fixed'].get(key))}, and "
                f"now it is {_short(value)}: results would be mixed. Go back to the former, or "
                "give another --output"
            )
    known, given = before["edits"], now["edits"]
    for old, new in zip(known, given, strict=False):
        if old != new:
            raise UsageError(
                f"{folder} holds a comparison whose edit {old['name']} is another one "
                f"({_short(old['prompt'])}); its instruction or pictures were changed. Give "
                "another --output"
            )
    if len(given) < len(known):
        raise UsageError(
            f"{folder} holds a comparison of {len(known)} edits, and now there are {len(given)}: "
            f"give --count {len(known)} or more, or another --output"
        )
    lost = [seed for seed in before["seeds"] if seed not in now["seeds"]]
    if lost:
        raise UsageError(
            f"{folder} holds a comparison with the seeds {_joined(before['seeds'])}, and now it is "
            f"{_joined(now['seeds'])}: seeds can be added, none left out. Give another --output"
        )
    texts = {policy["label"]: policy["text"] for policy in before["policies"]}
    for policy in now["policies"]:
        former = texts.get(policy["label"], policy["text"])
        if former != policy["text"]:
            raise UsageError(
                f"{folder} holds a comparison where {policy['label']!r} is the policy {former!r}, "
                f"and now it is {policy['text']!r}; give it another label, as in "
                "'label: policy'"
            )
    added = [policy for policy in now["policies"] if policy["label"] not in texts]
    return {
        **before,
        "edits": given,
        "seeds": [*before["seeds"], *(s for s in now["seeds"] if s not in before["seeds"])],
        "policies": [*before["policies"], *added],
        "sessions": [*before["sessions"], *now["sessions"]],
    }


def _read_rows(log: IO[str]) -> dict[Key, Row]:
    """Finished runs; a last line that was cut off is taken away."""
    log.seek(0)
    content = log.read()
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        log.truncate(len(whole.encode()))
    return _rows_in(whole)


def _rows_in(text: str) -> dict[Key, Row]:
    """Runs by line; a last line that was cut off is left out."""
    rows: dict[Key, Row] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{RUNS}, line {number} is damaged ({error!r}); delete the line, and its run is "
                "made again"
            ) from error
    return rows


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
