"""`ImportanceMerge`, `ToMeSD` and `ToMA` against plain loops over tokens, in numpy."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny import make_call

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policy import CallView, Reduction, StepView
from ditrim.runtime.tokens.draws import generator_of

Array = npt.NDArray[np.float64]
Groups = dict[int, list[int]]  # kept token -> the tokens that it stands for
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]
LOADED: dict[str, Any] = {}


@pytest.fixture
def engines(tiny_engine_sets: Any) -> Any:
    """Loaded engines of the tiny Qwen-Image-Edit, made once."""
    if "qwen-edit" not in LOADED:
        LOADED["qwen-edit"] = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    return LOADED["qwen-edit"]


def features(batch: int, length: int, seed: int = 0, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def call_of(
    noisy: tuple[int, int], references: tuple[tuple[int, int], ...], batch: int = 2, **more: Any
) -> CallView:
    grids = (noisy, *references)
    lengths = [height * width for height, width in grids]
    granularity = more.pop("granularity", 1)
    values: dict[str, Any] = {
        "step": 7,
        "branch": "cond",
        "ladder": Ladder(rungs=(sum(lengths[1:]),), granularity=granularity),
        "grids": grids,
        "noisy": features(batch, lengths[0], seed=1),
        "reference": features(batch, sum(lengths[1:]), seed=2),
    }
    return CallView(**(values | more))


def plain_cells(grids: Any, generator: torch.Generator) -> list[int]:
    """One token of every 2 x 2: the one with the lowest draw."""
    length = sum(height * width for height, width in grids)
    draws = torch.rand(length, generator=generator, dtype=torch.float64).tolist()
    chosen, start = [], 0
    for height, width in grids:
        for top, left in itertools.product(range(0, height, 2), range(0, width, 2)):
            cell = [
                start + y * width + x
                for y in range(top, min(top + 2, height))
                for x in range(left, min(left + 2, width))
            ]
            chosen.append(min(cell, key=lambda i: draws[i]))
        start += height * width
    return chosen


def plain_groups(
    metric: Array, destinations: list[int], count: int, may_stay: list[int] | None = None
) -> Groups:
    """Bipartite soft matching of one sample by cosine similarity."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    nearest = {}
    for i in range(len(unit)):
        if i not in destinations:
            scores = [float(unit[i] @ unit[j]) for j in destinations]
            nearest[i] = max(scores), destinations[int(np.argmax(scores))]
    able = [i for i in nearest if may_stay is None or i in may_stay]
    alone = sorted(able, key=lambda i: (nearest[i][0], -i))[: count - len(destinations)]
    groups = {j: [j] for j in [*destinations, *alone]}
    for i in nearest:
        if i not in alone:
            groups[nearest[i][1]].append(i)
    return groups


def plain_tomesd(metric: Array, grids: Any, count: int, generator: torch.Generator) -> Groups:
    chosen = plain_cells(grids, generator)
    if len(chosen) > count:
        picks = torch.randperm(len(chosen), generator=generator)[:count].tolist()
        chosen = [chosen[i] for i in picks]
    return plain_groups(metric, chosen, count)


def assert_groups(found: Any, metric: torch.Tensor, groups: list[Groups], prune: bool) -> None:
    """Kept tokens, means, and copies of every batch entry."""
    merged, copied = found.merge(metric), found.unmerge(found.merge(metric))
    for b, plain in enumerate(groups):
        x, kept = metric[b].numpy(), sorted(plain)
        assert found.kept[b].tolist() == kept
        for place, j in enumerate(kept):
            expected = x[j] if prune else x[plain[j]].mean(axis=0)
            np.testing.assert_allclose(merged[b, place].numpy(), expected, rtol=1e-9, atol=1e-12)
            for i in plain[j]:
                assert torch.equal(copied[b, i], merged[b, place])


def count_of(ratio: float, length: int, granularity: int = 1) -> int:
    count = max(1, math.ceil(ratio * length))
    return min(length, math.ceil(count / granularity) * granularity)


