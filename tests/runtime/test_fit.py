"""What a pipeline has beyond the engine set's weights is refused before the set stands in for it;
what pipelines do with a transformer afterwards works, or says why not."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import layers_of, random_lora, write_lora
from tiny import FAMILY_NAMES, make_call, tiny_transformer
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim.runtime as ditrim
from ditrim.commands.build_engine import main as build_engine
from ditrim.engines.build import build
from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.load import load_engines
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.plugins.errors import CheckpointError, UsageError
from ditrim.runtime.fit import check_transformer


@pytest.fixture(scope="module")
def loaded(tiny_engine_sets: Any) -> Any:
    made: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in made:
            made[family] = load_engines(tiny_engine_sets(family), device="cpu")
        return made[family]

    return load


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    arguments = copy.deepcopy(arguments)
    with small_pictures(64), torch.no_grad():
        return pipe(**arguments).images  # type: ignore[no-any-return]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def lora_file(folder: Path, family: str = "qwen-edit", **options: Any) -> Path:
    lora = random_lora(layers_of(tiny_transformer(family)), **options)
    return write_lora(folder / "style.safetensors", lora, "diffusers")


def with_lora(pipe: Any, path: Path) -> Any:
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="style")
    return pipe


# --- weights and adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_active_lora_is_refused_with_the_command_that_merges_it(
    family: str, loaded: Any, tmp_path: Path
) -> None:
    pipe = with_lora(tiny_pipeline(family), lora_file(tmp_path, family))
    with pytest.raises(UsageError, match=r"active adapter style.*--lora FILE:SCALE"):
        ditrim.attach(pipe, loaded(family))
    pipe.disable_lora()
    with ditrim.attach(pipe, loaded(family)):
        pass
    pipe.unload_lora_weights()
    with ditrim.attach(pipe, loaded(family)):
        pass


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_a_fused_lora_is_refused_and_names_a_tensor(
    family: str, loaded: Any, tmp_path: Path
) -> None:
    pipe = with_lora(tiny_pipeline(family), lora_file(tmp_path, family, strength=0.01))
    pipe.fuse_lora()
    with pytest.raises(UsageError, match=r"transformer_blocks\.\d+\.\S+\.weight and \d+ more"):
        ditrim.attach(pipe, loaded(family))
    pipe.unload_lora_weights()
    with pytest.raises(UsageError, match=r"a fine-tune, or a fused LoRA"):
        ditrim.attach(pipe, loaded(family))
    with ditrim.attach(pipe, loaded(family), check_weights=False):
        pass


def test_one_tensor_of_a_fine_tune_is_found(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    pipe.transformer.transformer_blocks[2].txt_mlp.net[2].weight.data *= 1.01
    with pytest.raises(UsageError, match=r"transformer_blocks\.2\.txt_mlp\.net\.2\.weight differ"):
        ditrim.attach(pipe, loaded("qwen-edit"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_accepted(dtype: torch.dtype, loaded: Any) -> None:
    pipe = tiny_pipeline("flux-kontext")
    pipe.transformer.to(dtype)
    with ditrim.attach(pipe, loaded("flux-kontext")) as attachment:
        assert attachment.transformer.dtype == dtype


def test_only_samples_of_the_weights_are_read(loaded: Any, monkeypatch: Any) -> None:
    from ditrim.engines.sets import fingerprints
    from ditrim.runtime import fit

    read: list[int] = []

    def count(tensor: Any) -> Any:
        samples = fingerprints.samples_of(tensor)
        read.append(samples.size)
        return samples

    monkeypatch.setattr(fit, "samples_of", count)
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit")):
        assert len(read) == len(tiny_transformer("qwen-edit").state_dict())
        assert max(read) <= fingerprints.NUM_SAMPLES


def test_a_set_of_a_merged_lora_runs_as_the_pipeline_that_loaded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "qwen-edit-plus"
    tiny_transformer(family).save_pretrained(tmp_path / "checkpoint")
    path = lora_file(tmp_path, family)
    arguments = [
        *("--model", family, "--weights", str(tmp_path / "checkpoint")),
        *("--output", str(tmp_path / "set"), "--lora", f"{path}:0.8"),
        *("--max-reference-tokens", "64", "--max-noisy-tokens", "64", "--max-text-tokens", "32"),
    ]
    assert build_engine(arguments) == 0
    manifest = load_engine_set(tmp_path / "set").manifest
    (lora,) = manifest.source["loras"]
    assert (lora["file"], lora["scale"]) == (str(path), 0.8)
    assert len(manifest.merged_weights) == len(layers_of(tiny_transformer(family)))
    engines = load_engines(tmp_path / "set", device="cpu")
    call = request(family, num_references=2)

    pipe = tiny_pipeline(family)
    base = run(pipe, call)
    with ditrim.attach(pipe, engines, ditrim.FullContext()):
        merged = run(pipe, call)  # what the set was built from: its LoRAs come with it
    with_lora(pipe, path).set_adapters(["style"], [0.8])
    expected = run(pipe, call)
    assert difference(expected, base) > 1e-2
    assert difference(merged, expected) < 1e-4
    with ditrim.attach(pipe, engines, ditrim.FullContext()):
        assert difference(run(pipe, call), expected) < 1e-4
    pipe.set_adapters(["style"], [0.5])
    with pytest.raises(UsageError, match="come out differently"):
        ditrim.attach(pipe, engines)
    pipe.set_adapters(["style"], [0.8])
    pipe.fuse_lora()
    with ditrim.attach(pipe, engines, ditrim.FullContext()):
        assert difference(run(pipe, call), expected) < 1e-4
    pipe.unload_lora_weights()
    with ditrim.attach(pipe, engines):
        pass
    # The same command with another scale is another set, and the set's own command makes it again.
    assert "--lora" in manifest.command
    asked: list[str] = []

    def note_identity(task: Any, folder: Path, progress: Any) -> Any:
        asked.append(task.identity)
        raise UsageError("enough is known")

    monkeypatch.setattr(build, "write_graphs", note_identity)
    assert build_engine([*arguments[:-7], f"{path}:0.5", *arguments[-6:]]) == UsageError.exit_code
    assert asked != [manifest.identity]
    assert len(asked) == 1


def test_random_weights_take_loras_too(tmp_path: Path) -> None:
    config = {
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "axes_dims_rope": [4, 6, 6],
        "in_channels": 16,
        "out_channels": 4,
    }
    layers = layers_of(tiny_transformer("qwen-edit", num_layers=3))
    path = write_lora(tmp_path / "style.safetensors", random_lora(layers), "lightning")
    options = BuildOptions(
        model="qwen-edit",
        weights="random",
        config=config,
        lora=(str(path),),
        max_reference_tokens=64,
        max_noisy_tokens=64,
        max_text_tokens=32,
        output=str(tmp_path / "set"),
    )
    manifest = build_engine_set(options).manifest
    assert set(manifest.merged_weights) == {f"{layer}.weight" for layer in layers}
    assert all(manifest.weights[name] != text for name, text in manifest.merged_weights.items())


def test_a_checkpoint_with_a_fused_lora_that_was_not_unloaded_names_the_remedy(
    tmp_path: Path,
) -> None:
    pipe = with_lora(tiny_pipeline("qwen-edit"), lora_file(tmp_path))
    pipe.fuse_lora()
    pipe.transformer.save_pretrained(tmp_path / "checkpoint")
    options = BuildOptions(
        model="qwen-edit", weights=str(tmp_path / "checkpoint"), output=str(tmp_path / "set")
    )
    with pytest.raises(CheckpointError, match=r"unload_lora_weights\(\) and save it again"):
        build_engine_set(options)


# --- caches, hooks and wrappers -------------------------------------------------------------------


def test_a_cache_of_diffusers_on_the_transformer_is_refused(loaded: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = tiny_pipeline("qwen-edit")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(UsageError, match=r"disable it first .*cache=ditrim\.StepCache"):
        ditrim.attach(pipe, loaded("qwen-edit"))
    pipe.transformer.disable_cache()
    with ditrim.attach(pipe, loaded("qwen-edit")):
        pass


def replace_forward(transformer: Any) -> None:
    transformer.forward = lambda *args, **kwargs: None


def hook_block(transformer: Any) -> None:
    transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)


def hook_before(transformer: Any) -> None:
    transformer.register_forward_pre_hook(lambda *_: None)


def replace_in_block(transformer: Any) -> None:
    transformer.transformer_blocks[1].forward = lambda *args, **kwargs: None


@pytest.mark.parametrize("change", [replace_forward, hook_block, hook_before, replace_in_block])
def test_calls_that_are_not_the_models_own_are_refused(change: Any, loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    change(pipe.transformer)
    with pytest.raises(UsageError, match=r"forward of .* was replaced, or has hooks"):
        ditrim.attach(pipe, loaded("qwen-edit"))


def test_a_patched_class_is_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("qwen-edit")
    kind = type(pipe.transformer)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    with pytest.raises(UsageError, match=r"forward of the transformer was replaced"):
        ditrim.attach(pipe, loaded("qwen-edit"))


def test_zeros_are_not_taken_for_small_values(tmp_path: Path) -> None:
    pipe = tiny_pipeline("qwen-edit")
    bias = pipe.transformer.transformer_blocks[0].img_mod[1].bias
    bias.data *= 1e-4
    pipe.transformer.save_pretrained(folder := tmp_path / "checkpoint")
    options = BuildOptions(
        model="qwen-edit", weights=str(folder), graph_only=True, output=str(tmp_path / "set")
    )
    engine_set = build_engine_set(options)
    bias.data.zero_()
    with pytest.raises(UsageError, match=r"img_mod\.1\.bias differ"):
        check_transformer(pipe.transformer, engine_set)


def test_a_compiled_transformer_is_taken_for_what_it_wraps(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    plain = run(pipe, request("qwen-edit"))
    pipe.transformer = torch.compile(pipe.transformer)
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.FullContext()):
        assert difference(run(pipe, request("qwen-edit")), plain) < 1e-4
    assert hasattr(pipe.transformer, "_orig_mod")


def test_a_transformer_in_peft_is_refused_for_its_adapter(loaded: Any) -> None:
    from peft import LoraConfig, get_peft_model

    pipe = tiny_pipeline("qwen-edit")
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer = get_peft_model(pipe.transformer, config)
    with pytest.raises(UsageError, match=r"active adapter default"):
        ditrim.attach(pipe, loaded("qwen-edit"))


@pytest.mark.parametrize("moment", ["before", "while attached"])
def test_model_cpu_offload_works(moment: str, loaded: Any) -> None:
    plain = run(tiny_pipeline("qwen-edit"), request("qwen-edit"))
    pipe = tiny_pipeline("qwen-edit")
    if moment == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.FullContext()):
        if moment != "before":
            pipe.enable_model_cpu_offload(device="cpu")
        assert difference(run(pipe, request("qwen-edit")), plain) < 1e-4
    assert difference(run(pipe, request("qwen-edit")), plain) == 0


def test_what_cannot_work_while_attached_says_why_and_what_works_works(
    loaded: Any, tmp_path: Path
) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe, path = tiny_pipeline("qwen-edit"), lora_file(tmp_path)
    count = pipe.transformer.num_parameters()
    with ditrim.attach(pipe, loaded("qwen-edit")):
        for act, remedy in (
            (lambda: pipe.load_lora_weights(str(path.parent), weight_name=path.name), "--lora"),
            (lambda: pipe.fuse_lora(), "--lora"),
            (lambda: pipe.unload_lora_weights(), "--lora"),
            (lambda: pipe.disable_lora(), "--lora"),
            (lambda: pipe.transformer.set_attention_backend("native"), "leave the call out"),
            (lambda: pipe.transformer.enable_cache(FirstBlockCacheConfig()), "StepCache"),
            (lambda: pipe.transformer.fuse_qkv_projections(), "leave the call out"),
            (lambda: pipe.transformer.compile(), "compiled already"),
            (lambda: pipe.transformer.state_dict(), "detach first"),
            (lambda: pipe.transformer.save_pretrained(tmp_path), "detach first"),
            (lambda: pipe.transformer.enable_group_offload(torch.device("cpu")), "leave the call"),
            (lambda: pickle.dumps(pipe.transformer), "folder"),
            (lambda: pickle.dumps(pipe), "detach"),
        ):
            with pytest.raises((UsageError, ValueError), match=remedy):
                act()
        transformer = pipe.transformer
        assert transformer.num_parameters() == count
        assert transformer.num_parameters(only_trainable=True) == 0
        assert transformer.config.num_layers == 4
        assert transformer.device.type == "cpu"
        assert pipe.to(torch.float32) is pipe
        assert transformer.to(torch.bfloat16).dtype == torch.bfloat16
        assert isinstance(pipe.components["transformer"], type(transformer))


def test_methods_about_adapters_that_reach_no_transformer_are_refused_too(loaded: Any) -> None:
    pipe = tiny_pipeline("flux-kontext")
    with ditrim.attach(pipe, loaded("flux-kontext")):
        for act, remedy in (
            (lambda: pipe.set_adapters("style"), r"pipe\.set_adapters\(\).*--lora"),
            (lambda: pipe.unfuse_lora(), "--lora"),
            (lambda: pipe.set_lora_device(["style"], "cpu"), "--lora"),
            (lambda: pipe.load_ip_adapter("any"), "without an engine set"),
            (lambda: pipe.set_ip_adapter_scale(0.5), "without an engine set"),
        ):
            with pytest.raises(UsageError, match=remedy):
                act()
        assert pipe.get_list_adapters() == {}
    assert pipe.get_active_adapters() == []
    pipe.unfuse_lora()


def test_a_transformer_put_in_while_a_set_is_attached_is_refused(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit")) as attachment:
        own = pipe.transformer
        for other in (tiny_transformer("qwen-edit", seed=3), None):
            pipe.transformer = other
            with pytest.raises(UsageError, match=r"exchanged while an engine set is attached"):
                run(pipe, request("qwen-edit"))
            with pytest.raises(UsageError, match=r"exchanged while an engine set is attached"):
                attachment.request()
        pipe.transformer = own
        run(pipe, request("qwen-edit"))
        assert len(attachment.report.steps) == 4


# --- schedulers -----------------------------------------------------------------------------------


def test_copies_of_the_scheduler_are_plain_schedulers(loaded: Any) -> None:
    pipe, other = tiny_pipeline("qwen-edit"), tiny_pipeline("qwen-edit")
    call = request("qwen-edit")
    plain = run(other, call)
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.TokenDrop()):
        run(pipe, call)
        for made in (
            copy.deepcopy(pipe.scheduler),
            copy.copy(pipe.scheduler),
            type(pipe.scheduler).from_config(pipe.scheduler.config),
        ):
            other.scheduler = made
            assert torch.equal(run(other, call), plain)
            pipe.scheduler = made
            run(pipe, call)

    def keep(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        copies.append(copy.deepcopy(pipe.scheduler))
        copies.append(type(pipe.scheduler).from_config(pipe.scheduler.config))
        return {}

    copies: list[Any] = []
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.TokenDrop()):
        run(pipe, {**call, "callback_on_step_end": keep})
    assert {type(made) for made in copies} == {type(other.scheduler)}
    for made in (copies[0], copies[1]):
        other.scheduler = made
        assert torch.equal(run(other, call), plain)


def test_a_scheduler_put_in_while_attached_is_watched_like_the_first(loaded: Any) -> None:
    call = request("qwen-edit", side=64, steps=6)
    policy = ditrim.TokenDrop(omega=-0.5, full_steps=2, num_bins=8, dense_if_non_local=False)
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit"), policy) as attachment:
        expected = run(pipe, call)
        roles = [step.role for step in attachment.report.steps]
        assert "reduced" in roles
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert torch.equal(run(pipe, call), expected)
        assert [step.role for step in attachment.report.steps] == roles


def test_a_scheduler_that_a_policy_cannot_work_with_is_refused(loaded: Any) -> None:
    from diffusers import UniPCMultistepScheduler

    def uni_pc() -> Any:
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )

    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.TokenDrop()):
        pipe.scheduler = uni_pc()
        with pytest.raises(UsageError, match=r"TokenDrop acts on the scheduler.s steps"):
            run(pipe, request("qwen-edit"))
    with pytest.raises(UsageError, match=r"the pipeline has a UniPCMultistepScheduler"):
        ditrim.attach(pipe, loaded("qwen-edit"), ditrim.Auto())
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi()):
        pass


# --- calls from elsewhere -------------------------------------------------------------------------


def test_a_pipeline_of_the_same_components_is_refused_unless_calls_stand_alone(
    loaded: Any,
) -> None:
    pipe = tiny_pipeline("qwen-edit")
    plain = run(pipe, request("qwen-edit", seed=6))
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi(tau=0.2)):
        other = type(pipe).__mro__[2](**pipe.components)
        with pytest.raises(UsageError, match=r"from outside the attached pipeline"):
            run(other, request("qwen-edit", seed=6))
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.FullContext()):
        other = type(pipe).__mro__[2](**pipe.components)
        for _ in range(2):
            assert difference(run(other, request("qwen-edit", seed=6)), plain) < 1e-4


def own_loop(pipe: Any, scheduler: Any, steps: int) -> torch.Tensor:
    """A loop over transformer and scheduler, as an application may have its own."""
    call = make_call("qwen-edit")
    latents = call.kwargs["hidden_states"][:, : call.num_noisy]
    references = call.kwargs["hidden_states"][:, call.num_noisy :]
    scheduler.set_timesteps(steps, mu=1.0)
    for t in scheduler.timesteps:
        kwargs = call.kwargs | {
            "hidden_states": torch.cat([latents, references], dim=1),
            "timestep": t.expand(1) / 1000,
        }
        with torch.no_grad():
            velocity = pipe.transformer(**kwargs)[0][:, : call.num_noisy]
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def test_a_loop_of_ones_own_is_a_request(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.ToPi(interval=3)) as attachment:
        before = pipe.scheduler
        with attachment.request():
            inside = own_loop(pipe, pipe.scheduler, 6)
        roles = [step.role for step in attachment.report.steps]
        assert roles == ["anchor", "reduced", "reduced"] * 2
        with attachment.request():  # this one tells nothing of its steps; timesteps do
            assert torch.equal(own_loop(pipe, before, 6), inside)
        assert [step.role for step in attachment.report.steps] == roles
    with ditrim.attach(pipe, loaded("qwen-edit"), ditrim.TokenDrop()) as attachment:
        before = pipe.scheduler
        with (
            attachment.request(),
            pytest.raises(UsageError, match=r"take the scheduler from the attached"),
        ):
            own_loop(pipe, before, 6)


def test_requests_in_generators_end_wherever_they_are_closed(loaded: Any) -> None:
    pipe = tiny_pipeline("qwen-edit")
    with ditrim.attach(pipe, loaded("qwen-edit")) as attachment:

        def steps() -> Iterator[int]:
            with attachment.request():
                yield 1
                yield 2

        first = steps()
        contextvars.copy_context().run(next, first)  # as a server does, a context a step
        contextvars.copy_context().run(next, first)
        first.close()
        second, third = steps(), steps()
        next(second)
        with pytest.raises(UsageError, match=r"inside a request of this attachment already"):
            next(third)
        second.close()
        assert attachment.transformer.opened_request() is None


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [ditrim.ToPi(interval=3), ditrim.TokenDrop(), ditrim.FullContext()]
)
def test_light_copies_of_one_attached_pipeline_serve_threads_exactly(
    policy: Any, loaded: Any
) -> None:
    family = "qwen-edit-plus"
    pipe = tiny_pipeline(family)
    calls = [
        request(family, seed=seed, steps=4 + seed, num_references=1 + seed % 2, guided=seed % 2 > 0)
        for seed in range(4)
    ]
    start = threading.Barrier(4)

    def work(index: int) -> list[tuple[torch.Tensor, int]]:
        light = copy.copy(pipe)
        light.scheduler = copy.deepcopy(pipe.scheduler)
        start.wait()
        made = []
        with torch.no_grad():
            for _ in range(3):
                image = light(**copy.deepcopy(calls[index])).images
                made.append((image, len(attachment.report.steps)))
        return made

    with small_pictures(64), ditrim.attach(pipe, loaded(family), policy) as attachment:
        expected = [pipe(**copy.deepcopy(call)).images for call in calls]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
    for index, made in enumerate(results):
        calls_made = (4 + index) * (1 + (index % 2 > 0))
        for image, num_records in made:
            assert torch.equal(image, expected[index])
            assert num_records == calls_made
