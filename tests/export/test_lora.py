"""LoRAs: read in every key style that is published, merged as diffusers merges them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from complete_pipelines import FAMILIES
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from lora_files import STYLES, layers_of, original_flux_layers, random_lora, write_lora
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, tiny_transformer
from torch import Tensor

from ditrim.export.lora import LoraChoice, find_lora, read_merge
from ditrim.plugins.errors import CheckpointError

_PARTS = {
    *("vae", "text_encoder", "tokenizer", "processor"),
    *("text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"),
}


def bare_pipeline(family: str, transformer: Any) -> Any:
    """The family's pipeline around a transformer, with nothing else in it."""
    kind = FAMILIES[family]
    absent = dict.fromkeys(_PARTS & set(inspect.signature(kind.__init__).parameters))
    return kind(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **absent)


def fused(family: str, transformer: Any, loras: list[tuple[Path, float]]) -> dict[str, Tensor]:
    """The weights that diffusers makes, one LoRA after the other."""
    pipe = bare_pipeline(family, transformer)
    for path, scale in loras:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    weights: dict[str, Tensor] = pipe.transformer.state_dict()
    return weights


def merged(transformer: Any, loras: list[tuple[Path, float]]) -> dict[str, Tensor]:
    weights = {name: value.clone() for name, value in transformer.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    architecture = "flux" if isinstance(transformer, FluxTransformer2DModel) else "qwen"
    merge = read_merge(loras, shapes, architecture)
    return {name: merge.apply(name, value) for name, value in weights.items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("style", STYLES)
def test_each_key_style_gives_the_weights_that_diffusers_fuses(style: str, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit-plus")
    path = write_lora(tmp_path / "lora.safetensors", random_lora(layers_of(transformer)), style)
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    ours = merged(transformer, [(path, 0.7)])
    assert largest_difference(ours, base) > 0.05
    assert largest_difference(ours, fused("qwen-edit-plus", transformer, [(path, 0.7)])) < 1e-6


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_several_loras_are_merged_in_order_in_every_family(family: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    layers = layers_of(transformer)
    some = dict(list(layers.items())[::3])
    first = write_lora(tmp_path / "first.safetensors", random_lora(layers, seed=1), "diffusers")
    second = write_lora(tmp_path / "second.safetensors", random_lora(some, rank=9), "diffusers")
    loras = [(first, 0.8), (second, -1.5)]
    ours = merged(transformer, loras)
    assert largest_difference(ours, fused(family, transformer, loras)) < 1e-6


@pytest.mark.parametrize("style", ["kohya", "comfy", "comfy-down-up"])
def test_original_flux_names_mean_the_layers_that_became_of_them(
    style: str, tmp_path: Path
) -> None:
    transformer = tiny_transformer("flux-kontext")
    layers = original_flux_layers(transformer)
    path = write_lora(tmp_path / "lora.safetensors", random_lora(layers), style, alpha=2.0)
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    ours = merged(transformer, [(path, 1.0)])
    lora = random_lora(layers)
    for number in range(2):
        down, up = lora[f"double_blocks.{number}.txt_attn.qkv"]
        change = up @ down * (1.0 if style == "comfy" else 2.0 / down.shape[0])
        parts = change.chunk(3)
        for name, part in zip(("add_q_proj", "add_k_proj", "add_v_proj"), parts, strict=True):
            weight = f"transformer_blocks.{number}.attn.{name}.weight"
            torch.testing.assert_close(ours[weight], base[weight] + part)
    touched = {name for name in base if not torch.equal(base[name], ours[name])}
    assert touched == {f"{path}.weight" for path in layers_of(transformer)}


@pytest.mark.slow
def test_original_flux_names_of_the_released_width_give_what_diffusers_fuses(
    tmp_path: Path,
) -> None:
    # diffusers' converter knows no other width.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=True,
        )
    layers = original_flux_layers(transformer)
    path = write_lora(tmp_path / "lora.safetensors", random_lora(layers), "kohya")
    ours = merged(transformer, [(path, 0.9)])
    assert largest_difference(ours, fused("flux-kontext", transformer, [(path, 0.9)])) < 1e-5


def test_alpha_in_the_adapters_metadata_counts(tmp_path: Path) -> None:
    from peft import LoraConfig

    transformer = tiny_transformer("qwen-edit")
    pipe = bare_pipeline("qwen-edit", transformer)
    config = LoraConfig(
        r=4,
        lora_alpha=24,
        target_modules=["to_q", "to_v"],
        alpha_pattern={"attn.to_v": 2, "to_v": 16},
        init_lora_weights=False,
    )
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    pipe.transformer.add_adapter(config, adapter_name="default")
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    shapes = {name: tuple(value.shape) for name, value in base.items()}
    merge = read_merge([(find_lora(str(tmp_path)), 1.0)], shapes, "qwen")
    ours = {name: merge.apply(name, value) for name, value in base.items()}
    assert largest_difference(ours, pipe.transformer.state_dict()) < 1e-6


def test_a_folder_of_peft_is_read_with_its_settings(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    transformer = tiny_transformer("qwen-edit")
    base = {name: value.clone() for name, value in transformer.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["to_k"], init_lora_weights=False
    )
    wrapped = get_peft_model(transformer, config)
    wrapped.save_pretrained(tmp_path)
    expected = wrapped.merge_and_unload().state_dict()
    shapes = {name: tuple(value.shape) for name, value in base.items()}
    merge = read_merge([(find_lora(str(tmp_path)), 1.0)], shapes, "qwen")
    ours = {name: merge.apply(name, value) for name, value in base.items()}
    assert largest_difference(ours, expected) < 1e-6


def changed(path: Path, change: Any) -> Path:
    """A file whose tensors are changed."""
    tensors = load_file(path)
    change(tensors)
    made = path.with_name("changed.safetensors")
    save_file(tensors, made)
    return made


REFUSED = {
    "DoRA": lambda t: t.update({"transformer_blocks.0.attn.to_q.dora_scale": torch.ones(48)}),
    "LoKr": lambda t: t.update({"transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(4, 4)}),
    "LoHa": lambda t: t.update({"transformer_blocks.0.attn.to_q.hada_w1_a": torch.ones(4, 4)}),
    "match nothing.*blocks.9": lambda t: t.update(
        {"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(4, 48)}
    ),
    "text encoder": lambda t: t.update({"text_encoder.q.lora_A.weight": torch.ones(4, 4)}),
    "one half": lambda t: t.pop("transformer.transformer_blocks.0.attn.to_q.lora_B.weight"),
    "does not make a change of": lambda t: t.update(
        {"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(40, 4)}
    ),
    "no finite numbers": lambda t: t[
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    ].fill_(float("nan")),
    "holds no LoRA": lambda t: t.clear(),
    "twice: it is lora_unet_": lambda t: t.update(
        {"lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(48, 4)}
    ),
    "alpha of the shape": lambda t: t.update(
        {"transformer_blocks.0.attn.to_q.alpha": torch.ones(2)}
    ),
    r"\[48, 0\].* does not make": lambda t: t.update(
        {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(0, 48),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(48, 0),
        }
    ),
    r"\[\] with": lambda t: t.update(
        {"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.tensor(1.0)}
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(what: str, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=1)
    lora = random_lora(layers_of(transformer))
    path = write_lora(tmp_path / "lora.safetensors", lora, "diffusers")
    with pytest.raises(CheckpointError, match=what):
        merged(transformer, [(changed(path, REFUSED[what]), 1.0)])


def test_weights_named_in_both_of_fluxs_ways_are_refused(tmp_path: Path) -> None:
    transformer = tiny_transformer("flux-kontext")
    both = layers_of(transformer) | original_flux_layers(transformer)
    path = write_lora(tmp_path / "lora.safetensors", random_lora(both), "comfy")
    with pytest.raises(CheckpointError, match=r"(twice: it is|changes \S+ twice, as)"):
        merged(transformer, [(path, 1.0)])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "base_model.model.transformer."])
def test_every_prefix_is_read(prefix: str, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=1)
    lora = random_lora(layers_of(transformer))
    path = write_lora(tmp_path / "lora.safetensors", lora, "diffusers")
    other = tmp_path / "other.safetensors"
    save_file({k.replace("transformer.", prefix, 1): v for k, v in load_file(path).items()}, other)
    assert (
        largest_difference(merged(transformer, [(path, 1.0)]), merged(transformer, [(other, 1.0)]))
        == 0
    )


def test_a_lora_in_float8_is_merged(tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=1)
    path = write_lora(tmp_path / "a.safetensors", random_lora(layers_of(transformer)), "diffusers")
    small = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(path).items()}
    save_file(small, tmp_path / "b.safetensors")
    save_file({name: value.float() for name, value in small.items()}, tmp_path / "c.safetensors")
    found = merged(transformer, [(tmp_path / "b.safetensors", 1.0)])
    assert largest_difference(found, merged(transformer, [(tmp_path / "c.safetensors", 1.0)])) == 0


DAMAGED = (
    "[1]",
    '{"alpha_pattern": [1]}',
    '{"alpha_pattern": {"(": 1}}',
    '{"lora_alpha": "x"}',
    '{"lora_alpha": 1' + "0" * 400 + "}",
    "{",
)


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_settings_are_named(text: str, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=1)
    lora = random_lora(layers_of(transformer))
    path = write_lora(tmp_path / "adapter_model.safetensors", lora, "diffusers")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"settings are damaged|which is no number"):
        merged(transformer, [(path, 1.0)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LOHA"}', "is LOHA by its settings"),
        ('{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}', "changed the base weights"),
        ('{"peft_type": "LORA", "init_lora_weights": "olora"}', "changed the base weights"),
        ('{"use_dora": true}', "is DoRA by its settings"),
    ],
)
def test_settings_of_what_is_no_plain_lora_are_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    transformer = tiny_transformer("qwen-edit", num_layers=1)
    lora = random_lora(layers_of(transformer))
    path = write_lora(tmp_path / "adapter_model.safetensors", lora, "diffusers")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        merged(transformer, [(path, 1.0)])


def test_a_scale_is_told_from_a_file_with_a_colon(tmp_path: Path) -> None:
    named = tmp_path / "a:0.5"
    named.write_bytes(b"")
    assert LoraChoice.parse(str(named)) == LoraChoice(location=str(named))
    assert LoraChoice.parse("me/style:0.125") == LoraChoice(location="me/style", scale=0.125)
    assert LoraChoice.parse("C:style") == LoraChoice(location="C:style")
    for text in ("x:0", "x:nan", "x:1e9", "", ":1"):
        with pytest.raises(CheckpointError, match="--lora"):
            LoraChoice.parse(text)


def test_files_that_are_no_loras_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        find_lora(str(tmp_path / "lora.bin"))
    with pytest.raises(CheckpointError, match="holds 0 safetensors files"):
        find_lora(str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a file or folder"):
        find_lora("nothing-of-the-kind")
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(json.dumps(name).encode())
    with pytest.raises(CheckpointError, match=r"holds 2 safetensors files \(one"):
        find_lora(str(tmp_path))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        merged(tiny_transformer("qwen-edit", num_layers=1), [(tmp_path / "one.safetensors", 1.0)])


def test_a_lora_is_taken_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--styles"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "two.safetensors").write_bytes(b"")
    assert find_lora("me/styles/two.safetensors") == snapshot / "two.safetensors"
    # What the cache happens to hold is not what a repository holds.
    with pytest.raises(
        CheckpointError,
        match=r"cannot be reached; go online, or pass a downloaded copy: --lora <file>",
    ):
        find_lora("me/styles")
    (snapshot / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert find_lora("me/styles") == snapshot / "pytorch_lora_weights.safetensors"
    with pytest.raises(CheckpointError, match=r"not in the local cache .* --lora <file>"):
        find_lora("me/nothing")
    for location in ("loras/style.safetensors", "~nobody/x", "me/styles/two", "x" * 300):
        with pytest.raises(CheckpointError, match="neither a file or folder"):
            find_lora(location)
    assert LoraChoice.parse("~nobody/x:1").location == "~nobody/x"
