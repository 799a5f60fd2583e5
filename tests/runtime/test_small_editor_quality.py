"""What trimming costs on the trained small editor, on held-out edits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.runtime.small_editor import load_small_pipeline
from ditrim.runtime.small_editor.scenes import held_out_edits

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
SCRIPT = SCRIPTS / "small_editor" / "evaluate_small_editor.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("evaluate_small_editor", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tau_one_equals_full_context_at_every_step(small_engine_set: Path) -> None:
    engines = load_engines(small_engine_set, device="cpu")
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    example = held_out_edits(1)[0]
    latents: dict[str, list[torch.Tensor]] = {"full": [], "topi": []}
    for name, policy in (
        ("full", ditrim.FullContext()),
        ("topi", ditrim.ToPi(tau=1.0, interval=10)),
    ):

        def keep(_: Any, step: int, t: Any, values: dict[str, Any], name: str = name) -> Any:
            latents[name].append(values["latents"].clone())
            return values

        with ditrim.attach(pipe, engines, policy):
            pipe(
                image=[Image.fromarray(reference) for reference in example.references],
                prompt=example.prompt,
                num_inference_steps=40,
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=keep,
            )
    assert len(latents["topi"]) == 40
    for full, topi in zip(latents["full"], latents["topi"], strict=True):
        assert float((full - topi).abs().max()) <= 1e-5


@pytest.mark.slow
def test_pruned_pictures_stay_close_and_beat_random_dropping(small_engine_set: Path) -> None:
    result = load_script().evaluate(
        small_engine_set, edits=16, tau=0.85, interval=10, steps=40, seed=0, split="held-out"
    )
    assert result["all"]["count"] == 16
    assert result["all"]["topi_db"] >= 30.0, result
    assert result["all"]["gain_db"] > 0.0, result
    assert result["all"]["kept_ratio"] < 0.95, result
