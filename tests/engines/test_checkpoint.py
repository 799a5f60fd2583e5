from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditrim.export.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    check_config,
    fetch_checkpoint,
    find_checkpoint,
)
from ditrim.export.family import FAMILIES, Family
from ditrim.export.transformer import load_transformer
from ditrim.plugins.errors import CheckpointError, UsageError

QWEN = FAMILIES["qwen-edit"]


@pytest.fixture
def sharded(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A transformer folder with several shards, free to be changed."""
    return Path(shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer"))


@pytest.fixture
def single(sharded: Path) -> Path:
    """A transformer folder with one file, free to be changed."""
    tensors = {}
    for path in sharded.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (sharded / INDEX_NAME).unlink()
    save_file(tensors, sharded / WEIGHTS_NAME)
    return sharded


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / WEIGHTS_NAME
    tensors: dict[str, Any] = {key: value.clone() for key, value in load_file(path).items()}
    for key, value in changes.items():
        tensors[key.replace("__", ".")] = value
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, family: Family = QWEN) -> torch.nn.Module:
    return load_transformer(family, folder, torch.float32)


def test_every_layout_loads_the_same_weights_as_diffusers(
    pipeline_folder: Path, single: Path
) -> None:
    from diffusers import QwenImageTransformer2DModel

    expected = QwenImageTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    seen: list[tuple[int, int]] = []
    models = [
        load_transformer(
            QWEN, pipeline_folder, torch.float32, on_bytes=lambda *done: seen.append(done)
        ),
        load(single),
        load(single.parent),  # looks like a pipeline folder
    ]
    assert seen[-1][0] == seen[-1][1] > 0
    for model in models:
        assert not model.training
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], value), name
            assert state[name].device.type == "cpu"


def test_weights_are_converted_to_the_dtype(single: Path) -> None:
    model = load_transformer(QWEN, single, torch.float16)
    assert {value.dtype for value in model.parameters()} == {torch.float16}


def test_missing_tensor_is_named(single: Path) -> None:
    change_tensors(single, img_in__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks the tensor img_in\.weight\. Its config"):
        load(single)


def test_renamed_tensor_is_named_with_its_likeness(single: Path) -> None:
    weight = load_file(single / WEIGHTS_NAME)["img_in.weight"].clone()
    change_tensors(single, img_in__weight=None, img_inn__weight=weight)
    with pytest.raises(CheckpointError, match=r"img_in\.weight\. It has img_inn\.weight, which"):
        load(single)


def test_unexpected_tensors_are_named_and_counted(single: Path) -> None:
    change_tensors(single, lora__up=torch.zeros(1), lora__down=torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"has the tensor lora\.down and 1 more, which the"):
        load(single)


def test_wrong_shape_names_both(single: Path) -> None:
    change_tensors(single, img_in__weight=torch.zeros(32, 17))
    with pytest.raises(
        CheckpointError, match=r"img_in\.weight has shape \[32, 17\], .* needs \[32, 16\]"
    ):
        load(single)


def test_quantised_tensor_names_its_dtype(single: Path) -> None:
    change_tensors(single, img_in__weight=torch.zeros(32, 16, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"img_in\.weight is of dtype I8; allowed: F64, F32"):
        load(single)


def test_depth_of_another_config_is_a_missing_tensor(single: Path) -> None:
    change_config(single, num_layers=4)
    with pytest.raises(CheckpointError, match=r"lacks the tensor transformer_blocks\.3\..* more"):
        load(single)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_a_clear_error(single: Path, keep: int) -> None:
    path = single / WEIGHTS_NAME
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"safetensors.* truncated"):
        load(single)


def test_git_lfs_pointer_is_recognised(single: Path) -> None:
    (single / WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .* git lfs pull"):
        load(single)


def test_damaged_header_is_a_clear_error(single: Path) -> None:
    data = (single / WEIGHTS_NAME).read_bytes()
    (single / WEIGHTS_NAME).write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(CheckpointError, match="has a damaged safetensors header"):
        load(single)


def test_missing_shard_is_named_with_its_tensors(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks the shard {shard.name} \(\d+ tensors"):
        load(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "weights.bin"])
def test_index_that_points_elsewhere_is_refused(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["img_in.weight"] = name
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files in the same folder"):
        load(sharded)


def test_pickles_are_never_opened(single: Path) -> None:
    (single / WEIGHTS_NAME).rename(single / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"as pickles \(diffusion_pytorch_model\.bin\)"):
        load(single)


def test_weights_of_another_name_are_mentioned(single: Path) -> None:
    (single / WEIGHTS_NAME).rename(single / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no weights: .*; found model\.safetensors"):
        load(single)


def test_folder_without_config_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; pass a folder in the diffus"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        ({"zero_cond_t": True}, "qwen-edit", r"'zero_cond_t' is true, .* --model qwen-edit-2511$"),
        ({}, "qwen-edit-2511", r"'zero_cond_t' is false, .* --model qwen-edit or qwen-edit-plus"),
        ({"guidance_embeds": True}, "qwen-edit", r"'guidance_embeds' is true.* no supported"),
        ({}, "flux-kontext", r"'_class_name' is 'QwenImageTr.*; use --model qwen-edit or"),
        ({"_class_name": "UNet"}, "qwen-edit", r"is 'UNet', .* no supported model has such a"),
        ({"use_layer3d_rope": True}, "qwen-edit", r"'use_layer3d_rope' is true: .* not supported"),
        ({"quantization_config": {"bits": 4}}, "qwen-edit", r"weights are quantised; pass the"),
        ({"attention_head_dim": 32}, "qwen-edit", r"'attention_head_dim' is 32, and .* up to 16"),
        ({"num_layers": "x"}, "qwen-edit", r"diffusers cannot make a QwenImageTransformer2DModel"),
    ],
)
def test_config_of_another_model_names_key_and_remedy(
    single: Path, change: dict[str, Any], model: str, message: str
) -> None:
    change_config(single, **change)
    with pytest.raises(CheckpointError, match=message):
        load(single, FAMILIES[model])


def test_flux_that_takes_its_condition_as_channels_is_refused() -> None:
    config = {
        "_class_name": "FluxTransformer2DModel",
        "guidance_embeds": True,
        "in_channels": 384,
        "out_channels": 64,
    }
    with pytest.raises(CheckpointError, match="'in_channels' is 384 and 'out_channels' 64: this"):
        check_config(FAMILIES["flux-kontext"], config, "config.json")


def test_truncated_config_is_a_clear_error(single: Path) -> None:
    (single / "config.json").write_text('{"num_layers": ')
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON .* not downloaded compl"):
        load(single)


def test_random_weights_depend_on_the_seed_alone(tiny_config: dict[str, Any]) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (
        load_transformer(QWEN, "random", torch.float32, seed=seed, config=tiny_config)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_unknown_override_is_named_with_its_likeness() -> None:
    with pytest.raises(UsageError, match=r"has no key 'num_layer'\. Did you mean 'num_layers'\?"):
        load_transformer(QWEN, "random", torch.float32, config={"num_layer": 3})


def test_hub_that_cannot_be_reached_says_to_pass_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as raised:
        load_transformer(QWEN, "owner/model", torch.float32)
    assert str(raised.value) == (
        "owner/model is not in the local cache and the hub cannot be reached; go online, or pass "
        "a downloaded copy: --weights <folder>"
    )


def test_snapshot_in_the_cache_is_used_without_the_network(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "c0ffee"
    shutil.copytree(pipeline_folder, snapshot)
    calls: list[dict[str, Any]] = []

    def download(hub_id: str, **kwargs: Any) -> str:
        calls.append(kwargs)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint, commit = fetch_checkpoint("owner/model", "main")
    assert commit == "c0ffee"
    assert len(checkpoint.weights) > 1
    assert [call.get("local_files_only") for call in calls] == [True]
    assert all(not name.endswith(".bin") for name in calls[0]["allow_patterns"])
    checkpoint.folder.joinpath(checkpoint.weights[0]).unlink()
    with pytest.raises(CheckpointError, match="lacks the shard"):
        fetch_checkpoint("owner/model", "main")
    assert [call.get("local_files_only") for call in calls] == [True, True, None]
