"""`TokenDrop` against Algorithms 1 and 2 on the diffusers model, step by step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from algorithm_1 import run_model
from skimage.filters import threshold_triangle
from tiny import make_call, tiny_transformer
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.policy import UNCHANGED, Reduction, StepOutcome, StepView

Array = npt.NDArray[np.float64]
GRIDS: dict[str, Any] = {"noisy": (4, 5), "references": ((4, 5), (2, 3))}
SIGMAS = [1.0, 0.85, 0.7, 0.5, 0.3, 0.15]
# Random weights change the whole picture.
LOCAL: dict[str, Any] = {"dense_if_non_local": False}
# With 256 bins the threshold of two dozen tokens lies at the floor.
FEW: dict[str, Any] = {"num_bins": 16, **LOCAL}


def plain_mask(estimate: Array, source: Array, grid: tuple[int, int], omega: float) -> Array:
    """Algorithm 2 for one sample: the scores, (L,), and which are above the threshold, (L,)."""
    height, width = grid
    difference = np.abs(estimate - source).mean(axis=1).reshape(grid)
    padded = np.pad(difference, 5, mode="reflect")
    kernel = np.array([[np.exp(-(y * y + x * x) / 2) for x in range(-5, 6)] for y in range(-5, 6)])
    kernel /= kernel.sum()
    blurred = np.array(
        [
            (padded[y : y + 11, x : x + 11] * kernel).sum()
            for y in range(height)
            for x in range(width)
        ]
    )
    scores = (blurred - blurred.min()) / (blurred.max() - blurred.min())
    bins = min(256, max(16, len(scores) // 4))
    mask = scores > threshold_triangle(scores, nbins=bins) - omega * scores.std()
    return np.stack([scores, mask])


def plain_run(
    model: Callable[[Array, float, list[int]], Array],
    z: Array,
    source: Array,
    others: int,
    grid: tuple[int, int],
    omega: float,
    full_steps: int,
    regularise: bool = True,
) -> tuple[list[Array], list[list[int]]]:
    """Algorithm 1 for one sample: latents after every step, and what each step's model saw.

    Args:
        model: (latents, t, kept tokens) -> velocity, guided where there is guidance.
        others: tokens of further references, never dropped.
    """
    length = len(source)
    kept, seen, path = list(range(length + others)), [], []
    for index, (t, then) in enumerate(itertools.pairwise([*SIGMAS, 0.0])):
        v = model(z, t, kept)
        seen.append(kept)
        clean, noise = z - t * v, z + (1 - t) * v
        mask = np.ones(length)
        if index >= full_steps - 1:
            scores, mask = plain_mask(clean, source, grid, omega)
            if not mask.any():
                mask = (scores == scores.max()).astype(float)
        kept = [j for j in range(length) if mask[j]] + list(range(length, length + others))
        if regularise:
            column = mask[:, None]
            star = column * clean + (1 - column) * source
            clean = clean / (1 + t) + t / (1 + t) * star
        z = (1 - then) * clean + then * noise
        path.append(z)
    return path, seen


def session_arguments(call: Any, **more: Any) -> dict[str, Any]:
    lengths = [height * width for _, height, width in call.grids]
    noisy, *references = call.kwargs["hidden_states"].split(lengths, dim=1)
    arguments = {
        "noisy": noisy,
        "noisy_grid": call.grids[0][1:],
        "references": references,
        "reference_grids": [grid[1:] for grid in call.grids[1:]],
        "text_embeds": call.kwargs["encoder_hidden_states"],
        "sigmas": SIGMAS,
    }
    if "pooled_projections" in call.kwargs:
        arguments |= {"guidance": 2.5, "pooled_text": call.kwargs["pooled_projections"]}
    return arguments | more


def model_of(family: str, call: Any) -> Callable[[Array, float, list[int]], Array]:
    """The diffusers model on the first sample of a call, from its first layer on kept tokens."""
    transformer = tiny_transformer(family)

    def model(z: Array, t: float, kept: list[int]) -> Array:
        given = copy.deepcopy(call)
        given.kwargs["hidden_states"][0, : call.num_noisy] = torch.from_numpy(z).float()
        given.kwargs["timestep"] = torch.tensor([t])
        velocity, _ = run_model(transformer, given, front_depth=0, kept=torch.tensor(kept))
        found: Array = velocity[0].double().numpy()
        return found

    return model


@pytest.mark.parametrize("regularise", [True, False])
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_whole_run_equals_algorithm_1(family: str, regularise: bool, tiny_engine_sets: Any) -> None:
    call = make_call(family, **GRIDS)
    policy = ditrim.TokenDrop(omega=0.2, full_steps=2, regularise=regularise, **LOCAL)
    session = ditrim.EditSession(tiny_engine_sets(family), policy, device="cpu")
    steps = list(session.denoise(**session_arguments(call)))
    hidden = call.kwargs["hidden_states"][0].double().numpy()
    path, seen = plain_run(
        model_of(family, call), hidden[:20], hidden[20:40], 6, (4, 5), 0.2, 2, regularise
    )
    for step, latents, kept in zip(steps, path, seen, strict=True):
        record = step.records[0]
        assert record.role == ("full" if step.index < 2 else "reduced")
        assert record.num_kept == len(kept)
        if step.index >= 2:
            assert record.kept_indices is not None
            assert record.kept_indices[0].tolist() == kept
        assert np.abs(step.latents[0].numpy() - latents).max() < 1e-4
    assert min(len(kept) for kept in seen) < 20
    assert len({tuple(kept) for kept in seen}) > 2  # the mask is renewed
    notes = session.report.notes
    assert notes["decision"] == "tokens of the source are dropped"
    shares = [(len(kept) - 6) / 20 for kept in seen[2:]]
    assert notes["mask_kept_ratio"] == pytest.approx(np.mean(shares), abs=0.06)  # one mask more


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_guided_velocity_makes_the_mask_and_the_update(family: str, tiny_engine_sets: Any) -> None:
    call = make_call(family, **GRIDS)
    negative = copy.deepcopy(call)
    generator = torch.Generator().manual_seed(8)
    negative.kwargs["encoder_hidden_states"] = torch.randn(1, 6, 24, generator=generator)
    with_text, without = model_of(family, call), model_of(family, negative)

    def guided(z: Array, t: float, kept: list[int]) -> Array:
        one, other = with_text(z, t, kept), without(z, t, kept)
        mixed: Array = other + 3.0 * (one - other)
        if family == "flux-kontext":
            return mixed
        norms = np.linalg.norm(one, axis=1) / np.linalg.norm(mixed, axis=1)
        return mixed * norms[:, None]

    more = {
        "negative_text_embeds": negative.kwargs["encoder_hidden_states"],
        "negative_pooled_text": call.kwargs.get("pooled_projections"),
        "true_cfg_scale": 3.0,
    }
    policy = ditrim.TokenDrop(omega=0.2, full_steps=1, **LOCAL)
    session = ditrim.EditSession(tiny_engine_sets(family), policy, device="cpu")
    steps = list(session.denoise(**session_arguments(call, **more)))
    hidden = call.kwargs["hidden_states"][0].double().numpy()
    path, seen = plain_run(guided, hidden[:20], hidden[20:40], 6, (4, 5), 0.2, 1)
    for step, latents, kept in zip(steps, path, seen, strict=True):
        assert [record.num_kept for record in step.records] == [len(kept)] * 2
        assert np.abs(step.latents[0].numpy() - latents).max() < 2e-4


def step_view(
    estimate: torch.Tensor, source: torch.Tensor, *, others: int = 0, **more: Any
) -> StepView:
    """A step at t = 0.5 whose clean estimate is the one given."""
    batch, length, channels = source.shape
    latents = torch.randn(source.shape, generator=torch.Generator().manual_seed(3))
    values: dict[str, Any] = {
        "step": 3,
        "ladder": Ladder(rungs=(length + others,)),
        "grids": ((1, length), (1, length), *([(1, others)] if others else [])),
        "latents": latents,
        "velocity": (latents - estimate) / 0.5,
        "branches": {},
        "sigma": 0.5,
        "next_sigma": 0.25,
        "reference": torch.cat([source, torch.zeros(batch, others, channels)], dim=1),
    }
    return StepView(**(values | more))


def edited(*places: list[int], length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of clean estimates, each entry with tokens that differ from the source."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(len(places), length, 4, generator=generator)
    estimate = source + 0.01 * torch.randn(source.shape, generator=generator)
    for entry, tokens in enumerate(places):
        estimate[entry, tokens] += 2.0
    return estimate, source


def finish(policy: ditrim.TokenDrop, view: StepView) -> tuple[StepOutcome, list[list[int]]]:
    outcome = policy.begin().finish_step(view)
    assert outcome.reduction is not None
    assert outcome.reduction.before_front
    assert outcome.reduction.kept is not None
    return outcome, outcome.reduction.kept.tolist()


def pulled_tokens(outcome: StepOutcome, view: StepView) -> list[list[int]]:
    """Tokens whose update is not Euler's."""
    assert outcome.latents is not None
    euler = view.latents + (view.next_sigma - view.sigma) * view.velocity
    differs = (outcome.latents - euler).abs().amax(dim=2) > 1e-6
    return [row.nonzero().flatten().tolist() for row in differs]


