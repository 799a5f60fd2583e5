"""Policies on the same edits from the same noise, against the full context of the same seed.

For an edit and a seed every policy runs once, one after another, the full context among them: what
slows the machine for a while slows all alike. The order turns by one from edit to edit, so that
none is always first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ditrim.plugins.errors import DitrimError
from ditrim.runtime.metrics import compare_pictures

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.engines.backend import Engines
    from ditrim.plugins.layout import TokenGrid
    from ditrim.runtime.caches.step_cache import Cache
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.evaluation.edits import ComparedEdit, EditPictures
    from ditrim.runtime.evaluation.folder import ComparisonFolder, Row
    from ditrim.runtime.metrics import Lpips, Picture
    from ditrim.runtime.policy import Policy
    from ditrim.runtime.report import RunReport, StepRecord

REFERENCE = "full context"  # the label of what all others are compared with
WARMING_UP = ", warming up"  # ends the label that `on_run` gets then
_WARM_STEPS = 4
_MAX_OVERLAYS = 4
_MAX_SEED = 2**32
_OVERLAY_SIDE = 192  # pixels that a reference is drawn in, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A policy under its label, and the step cache beside it."""

    label: str
    policy: Policy
    cache: Cache | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """One run, before it is compared.

    Attributes:
        label: of the policy.
        image: the result.
        report: what every step did.
        seconds: wall-clock time from the prompt to the picture.
        grids: (height, width) of each reference in tokens.
    """

    label: str
    image: Image.Image
    report: RunReport
    seconds: float
    grids: Sequence[TokenGrid]


def noise_seed(seed: int, edit_index: int) -> int:
    """The seed of a run's noise: edits of one seed get different noise, policies the same."""
    return (seed * 100_003 + edit_index) % _MAX_SEED


