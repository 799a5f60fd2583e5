"""Step caching: decisions against a plain statement on the diffusers model, and composition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Call, make_call, tiny_transformer

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.step_cache import (
    CacheMemory,
    FrontView,
    StepCache,
    TeaCache,
    relative_changes,
)
from ditrim.runtime.policies.baselines import ToMA, ToMeSD
from ditrim.runtime.policies.importance_merge import ImportanceMerge
from ditrim.runtime.policies.tokendrop import TokenDrop

SIGMAS = [1.0, 0.97, 0.93, 0.8, 0.75, 0.5, 0.45, 0.4, 0.2, 0.15]
GRIDS: dict[str, Any] = {"noisy": (4, 5), "references": ((4, 5), (2, 3))}
LINE = (2.0, 0.01)  # a polynomial: 2 x + 0.01
HUGE = 1e9


class Watched:
    """Engines whose FRONT outputs and BACK calls are noted; runs the engines it is given."""

    def __init__(self, engines: Any) -> None:
        self.engines = engines
        self.fronts: list[torch.Tensor] = []
        self.num_back = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engines, name)

    def run(self, role: str, inputs: Any, outputs: Any) -> None:
        self.engines.run(role, inputs, outputs)
        if role == "front":
            self.fronts.append(outputs["noisy"].clone())
        else:
            self.num_back += 1


def arguments_of(family: str, batch: int = 1, guided: bool = False) -> dict[str, Any]:
    """Arguments of `denoise` for a tiny model."""
    call = make_call(family, batch=batch, **GRIDS)
    lengths = [height * width for _, height, width in call.grids]
    noisy, *references = call.kwargs["hidden_states"].split(lengths, dim=1)
    grids = [grid[1:] for grid in call.grids]
    arguments: dict[str, Any] = {
        "noisy": noisy,
        "noisy_grid": grids[0],
        "references": references,
        "reference_grids": grids[1:],
        "text_embeds": call.kwargs["encoder_hidden_states"],
        "sigmas": SIGMAS,
    }
    if family == "flux-kontext":
        arguments |= {"guidance": 2.5, "pooled_text": call.kwargs["pooled_projections"]}
    if guided:
        generator = torch.Generator().manual_seed(7)
        arguments |= {
            "negative_text_embeds": 3 * torch.randn(batch, 3, 24, generator=generator),
            "true_cfg_scale": 2.0,
        }
    return arguments


def roles_of(steps: list[Any], branch: str = "cond") -> list[str]:
    return [r.role for step in steps for r in step.records if r.branch == branch]


def change_of(now: np.ndarray, before: np.ndarray) -> float:
    return float(np.abs(now - before).mean() / np.abs(before).mean())


def stated_run(
    family: str, reuse: Callable[[list[np.ndarray], list[int]], bool]
) -> tuple[list[bool], torch.Tensor]:
    """A full-context run on the diffusers model, where `reuse` says which steps take no velocity.

    `reuse` is given the first block's noisy hidden states so far, this step's last, and the steps
    that were computed.
    """
    transformer = tiny_transformer(family)
    call: Call = make_call(family, **GRIDS)
    latents = call.kwargs["hidden_states"][:, : call.num_noisy].clone()
    states: list[np.ndarray] = []

    def note(module: Any, args: Any, output: Any) -> None:
        states.append(output[1][:, : call.num_noisy].double().numpy())

    handle = transformer.transformer_blocks[0].register_forward_hook(note)
    levels, computed, answers = [*SIGMAS, 0.0], [], []
    velocity = torch.zeros(())
    for step, sigma in enumerate(SIGMAS):
        call.kwargs["timestep"] = torch.tensor([sigma])
        call.kwargs["hidden_states"][:, : call.num_noisy] = latents
        with torch.no_grad():
            found = transformer(**call.kwargs)[0][:, : call.num_noisy]
        answers.append(bool(computed) and reuse(states, computed))
        if not answers[-1]:
            velocity, computed = found, [*computed, step]
        latents = latents + (levels[step + 1] - sigma) * velocity
    handle.remove()
    return answers, latents


@pytest.mark.parametrize("threshold", [0.02, 0.08, 0.2])
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_first_block_criterion_on_the_diffusers_model(
    family: str, threshold: float, tiny_engine_sets: Any
) -> None:
    def reuse(states: list[np.ndarray], computed: list[int]) -> bool:
        change = change_of(states[-1], states[computed[-1]])
        assert abs(change / threshold - 1) > 1e-3, "too close to tell: choose another threshold"
        return change < threshold

    expected, latents = stated_run(family, reuse)
    session = ditrim.EditSession(
        tiny_engine_sets(family),
        ditrim.FullContext(),
        cache=StepCache(threshold=threshold),
        device="cpu",
    )
    steps = list(session.denoise(**arguments_of(family)))
    assert [role == "reuse" for role in roles_of(steps)] == expected
    assert torch.allclose(steps[-1].latents, latents, atol=1e-4)
    assert session.report.back_calls == len(SIGMAS) - sum(expected)


@pytest.mark.parametrize("threshold", [0.1, 0.4, 1.0])
def test_tea_cache_criterion_on_the_diffusers_model(
    threshold: float, tiny_engine_sets: Any
) -> None:
    gathered = 0.0

    def reuse(states: list[np.ndarray], computed: list[int]) -> bool:
        nonlocal gathered
        if computed[-1] == len(states) - 2:
            gathered = 0.0
        gathered += np.polyval(LINE, change_of(states[-1], states[-2]))
        assert abs(gathered / threshold - 1) > 1e-3, "too close to tell: choose another threshold"
        return gathered < threshold

    expected, latents = stated_run("qwen-edit", reuse)
    steps = list(
        ditrim.EditSession(
            tiny_engine_sets("qwen-edit"),
            ditrim.FullContext(),
            cache=TeaCache(threshold=threshold, coefficients=LINE),
            device="cpu",
        ).denoise(**arguments_of("qwen-edit"))
    )
    assert [role == "reuse" for role in roles_of(steps)] == expected
    assert torch.allclose(steps[-1].latents, latents, atol=1e-4)


def test_thresholds_of_the_tests_reuse_some_steps_and_not_others(tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    for cache in (
        StepCache(threshold=0.2),
        TeaCache(threshold=1.0, coefficients=LINE),
        StepCache(threshold=0.2, tokens="joint"),
    ):
        session = ditrim.EditSession(engines, ditrim.FullContext(), cache=cache)
        roles = roles_of(list(session.denoise(**arguments_of("qwen-edit"))))
        assert {"full", "reuse"} == set(roles), cache


@pytest.mark.parametrize(
    "cache", [StepCache(threshold=HUGE), TeaCache(threshold=HUGE, coefficients=(1.0, 0.0))]
)
def test_anchors_always_run_and_all_between_them_reuse_their_velocity(
    cache: Any, tiny_engine_sets: Any
) -> None:
    engines = Watched(load_engines(tiny_engine_sets("qwen-edit"), device="cpu"))
    session = ditrim.EditSession(engines, ditrim.ToPi(tau=0.5, interval=4, warmup=1), cache=cache)
    steps = list(session.denoise(**arguments_of("qwen-edit")))
    assert roles_of(steps) == ["full", *(["anchor", "reuse", "reuse", "reuse"] * 3)][:10]
    for step, before in zip(steps[1:], steps, strict=False):
        is_reused = step.records[0].role == "reuse"
        assert torch.equal(step.velocity, before.velocity) == is_reused
    assert engines.num_back == session.report.back_calls == 4
    assert session.report.as_dict()["calls_by_role"]["reuse"] == 6


def test_a_reduced_step_after_a_computed_one_is_compared_with_that_one(
    tiny_engine_sets: Any,
) -> None:
    engines = Watched(load_engines(tiny_engine_sets("qwen-edit"), device="cpu"))
    cache = StepCache(threshold=0.15)
    session = ditrim.EditSession(engines, ditrim.ToPi(tau=0.5, interval=5), cache=cache)
    roles = roles_of(list(session.denoise(**arguments_of("qwen-edit"))))
    assert set(roles) == {"anchor", "reduced", "reuse"}
    last = 0
    for step, role in enumerate(roles):
        change = change_of(engines.fronts[step].numpy(), engines.fronts[last].numpy())
        if step % 5 == 0:
            assert role == "anchor"
        else:
            assert role == ("reuse" if change < 0.15 else "reduced")
        last = last if role == "reuse" else step


def test_max_reuses_bounds_the_steps_in_a_row(tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    for cache in (
        StepCache(threshold=HUGE, max_reuses=2),
        TeaCache(threshold=HUGE, coefficients=(1.0,), max_reuses=2),
    ):
        session = ditrim.EditSession(engines, ditrim.FullContext(), cache=cache)
        roles = roles_of(list(session.denoise(**arguments_of("qwen-edit"))))
        assert roles == (["full", "reuse", "reuse"] * 4)[:10]


def first_changes(
    engines: Any, arguments: dict[str, Any], pick: Callable[[Any], Any]
) -> list[float]:
    """Changes of FRONT's output at the second step, of what `pick` takes from all outputs."""
    watched = Watched(engines)
    steps = ditrim.EditSession(watched, ditrim.FullContext()).denoise(**arguments)
    next(steps), next(steps)
    return [change_of(now.numpy(), before.numpy()) for now, before in pick(watched.fronts)]


