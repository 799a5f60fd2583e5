"""The small editor's pictures on the torch backend and on engine sets, against float32."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from gpu.clock import psnr
from gpu.part import CannotRunError, Context, need, need_gpu

# They tell a wrong tensor from rounding: copying the source gives 13 dB.
LEAST_PSNR_DB = {"fp32": 50.0, "fp16": 35.0, "bf16": 25.0}
# Of both, so that both keep the same tokens.
GRANULARITY = 8


def small_torch(context: Context) -> None:
    """The torch backend in bf16 on the device."""
    torch = need_gpu(context)
    need("diffusers")
    from ditrim.runtime.small_editor import load_small_pipeline

    pipe = load_small_pipeline().to(context.device, torch.bfloat16)
    engines = _engines_of(pipe)
    compare_pictures(context, pipe, engines, "bf16", ())
    plain = _pictures(context, pipe)
    with _attached(pipe, engines, _policies()["full context"]):
        found = _pictures(context, pipe)
    worst = min(psnr(a, b) for a, b in zip(found, plain, strict=True))
    context.record.note(full_context_against_diffusers_psnr_db=worst)
    least = LEAST_PSNR_DB["bf16"]
    context.record.check(f"full context is diffusers' own: at least {least:g} dB", worst >= least)


def onnxruntime_cuda(context: Context) -> None:
    """ONNX Runtime's CUDA provider; a rehearsal takes its CPU provider."""
    need_gpu(context)
    need("diffusers", "onnxruntime", "pydantic")
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if not context.is_rehearsal and "CUDAExecutionProvider" not in providers:
        raise CannotRunError("onnxruntime has no CUDA provider; onnxruntime-gpu does")
    small_engine_set(context, "onnxruntime", "fp32")


def build(context: Context, name: str, **options: Any) -> Any:
    """Build an engine set; the seconds that it took come with it."""
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    start = time.perf_counter()
    engine_set = build_engine_set(BuildOptions(output=str(context.folder / name), **options))
    return engine_set, round(time.perf_counter() - start, 1)


def small_engine_set(context: Context, backend: str, precision: str) -> Any:
    """Build the small editor for a backend and compare its pictures; the engine set."""
    from ditrim.engines.load import load_engines
    from ditrim.runtime.small_editor import load_small_pipeline

    engine_set, seconds = build(
        context,
        f"{backend}-{precision}",
        preset="small",
        granularity=GRANULARITY,
        backend=backend,
        precision=precision,
    )
    context.record.note(precision, build_seconds=seconds)
    engines = load_engines(engine_set, device=context.device)
    pipe = load_small_pipeline().to(context.device)
    compare_pictures(context, pipe, engines, precision, (precision,))
    return engine_set


def compare_pictures(
    context: Context, pipe: Any, engines: Any, precision: str, place: tuple[str, ...]
) -> None:
    """Make the same edits on engines and on torch in float32 on the CPU, and compare.

    Args:
        context: of the part.
        pipe: the small editor, on the device.
        engines: what runs in it.
        precision: decides how near the pictures have to be.
        place: where the figures go in the document.
    """
    from ditrim.runtime.small_editor import load_small_pipeline

    record = context.record
    record.note(*place, choice=engines.choice)
    referee = load_small_pipeline()
    exact = _engines_of(referee)
    for name, policy in _policies().items():
        # At the full context nothing of this project has a part in what is right.
        if name == "full context":
            wanted, expected_kept = _pictures(context, referee), None
        else:
            with _attached(referee, exact, policy) as attachment:
                wanted = _pictures(context, referee)
                expected_kept = _kept(attachment.report)
        with _attached(pipe, engines, policy) as attachment:
            pictures, report = _pictures(context, pipe), attachment.report
        values = [psnr(one, two) for one, two in zip(pictures, wanted, strict=True)]
        found: dict[str, Any] = {"psnr_db": values, "step_ms": _step_times(report)}
        if expected_kept is not None:
            found["kept"] = {"here": _kept(report), "float32": expected_kept}
        record.note(*place, **{name: found})
        if name == "full context":
            least = LEAST_PSNR_DB[precision]
            held = min(values) >= least
            record.check(f"{precision} full context: at least {least:g} dB", held)


def _engines_of(pipe: Any) -> Any:
    """The torch backend of the small editor.

    Its calibration is read here: what reads files for the project needs pydantic, which a machine
    with torch and this checkout lacks.
    """
    from ditrim.engines.live import torch_engines
    from ditrim.engines.presets import small_editor_folder

    measured = json.loads((small_editor_folder() / "calibration.json").read_text())
    return torch_engines(
        pipe.transformer,
        model="qwen-edit",
        front_depth=measured["front_depth"],
        layers=measured["representative_layers"],
        granularity=GRANULARITY,
    )


def _policies() -> dict[str, Any]:
    from ditrim.runtime.policies.topi import ToPi
    from ditrim.runtime.policy import FullContext

    return {"full context": FullContext(), "ToPi": ToPi(tau=0.85, interval=5)}


def _attached(pipe: Any, engines: Any, policy: Any) -> Any:
    from ditrim.runtime.attachment import attach

    return attach(pipe, engines, policy, timing=True)


def _pictures(context: Context, pipe: Any) -> list[Any]:
    """Pictures of held-out edits."""
    import torch
    from PIL import Image

    from ditrim.runtime.small_editor.scenes import held_out_edits

    count, steps = (2, 10) if context.is_quick else (4, 20)
    if context.is_rehearsal:
        count, steps = 1, 3
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for index, example in enumerate(held_out_edits(count, seed=0)):
        made = pipe(
            image=[Image.fromarray(picture) for picture in example.references],
            prompt=example.prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(index),
            output_type="np",
        )
        pictures.append(made.images[0])
    return pictures


def _kept(report: Any) -> list[int]:
    """Reference tokens of each step of the last edit."""
    return [record.num_kept for record in report.steps]


def _step_times(report: Any) -> dict[str, float]:
    """Median milliseconds of a step by role."""
    roles: dict[str, list[float]] = {}
    for record in report.steps[1:]:
        roles.setdefault(record.role, []).append(record.total_ms)
    return {role: round(statistics.median(times), 3) for role, times in roles.items()}
