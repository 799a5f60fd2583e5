"""The drop-in in diffusers' own pipelines, against the same pipelines untouched."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_1 import kept_tokens
from tiny import FAMILY_NAMES
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim.runtime as ditrim
from ditrim.engines.load import load_engines
from ditrim.plugins.errors import LadderError, UsageError

LOADED: dict[str, Any] = {}


@pytest.fixture
def loaded(tiny_engine_sets: Any) -> Any:
    """Loaded engines of a family, made once."""

    def load(family: str) -> Any:
        if family not in LOADED:
            LOADED[family] = load_engines(tiny_engine_sets(family), device="cpu")
        return LOADED[family]

    return load


def run(pipe: Any, arguments: dict[str, Any], reference_side: int = 64) -> torch.Tensor:
    arguments = copy.deepcopy(arguments)
    with small_pictures(reference_side), torch.no_grad():
        return pipe(**arguments).images  # type: ignore[no-any-return]


def variants(family: str) -> list[dict[str, Any]]:
    """Call signatures that the family's pipeline takes."""
    several = {"num_images_per_prompt": 2}
    shapes: list[dict[str, Any]] = [{}, {"guided": True}, {"side": 64, "num_text": 9}]
    if family != "qwen-edit" and family != "flux-kontext":
        shapes += [{"num_references": 2, "guided": True}]
        return [*shapes, {"num_references": 2, "_extra": several}]
    shapes += [{"batch": 2, "guided": True}]
    if family == "qwen-edit":
        shapes += [{"batch": 2, "short_prompts": True, "_extra": several}]
    return shapes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_context_gives_the_pipelines_own_latents(family: str, loaded: Any) -> None:
    pipe = tiny_pipeline(family)
    for index, variant in enumerate(variants(family)):
        variant = dict(variant)
        extra = variant.pop("_extra", {})
        arguments = request(family, seed=index, **variant) | extra
        expected = run(pipe, arguments)
        with ditrim.attach(pipe, loaded(family), ditrim.FullContext()) as engine:
            found = run(pipe, arguments)
            branches = 2 if variant.get("guided") else 1
            assert len(engine.report.steps) == 4 * branches
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, (variant, error)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tau_one_equals_full_context_at_every_step(family: str, loaded: Any) -> None:
    pipe = tiny_pipeline(family)
    latents: dict[str, list[torch.Tensor]] = {}
    for name, policy in (
        ("full", ditrim.FullContext()),
        ("topi", ditrim.ToPi(tau=1.0, interval=3)),
    ):
        latents[name] = []

        def keep(_: Any, step: int, t: Any, values: dict[str, Any], name: str = name) -> Any:
            latents[name].append(values["latents"].clone())
            return values

        with ditrim.attach(pipe, loaded(family), policy) as engine:
            run(pipe, request(family, steps=7, guided=True) | {"callback_on_step_end": keep})
    roles = [record.role for record in engine.report.steps if record.branch == "cond"]
    assert roles == ["anchor", "reduced", "reduced"] * 2 + ["anchor"]
    assert len(latents["full"]) == 7
    for full, topi in zip(latents["full"], latents["topi"], strict=True):
        assert float((full - topi).abs().max() / full.abs().max()) <= 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_guidance_branches_keep_their_own_tokens(family: str, loaded: Any) -> None:
    pipe = tiny_pipeline(family)
    with ditrim.attach(pipe, loaded(family), ditrim.ToPi(tau=0.83, interval=2)) as engine:
        run(pipe, request(family, guided=True), reference_side=128)
        records = engine.report.steps
    assert [record.branch for record in records] == ["cond", "uncond"] * 4
    assert [record.role for record in records] == (["anchor"] * 2 + ["reduced"] * 2) * 2
    anchors = [r.kept_indices for r in records if r.role == "anchor"]
    reduced = [r for r in records if r.role == "reduced"]
    assert all(kept is not None for kept in anchors)
    # Two prompts rank alike on random weights, but not at both anchors to the last token.
    assert any(not torch.equal(anchors[i], anchors[i + 1]) for i in (0, 2))  # type: ignore[arg-type]
    for kept, record in zip(anchors, reduced, strict=True):
        assert record.num_kept == kept.shape[1] < record.num_reference  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_detach_restores_the_pipeline_exactly(family: str, loaded: Any) -> None:
    pipe = tiny_pipeline(family)
    transformer, config = pipe.transformer, dict(pipe.config)
    arguments = request(family)
    expected = run(pipe, arguments)
    attachment = ditrim.attach(pipe, loaded(family))
    assert pipe.transformer is not transformer
    attachment.detach()
    attachment.detach()
    assert pipe.transformer is transformer
    assert dict(pipe.config) == config
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(run(pipe, arguments), expected)