def test_guidance_branches_decide_each_for_itself(tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = arguments_of("qwen-edit", guided=True)
    # Between the branches' changes at the second step: one of them reuses there.
    threshold = float(
        np.mean(first_changes(engines, arguments, lambda f: [(f[2], f[0]), (f[3], f[1])]))
    )
    watched = Watched(engines)
    session = ditrim.EditSession(
        watched, ditrim.FullContext(), cache=StepCache(threshold=threshold)
    )
    steps = list(session.denoise(**arguments))
    sequences = []
    for offset, branch in enumerate(("cond", "uncond")):
        fronts, roles, last = watched.fronts[offset::2], roles_of(steps, branch), 0
        for step, role in enumerate(roles):
            change = change_of(fronts[step].numpy(), fronts[last].numpy())
            assert role == ("reuse" if step and change < threshold else "full")
            last = last if role == "reuse" else step
        sequences.append(roles)
    assert sequences[0][1] != sequences[1][1]


def test_a_batch_reuses_only_what_each_of_its_entries_would(tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = arguments_of("qwen-edit", batch=2)
    arguments["text_embeds"][1] *= 4
    first, second = first_changes(
        engines, arguments, lambda f: [(f[1][0], f[0][0]), (f[1][1], f[0][1])]
    )
    threshold = (first + second) / 2
    watched = Watched(engines)
    session = ditrim.EditSession(
        watched, ditrim.FullContext(), cache=StepCache(threshold=threshold)
    )
    roles, last = roles_of(list(session.denoise(**arguments))), 0
    for step, role in enumerate(roles):
        changes = [
            change_of(watched.fronts[step][entry].numpy(), watched.fronts[last][entry].numpy())
            for entry in range(2)
        ]
        assert role == ("reuse" if step and max(changes) < threshold else "full")
        last = last if role == "reuse" else step
    assert first != second
    assert roles[1] == "full", "the entries disagree at the second step"


@pytest.mark.parametrize(
    "cache", [StepCache(threshold=0.13), TeaCache(threshold=0.4, coefficients=LINE)]
)
def test_text_of_different_lengths_decides_as_the_entries_alone(
    cache: Any, tiny_engine_sets: Any
) -> None:
    """FRONT runs in two groups, and the second entry's is the first of them to be scattered."""
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = arguments_of("qwen-edit", batch=3)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    together = ditrim.EditSession(engines, ditrim.FullContext(), cache=cache)
    steps = list(together.denoise(**arguments, text_mask=mask))
    roles = roles_of(steps)
    assert set(roles) == {"full", "reuse"}
    watched = Watched(engines)
    full = ditrim.EditSession(watched, ditrim.FullContext(), cache=StepCache(threshold=1e-9))
    full_steps = list(full.denoise(**arguments, text_mask=mask))
    assert len(watched.fronts) == 2 * len(SIGMAS)
    assert set(roles_of(full_steps)) == {"full"}
    first_reuse = roles.index("reuse")
    for step, other in zip(steps[:first_reuse], full_steps, strict=False):
        assert torch.equal(step.latents, other.latents)
    reused, before = steps[first_reuse], steps[first_reuse - 1]
    assert torch.equal(reused.velocity, before.velocity)


def test_a_new_request_forgets_the_last(tiny_engine_sets: Any) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    session = ditrim.EditSession(engines, ditrim.FullContext(), cache=StepCache(threshold=HUGE))
    first = list(session.denoise(**arguments_of("qwen-edit")))
    second = list(session.denoise(**arguments_of("qwen-edit")))
    assert roles_of(second) == roles_of(first) == ["full"] + ["reuse"] * 9
    assert torch.equal(first[-1].latents, second[-1].latents)
    larger = arguments_of("qwen-edit", batch=2)
    assert roles_of(list(session.denoise(**larger)))[0] == "full"


POLICIES: dict[str, Any] = {
    "full": ditrim.FullContext(),
    "topi": ditrim.ToPi(tau=0.5, interval=4),
    "topi, merge": ditrim.ToPi(tau=0.5, interval=4, mode="merge"),
    "random": ditrim.RandomDrop(policy=ditrim.ToPi(tau=0.5, interval=4)),
    "tokendrop": TokenDrop(full_steps=2, dense_if_non_local=False),
    "tomesd": ToMeSD(ratio=0.6),
    "toma, references": ToMA(ratio=0.6, scope="reference"),
    "importance": ImportanceMerge(interval=4, prune_steps=1),
}
CACHES: dict[str, Any] = {
    "first-block": StepCache(threshold=0.15),
    "teacache": TeaCache(threshold=0.5, coefficients=LINE),
    "joint": StepCache(threshold=0.15, tokens="joint"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_caches_compose_with_every_policy(policy: str, tiny_engine_sets: Any) -> None:
    """A cache that reuses nothing changes nothing; one that does, reuses the last velocity."""
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    plain = ditrim.EditSession(engines, POLICIES[policy])
    arguments = arguments_of("qwen-edit")
    expected = list(plain.denoise(**arguments))
    for cache in (
        StepCache(threshold=1e-9),
        StepCache(threshold=1e-9, tokens="joint"),
        TeaCache(threshold=1e-9, coefficients=LINE),
    ):
        steps = list(
            ditrim.EditSession(engines, POLICIES[policy], cache=cache).denoise(**arguments)
        )
        assert roles_of(steps) == roles_of(expected)
        assert all(
            torch.equal(step.latents, other.latents)
            for step, other in zip(steps, expected, strict=True)
        )
    for name, cache in CACHES.items():
        steps = list(
            ditrim.EditSession(engines, POLICIES[policy], cache=cache).denoise(**arguments)
        )
        roles = roles_of(steps)
        assert "reuse" in roles, name
        for step, before in zip(steps[1:], steps, strict=False):
            if step.records[0].role == "reuse":
                assert torch.equal(step.velocity, before.velocity)
        anchors = [step for step, role in enumerate(roles_of(expected)) if role == "anchor"]
        assert [roles[step] for step in anchors] == ["anchor"] * len(anchors)


@pytest.mark.parametrize("policy", ["topi", "tokendrop", "importance"])
@pytest.mark.parametrize("cache", CACHES)
def test_resuming_anywhere_equals_an_uninterrupted_run(
    cache: str, policy: str, tiny_engine_sets: Any
) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = arguments_of("qwen-edit", guided=True)

    def session() -> ditrim.EditSession:
        return ditrim.EditSession(engines, POLICIES[policy], cache=CACHES[cache])

    whole = list(session().denoise(**arguments))
    assert "reuse" in roles_of(whole)
    for index in (2, 3, 6, 7):
        rest = list(session().denoise(**arguments, resume=whole[index].state))
        for branch in ("cond", "uncond"):
            assert roles_of(rest, branch) == roles_of(whole, branch)[index + 1 :]
        assert torch.equal(rest[-1].latents, whole[-1].latents)


@pytest.fixture(scope="module")
def embedding_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine set with K = 0: FRONT embeds and no more."""
    from ditrim.engines.build.build import build_engine_set
    from ditrim.engines.build.options import BuildOptions

    root = tmp_path_factory.mktemp("k0")
    tiny_transformer("qwen-edit", num_layers=2).save_pretrained(root / "checkpoint")
    build_engine_set(
        BuildOptions(
            model="qwen-edit",
            weights=str(root / "checkpoint"),
            front_depth=0,
            layers=(1,),
            max_reference_tokens=64,
            max_noisy_tokens=64,
            max_text_tokens=32,
            output=str(root / "set"),
        )
    )
    return root / "set"


def test_without_front_blocks_the_timestep_counts_too(embedding_only: Path) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=2)
    engines = load_engines(embedding_only, device="cpu")
    arguments, threshold = arguments_of("qwen-edit"), 0.6
    session = ditrim.EditSession(
        engines, ditrim.FullContext(), cache=StepCache(threshold=threshold)
    )
    steps = list(session.denoise(**arguments))
    latents = [arguments["noisy"], *(step.latents for step in steps)]
    embedded, tembs = [], []
    with torch.no_grad():
        for sigma, before in zip(SIGMAS, latents, strict=False):
            embedded.append(transformer.img_in(before).double().numpy())
            temb = transformer.time_text_embed(torch.tensor([sigma]), torch.zeros(1))
            tembs.append(temb.double().numpy())
    roles, last, would_differ = roles_of(steps), 0, False
    assert set(roles) == {"full", "reuse"}
    for step, role in enumerate(roles):
        noisy = change_of(embedded[step], embedded[last])
        change = noisy + change_of(tembs[step], tembs[last])
        assert abs(change / threshold - 1) > 1e-3
        assert role == ("reuse" if step and change < threshold else "full")
        would_differ |= noisy < threshold <= change
        last = last if role == "reuse" else step
    assert would_differ, "the timestep never decides: the test says nothing"


def view(noisy: Any, **others: Any) -> FrontView:
    return FrontView(noisy=torch.tensor(noisy, dtype=torch.float32)[..., None], **others)


def test_changes_by_hand() -> None:
    now, before = view([[1.0, 3.0], [2.0, 2.0]]), view([[1.0, 1.0], [2.0, 2.0]])
    assert relative_changes(now, before) == (1.0, 0.0)
    reference = torch.ones(2, 6, 1)
    joint = relative_changes(
        FrontView(noisy=now.noisy, reference=reference),
        FrontView(noisy=before.noisy, reference=reference),
    )
    assert joint == (0.25, 0.0)  # 2 of 2 becomes 2 of 8: the references dilute it
    temb = FrontView(noisy=now.noisy, temb=torch.tensor([[3.0], [1.0]]))
    earlier = FrontView(noisy=before.noisy, temb=torch.tensor([[2.0], [2.0]]))
    assert relative_changes(temb, earlier) == (1.5, 0.5)
    assert relative_changes(view([[0.0]]), view([[0.0]])) == (0.0,)
    assert relative_changes(view([[1.0]]), view([[0.0]])) == (math.inf,)
    assert relative_changes(view([[1.0, 1.0]]), view([[1.0]])) == (math.inf,)
    assert math.isnan(relative_changes(view([[math.nan]]), view([[1.0]]))[0])
    half = FrontView(noisy=torch.full((1, 4096, 64), 300.0, dtype=torch.float16))
    more = FrontView(noisy=torch.full((1, 4096, 64), 450.0, dtype=torch.float16))
    assert relative_changes(more, half) == (0.5,)


@pytest.mark.parametrize(
    "cache", [StepCache(threshold=HUGE), TeaCache(threshold=HUGE, coefficients=(1.0, 0.0))]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_never_reused(cache: Any, bad: float) -> None:
    good = view([[1.0, 2.0], [1.0, 2.0]])
    memory = cache.remember(None, good, torch.zeros(2, 2, 1))
    is_reused, _ = cache.look(memory, good)
    assert is_reused
    is_reused, after = cache.look(memory, view([[1.0, 2.0], [bad, 2.0]]))
    assert not is_reused
    memory = cache.remember(after, good, torch.zeros(2, 2, 1))
    assert cache.look(memory, good)[0], "what was not finite is forgotten with the next step"


def test_tea_cache_gathers_each_entry_and_starts_anew() -> None:
    cache = TeaCache(threshold=0.75, coefficients=(1.0, 0.0))
    velocity = torch.zeros(2, 1, 1)
    memory = cache.remember(None, view([[4.0], [4.0]]), velocity)
    answers = []
    for noisy in ([[5.0], [4.0]], [[5.0], [6.0]], [[6.0], [6.0]], [[9.0], [6.0]]):
        is_reused, memory = cache.look(memory, view(noisy))
        answers.append((is_reused, tuple(round(total, 6) for total in memory.totals)))
    assert answers == [
        (True, (0.25, 0.0)),
        (True, (0.25, 0.5)),
        (True, (0.45, 0.5)),
        (False, (0.95, 0.5)),
    ]
    memory = cache.remember(memory, view([[9.0], [6.0]]), velocity)
    assert cache.look(memory, view([[9.0], [6.0]]))[1].totals == (0.0, 0.0)


def test_predictions_stay_at_or_above_0_and_grow_beyond_what_was_measured() -> None:
    falling = TeaCache(threshold=1.0, coefficients=(-1.0, 0.5))
    assert falling.predict(0.2) == pytest.approx(0.3)
    assert falling.predict(2.0) == 0.0
    bounded = TeaCache(threshold=1.0, coefficients=(-1.0, 0.5), measured=(0.1, 0.4))
    assert bounded.predict(0.2) == pytest.approx(0.3)
    assert bounded.predict(0.0) == pytest.approx(0.4)
    assert bounded.predict(0.8) == pytest.approx(0.2)  # 0.1 at 0.4, twice that far
    assert bounded.predict(math.inf) == math.inf
    assert math.isnan(bounded.predict(math.nan))


def test_memory_holds_what_is_compared_and_nothing_more() -> None:
    front = FrontView(noisy=torch.ones(1, 2, 3), reference=torch.ones(1, 5, 3))
    memory = StepCache(threshold=1.0).remember(None, front, torch.ones(1, 2, 1))
    assert memory.front.reference is None
    joint = StepCache(threshold=1.0, tokens="joint").remember(None, front, torch.ones(1, 2, 1))
    assert joint.front.reference is front.reference
    assert isinstance(memory, CacheMemory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepCache(threshold=0), "threshold must be a number above 0, got 0"),
        (lambda: StepCache(threshold=math.nan), "threshold must be a number above 0, got nan"),
        (lambda: StepCache(threshold=True), "threshold must be a number above 0, got True"),
        (lambda: StepCache(threshold=0.1, max_reuses=0), "max_reuses must be an integer of at"),
        (lambda: StepCache(threshold=0.1, tokens="all"), "tokens must be one of noisy, joint"),  # type: ignore[arg-type]
        (lambda: TeaCache(threshold=-1.0, coefficients=(1.0,)), "threshold must be a number"),
        (lambda: TeaCache(threshold=0.1, coefficients=()), "coefficients must be a tuple of"),
        (lambda: TeaCache(threshold=0.1, coefficients=(math.inf,)), "finite numbers"),
        (
            lambda: TeaCache(threshold=0.1, coefficients=(1.0,), measured=(0.2, 0.1)),
            "measured must be the least and the largest change",
        ),
    ],
)
def test_options_that_make_no_sense_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