def test_tokens_kept_for_the_batch_or_the_ladder_alone_are_not_pulled() -> None:
    estimate, source = edited([10], [2, 3, 4, 12, 13, 14, 15, 16])
    alone = step_view(estimate[:1], source[:1])
    _, first = finish(ditrim.TokenDrop(**FEW), alone)
    ladder = Ladder(rungs=(24,), granularity=5)
    for view in (step_view(estimate, source), step_view(estimate, source, ladder=ladder)):
        outcome, kept = finish(ditrim.TokenDrop(**FEW), view)
        assert set(first[0]) < set(kept[0])
        assert len(kept[0]) == len(kept[1])
        assert len(kept[0]) % view.ladder.granularity == 0
        for entry, tokens in enumerate(pulled_tokens(outcome, view)):
            assert tokens == [j for j in range(24) if j not in kept[entry]]
            assert tokens


def test_further_references_and_tokens_under_a_region_are_kept() -> None:
    estimate, source = edited([10])
    view = step_view(estimate, source, others=6)
    _, kept = finish(ditrim.TokenDrop(**FEW), view)
    assert set(range(24, 30)) < set(kept[0])
    assert 0 not in kept[0]
    region = torch.zeros(30, dtype=torch.bool)
    region[[0, 1, 23]] = True
    for policy in (ditrim.TokenDrop(**FEW), ditrim.TokenDrop(random=True, **FEW)):
        outcome, kept = finish(policy, step_view(estimate, source, others=6, region=region))
        assert {0, 1, 23, *range(24, 30)} < set(kept[0])
        assert not {0, 1, 23} & set(pulled_tokens(outcome, view)[0])


