"""Many edits of their own over one service: what was made is not made again, what failed is told.

A result is written beside its target and then moved there, with a fingerprint of the edit in it, so
that a batch that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.engines.json_file import Whole, parse_json, value_from
from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.service.errors import DeviceFailed, Unavailable
from ditrim.runtime.service.job import EditHandle, EditJob
from ditrim.runtime.service.service import EditService

logger = logging.getLogger(__name__)

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_FINGERPRINT = "ditrim_edit"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEdit:
    """One edit of a batch.

    Attributes:
        name: of the result, without its ending; unique.
        images: picture files, the one to edit first.
        prompt: the instruction.
        seed: of the noise.
        mask: picture file, white where the first picture may change.
        policy: as a person types it.
    """

    name: str
    images: tuple[Path, ...]
    prompt: str
    seed: int
    policy: str
    mask: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An edit that could not be made, and why."""

    name: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What became of a batch: names of the edits."""

    made: tuple[str, ...]
    kept: tuple[str, ...]
    failed: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    image: str | list[str]
    prompt: str | None = None
    seed: Whole | None = None
    mask: str | None = None
    policy: str | None = None
    name: str | None = None


def read_batch(source: Path, *, prompt: str | None, seed: int, policy: str) -> list[BatchEdit]:
    """Read a batch: a folder of pictures, or a JSON Lines file with an edit a line.

    A line has `image` (a name beside the file, or a list of them) and, where they differ from the
    arguments, `prompt`, `seed`, `mask`, `policy` and `name`.

    Args:
        source: the folder or the file.
        prompt, seed, policy: of edits that name none.

    Raises:
        UsageError: there is nothing to edit, a line is malformed, or two results have one name.
    """
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.is_file())
        files = [path for path in found if path.suffix.lower() in _ENDINGS]
        if len(files) < len(found):
            others = ", ".join(path.name for path in found if path not in files)
            logger.warning("%s: left out, by their endings no pictures: %s", source, others)
        stems = [path.stem for path in files]
        lines = [
            (str(path), _Line(image=path.name, name=stem if stems.count(stem) == 1 else path.name))
            for path, stem in zip(files, stems, strict=True)
        ]
        folder = source
    else:
        lines, folder = list(_lines_in(source)), source.parent
    if not lines:
        raise UsageError(f"{source} holds no edits: give a folder of pictures, or a file of lines")
    edits = []
    for number, (where, line) in enumerate(lines):
        text = line.prompt if line.prompt is not None else prompt
        if text is None or not text.strip():
            raise UsageError(f"{where} has no prompt: give it one, or --prompt for all")
        names = [line.image] if isinstance(line.image, str) else line.image
        name = line.name or f"edit-{number:04d}"
        if not names or Path(name).name != name or name.startswith("."):
            raise UsageError(f"{where} has no image, or a name that is no plain file name")
        edits.append(
            BatchEdit(
                name=name,
                images=tuple(folder / image for image in names),
                prompt=text,
                seed=seed if line.seed is None else line.seed,
                policy=line.policy or policy,
                mask=None if line.mask is None else folder / line.mask,
            )
        )
    seen: set[str] = set()
    for edit in edits:
        if edit.name in seen:
            raise UsageError(f"{source}: two edits are called {edit.name!r}; name them apart")
        seen.add(edit.name)
    return edits


def _lines_in(source: Path) -> Iterator[tuple[str, _Line]]:
    try:
        text = source.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} cannot be read as lines of JSON: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                yield where, value_from(_Line, parse_json(line))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error


def run_batch(
    service: EditService,
    edits: Sequence[BatchEdit],
    output: Path,
    make_job: Callable[[BatchEdit], EditJob],
    *,
    facts: Any = None,
    on_done: Callable[[int, str], None] = lambda done, name: None,
) -> BatchResult:
    """Run what is not there yet; each result is `output/<name>.png`.

    Args:
        service: started.
        edits: see `read_batch`.
        output: a folder that exists.
        make_job: opens an edit's pictures; what it raises fails that edit alone.
        facts: JSON-ready; what else the results depend on, as steps and the engine set.
        on_done: told how many edits are done, and the last one's name.

    Raises:
        UsageError: a result that is there is of another edit.
        DitrimError: the service cannot go on, or a result cannot be written.
    """
    runner = _Runner(service, output, on_done)
    places = service.options.workers + service.options.queue_size
    for edit in edits:
        target = output / f"{edit.name}.png"
        try:
            mark = _fingerprint(edit, facts)
            if target.exists():
                _check_same(target, mark)
                runner.keep(edit.name)
                continue
            job = make_job(edit)
            while len(runner.waiting) >= places:
                runner.finish_one()
            runner.waiting.append((edit.name, mark, service.submit(job)))
        except (DeviceFailed, Unavailable, _OtherEditError):
            raise
        except (DitrimError, OSError) as error:
            runner.fail(edit.name, error)
    while runner.waiting:
        runner.finish_one()
    return runner.result()


class _OtherEditError(UsageError):
    """A result that is there is of another edit."""


class _Runner:
    """Waits for edits in their order and writes them."""

    def __init__(
        self, service: EditService, output: Path, on_done: Callable[[int, str], None]
    ) -> None:
        self.waiting: deque[tuple[str, str, EditHandle]] = deque()
        self._output, self._on_done = output, on_done
        self._made: list[str] = []
        self._kept: list[str] = []
        self._failed: list[Failure] = []

    def finish_one(self) -> None:
        """Wait for the edit that has waited longest."""
        from ditrim.runtime.editing.pictures import save_picture

        name, mark, handle = self.waiting.popleft()
        try:
            image = handle.result().image
        except (DeviceFailed, Unavailable):
            raise
        except DitrimError as error:
            self.fail(name, error)
            return
        # What cannot be written ends the batch: the next one could not be either.
        save_picture(image, self._output / f"{name}.png", {_FINGERPRINT: mark})
        self._made.append(name)
        self._tell(name)

    def keep(self, name: str) -> None:
        self._kept.append(name)
        self._tell(name)

    def fail(self, name: str, error: Exception) -> None:
        self._failed.append(Failure(name=name, error=str(error)))
        self._tell(name)

    def result(self) -> BatchResult:
        return BatchResult(
            made=tuple(self._made), kept=tuple(self._kept), failed=tuple(self._failed)
        )

    def _tell(self, name: str) -> None:
        self._on_done(len(self._made) + len(self._kept) + len(self._failed), name)


def _fingerprint(edit: BatchEdit, facts: Any) -> str:
    """SHA-256 of everything that a result depends on."""
    files = [*edit.images, *([] if edit.mask is None else [edit.mask])]
    content = {
        "facts": facts,
        "prompt": edit.prompt,
        "seed": edit.seed,
        "policy": edit.policy,
        "has_mask": edit.mask is not None,
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _check_same(target: Path, mark: str) -> None:
    from PIL import Image

    try:
        with Image.open(target) as image:
            found = image.info.get(_FINGERPRINT)
    except (OSError, ValueError) as error:
        raise _OtherEditError(f"{target} is no picture ({error}); delete it") from error
    if found != mark:
        raise _OtherEditError(
            f"{target} is there, and of another edit: its pictures, prompt, seed, policy or engine "
            "were others. Give another --output, or delete it"
        )