LAYOUTS = [
    ((4, 4), ((4, 4),)),
    ((3, 5), ((5, 3), (2, 7))),
    ((1, 1), ((1, 1),)),
    ((1, 7), ((3, 1),)),
]


@pytest.mark.parametrize("scope", ["reference", "both"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.83, 1.0])
@pytest.mark.parametrize(("noisy", "references"), LAYOUTS)
def test_tomesd_equals_the_plain_statement(
    noisy: Any, references: Any, ratio: float, scope: Any
) -> None:
    call = call_of(noisy, references, granularity=min(3, references[0][0]))
    policy = ditrim.ToMeSD(ratio=ratio, scope=scope, seed=5)
    found = policy.regroup(call)
    assert found is not None
    parts = [(found.merge, call.reference, references, call.ladder.granularity, 0)]
    if scope == "both":
        parts.append((found.noisy_merge, call.noisy, (noisy,), 1, 1))
    else:
        assert found.noisy_merge is None
    for merge, metric, grids, granularity, part in parts:
        assert metric is not None
        length = metric.shape[1]
        count = count_of(ratio, length, granularity)
        if count == length:
            assert merge is None
            continue
        assert merge is not None
        groups = [
            plain_tomesd(metric[b].numpy(), grids, count, generator_of(5, 7, part))
            for b in range(2)
        ]
        assert_groups(merge, metric, groups, prune=False)
    assert found.kept is (None if found.merge is None else found.merge.kept)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("scope", ["reference", "both"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.83, 1.0])
@pytest.mark.parametrize(("noisy", "references"), LAYOUTS)
def test_ibtm_equals_the_plain_statement(
    noisy: Any, references: Any, ratio: float, scope: Any, prune: bool
) -> None:
    policy = ditrim.ImportanceMerge(
        ratio=ratio, scope=scope, seed=5, p=0.4, k=0.25, prune_steps=8 if prune else 7
    )
    call = call_of(noisy, references)
    assert call.reference is not None
    assert call.noisy is not None
    influence = features(2, call.reference.shape[1], seed=3, width=1)[..., 0].abs()
    importance = features(2, call.noisy.shape[1], seed=4, width=1)[..., 0].abs()
    reducer: Any = policy.begin()
    chosen = reducer.select(anchor(call, influence))
    reducer.noisy_importance = importance
    assert chosen.kept is None
    found = reducer.regroup(call)
    parts = [(found.merge, call.reference, references, influence, 0)]
    if scope == "both":
        parts.append((found.noisy_merge, call.noisy, (noisy,), importance, 1))
    else:
        assert found.noisy_merge is None
    for merge, metric, grids, scores, part in parts:
        length = metric.shape[1]
        count = count_of(ratio, length)
        if count == length:
            assert merge is None
            continue
        generator = generator_of(5, 7, part)
        groups = []
        for b in range(2):
            if prune:
                draws = generator_of(5, 7, part)
                groups.append(plain_tomesd(metric[b].numpy(), grids, count, draws))
                continue
            order = sorted(range(length), key=lambda i: (-float(scores[b, i]), i))
            pool = order[: min(length, int(count * 1.4))]
            size = max(1, min(count, int(length * 0.25)))
            picks = torch.randperm(len(pool), generator=generator)[:size].tolist()
            groups.append(plain_groups(metric[b].numpy(), [pool[i] for i in picks], count, pool))
        assert_groups(merge, metric, groups, prune)


def anchor(call: CallView, influence: torch.Tensor) -> CallView:
    return replace(call, step=0, influence=influence)


def plain_toma(metric: Array, count: int, sharpness: float) -> tuple[list[int], Array]:
    """Kept tokens of one sample that is one tile, and A (K', N) whose columns sum to 1."""
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    similar = unit @ unit.T
    chosen: list[int] = []
    for _ in range(count):
        have = similar[chosen].max(axis=0) if chosen else None
        gains = similar.sum(axis=1) if have is None else np.maximum(similar - have, 0).sum(axis=1)
        gains[chosen] = -np.inf
        chosen.append(int((gains >= gains.max() - 1e-5).argmax()))
    kept = sorted(chosen)
    shares = np.exp(sharpness * (similar[kept] - similar[kept].max(axis=0)))
    return kept, shares / shares.sum(axis=0)