def test_random_tokens_are_as_many_and_differ_between_steps() -> None:
    estimate, source = edited([5, 6, 7], [5, 6, 7, 8, 14, 15, 16])
    adaptive = finish(ditrim.TokenDrop(**FEW), step_view(estimate, source))[1]
    policy = ditrim.TokenDrop(random=True, **FEW)
    chosen = [finish(policy, step_view(estimate, source, step=step))[1] for step in range(3, 9)]
    assert {len(rows[0]) for rows in chosen} == {len(adaptive[0])}
    assert len({str(rows) for rows in chosen}) == 6
    assert all(rows[0] != rows[1] for rows in chosen)
    again = finish(policy, step_view(estimate, source, step=3))[1]
    assert again == chosen[0]
    other = ditrim.TokenDrop(random=True, seed=1, **FEW)
    assert finish(other, step_view(estimate, source, step=3))[1] != chosen[0]


def test_without_regularisation_the_step_is_the_schedulers() -> None:
    view = step_view(*edited([10]))
    outcome, kept = finish(ditrim.TokenDrop(regularise=False, **FEW), view)
    assert outcome.latents is None
    assert kept == finish(ditrim.TokenDrop(**FEW), view)[1]


def test_extreme_omegas_keep_everything_and_one_token() -> None:
    view = step_view(*edited([10]))
    outcome, kept = finish(ditrim.TokenDrop(omega=1e3, **FEW), view)
    assert kept == [list(range(24))]
    assert pulled_tokens(outcome, view) == [[]]
    assert finish(ditrim.TokenDrop(omega=-1e3, **FEW), view)[1] == [[10]]


