"""`calibrate-cache`: what is measured, what is fitted, and files that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditrim.runtime as ditrim
from ditrim.commands.calibrate_cache import main
from ditrim.engines.load import load_engines
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.calibration import (
    CacheCalibration,
    ChangePoint,
    ChangeRecorder,
    fit_polynomial,
    load_calibration,
    load_tea_cache,
    save_calibration,
    step_cache_from,
    weights_digest,
)
from ditrim.runtime.caches.step_cache import FrontView, StepCache, TeaCache
from ditrim.runtime.small_editor import load_small_pipeline, scenes


def points_on(polynomial: tuple[float, ...], count: int) -> list[ChangePoint]:
    changes = np.linspace(0.01, 0.4, count)
    effects = np.polyval(polynomial, changes)
    return [
        ChangePoint(step=1 + index, front=float(change), velocity=float(effect))
        for index, (change, effect) in enumerate(zip(changes, effects, strict=True))
    ]


def calibration_of(manifest: Any, **changes: Any) -> CacheCalibration:
    points = tuple(points_on((0.5, 0.1), 9))
    calibration = CacheCalibration(
        model=manifest.model,
        front_depth=manifest.front_depth,
        weights=weights_digest(manifest),
        engine_identity=manifest.identity,
        precision=manifest.precision,
        tokens="noisy",
        num_steps=4,
        num_samples=3,
        seed=0,
        points=points,
        fit=fit_polynomial(points, 1),
    )
    return replace(calibration, **changes)


def test_a_polynomial_is_found_again() -> None:
    truth = (3.0, -2.0, 0.7, 0.4, 0.02)
    fit = fit_polynomial(points_on(truth, 30), 4)
    assert fit.coefficients == pytest.approx(truth, abs=1e-6)
    assert fit.measured == pytest.approx((0.01, 0.4))
    assert fit.rms_error < 1e-9
    assert fit.r_squared == pytest.approx(1.0)


def test_fit_quality_is_that_of_the_residuals() -> None:
    rng = np.random.default_rng(0)
    points = [
        replace(point, velocity=point.velocity + float(rng.normal(0, 0.05)))
        for point in points_on((1.0, 0.2), 40)
    ]
    fit = fit_polynomial(points, 1)
    design = np.array([[point.front, 1.0] for point in points])
    effects = np.array([point.velocity for point in points])
    solution = np.linalg.solve(design.T @ design, design.T @ effects)
    errors = effects - design @ solution
    assert fit.coefficients == pytest.approx(solution)
    assert fit.rms_error == pytest.approx(math.sqrt((errors**2).mean()))
    assert fit.max_error == pytest.approx(np.abs(errors).max())
    assert fit.r_squared == pytest.approx(1 - errors.var() / effects.var())


@pytest.mark.parametrize(
    ("points", "degree", "message"),
    [
        (points_on((1.0, 0.0), 5), 4, "5 different points cannot tell .* degree 4 .* at least 6"),
        (points_on((1.0, 0.0), 1) * 50, 1, "1 different points cannot tell"),
        (
            [ChangePoint(step=i, front=1 + i * 1e-15, velocity=0.1) for i in range(20)],
            4,
            "too close for a polynomial of degree 4",
        ),
        (
            [*points_on((1.0, 0.0), 9), ChangePoint(step=9, front=math.nan, velocity=0.1)],
            1,
            "changes are not finite",
        ),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(
    points: list[ChangePoint], degree: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_polynomial(points, degree)


def test_files_are_read_as_written_and_give_their_cache(
    tiny_engine_sets: Any, tmp_path: Path
) -> None:
    engine_set = load_engine_set(tiny_engine_sets("qwen-edit"))
    calibration = calibration_of(engine_set.manifest)
    path = tmp_path / "cache.json"
    save_calibration(calibration, path)
    assert load_calibration(path) == calibration
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.json"]
    cache = load_tea_cache(path, engine_set, threshold=0.2, max_reuses=3)
    assert cache == TeaCache(
        threshold=0.2,
        coefficients=calibration.fit.coefficients,
        max_reuses=3,
        measured=calibration.fit.measured,
    )
    assert cache.predict(0.2) == pytest.approx(0.2)


def test_caches_are_read_as_they_are_typed(tiny_engine_sets: Any, tmp_path: Path) -> None:
    engine_set = load_engine_set(tiny_engine_sets("qwen-edit"))
    assert step_cache_from("0.08", engine_set) == StepCache(threshold=0.08)
    path = tmp_path / "with:colon.json"
    save_calibration(calibration_of(engine_set.manifest), path)
    expected = load_tea_cache(path, engine_set, threshold=0.05)
    assert step_cache_from(f"{path}:0.05", engine_set) == expected
    for text, message in (
        (str(path), "a step cache is a threshold, as 0.08, or a file of calibrate-cache"),
        ("", "got ''"),
        ("0", "threshold must be a number above 0"),
        ("none.json:0.1", "cache calibration none.json cannot be read: No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            step_cache_from(text, engine_set)


def test_another_models_file_is_refused(tiny_engine_sets: Any, tmp_path: Path) -> None:
    engine_set = load_engine_set(tiny_engine_sets("qwen-edit"))
    path = tmp_path / "cache.json"
    for changes, message in (
        ({"model": "flux-kontext"}, "was measured on flux-kontext with front depth 1"),
        ({"front_depth": 3}, "with front depth 3; .* holds qwen-edit with front depth 1"),
        ({"weights": "0" * 64}, "of other weights. Measure this one with: calibrate-cache"),
    ):
        save_calibration(calibration_of(engine_set.manifest, **changes), path)
        with pytest.raises(UsageError, match=message):
            load_tea_cache(path, engine_set, threshold=0.1)
    # Another build of the same weights will do.
    save_calibration(calibration_of(engine_set.manifest, engine_identity="0" * 64), path)
    load_tea_cache(path, engine_set, threshold=0.1)


def test_damaged_files_are_refused(tiny_engine_sets: Any, tmp_path: Path) -> None:
    manifest = load_engine_set(tiny_engine_sets("qwen-edit")).manifest
    path = tmp_path / "cache.json"
    text = calibration_of(manifest).to_json()
    content = json.loads(text)
    for damaged, message in (
        (text[: len(text) // 2], "it is truncated or not JSON"),
        ("", "it is truncated or not JSON"),
        ("[1, 2]", "it is no file of calibrate-cache"),
        (json.dumps(content | {"kind": "other"}), "it is no file of calibrate-cache"),
        (json.dumps(content | {"format_version": 9}), "it is of format version 9"),
        (json.dumps(content | {"num_steps": 5}), "its content does not match its sha256"),
        (text.replace('"seed": 0', '"seed": NaN'), "NaN is no number"),
    ):
        path.write_text(damaged)
        with pytest.raises(UsageError, match=message) as caught:
            load_calibration(path)
        assert str(path) in str(caught.value)
        assert "calibrate-cache" in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is no text"):
        load_calibration(path)
    with pytest.raises(UsageError, match=r"cannot be read: No such .*; make one with calibrate-c"):
        load_calibration(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load_calibration(tmp_path)


def test_sealed_nonsense_is_refused(tiny_engine_sets: Any) -> None:
    """A seal tells that nobody changed a file, not that its content makes sense."""
    manifest = load_engine_set(tiny_engine_sets("qwen-edit")).manifest
    good = calibration_of(manifest)
    for changes, message in (
        ({"tokens": "all"}, "key 'tokens' is 'all'; it must be 'noisy'"),
        ({"num_steps": 0}, "key 'num_steps' is 0; it must be greater than"),
        ({"front_depth": True}, "key 'front_depth' is True; it must be a valid integer"),
        ({"fit": replace(good.fit, coefficients=())}, "coefficients must be a tuple"),
        (
            {"points": (SimpleNamespace(step=1, front="x", velocity=0.0),)},
            r"key 'points\[0\]\[1\]' is 'x'; it must be a valid",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            CacheCalibration.from_json(replace(good, **changes).to_json())


def plain_points(engine: Path, count: int, steps: int, seed: int) -> list[tuple[int, float, float]]:
    """What the command should find on the small editor: changes from step to step."""

    class Spy:
        def __init__(self, engines: Any) -> None:
            self.engines, self.front, self.velocity = engines, [], []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engines, name)

        def run(self, role: str, inputs: Any, outputs: Any) -> None:
            self.engines.run(role, inputs, outputs)
            if role == "front":
                self.front.append(outputs["noisy"].double().numpy().copy())
            else:
                self.velocity.append(outputs["velocity"].double().numpy().copy())

    def change(values: list[Any], step: int) -> float:
        return float(
            np.abs(values[step] - values[step - 1]).mean() / np.abs(values[step - 1]).mean()
        )

    engines, pipe, points = load_engines(engine, device="cpu"), load_small_pipeline(), []
    pipe.set_progress_bar_config(disable=True)
    for index in range(count):
        example = scenes.sample_edit(
            np.random.default_rng([seed, index, 0xCAC4E]),
            category=scenes.CATEGORIES[index % 4],
            split="train",
        )
        spy: Any = Spy(engines)
        with ditrim.attach(pipe, spy, ditrim.FullContext()):
            pipe(
                image=[Image.fromarray(reference) for reference in example.references],
                prompt=example.prompt,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed + index),
            )
        points += [
            (step, change(spy.front, step), change(spy.velocity, step)) for step in range(1, steps)
        ]
    return points


def test_the_small_editor_is_measured(
    small_engine_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cache.json"
    output.write_text("old")
    arguments = ["--engine", str(small_engine_set), "--output", str(output), "--seed", "3"]
    code = main([*arguments, "--num-samples", "2", "--steps", "5", "--degree", "2", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    calibration = load_calibration(output)
    expected = plain_points(small_engine_set, 2, 5, 3)
    assert line["num_points"] == len(calibration.points) == len(expected) == 8
    for point, (step, front, velocity) in zip(calibration.points, expected, strict=True):
        assert point.step == step
        assert point.front == pytest.approx(front, rel=1e-4)
        assert point.velocity == pytest.approx(velocity, rel=1e-4)
    assert line["coefficients"] == list(calibration.fit.coefficients)
    assert calibration.fit == fit_polynomial(calibration.points, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.json"]
    cache = load_tea_cache(output, load_engine_set(small_engine_set), threshold=1e9)
    with ditrim.attach(
        load_small_pipeline(), small_engine_set, ditrim.FullContext(), cache=cache
    ) as attachment:
        attachment.pipe.set_progress_bar_config(disable=True)
        attachment.pipe(
            image=Image.new("RGB", (48, 48), "teal"), prompt="make it grey", num_inference_steps=3
        )
        assert [record.role for record in attachment.report.steps] == ["full", "reuse", "reuse"]


def test_a_folder_of_edits_is_measured_with_both_branches(
    small_engine_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / name)
    lines = [
        {"image": "a.png", "prompt": "make the red circle blue"},
        {"image": ["b.png", "a.png"], "prompt": "insert the ring"},
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "cache.json"
    arguments = ["--engine", str(small_engine_set), "--set", str(tmp_path), "--steps", "3"]
    options = ["--degree", "1", "--true-cfg-scale", "2", "--output", str(output), "--quiet"]
    assert main([*arguments, *options]) == 0
    assert capsys.readouterr().out == ""
    steps = [point.step for point in load_calibration(output).points]
    assert steps == [1, 1, 2, 2] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--degree", "9"], "--degree must lie in [1, 8], got 9"),
        (["--steps", "1"], "--steps must lie in [2, 1000], got 1"),
        (["--num-samples", "0"], "--num-samples must lie in [1, 10000], got 0"),
        (["--guidance", "nan"], "--guidance must lie in [0, 1000], got nan"),
        (["--seed", "-1"], "--seed must lie in [0, 4294967295], got -1"),
        (["--set", "nowhere"], "nowhere has no edits.jsonl"),
        (["--guidance", "2"], "this model has no guidance embeddings"),
        (["--num-samples", "1", "--steps", "2"], "1 different points cannot tell"),
    ],
)
def test_mistakes_exit_2_with_one_line_and_write_nothing(
    arguments: list[str],
    message: str,
    small_engine_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "cache.json"
    given = ["--engine", str(small_engine_set), "--output", str(output), *arguments, "--json"]
    assert main(given) == 2
    out, err = capsys.readouterr()
    line = json.loads(out.splitlines()[-1])
    assert message in line["error"]
    assert line["ok"] is False
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_other_models_need_a_set_and_a_place_to_write_is_checked_first(
    tiny_engine_sets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = str(tiny_engine_sets("qwen-edit"))
    assert main(["--engine", engine, "--output", str(tmp_path / "cache.json"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "--set is missing: a folder with pictures and edits.jsonl" in error
    assert main(["--engine", "nowhere", "--output", str(tmp_path / "x" / "y.json"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "does not exist; make it first" in error


def test_a_recorder_reuses_nothing(tiny_engine_sets: Any) -> None:
    recorder = ChangeRecorder()
    front, velocity = FrontView(noisy=torch.ones(2, 3, 4)), torch.ones(2, 3, 1)
    memory = recorder.remember(None, front, velocity)
    assert recorder.look(memory, front) == (False, memory)
    later = FrontView(noisy=torch.full((2, 3, 4), 1.5))
    memory = recorder.remember(memory, later, velocity * 3)
    recorder.remember(memory, later, velocity * 3)
    assert recorder.points == [
        *[ChangePoint(step=1, front=0.5, velocity=2.0)] * 2,
        *[ChangePoint(step=2, front=0.0, velocity=0.0)] * 2,
    ]
