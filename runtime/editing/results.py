"""What a finished edit leaves behind: its numbers, pictures and report."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from ditrim.plugins.errors import DitrimError
from ditrim.runtime.editing.overlay import Panel, draw_strip, kept_mask_picture
from ditrim.runtime.metrics import psnr_db
from ditrim.runtime.policy import Policy
from ditrim.runtime.policy_text import policy_to_text

if TYPE_CHECKING:
    from PIL import Image

    from ditrim.engines.backend import Engines
    from ditrim.plugins.layout import TokenGrid
    from ditrim.runtime.editing.overlay import Indices
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.report import RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRun:
    """One finished edit.

    Attributes:
        image: the result, RGB.
        report: what every step did.
        seen: the references as the model saw them.
        grids: (height, width) of each reference in tokens.
        geometry: the references' sizes, in words.
        seconds: wall-clock time from the prompt to the picture.
    """

    image: Image.Image
    report: RunReport
    seen: Sequence[Image.Image]
    grids: Sequence[TokenGrid]
    geometry: str
    seconds: float


def describe_policy(policy: Policy) -> dict[str, Any]:
    """A policy's name and options, for JSON; `text` gives it again."""
    text = policy_to_text(policy)
    return {"name": text.split()[0], "text": text, **options_of(policy)}


def options_of(choice: Any) -> dict[str, Any]:
    """Plain values of a policy or cache; a policy inside another gives its own."""
    return {
        item.name: options_of(value) if is_dataclass(value) else value
        for item in fields(choice)
        if item.init and not item.name.startswith("_")
        for value in [getattr(choice, item.name)]
    }


def compare_runs(run: EditRun, full: EditRun) -> dict[str, Any]:
    """PSNR in dB between two runs' pictures (100 where they are equal), and how much faster."""
    return {
        "psnr_db": round(psnr_db(np.asarray(run.image), np.asarray(full.image)), 2),
        "speedup": round(full.seconds / run.seconds, 3),
        "transformer_speedup": round(full.report.total_ms / run.report.total_ms, 3),
        "full_seconds": round(full.seconds, 3),
        "full_transformer_ms": round(full.report.total_ms, 3),
    }


def selections_of(report: RunReport) -> list[Indices]:
    """The different selections that reduced steps ran on; all tokens if there were none.

    With true guidance, those of the branch that follows the prompt.
    """
    records = [record for record in report.steps if record.branch == "cond"]
    found: list[Indices] = []
    roles = [record.role for record in records]
    for record, following in zip(records, [*roles[1:], ""], strict=True):
        if record.kept_indices is not None and "reduced" in (record.role, following):
            found.append(record.kept_indices[0].cpu().numpy())
    return found or [np.arange(report.steps[0].num_reference)]


def draw_mask(run: EditRun) -> Image.Image:
    """The kept tokens of a run over its references."""
    return kept_mask_picture(run.seen, run.grids, selections_of(run.report))


def draw_comparison(
    prompt: str, policy: Policy, run: EditRun, full: EditRun, compared: dict[str, Any]
) -> Image.Image:
    """`source | full context | reduced | kept-token mask`, with what was measured.

    Args:
        prompt: the instruction.
        policy: of `run`.
        run, full: the same edit with and without a policy.
        compared: what `compare_runs` said of them.
    """
    num_tokens = run.report.steps[0].num_reference
    num_steps = 1 + max(record.step for record in run.report.steps)
    num_selections = len(selections_of(run.report))
    selections = "1 selection" if num_selections == 1 else f"{num_selections} selections"
    panels = [
        Panel(
            title="source",
            picture=kept_mask_picture(run.seen, run.grids, [np.arange(num_tokens)]),
            note=f"{num_tokens} reference tokens: {run.geometry}",
        ),
        Panel(
            title="full context",
            picture=full.image,
            note=f"all tokens in each of {num_steps} steps: {full.seconds:.2f} s",
        ),
        Panel(
            title="reduced",
            picture=run.image,
            note=f"{run.seconds:.2f} s, {compared['speedup']:.2f} times as fast; "
            f"{compared['psnr_db']:.1f} dB PSNR to the full context",
        ),
        Panel(
            title="kept-token mask",
            picture=draw_mask(run),
            note=f"{run.report.kept_ratio:.0%} of the tokens kept, {selections} "
            f"({policy_to_text(policy)})",
        ),
    ]
    return draw_strip(panels, f'"{prompt}"')


def picture_metadata(request: EditRequest, policy: Policy, engines: Engines) -> dict[str, str]:
    """Text chunks that say how a picture was made."""
    manifest = engines.engine_set.manifest
    return {
        "Software": f"ditrim {version('ditrim')}",
        "prompt": request.prompt,
        "seed": str(request.seed),
        "policy": json.dumps(describe_policy(policy)),
        "engine": f"{manifest.model} {manifest.identity}",
    }


def summarise_run(run: EditRun, policy: Policy, request: EditRequest) -> dict[str, Any]:
    """The few numbers that a person wants of a run.

    Raises:
        DitrimError: the pipeline made no model call.
    """
    if not run.report.steps:
        raise DitrimError("the pipeline never called its transformer: there is nothing to report")
    return {
        "width": run.image.width,
        "height": run.image.height,
        **({} if request.size is None else {"size_reason": request.size.why}),
        "policy": describe_policy(policy),
        "seed": request.seed,
        "reference_tokens": run.report.steps[0].num_reference,
        "kept_ratio": round(run.report.kept_ratio, 4),
        "seconds": round(run.seconds, 3),
        "transformer_ms": round(run.report.total_ms, 3),
    }


def report_of(
    summary: dict[str, Any],
    request: EditRequest,
    files: Sequence[str],
    engines: Engines,
    run: EditRun,
    full: EditRun | None,
) -> str:
    """The text of a report: the summary, what was asked for, what ran it, and every step."""
    manifest = engines.engine_set.manifest
    content = {
        **summary,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "true_cfg_scale": request.true_cfg_scale,
        "guidance": request.guidance,
        "images": [
            {"file": file, "width": image.width, "height": image.height}
            for file, image in zip(files, request.images, strict=True)
        ],
        "engine": {
            "folder": str(engines.engine_set.folder),
            **{
                key: getattr(manifest, key)
                for key in ("identity", "model", "backend", "backend_version", "precision")
            },
            "device": str(engines.device),
            "device_choice": engines.choice,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ditrim", "torch", "diffusers")},
        },
        "run": run.report.as_dict(),
        "full_context": None if full is None else full.report.as_dict(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