def test_a_single_token_and_a_source_that_equals_the_estimate_keep_everything() -> None:
    for length in (1, 7):
        source = torch.zeros(2, length, 4)
        view = step_view(source, source, latents=source, velocity=torch.zeros_like(source))
        outcome, kept = finish(ditrim.TokenDrop(**FEW), view)
        assert kept == [list(range(length))] * 2
        assert outcome.latents is not None


def test_all_tokens_until_the_last_full_step_has_made_the_first_mask() -> None:
    view = step_view(*edited([10]), step=2)
    reducer = ditrim.TokenDrop(full_steps=4, **FEW).begin()
    assert reducer.finish_step(view) is UNCHANGED
    assert reducer.notes() == {}
    chosen = finish(ditrim.TokenDrop(full_steps=3, **FEW), view)[0].reduction
    assert [reducer.role(step, chosen) for step in (0, 3, 4, 5)] == ["full"] * 2 + ["reduced"] * 2
    assert reducer.role(5, None) == "full"


def test_edits_of_the_whole_picture_are_served_with_all_tokens() -> None:
    local, source = edited([10], [5])
    whole = local.clone()
    whole[1] += torch.randn(24, 4, generator=torch.Generator().manual_seed(5)) + 2.0
    policy = ditrim.TokenDrop(num_bins=16)
    assert finish(policy, step_view(local, source))
    reducer = policy.begin()
    assert reducer.finish_step(step_view(whole, source)) is UNCHANGED
    notes = reducer.notes()
    assert notes["decision"].startswith(
        "all tokens: the edit of batch entry 1 is not local, with a residual spread of 0."
    )
    assert notes["residual_spread"] > 0.15
    # Decided once: a later step that looks local stays dense, and the other way round.
    assert reducer.finish_step(step_view(local, source, step=4)) is UNCHANGED
    other = policy.begin()
    other.finish_step(step_view(local, source))
    assert other.finish_step(step_view(whole, source, step=4)).reduction is not None
    for off in (FEW, {"max_spread": 1.0, "max_kept_ratio": 1.0}):
        assert finish(ditrim.TokenDrop(**off), step_view(whole, source))
    strict = ditrim.TokenDrop(max_kept_ratio=0.01, num_bins=16).begin()
    assert strict.finish_step(step_view(local, source)) is UNCHANGED
    assert "(limit 0.01)" in strict.notes()["decision"]


@pytest.mark.parametrize(
    ("grids", "reason"),
    [
        (None, "all tokens: the request's picture ids form no whole grids"),
        (
            ((4, 6), (6, 4)),
            "all tokens: the first reference has 6 x 4 tokens, the picture in the making 4 x 6",
        ),
    ],
)
def test_without_a_source_on_the_grid_every_token_is_kept(grids: Any, reason: str) -> None:
    reducer = ditrim.TokenDrop().begin()
    assert reducer.finish_step(step_view(*edited([10]), grids=grids)) is UNCHANGED
    assert reducer.notes() == {"decision": reason}


def test_a_residual_that_is_not_finite_is_named() -> None:
    estimate, source = edited([10])
    estimate[0, 3] = torch.nan
    with pytest.raises(DitrimError, match=r"residual of step 3 is not finite.*try fp32 or bf16"):
        ditrim.TokenDrop().begin().finish_step(step_view(estimate, source))


def test_fewer_bins_are_passed_on() -> None:
    estimate, source = edited([4, 5, 6], length=60)
    estimate += torch.linspace(0, 0.8, 60)[None, :, None]
    masks = [
        finish(ditrim.TokenDrop(num_bins=n, **LOCAL), step_view(estimate, source))[1]
        for n in (8, 256)
    ]
    assert masks[0] != masks[1]


