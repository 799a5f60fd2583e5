"""`EditSession` against Algorithm 1 on the diffusers model, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithm_1 import kept_tokens, run_model
from tiny import Call, make_call, tiny_transformer

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import UsageError

GRIDS: dict[str, Any] = {"noisy": (4, 5), "references": ((5, 4), (2, 3))}


def arguments_of(family: str, call: Call, sigmas: list[float]) -> dict[str, Any]:
    """A call's tensors as arguments of `denoise`."""
    lengths = [height * width for _, height, width in call.grids]
    noisy, *references = call.kwargs["hidden_states"].split(lengths, dim=1)
    grids = [grid[1:] for grid in call.grids]
    arguments = {
        "noisy": noisy,
        "noisy_grid": grids[0],
        "references": references,
        "reference_grids": grids[1:],
        "text_embeds": call.kwargs["encoder_hidden_states"],
        "sigmas": sigmas,
    }
    if family == "flux-kontext":
        arguments |= {"guidance": 2.5, "pooled_text": call.kwargs["pooled_projections"]}
    return arguments


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_whole_run_equals_algorithm_1(family: str, stride: int, tiny_engine_sets: Any) -> None:
    transformer = tiny_transformer(family)
    call = make_call(family, **GRIDS)
    sigmas = [1.0, 0.8, 0.6, 0.3, 0.1]
    policy = ditrim.ToPi(tau=0.6, interval=3, score_every=stride)
    session = ditrim.EditSession(tiny_engine_sets(family), policy, device="cpu")
    latents, kept = call.kwargs["hidden_states"][:, : call.num_noisy], None
    levels = [*sigmas, 0.0]
    steps = list(session.denoise(**arguments_of(family, call, sigmas)))
    assert [step.index for step in steps] == list(range(5))
    for step in steps:
        call.kwargs["timestep"] = torch.tensor([levels[step.index]])
        call.kwargs["hidden_states"][:, : call.num_noisy] = latents
        is_anchor = step.index % 3 == 0
        velocity, influence = run_model(
            transformer,
            call,
            front_depth=1,
            layers=(2, 3) if is_anchor else (),
            kept=None if is_anchor else torch.tensor(kept),
            stride=stride,
        )
        if is_anchor:
            assert influence is not None
            kept = kept_tokens(influence[0], 0.6)
            found = step.records[0].kept_indices
            assert found is not None
            assert found[0].tolist() == kept
        assert step.records[0].num_kept == (26 if is_anchor else len(kept or []))
        latents = latents + (levels[step.index + 1] - levels[step.index]) * velocity
        assert torch.allclose(step.latents, latents, atol=1e-4)
    assert len(kept or []) < 26


def test_a_run_can_be_stopped_and_resumed_elsewhere(tiny_engine_sets: Any) -> None:
    family = "qwen-edit"
    engines = load_engines(tiny_engine_sets(family), device="cpu")
    call = make_call(family, **GRIDS)
    arguments = arguments_of(family, call, [1.0, 0.8, 0.6, 0.4, 0.2])
    arguments |= {"negative_text_embeds": torch.randn(1, 3, 24), "true_cfg_scale": 2.0}
    policy = ditrim.ToPi(tau=0.5, interval=4)
    whole = list(ditrim.EditSession(engines, policy).denoise(**arguments))
    first = ditrim.EditSession(engines, policy).denoise(**arguments)
    stopped = [next(first) for _ in range(2)][-1]
    first.close()
    rest = list(ditrim.EditSession(engines, policy).denoise(**arguments, resume=stopped.state))
    assert [step.index for step in rest] == [2, 3, 4]
    assert [r.role for step in rest for r in step.records] == ["reduced"] * 4 + ["anchor"] * 2
    for step, expected in zip(rest, whole[2:], strict=True):
        assert torch.equal(step.latents, expected.latents)
    with pytest.raises(UsageError, match="cannot resume at step 5"):
        ditrim.EditSession(engines, policy).denoise(**arguments, resume=whole[-1].state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": []}, "sigmas must decrease and hold at least one level"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must decrease"),
        ({"sigmas": [2.0, 0.5]}, r"sigmas must lie in \(0, 1\], got 2.0"),
        ({"noisy_grid": (3, 5)}, r"noisy has shape \(1, 20, 16\), but its grid \(3, 5\) needs"),
        ({"references": [], "reference_grids": []}, "give at least one reference"),
        ({"true_cfg_scale": 2.0}, "needs negative_text_embeds"),
        ({"noisy": torch.full((1, 20, 16), float("nan"))}, "noisy_latents hold NaN or infinite"),
        ({"text_embeds": torch.zeros(1, 6, 7)}, "text_embeds has 7 channels, the model takes 24"),
        ({"text_embeds": torch.zeros(2, 6, 24)}, "text_embeds has batch 2, noisy_latents have 1"),
        ({"text_mask": torch.zeros(1, 6)}, "a text mask without any token"),
        ({"text_mask": torch.ones(1, 5)}, r"text mask has shape \(1, 5\), .* need \(1, 6\)"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas must be finite"),
        ({"guidance": float("inf")}, "guidance must be finite, got inf"),
        (
            {"references": [torch.zeros(1, 20, 8), torch.zeros(1, 6, 16)]},
            r"references\[0\] has shape \(1, 20, 8\), but its batch and channels",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    change: dict[str, Any], message: str, tiny_engine_sets: Any
) -> None:
    call = make_call("qwen-edit", **GRIDS)
    session = ditrim.EditSession(tiny_engine_sets("qwen-edit"), device="cpu")
    with pytest.raises(UsageError, match=message):
        next(session.denoise(**(arguments_of("qwen-edit", call, [1.0, 0.5]) | change)))


def test_a_second_run_ends_the_first_and_observers_cannot_change_a_run(
    tiny_engine_sets: Any,
) -> None:
    engines = load_engines(tiny_engine_sets("qwen-edit"), device="cpu")
    arguments = arguments_of("qwen-edit", make_call("qwen-edit", **GRIDS), [1.0, 0.7, 0.4])
    session = ditrim.EditSession(engines)
    expected = [step.latents for step in session.denoise(**arguments)]
    first = session.denoise(**arguments)
    next(first)
    for step, latents in zip(session.denoise(**arguments), expected, strict=True):
        assert torch.equal(step.latents, latents)
        step.latents.zero_()
    with pytest.raises(UsageError, match="ended by another denoise"):
        next(first)


def test_loading_and_running_leave_denormal_numbers_of_the_caller_alone(
    tiny_engine_sets: Any,
) -> None:
    smallest = torch.tensor(1e-40)
    assert float(smallest * 0.5) > 0, "this thread flushed denormal numbers before"
    call = make_call("flux-kontext", **GRIDS)
    session = ditrim.EditSession(tiny_engine_sets("flux-kontext"), device="cpu")
    list(session.denoise(**arguments_of("flux-kontext", call, [1.0])))
    assert float(smallest * 0.5) > 0
