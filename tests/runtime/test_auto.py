"""`Auto`: what it picks, why, and that the floor holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ditrim.runtime as ditrim
from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.auto import Auto, FlooredCoverage, concentration, kept_influence
from ditrim.runtime.policies.quality import CAP_DB, Outlook, QualityModel, load_quality
from ditrim.runtime.policy import CallView, StepView

GRID = (6, 8)
LENGTH = 48


def make_call(influence: torch.Tensor, *grids: tuple[int, int], step: int = 1) -> CallView:
    ladder = Ladder(rungs=(influence.shape[1],))
    return CallView(step=step, branch="cond", ladder=ladder, grids=grids, influence=influence)


def make_step(
    source: torch.Tensor, estimate: torch.Tensor, influence: torch.Tensor, step: int = 1
) -> StepView:
    """A step whose clean estimate is `estimate`, on the source's grid."""
    sigma = 0.8
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    latents = (1 - sigma) * estimate + sigma * noise
    velocity = noise - estimate
    return StepView(
        step=step,
        ladder=Ladder(rungs=(source.shape[1],)),
        grids=(GRID, GRID),
        latents=latents,
        velocity=velocity,
        branches={"cond": velocity},
        sigma=sigma,
        next_sigma=0.6,
        reference=source,
        influence=influence,
    )