def test_the_papers_values_are_the_models() -> None:
    qwen, flux = ditrim.TokenDrop(model="qwen-edit-plus"), ditrim.TokenDrop(model="flux-kontext")
    assert (qwen.bias, qwen.num_full_steps) == (0.1, 4)
    assert (flux.bias, flux.num_full_steps) == (0.4, 2)
    given = ditrim.TokenDrop(model="another", omega=0.0, full_steps=1)
    assert (given.bias, given.num_full_steps) == (0.0, 1)
    with pytest.raises(UsageError, match=r"no omega and full_steps for 'another', only for qwen"):
        ditrim.TokenDrop(model="another", omega=0.3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"omega": float("nan")}, "omega must be a finite number, got nan"),
        ({"omega": "1"}, "omega must be a finite number, got '1'"),
        ({"full_steps": 0}, "full_steps must be an integer of at least 1, got 0"),
        ({"max_spread": -1}, r"max_spread must be a number in \[0, 1\], got -1"),
        ({"max_kept_ratio": 2}, r"max_kept_ratio must be a number in \[0, 1\], got 2"),
        ({"num_bins": 1}, "num_bins must be an integer of at least 2, got 1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_impossible_parameters_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ditrim.TokenDrop(**values)


def run_pipeline(pipe: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a pipeline returns, and the latents after every step."""
    path: list[torch.Tensor] = []

    def keep(_: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        path.append(values["latents"].clone())
        return values

    arguments = copy.deepcopy(arguments) | {"callback_on_step_end": keep}
    with small_pictures(64), torch.no_grad():
        return pipe(**arguments).images, path


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_the_drop_in_equals_a_session(family: str, guided: bool, tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets(family), device="cpu")
    policy = ditrim.TokenDrop(omega=-0.5, full_steps=2, num_bins=8, **LOCAL)
    pipe = tiny_pipeline(family)
    arguments = request(family, side=64, steps=6, guided=guided)
    calls: list[dict[str, Any]] = []
    with ditrim.attach(pipe, engines, policy) as attachment:
        attachment.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True
        )
        _, path = run_pipeline(pipe, arguments)
        records = attachment.report.steps
        notes = attachment.report.notes
    assert {r.role for r in records} == {"full", "reduced"}
    assert min(r.num_kept for r in records) < 16
    hidden = calls[0]["hidden_states"]
    assert hidden.shape[1] == 32
    more: dict[str, Any] = {}
    if family == "flux-kontext":
        more = {
            "guidance": float(calls[0]["guidance"][0]),
            "pooled_text": calls[0]["pooled_projections"],
        }
    if guided:
        more |= {
            "negative_text_embeds": calls[1]["encoder_hidden_states"],
            "negative_pooled_text": calls[1].get("pooled_projections"),
            "true_cfg_scale": 3.0,
        }
    session = ditrim.EditSession(engines, policy)
    steps = session.denoise(
        noisy=hidden[:, :16],
        noisy_grid=(4, 4),
        references=[hidden[:, 16:]],
        reference_grids=[(4, 4)],
        text_embeds=calls[0]["encoder_hidden_states"],
        sigmas=pipe.scheduler.sigmas.tolist(),
        **more,
    )
    for step, latents in zip(steps, path, strict=True):
        torch.testing.assert_close(step.latents, latents, rtol=1e-4, atol=1e-4)
    assert [r.num_kept for r in session.report.steps] == [r.num_kept for r in records]
    assert session.report.notes["decision"] == notes["decision"]


def test_detach_restores_the_scheduler_exactly(tiny_engine_sets: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    arguments = request("qwen-edit", side=64)
    expected, _ = run_pipeline(pipe, arguments)
    scheduler, before = pipe.scheduler, set(vars(pipe.scheduler))
    policy = ditrim.TokenDrop(full_steps=1, **LOCAL)
    with ditrim.attach(pipe, tiny_engine_sets("qwen-edit"), policy, device="cpu"):
        found, _ = run_pipeline(pipe, arguments)
        assert not torch.allclose(found, expected, atol=1e-3)
        assert pipe.scheduler is scheduler
        assert set(vars(scheduler)) == before
    assert pipe.scheduler is scheduler
    again, _ = run_pipeline(pipe, arguments)
    assert torch.equal(again, expected)


def test_other_schedulers_are_refused(tiny_engine_sets: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    pipe = tiny_pipeline("qwen-edit")
    for scheduler, message in (
        (FlowMatchHeunDiscreteScheduler(), "has a FlowMatchHeunDiscreteScheduler"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            "has a FlowMatchEulerDiscreteScheduler with it",
        ),
    ):
        pipe.scheduler = scheduler
        transformer = pipe.transformer
        for policy in (ditrim.TokenDrop(), ditrim.ImportanceMerge()):
            with pytest.raises(UsageError, match=rf"{type(policy).__name__}.*{message}"):
                ditrim.attach(pipe, engines, policy)
        assert pipe.transformer is transformer
        assert not {"step", "set_timesteps"} & set(vars(scheduler))
        ditrim.attach(pipe, engines, ditrim.ImportanceMerge(scope="reference")).detach()


def test_dense_requests_equal_the_full_context(tiny_engine_sets: Any) -> None:
    """An edit that is not local, and a reference on another grid, to the last bit."""
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    for grids, reason in (
        ({}, "is not local"),
        ({"references": ((5, 4), (2, 3))}, "the first reference has 5 x 4 tokens"),
    ):
        arguments = session_arguments(make_call("qwen-edit", batch=2, **(GRIDS | grids)))
        expected = list(ditrim.EditSession(engines, ditrim.FullContext()).denoise(**arguments))
        session = ditrim.EditSession(engines, ditrim.TokenDrop(full_steps=1, max_spread=0.0))
        for step, other in zip(session.denoise(**arguments), expected, strict=True):
            assert torch.equal(step.latents, other.latents)
            assert [record.role for record in step.records] == ["full"]
        assert reason in session.report.notes["decision"]


def test_a_region_is_kept_through_a_session(tiny_engine_sets: Any) -> None:
    region = torch.zeros(4, 5, dtype=torch.bool)
    region[0, :2] = region[3, 4] = True
    policy = ditrim.TokenDrop(omega=-1e3, full_steps=1, **LOCAL)
    session = ditrim.EditSession(tiny_engine_sets("qwen-edit"), policy, region=region, device="cpu")
    list(session.denoise(**session_arguments(make_call("qwen-edit", **GRIDS))))
    reduced = session.report.of_role("reduced")
    assert len(reduced) == 5
    for record in reduced:
        assert record.kept_indices is not None
        # The region, and the second reference.
        assert {0, 1, 19, *range(20, 26)} <= set(record.kept_indices[0].tolist())


def test_a_batch_is_masked_entry_by_entry(tiny_engine_sets: Any) -> None:
    """With one count for all, each entry is what it is alone; also where texts differ in length."""
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = session_arguments(make_call("qwen-edit", batch=2, **GRIDS))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    policy = ditrim.TokenDrop(omega=-1e3, full_steps=1, **LOCAL)  # nothing of the source
    for text_mask in (None, mask):
        together = list(
            ditrim.EditSession(engines, policy).denoise(**arguments, text_mask=text_mask)
        )
        for entry in range(2):
            one = slice(entry, entry + 1)
            alone = arguments | {
                "noisy": arguments["noisy"][one],
                "references": [reference[one] for reference in arguments["references"]],
                "text_embeds": arguments["text_embeds"][one],
            }
            masks = None if text_mask is None else text_mask[one]
            steps = ditrim.EditSession(engines, policy).denoise(**alone, text_mask=masks)
            for step, both in zip(steps, together, strict=True):
                assert step.records[0].num_kept == both.records[0].num_kept
                assert torch.allclose(step.latents, both.latents[one], atol=1e-4)
        assert {step.records[0].num_kept for step in together} == {26, 6}


def test_reductions_hold_nothing_of_the_reducer() -> None:
    """A snapshot's reducer is a copy, and what it was copied from goes on."""
    view = step_view(*edited([10]))
    reducer = ditrim.TokenDrop(**LOCAL).begin()
    before = copy.copy(reducer)
    reducer.finish_step(view)
    assert before.notes() == {}
    assert isinstance(before.finish_step(view).reduction, Reduction)
    assert before.notes() == reducer.notes()