def test_saving_is_refused_while_attached_and_whole_afterwards(loaded: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline("qwen-edit")
    with (
        ditrim.attach(pipe, loaded("qwen-edit")),
        pytest.raises(UsageError, match="cannot be saved with it; detach it first"),
    ):
        pipe.save_pretrained(tmp_path / "attached")
    assert not (tmp_path / "attached").exists()
    assert "save_pretrained" not in vars(pipe)
    pipe.save_pretrained(tmp_path / "detached")
    index = json.loads((tmp_path / "detached" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert (tmp_path / "detached" / "transformer" / "config.json").is_file()


def test_an_error_inside_the_block_restores_the_pipeline(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    transformer = pipe.transformer

    def fail(*_: Any) -> None:
        raise RuntimeError("from a callback")

    arguments = request("qwen-edit") | {"callback_on_step_end": fail}
    with (
        pytest.raises(RuntimeError, match="from a callback"),
        ditrim.attach(pipe, loaded("qwen-edit")),
    ):
        run(pipe, arguments)
    assert pipe.transformer is transformer


def test_back_to_back_requests_start_fresh(loaded: Any) -> None:
    """Other sizes, prompts and step counts, and a request that was broken off in the middle."""
    pipe = tiny_pipeline("qwen-edit-plus")
    engines, policy = loaded("qwen-edit-plus"), ditrim.ToPi(tau=0.6, interval=3)
    requests = [
        request("qwen-edit-plus", steps=4),
        request("qwen-edit-plus", seed=5, side=64, num_text=3, num_references=2, steps=5),
        request("qwen-edit-plus", seed=6, side=32, steps=1, guided=True),
        request("qwen-edit-plus", steps=4),
    ]
    alone = []
    for arguments in requests:
        with ditrim.attach(pipe, engines, policy):
            alone.append(run(pipe, arguments))

    def interrupt(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return values

    with ditrim.attach(pipe, engines, policy) as engine:
        for arguments, expected in zip(requests, alone, strict=True):
            run(pipe, arguments | {"callback_on_step_end": interrupt})
            assert len(engine.report.steps) <= 4
            assert torch.equal(run(pipe, arguments), expected)
            steps = arguments["num_inference_steps"] * (2 if "true_cfg_scale" in arguments else 1)
            assert len(engine.report.steps) == steps


def test_two_threads_share_loaded_engines(loaded: Any) -> None:
    engines = loaded("qwen-edit")
    arguments = [request("qwen-edit", seed=i, side=48 + 16 * i, guided=True) for i in range(2)]
    policy = ditrim.ToPi(tau=0.6, interval=2)
    expected = []
    for item in arguments:
        pipe = tiny_pipeline("qwen-edit")
        with ditrim.attach(pipe, engines, policy):
            expected.append(run(pipe, item))
    pipes = [tiny_pipeline("qwen-edit") for _ in range(2)]
    barrier = threading.Barrier(2)

    def work(index: int) -> list[torch.Tensor]:
        with ditrim.attach(pipes[index], engines, policy):
            barrier.wait(timeout=60)
            return [pipes[index](**copy.deepcopy(arguments[index])).images for _ in range(3)]

    with small_pictures(), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, index) for index in range(2)]
        for index, future in enumerate(futures):
            found = future.result()
            assert len(found) == 3
            assert all(torch.equal(images, expected[index]) for images in found)


def test_kept_tokens_are_those_of_equation_10(loaded: Any, monkeypatch: Any) -> None:
    """The anchor's scores go through the policy unchanged, and rounding keeps the next-ranked."""
    seen: list[torch.Tensor] = []
    original = ditrim.ToPi.select

    def spy(self: Any, call: Any) -> Any:
        seen.append(call.influence.clone())
        return original(self, call)

    monkeypatch.setattr(ditrim.ToPi, "select", spy)
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi(tau=0.7, interval=2)) as engine:
        run(pipe, request("qwen-edit"))
        kept = [r.kept_indices for r in engine.report.steps if r.role == "anchor"]
    assert len(seen) == len(kept) == 2
    for influence, found in zip(seen, kept, strict=True):
        assert found is not None
        assert found[0].tolist() == kept_tokens(influence[0], 0.7)


def test_a_pipeline_without_transformer_can_be_attached(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    arguments = request("qwen-edit")
    expected = run(pipe, arguments)
    pipe.transformer = None
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.FullContext()):
        found = run(pipe, arguments)
    assert pipe.transformer is None
    assert torch.allclose(found, expected, atol=1e-4)


def test_another_models_engines_are_refused(loaded: Any) -> None:
    with pytest.raises(
        UsageError, match=r"is a FluxKontextPipeline, the engine set holds a model for Q"
    ):
        ditrim.attach(tiny_pipeline("flux-kontext"), loaded("qwen-edit"))
    with pytest.raises(
        UsageError, match=r"has zero_cond_t = True, the engine set was built with False.*build-eng"
    ):
        ditrim.attach(tiny_pipeline("qwen-edit-2511"), loaded("qwen-edit-plus"))
    mixed = tiny_pipeline("qwen-edit")
    mixed.transformer = tiny_pipeline("flux-kontext").transformer
    with pytest.raises(UsageError, match="is a FluxTransformer2DModel, the engine set holds a Qw"):
        ditrim.attach(mixed, loaded("qwen-edit"))
    with pytest.raises(UsageError, match="has no transformer and scheduler"):
        ditrim.attach(object(), loaded("qwen-edit"))
    pipe = tiny_pipeline("qwen-edit")
    with (
        ditrim.attach(pipe, loaded("qwen-edit")),
        pytest.raises(UsageError, match="attached to this pipeline already"),
    ):
        ditrim.attach(pipe, loaded("qwen-edit"))


def test_lengths_beyond_the_built_ones_name_length_limit_and_command(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit-plus")
    with ditrim.attach(pipe, loaded("qwen-edit-plus")):
        too_long = request("qwen-edit-plus", num_references=8)
        with pytest.raises(
            LadderError,
            match=r"(?s)reference tokens are more than .* holds \(\d+\).*build-engine "
            r".*--max-reference-tokens \d+",
        ):
            run(pipe, too_long)
        with pytest.raises(LadderError, match=r"noisy tokens: 144 .*--max-noisy-tokens 144"):
            run(pipe, request("qwen-edit-plus", side=192))
        with pytest.raises(LadderError, match=r"text tokens: 90 .*--max-text-tokens 90"):
            run(pipe, request("qwen-edit-plus", num_text=90))
        run(pipe, request("qwen-edit-plus"))  # and it goes on working


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(loaded: Any, value: float) -> None:
    pipe = tiny_pipeline("qwen-edit")
    latents = torch.randn(1, 9, 16)
    latents[0, 3, 2] = value
    with (
        ditrim.attach(pipe, loaded("qwen-edit")),
        pytest.raises(UsageError, match="noisy_latents hold NaN or infinite values"),
    ):
        run(pipe, request("qwen-edit") | {"latents": latents})


def test_what_an_engine_cannot_apply_is_refused(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    with (
        ditrim.attach(pipe, loaded("qwen-edit")),
        pytest.raises(UsageError, match="scale was given, which a compiled engine cannot apply"),
    ):
        run(pipe, request("qwen-edit") | {"attention_kwargs": {"scale": 0.5}})


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_embeddings_in_bfloat16_are_taken(family: str, loaded: Any) -> None:
    pipe = tiny_pipeline(family)
    pipe.transformer = None
    arguments = request(family)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        if name in arguments:
            arguments[name] = arguments[name].bfloat16()
    pipe.vae.to(torch.bfloat16)
    with ditrim.attach(pipe, loaded(family), ditrim.ToPi(interval=2)) as engine:
        found = run(pipe, arguments)
        assert len(engine.report.steps) == 4
    assert bool(torch.isfinite(found.float()).all())


def test_a_scheduler_exchanged_while_attached_does_not_join_requests(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    first, second = request("qwen-edit"), request("qwen-edit", seed=9)
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi(tau=0.5)):
        expected = run(pipe, second)
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi(tau=0.5)) as engine:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        run(pipe, first)
        found = run(pipe, second)
        assert [record.role for record in engine.report.steps] == ["anchor", "reduced"] * 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize("first_off", [0, 1])
def test_pipelines_that_share_a_scheduler_are_told_apart(loaded: Any, first_off: int) -> None:
    one = tiny_pipeline("qwen-edit")
    other = type(one)(**one.components)
    other.set_progress_bar_config(disable=True)
    attachments = [ditrim.attach(pipe, loaded("qwen-edit")) for pipe in (one, other)]
    attachments[first_off].detach()
    left = (one, other)[1 - first_off]
    for _ in range(2):
        run(left, request("qwen-edit", steps=3))
        assert len(attachments[1 - first_off].report.steps) == 3
    attachments[1 - first_off].detach()
    assert not {"set_timesteps", "step"} & set(vars(one.scheduler))


def test_equal_timesteps_in_a_row_stay_one_branch(loaded: Any) -> None:
    """In bfloat16 neighbouring timesteps can be equal; FLUX names no branch."""
    pipe = tiny_pipeline("flux-kontext")
    arguments = request("flux-kontext", guided=True)
    arguments |= {"sigmas": [0.7, 0.7, 0.7, 0.2]}
    with ditrim.attach(pipe, loaded("flux-kontext"), ditrim.FullContext()) as engine:
        run(pipe, arguments)
        assert [record.branch for record in engine.report.steps] == ["cond", "uncond"] * 4


def test_batches_of_unequal_prompts_are_reduced_as_alone(loaded: Any) -> None:
    """Mask groups on reduced steps: each entry is what it is when it runs by itself."""
    pipe = tiny_pipeline("qwen-edit")
    # One kept count for all: the count of a batch is the largest, which alone may be smaller.
    policy = ditrim.ToPi(tau=0.0, interval=3, min_kept=7, max_kept=7)
    together = request("qwen-edit", batch=3, short_prompts=True)
    latents = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(5))
    with ditrim.attach(pipe, loaded("qwen-edit"), policy) as engine:
        found = run(pipe, together | {"latents": latents})
        assert [record.num_kept for record in engine.report.steps] == [16, 7, 7, 16]
        for entry in range(3):
            length = int(together["prompt_embeds_mask"][entry].sum())
            alone = together | {
                "prompt_embeds": together["prompt_embeds"][entry : entry + 1, :length],
                "prompt_embeds_mask": together["prompt_embeds_mask"][entry : entry + 1, :length],
                "latents": latents[entry : entry + 1],
            }
            expected = run(pipe, alone)[0]
            assert torch.allclose(found[entry], expected, atol=1e-4), entry


def test_another_pipelines_engines_of_equal_configuration_are_refused(loaded: Any) -> None:
    with pytest.raises(
        UsageError, match="is a QwenImageEditPlusPipeline, the engine set holds a model for QwenI"
    ):
        ditrim.attach(tiny_pipeline("qwen-edit-plus"), loaded("qwen-edit"))


def test_latents_that_turn_infinite_on_the_way_are_refused(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")

    def spoil(_: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] / (0.0 if step == 1 else 1.0)}

    arguments = request("qwen-edit") | {"callback_on_step_end": spoil}
    with (
        ditrim.attach(pipe, loaded("qwen-edit")),
        pytest.raises(UsageError, match="noisy_latents hold NaN or infinite values"),
    ):
        run(pipe, arguments)