def local_edit() -> tuple[torch.Tensor, torch.Tensor]:
    """A source, and an estimate that differs from it in one corner."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(1, LENGTH, 4, generator=generator)
    estimate = source + 0.01 * torch.randn(1, LENGTH, 4, generator=generator)
    estimate.view(1, *GRID, 4)[:, :2, :3] += 4
    return source, estimate


def choose(policy: Auto, influence: torch.Tensor, source: Any, estimate: Any) -> Any:
    reducer = policy.begin()
    assert [reducer.role(step, None) for step in range(2)] == ["full", "anchor"]
    reducer.finish_step(make_step(source, estimate, influence, step=0))
    reducer.select(make_call(influence, GRID, GRID))
    outcome = reducer.finish_step(make_step(source, estimate, influence, step=1))
    return reducer, outcome


def test_concentrated_influence_in_the_edited_corner_is_served_by_tokendrop() -> None:
    source, estimate = local_edit()
    influence = torch.full((1, LENGTH), 0.01)
    influence.view(1, *GRID)[:, :2, :3] = 10
    policy = Auto(min_influence=0.6, interval=3)
    reducer, outcome = choose(policy, influence, source, estimate)
    notes = reducer.notes()
    assert notes["chosen"] in ("tokendrop", "coverage")
    costs = {c["policy"]: c["cost"] for c in notes["candidates"] if "ruled_out" not in c}
    assert notes["chosen"] == min(costs, key=lambda name: costs[name])
    assert notes["chosen"] == "tokendrop", notes
    assert outcome.reduction.before_front
    held = kept_influence(influence, outcome.reduction.kept)
    assert held >= 0.6
    assert reducer.role(2, outcome.reduction) == "reduced"
    json.dumps(notes)


def test_influence_elsewhere_rules_tokendrop_out() -> None:
    source, estimate = local_edit()
    influence = torch.full((1, LENGTH), 0.01)
    influence.view(1, *GRID)[:, 4:, 5:] = 10  # far from what changes
    reducer, outcome = choose(Auto(min_influence=0.9), influence, source, estimate)
    notes = reducer.notes()
    assert notes["chosen"] == "coverage"
    assert outcome.reduction is None
    assert outcome.latents is None
    (drop,) = [c for c in notes["candidates"] if c["policy"] == "tokendrop"]
    assert drop["ruled_out"] == "it is below the floor"
    assert reducer.role(11, object()) == "anchor"  # type: ignore[arg-type]


def test_nothing_to_gain_is_served_with_all_tokens() -> None:
    source, _ = local_edit()
    influence = torch.ones(1, LENGTH)
    reducer, outcome = choose(Auto(min_influence=0.99), influence, source, -source)
    notes = reducer.notes()
    assert notes["chosen"] == "full"
    assert "less than 5%" in notes["why"]
    assert outcome.reduction.kept is None
    assert {reducer.role(step, None) for step in range(2, 30)} == {"full"}
    (drop,) = [c for c in notes["candidates"] if c["policy"] == "tokendrop"]
    assert "not local" in drop["ruled_out"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 100, width=32), min_size=LENGTH, max_size=LENGTH),
    st.floats(0, 1),
    st.sampled_from([1, 5, 16]),
)
def test_the_floor_holds_for_the_tokens_that_are_kept(
    scores: list[float], floor: float, granularity: int
) -> None:
    influence = torch.tensor([scores])
    policy = FlooredCoverage(min_influence=floor)
    call = CallView(
        step=0,
        branch="cond",
        ladder=Ladder(rungs=(LENGTH,), granularity=granularity),
        grids=(GRID, GRID),
        influence=influence,
    )
    kept = policy.select(call).kept
    assert kept is not None
    assert kept.shape[1] == LENGTH or kept.shape[1] % granularity == 0
    assert kept_influence(influence, kept) >= floor - 1e-9


def test_a_batch_and_two_branches_keep_what_the_most_demanding_needs() -> None:
    uneven = torch.cat([torch.full((1, 4), 50.0), torch.full((1, LENGTH - 4), 0.1)], dim=1)
    both = torch.cat([uneven, torch.ones(1, LENGTH)])
    kept = FlooredCoverage(min_influence=0.8).select(make_call(both, GRID, GRID)).kept
    assert kept is not None
    assert kept.shape[1] >= 0.8 * LENGTH
    reducer: Any = Auto().begin()
    reducer.select(make_call(uneven, GRID, GRID))
    reducer.select(make_call(torch.ones(1, LENGTH), GRID, GRID))
    assert reducer.coverage_outlook.ratio >= 0.85


def test_a_copy_goes_on_by_itself() -> None:
    source, estimate = local_edit()
    influence = torch.full((1, LENGTH), 0.01)
    influence.view(1, *GRID)[:, :2, :3] = 10
    reducer, _ = choose(Auto(min_influence=0.6, interval=3), influence, source, estimate)
    twin = copy.copy(reducer)
    assert twin.chosen is twin.drop
    assert twin.drop is not reducer.drop
    reducer.finish_step(make_step(source, estimate, influence, step=2))
    assert len(twin.drop.mask_ratios) == 1
    assert len(reducer.drop.mask_ratios) == 2


def test_kept_influence_and_concentration() -> None:
    influence = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 1.0, 1.0]])
    kept = torch.tensor([[2, 3], [2, 3]])
    assert kept_influence(influence, kept) == pytest.approx(0.2)
    assert kept_influence(torch.zeros(1, 4), torch.tensor([[0]])) == 0.25
    assert concentration(torch.ones(1, 7)) == pytest.approx(0)
    assert concentration(torch.eye(100)[:1]) == pytest.approx(0.99)
    assert concentration(torch.zeros(1, 4)) == 0


def made_up_quality() -> QualityModel:
    """PSNR = 10 + 12 x - 8 spread for coverage, with noise of 0.5 dB."""
    rng = np.random.default_rng(0)
    runs: dict[str, list[tuple[Outlook, float]]] = {"coverage": [], "tokendrop": []}
    for _ in range(400):
        ratio, spread = rng.uniform(0.05, 0.95), rng.uniform(0, 0.3)
        influence = 1 - (1 - ratio) ** 2
        outlook = Outlook(ratio=ratio, influence=influence, spread=spread)
        x = -np.log10(1 - influence)
        psnr = 10 + 12 * x - 8 * spread + rng.normal(0, 0.5)
        runs["coverage"].append((outlook, psnr))
        runs["tokendrop"].append((outlook, psnr - 5))
    return QualityModel.fit("qwen-edit", "0" * 64, runs)


def test_a_fit_finds_what_it_was_made_of(tmp_path: Path) -> None:
    found = made_up_quality()
    for method, offset in (("coverage", 0.0), ("tokendrop", -5.0)):
        assert found.residual_db[method] == pytest.approx(0.5, abs=0.06)
        outlook = Outlook(ratio=0.5, influence=0.75, spread=0.1)
        expected = 10 + 12 * -np.log10(0.25) - 0.8 + offset - 0.5
        assert found.predict(method, outlook) == pytest.approx(expected, abs=0.3)
    assert found.predict("coverage", Outlook(ratio=1.0, influence=1.0)) == CAP_DB
    place = tmp_path / "quality.json"
    place.write_text(json.dumps(found.as_dict()))
    again = load_quality(place)
    outlook = Outlook(ratio=0.3, influence=0.6)
    assert again.predict("coverage", outlook) == pytest.approx(
        found.predict("coverage", outlook), abs=0.01
    )


def test_a_higher_psnr_floor_keeps_more(tmp_path: Path) -> None:
    place = tmp_path / "quality.json"
    place.write_text(json.dumps(made_up_quality().as_dict()))
    influence = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(3)) ** 3
    source, _ = local_edit()
    ratios = []
    for floor in (14.0, 18.0, 22.0):
        policy = Auto(min_psnr=floor, predictor=str(place))
        reducer, _ = choose(policy, influence, source, -source)
        found = reducer.notes()["candidates"][0]
        assert found["predicted_psnr_db"] >= floor
        ratios.append(found["kept_ratio"])
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_influence": 1.5}, r"min_influence must be a number in \[0, 1\], got 1.5"),
        ({"min_psnr": 30.0}, "min_psnr needs a predictor: the file that calibrate-auto makes"),
        ({"min_psnr": 0.0, "predictor": "x"}, r"min_psnr must lie in \(0, 100\] dB, got 0.0"),
        ({"min_psnr": 30.0, "predictor": "/nowhere"}, "/nowhere cannot be read: No such file"),
        ({"look": 0}, "look must be an integer of at least 1"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
    ],
)
def test_impossible_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Auto(**values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is truncated or not JSON .*; make one with calibrate-auto"),
        ("{}", "it is no quality prediction; make one"),
        ('{"format": "other"}', "it is no quality prediction"),
        (
            '{"format": "ditrim-quality-1", "methods": {}, "model": "m", "engine_identity": "i"}',
            "key 'methods' is {}; Dictionary should have at least 1",
        ),
        (
            '{"format": "ditrim-quality-1", "model": "m", "engine_identity": "i", "methods": '
            '{"coverage": {"coefficients": [1, NaN, 0, 0], "residual_db": 1, "num_runs": 20}}}',
            "NaN is no number",
        ),
    ],
)
def test_damaged_predictors_are_refused(tmp_path: Path, content: str, message: str) -> None:
    place = tmp_path / "quality.json"
    place.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_quality(place)


def test_too_few_runs_are_refused() -> None:
    pair = (Outlook(ratio=0.5, influence=0.8), 30.0)
    with pytest.raises(UsageError, match="3 runs of coverage do not tell"):
        QualityModel.fit("m", "i", {"coverage": [pair] * 3})
    with pytest.raises(UsageError, match="with different kept ratios"):
        QualityModel.fit("m", "i", {"coverage": [pair] * 30})


def test_a_real_edit_is_served_and_explained(small_engine_set: Path) -> None:
    from PIL import Image

    from ditrim.runtime.small_editor import load_small_pipeline
    from ditrim.runtime.small_editor.scenes import sample_edit

    example = sample_edit(np.random.default_rng(5), category="local", split="train")
    pipe = load_small_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with ditrim.attach(pipe, small_engine_set, Auto(min_influence=0.8)) as attachment:
        for _ in range(2):
            pipe(
                image=[Image.fromarray(picture) for picture in example.references],
                prompt=example.prompt,
                num_inference_steps=6,
                generator=torch.Generator().manual_seed(0),
            )
            report = attachment.report
            assert [record.role for record in report.steps[:2]] == ["full", "anchor"]
            assert report.notes["chosen"] in ("coverage", "tokendrop")
            assert report.notes["at_step"] == 1
            assert {record.role for record in report.steps[2:]} <= {"reduced", "anchor"}
            assert report.steps[2].role == "reduced"
            assert report.as_dict()["policy_notes"] == report.notes