@dataclass(slots=True)
class Comparison:
    """Holds the policies and edits of a comparison, and the folder of its results.

    Attributes:
        pipe, engines: the pipeline, and the engine set that is attached to it for each run.
        contenders: the full context first, under the label `REFERENCE`.
        edits, seeds: each policy runs once for every pair of them.
        request: what all runs share; pictures, prompt and seed are filled in.
        folder: where finished runs go.
        num_strips: edits of a category whose pictures are kept.
        lpips: from `load_lpips`.
        session: number of this call among those of the folder.
        on_run: called before each run with edit, seed and label.
        on_step: called after each step; may raise to stop.
    """

    pipe: Any
    engines: Engines
    contenders: Sequence[Contender]
    edits: Sequence[ComparedEdit]
    seeds: Sequence[int]
    request: EditRequest
    folder: ComparisonFolder
    num_strips: int = 2
    lpips: Lpips | None = None
    session: int = 0
    on_run: Callable[[str, int, str], None] = lambda edit, seed, label: None
    on_step: Callable[[], None] = lambda: None

    def missing(self) -> list[tuple[int, int, list[Contender]]]:
        """Runs still to make: index of the edit, seed, and the policies in the order of running."""
        found = []
        for place, (index, seed) in enumerate(
            itertools.product(range(len(self.edits)), self.seeds)
        ):
            edit = self.edits[index]
            wanted = [c for c in self.contenders if not self._is_done(edit, seed, c.label)]
            if wanted:
                turn = place % len(wanted)
                found.append((index, seed, wanted[turn:] + wanted[:turn]))
        return found

    def run(self) -> None:
        """Make every missing run.

        Raises:
            DitrimError: a run failed; names its edit and policy. What was finished is kept.
        """
        missing = self.missing()
        if not missing:
            return
        self._warm_up(missing)
        for index, seed, wanted in missing:
            self._compare(index, seed, wanted)

    def _is_done(self, edit: ComparedEdit, seed: int, label: str) -> bool:
        row = self.folder.rows.get((edit.name, seed, label))
        if row is None or label != REFERENCE:
            return row is not None
        return self.folder.picture(row["picture"]).exists()

    def _warm_up(self, missing: list[tuple[int, int, list[Contender]]]) -> None:
        """A few steps of each policy that will run, so that none pays for what loads lazily."""
        index = missing[0][0]
        pictures = self.edits[index].open()
        labels = {contender.label for _, _, wanted in missing for contender in wanted}
        request = self._request_of(index, 0, pictures)
        short = replace(request, steps=min(request.steps or _WARM_STEPS, _WARM_STEPS))
        for contender in self.contenders:
            if contender.label in labels:
                self.on_run(self.edits[index].name, 0, contender.label + WARMING_UP)
                self._run_once(contender, short, self.edits[index])

    def _compare(self, index: int, seed: int, wanted: Sequence[Contender]) -> None:
        """All missing runs of an edit and a seed; those before the full context wait for it."""
        from ditrim.runtime.editing.pictures import open_picture

        edit = self.edits[index]
        pictures = edit.open()
        request = self._request_of(index, seed, pictures)
        reference: Picture | None = None
        row = self.folder.rows.get((edit.name, seed, REFERENCE))
        if row is not None and all(contender.label != REFERENCE for contender in wanted):
            reference = np.asarray(open_picture(self.folder.picture(row["picture"])))
        waiting: list[FinishedRun] = []
        for contender in wanted:
            self.on_run(edit.name, seed, contender.label)
            run = self._run_once(contender, request, edit)
            waiting.append(run)
            if contender.label == REFERENCE:
                reference = np.asarray(run.image)
                # Speed-ups are relative to its row, so it comes first.
                waiting.sort(key=lambda done: done.label != REFERENCE)
            if reference is not None:
                for done in waiting:
                    self._keep(index, seed, request, pictures, done, reference)
                waiting = []

    def _request_of(self, index: int, seed: int, pictures: EditPictures) -> EditRequest:
        from ditrim.runtime.editing.pipelines import prepare_request

        request = replace(
            self.request,
            images=pictures.images,
            prompt=self.edits[index].prompt,
            seed=noise_seed(seed, index),
        )
        return prepare_request(self.pipe, self.engines.engine_set, request)

    def _run_once(
        self, contender: Contender, request: EditRequest, edit: ComparedEdit
    ) -> FinishedRun:
        from ditrim.runtime.attachment import attach
        from ditrim.runtime.editing.pipelines import run_edit

        try:
            with attach(
                self.pipe, self.engines, contender.policy, cache=contender.cache, timing=True
            ) as attachment:
                start = time.perf_counter()
                image = run_edit(self.pipe, request, lambda done, total: self.on_step())
                seconds = time.perf_counter() - start
        except DitrimError as error:
            raise type(error)(f"edit {edit.name}, policy {contender.label!r}: {error}") from error
        return FinishedRun(
            label=contender.label,
            image=image.convert("RGB"),
            report=attachment.report,
            seconds=seconds,
            grids=(attachment.report.grids or ())[1:],
        )

    def _keep(
        self,
        index: int,
        seed: int,
        request: EditRequest,
        pictures: EditPictures,
        run: FinishedRun,
        reference: Picture,
    ) -> None:
        """Compare a run, and append its row."""
        edit = self.edits[index]
        row: Row = {
            "edit": edit.name,
            "category": edit.category,
            "seed": seed,
            "policy": run.label,
            "noise_seed": request.seed,
            "session": self.session,
            **measures_of(run.report),
            "seconds": round(run.seconds, 6),
        }
        full = row if run.label == REFERENCE else self.folder.rows[edit.name, seed, REFERENCE]
        row["speedup"] = round(full["transformer_ms"] / row["transformer_ms"], 6)
        row["wall_speedup"] = round(full["seconds"] / row["seconds"], 6)
        found = compare_pictures(
            np.asarray(run.image),
            reference,
            region=pictures.region(run.image.size),
            target=pictures.target_pixels(run.image.size),
            lpips=self.lpips,
        )
        row |= {key: None if v is None else round(v, 6) for key, v in found.items()}
        row["is_equal"] = bool(np.array_equal(np.asarray(run.image), reference))
        row |= self._saved_pictures(index, seed, request, run)
        self.folder.append(row)

    def _saved_pictures(
        self, index: int, seed: int, request: EditRequest, run: FinishedRun
    ) -> dict[str, Any]:
        """Names of the pictures that are kept: the reference's always, the others' for strips."""
        from ditrim.runtime.editing.pictures import save_picture

        is_shown = seed == self.seeds[0] and index in shown_edits(self.edits, self.num_strips)
        if not is_shown and run.label != REFERENCE:
            return {}
        number = [contender.label for contender in self.contenders].index(run.label)
        stem = f"{self.edits[index].name}-s{seed}-p{number:02d}"
        saved: dict[str, Any] = {"picture": f"{stem}.png"}
        save_picture(run.image, self.folder.picture(saved["picture"]))
        if is_shown and run.label != REFERENCE:
            saved["kept"] = []
            for record, image in self._overlays(request, run):
                name = f"{stem}-kept-{record.step:03d}.png"
                save_picture(image, self.folder.picture(name))
                assert record.kept_indices is not None
                share = record.kept_indices.shape[1] / record.num_reference
                saved["kept"].append({"step": record.step, "ratio": round(share, 4), "file": name})
        return saved

    def _overlays(
        self, request: EditRequest, run: FinishedRun
    ) -> Iterator[tuple[StepRecord, Image.Image]]:
        """The kept tokens over the references, after some of the steps that chose them."""
        from ditrim.runtime.editing.overlay import kept_mask_picture
        from ditrim.runtime.editing.pipelines import seen_references

        chosen = choices_of(run.report)
        if not chosen:
            return
        seen = seen_references(self.pipe, request.images, run.grids)
        cell = max(4, _OVERLAY_SIDE // max(side for grid in run.grids for side in grid))
        for record in evenly(chosen, _MAX_OVERLAYS):
            assert record.kept_indices is not None
            kept = record.kept_indices[0].cpu().numpy()
            yield record, kept_mask_picture(seen, run.grids, [kept], cell=cell)


def measures_of(report: RunReport) -> dict[str, Any]:
    """Return calls, times and kept shares of a run.

    `kept_ratio` and `noisy_kept_ratio` are means over reduced calls of the share of tokens that
    BACK ran on; `token_share` is the share of all of BACK's tokens, text included, that it ran on
    over the whole run, a reused step counting none.

    Raises:
        DitrimError: the pipeline made no model call.
    """
    if not report.steps:
        raise DitrimError("the pipeline never called its transformer: there is nothing to compare")
    reduced = report.of_role("reduced")
    ran = sum(r.num_noisy_kept + r.num_kept + r.num_text for r in report.steps if r.role != "reuse")
    full = sum(r.num_noisy + r.num_reference + r.num_text for r in report.steps)
    noisy = [r.num_noisy_kept / r.num_noisy for r in reduced]
    return {
        "reference_tokens": report.steps[0].num_reference,
        "kept_ratio": round(report.kept_ratio, 6),
        "noisy_kept_ratio": round(float(np.mean(noisy)) if noisy else 1.0, 6),
        "token_share": round(ran / full, 6),
        "back_calls": report.back_calls,
        "calls": len(report.steps),
        "calls_by_role": report.as_dict(with_steps=False)["calls_by_role"],
        "transformer_ms": round(report.total_ms, 4),
        **({"policy_notes": plain(report.notes)} if report.notes else {}),
    }


def choices_of(report: RunReport) -> list[StepRecord]:
    """The calls of the prompt's branch that chose tokens which a later call ran on."""
    records = [record for record in report.steps if record.branch == "cond"]
    found = []
    for place, record in enumerate(records):
        after = [later.role for later in records[place + 1 : place + 2]]
        is_used = record.role != "anchor" or after in (["reduced"], ["reuse"])
        if record.kept_indices is not None and is_used:
            found.append(record)
    return found


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def shown_edits(edits: Sequence[ComparedEdit], most: int) -> list[int]:
    """Indices of the first `most` edits of each category."""
    counts: dict[str, int] = {}
    shown = []
    for index, edit in enumerate(edits):
        counts[edit.category] = counts.get(edit.category, 0) + 1
        if counts[edit.category] <= most:
            shown.append(index)
    return shown


def plain(value: Any) -> Any:
    """Values that JSON takes: numbers of numpy and torch become Python's, tuples lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