@pytest.mark.parametrize("scope", ["reference", "both"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.83, 1.0])
@pytest.mark.parametrize(("noisy", "reference"), [((4, 4), (3, 5)), ((1, 1), (1, 1))])
def test_toma_equals_the_plain_statement(
    noisy: Any, reference: Any, ratio: float, scope: Any
) -> None:
    call = call_of(noisy, (reference,))
    found = ditrim.ToMA(ratio=ratio, scope=scope, sharpness=6.0).regroup(call)
    assert found is not None
    parts = [(found.merge, call.reference)]
    if scope == "both":
        parts.append((found.noisy_merge, call.noisy))
    else:
        assert found.noisy_merge is None
    for merge, metric in parts:
        assert metric is not None
        count = count_of(ratio, metric.shape[1])
        if count == metric.shape[1]:
            assert merge is None
            continue
        assert merge is not None
        merged = merge.merge(metric)
        spread = merge.unmerge(merged)
        for b in range(2):
            kept, matrix = plain_toma(metric[b].numpy(), count, 6.0)
            assert merge.kept[b].tolist() == kept
            means = (matrix / matrix.sum(axis=1, keepdims=True)) @ metric[b].numpy()
            np.testing.assert_allclose(merged[b].numpy(), means, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(spread[b].numpy(), matrix.T @ means, rtol=1e-5, atol=1e-6)


def test_equal_tokens_and_equal_importance_keep_as_many() -> None:
    call = call_of((4, 4), ((4, 4),))
    call = replace(call, noisy=torch.ones(2, 16, 3), reference=torch.ones(2, 16, 3))
    reducer: Any = ditrim.ImportanceMerge(prune_steps=0).begin()
    reducer.select(anchor(call, torch.ones(2, 16)))
    reducer.noisy_importance = torch.ones(2, 16)
    for found in (
        reducer.regroup(call),
        ditrim.ToMeSD().regroup(call),
        ditrim.ToMA(tile=3).regroup(call),
    ):
        for merge in (found.merge, found.noisy_merge):
            assert all(len(set(row)) == 8 for row in merge.kept.tolist())
            ones = torch.ones(2, 8, 3)
            torch.testing.assert_close(merge.merge(torch.ones(2, 16, 3)), ones)


def test_draws_are_those_of_seed_and_step() -> None:
    call = call_of((6, 6), ((6, 6),))

    def kept(policy: Any, step: int) -> list[list[int]]:
        found = policy.regroup(replace(call, step=step))
        return [found.kept[0].tolist(), found.noisy_merge.kept[0].tolist()]

    policy = ditrim.ToMeSD()
    assert kept(policy, 1) == kept(ditrim.ToMeSD(), 1)
    assert kept(policy, 1) != kept(policy, 2)
    assert kept(policy, 1) != kept(ditrim.ToMeSD(seed=1), 1)
    draws = [torch.rand(4, generator=generator_of(0, step)).tolist() for step in range(50)]
    assert len({tuple(row) for row in draws}) == 50
    assert torch.rand(4, generator=generator_of(1, 0)).tolist() not in draws


def test_schedules_of_full_steps() -> None:
    always, some = ditrim.ToMeSD(), ditrim.ToMA(warmup=2, interval=3)
    assert {always.role(step, None) for step in range(5)} == {"reduced"}
    assert [some.role(step, None) for step in range(9)] == [
        "full", "full", "full", "reduced", "reduced", "full", "reduced", "reduced", "full",
    ]  # fmt: skip
    reducer = ditrim.ImportanceMerge(warmup=1, interval=3).begin()
    assert [reducer.role(step, Reduction()) for step in range(6)] == [
        "full", "anchor", "reduced", "reduced", "anchor", "reduced",
    ]  # fmt: skip
    assert reducer.role(3, None) == "anchor"


def test_importance_is_the_guidance_difference_where_there_is_one() -> None:
    latents, velocity, source, other = (features(2, 6, seed=i, width=4) for i in range(4))
    view = {
        "step": 1,
        "ladder": Ladder(rungs=(9,)),
        "grids": ((2, 3), (2, 3), (1, 3)),
        "latents": latents,
        "velocity": velocity,
        "branches": {"cond": velocity, "uncond": other},
        "sigma": 0.6,
        "next_sigma": 0.4,
        "reference": torch.cat([source, features(2, 3, width=4)], dim=1),
    }
    one = {"branches": {"cond": velocity}}
    cases = [
        ({}, np.abs(velocity - other).mean(dim=2), "guidance difference"),
        (
            one,
            (latents - 0.6 * velocity - source).abs().mean(dim=2),
            "residual to the source, as only one branch runs",
        ),
        (
            one | {"grids": ((2, 3), (3, 2), (1, 3))},
            velocity.abs().mean(dim=2),
            "velocity, as only one branch runs and no source has the picture's grid",
        ),
    ]
    for change, expected, signal in cases:
        reducer: Any = ditrim.ImportanceMerge().begin()
        outcome = reducer.finish_step(StepView(**(view | change)))
        assert outcome.latents is None
        assert outcome.reduction is None
        torch.testing.assert_close(reducer.noisy_importance, expected.float())
        assert reducer.notes() == {"reference_importance": "influence", "noisy_importance": signal}


def test_each_branch_has_its_own_influence_and_groups_have_their_entries() -> None:
    call = call_of((2, 3), ((4, 5),), batch=3)
    reducer: Any = ditrim.ImportanceMerge(scope="reference", prune_steps=0).begin()
    scores = {name: features(3, 20, seed=i, width=1)[..., 0] for i, name in enumerate("ab")}
    for name, influence in scores.items():
        reducer.select(replace(anchor(call, influence), branch=name))
    for name, influence in scores.items():
        for row in range(3):
            assert call.reference is not None
            part = replace(
                call,
                branch=name,
                rows=torch.tensor([row]),
                reference=call.reference[row : row + 1],
            )
            kept = reducer.regroup(part).kept[0].tolist()
            pool = influence[row].argsort(descending=True)[:14].tolist()
            assert set(kept) <= set(pool)
            assert len(kept) == 10


def arguments_of(batch: int = 1, guided: bool = False, seed: int = 1) -> dict[str, Any]:
    call = make_call("qwen-edit", batch=batch, noisy=(4, 5), references=((4, 5), (2, 3)), seed=seed)
    noisy, *references = call.kwargs["hidden_states"].split([20, 20, 6], dim=1)
    arguments: dict[str, Any] = {
        "noisy": noisy,
        "noisy_grid": (4, 5),
        "references": references,
        "reference_grids": [(4, 5), (2, 3)],
        "text_embeds": call.kwargs["encoder_hidden_states"],
        "sigmas": SIGMAS,
    }
    if guided:
        generator = torch.Generator().manual_seed(9)
        arguments |= {
            "negative_text_embeds": torch.randn(batch, 3, 24, generator=generator),
            "true_cfg_scale": 2.0,
        }
    return arguments


def latents_of(steps: Any) -> list[torch.Tensor]:
    return [step.latents for step in steps]


POLICIES: list[Any] = [
    ditrim.ImportanceMerge(interval=4, prune_steps=2),
    ditrim.ImportanceMerge(interval=4, scope="reference", metric="places", prune_steps=0),
    ditrim.ToMeSD(interval=4),
    ditrim.ToMeSD(scope="reference"),
    ditrim.ToMA(interval=4, tile=4),
    ditrim.ToPi(ratio=0.5, interval=4, mode="merge"),
    ditrim.TokenDrop(omega=-0.5, full_steps=1, num_bins=8, dense_if_non_local=False),
    ditrim.RandomDrop(policy=ditrim.ToPi(ratio=0.5, interval=4)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_a_run_resumed_in_the_middle_and_runs_side_by_side_are_as_alone(
    policy: Any, engines: Any
) -> None:
    requests = [arguments_of(guided=True), arguments_of(seed=2)]
    whole = [list(ditrim.EditSession(engines, policy).denoise(**r)) for r in requests]
    assert any(record.role == "reduced" for step in whole[0] for record in step.records)
    first = ditrim.EditSession(engines, policy).denoise(**requests[0])
    stopped = [next(first) for _ in range(2)][-1]
    list(first)  # the first run goes on before the second starts from the middle
    rest = ditrim.EditSession(engines, policy).denoise(**requests[0], resume=stopped.state)
    for found, step in zip(rest, whole[0][2:], strict=True):
        assert torch.equal(found.latents, step.latents)
        assert [r.num_kept for r in found.records] == [r.num_kept for r in step.records]
    sessions = [ditrim.EditSession(engines, policy) for _ in requests]
    runs = [s.denoise(**r) for s, r in zip(sessions, requests, strict=True)]
    for index, steps in enumerate(zip(*runs, strict=True)):
        for step, expected in zip(steps, whole, strict=True):
            assert torch.equal(step.latents, expected[index].latents)


@pytest.mark.parametrize("policy", POLICIES[:6], ids=lambda p: type(p).__name__)
def test_entries_of_a_batch_with_unequal_texts_are_as_alone(policy: Any, engines: Any) -> None:
    arguments = arguments_of(batch=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    together = list(ditrim.EditSession(engines, policy).denoise(**arguments, text_mask=mask))
    for entry in range(2):
        one = slice(entry, entry + 1)
        alone = arguments | {
            "noisy": arguments["noisy"][one],
            "references": [reference[one] for reference in arguments["references"]],
            "text_embeds": arguments["text_embeds"][one],
        }
        steps = ditrim.EditSession(engines, policy).denoise(**alone, text_mask=mask[one])
        for step, both in zip(steps, together, strict=True):
            assert torch.allclose(step.latents, both.latents[one], atol=1e-4)
            kept, of_both = step.records[0].kept_indices, both.records[0].kept_indices
            assert (kept is None) == (of_both is None)
            if kept is not None and of_both is not None:
                assert torch.equal(kept, of_both[one])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("make", [ditrim.ImportanceMerge, ditrim.ToMeSD, ditrim.ToMA])
def test_keeping_everything_equals_the_full_context(make: Any, guided: bool, engines: Any) -> None:
    arguments = arguments_of(batch=2, guided=guided)
    expected = latents_of(ditrim.EditSession(engines, ditrim.FullContext()).denoise(**arguments))
    session = ditrim.EditSession(engines, make(ratio=1.0))
    for found, latents in zip(latents_of(session.denoise(**arguments)), expected, strict=True):
        torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-5)
    assert session.report.of_role("reduced")


@pytest.mark.parametrize("scope", ["reference", "both"])
@pytest.mark.parametrize("make", [ditrim.ImportanceMerge, ditrim.ToMeSD, ditrim.ToMA])
def test_reports_tell_what_back_ran_on(make: Any, scope: Any, engines: Any) -> None:
    session = ditrim.EditSession(engines, make(ratio=0.5, scope=scope, interval=3))
    list(session.denoise(**arguments_of(batch=2)))
    roles = [record.role for record in session.report.steps]
    full = "anchor" if make is ditrim.ImportanceMerge else "full"
    assert roles == [full, "reduced", "reduced", full, "reduced"]
    for record in session.report.of_role("reduced"):
        assert (record.num_kept, record.num_reference) == (13, 26)
        assert (record.num_noisy_kept, record.num_noisy) == (10 if scope == "both" else 20, 20)
        assert record.kept_indices is not None
        assert record.kept_indices.shape == (2, 13)
    assert all(r.kept_indices is None for r in session.report.of_role(full))


class Recorded:
    """Engines that remember what went into and came out of each call."""

    def __init__(self, engines: Any) -> None:
        self.engines = engines
        self.calls: list[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engines, name)

    def run(self, role: str, inputs: Any, outputs: Any) -> None:
        self.engines.run(role, inputs, outputs)
        taken, made = ({k: v.clone() for k, v in part.items()} for part in (inputs, outputs))
        self.calls.append((role, taken, made))


def test_back_runs_on_means_and_its_clean_estimate_is_copied_back(engines: Any) -> None:
    """What goes into BACK and what becomes of its result, by plain loops."""
    recorded = Recorded(engines)
    session = ditrim.EditSession(recorded, ditrim.ToMeSD(ratio=0.4, seed=3))
    arguments = arguments_of(batch=2)
    step = next(iter(session.denoise(**arguments)))
    (name, front_inputs, front), *backs = recorded.calls
    assert name == "front"
    assert [back[0] for back in backs] == ["back", "back"]  # one an entry
    for b, (_, inputs, outputs) in enumerate(backs):
        parts = (
            ("noisy", ((4, 5),), 8, 1),
            ("reference", ((4, 5), (2, 3)), 11, 0),
        )
        for part, grids, count, number in parts:
            x = front[part][b].double().numpy()
            groups = plain_tomesd(x, grids, count, generator_of(3, 0, number))
            kept = sorted(groups)
            means = np.stack([x[groups[j]].mean(axis=0) for j in kept])
            np.testing.assert_allclose(inputs[part][0].numpy(), means, rtol=1e-4, atol=1e-5)
            for table in ("cos", "sin"):
                whole = front_inputs[f"{part}_rope_{table}"]
                whole = whole[b] if part == "reference" else whole
                found = inputs[f"{part}_rope_{table}"]
                found = found[0] if part == "reference" else found
                assert torch.equal(found, whole[kept])
            if part == "noisy":
                z, t = arguments["noisy"][b].double().numpy(), float(arguments["sigmas"][0])
                for place, j in enumerate(kept):
                    mean = z[groups[j]].mean(axis=0)
                    clean = mean - t * outputs["velocity"][0, place].double().numpy()
                    for i in groups[j]:
                        found = z[i] - t * step.velocity[b, i].double().numpy()
                        np.testing.assert_allclose(found, clean, rtol=1e-4, atol=1e-5)
        assert torch.equal(inputs["text"][0], front["text"][b])


@pytest.mark.parametrize("make", [ditrim.ImportanceMerge, ditrim.ToMeSD, ditrim.ToMA])
def test_a_region_is_refused(make: Any, engines: Any) -> None:
    region = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(UsageError, match=f"{make.__name__} takes no region; use a policy that"):
        ditrim.EditSession(engines, make(), region=region)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (ditrim.ToMeSD, {"ratio": 1.2}, r"ratio must be a number in \[0, 1\], got 1.2"),
        (ditrim.ToMA, {"scope": "noisy"}, "scope must be one of reference, both, got 'noisy'"),
        (ditrim.ToMeSD, {"interval": 0}, "interval must be an integer of at least 1, got 0"),
        (ditrim.ToMeSD, {"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        (ditrim.ToMA, {"ratio": -1}, r"ratio must be a number in \[0, 1\], got -1"),
        (ditrim.ToMA, {"tile": 0}, "tile must be an integer of at least 1, got 0"),
        (ditrim.ToMA, {"sharpness": 0.0}, "sharpness must be a number above 0, got 0.0"),
        (ditrim.ImportanceMerge, {"p": -1.0}, r"p must not be negative and k in \(0, 1\]"),
        (ditrim.ImportanceMerge, {"k": 0.0}, r"p must not be negative and k in \(0, 1\]"),
        (ditrim.ImportanceMerge, {"prune_steps": -1}, "prune_steps must be an integer of at least"),
        (ditrim.ImportanceMerge, {"interval": 0}, "interval must be an integer of at least 1"),
        (ditrim.ImportanceMerge, {"metric": "keys"}, "metric must be one of features, places"),
        (ditrim.ImportanceMerge, {"scope": None}, "scope must be one of reference, both"),
    ],
)
def test_impossible_parameters_are_named(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**values)
