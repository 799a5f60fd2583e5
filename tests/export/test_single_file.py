"""Checkpoints of one file, and of a variant, built into sets that equal the model they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from complete_pipelines import randomise
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from graph_sessions import relative_error, run_sessions
from lora_files import layers_of, original_flux_layers, random_lora, write_lora
from safetensors.torch import load_file, save_file
from tiny import make_call, tiny_transformer

from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.export.family import FAMILIES
from ditrim.export.single_file import convert_single_file, describe_single_file
from ditrim.plugins.errors import CheckpointError, UsageError

QWEN: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 24,
    "in_channels": 16,
    "out_channels": 4,
}
LENGTHS: dict[str, Any] = {
    "max_reference_tokens": 64,
    "max_noisy_tokens": 64,
    "max_text_tokens": 32,
}


def qwen() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(QwenImageTransformer2DModel(**QWEN), 0)


def save_single(transformer: Any, path: Path, prefix: str = "model.diffusion_model.") -> Path:
    save_file({f"{prefix}{name}": v for name, v in transformer.state_dict().items()}, path)
    return path


def error_of(engine_set: EngineSet, transformer: Any, family: str = "qwen-edit") -> float:
    """How far the set's graphs are from the model, on one call."""
    import onnxruntime as ort

    call = make_call(family)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = {
        role: ort.InferenceSession(str(engine_set.path_of(role)), options)
        for role in ("front", "back")
    }
    found = run_sessions(sessions, transformer, call)["velocity"]
    with torch.no_grad():
        expected = transformer(**call.kwargs)[0][:, : call.num_noisy]
    return relative_error(found, expected)


@pytest.mark.parametrize("graph_only", [False, True])
def test_a_single_file_gives_the_set_of_the_model_in_it(graph_only: bool, tmp_path: Path) -> None:
    transformer = qwen()
    path = save_single(transformer, tmp_path / "qwen.safetensors")
    options = BuildOptions(
        model="qwen-edit",
        weights=str(path),
        graph_only=graph_only,
        output=str(tmp_path / "set"),
        **LENGTHS,
    )
    engine_set = build_engine_set(options)
    assert error_of(engine_set, transformer) < 1e-4
    manifest = engine_set.manifest
    assert (manifest.source["kind"], manifest.source["location"]) == ("file", str(path))
    assert set(manifest.weights) == set(transformer.state_dict())
    assert not any(entry.is_dir() for entry in engine_set.folder.iterdir())
    before = (engine_set.folder / "manifest.json").stat().st_ino
    assert build_engine_set(options).manifest.identity == manifest.identity
    assert (engine_set.folder / "manifest.json").stat().st_ino == before


def test_the_mark_of_2511_decides_the_family(tmp_path: Path) -> None:
    tensors = dict(qwen().state_dict()) | {"__index_timestep_zero__": torch.zeros(1)}
    path = tmp_path / "2511.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="use --model qwen-edit-2511"):
        describe_single_file(path, FAMILIES["qwen-edit"])
    described = describe_single_file(path, FAMILIES["qwen-edit-2511"])
    converted = convert_single_file(described, FAMILIES["qwen-edit-2511"], tmp_path / "folder")
    assert converted.config["zero_cond_t"] is True


def test_float8_without_scales_becomes_bfloat16(tmp_path: Path) -> None:
    tensors = {
        name: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value.to(torch.bfloat16)
        for name, value in qwen().state_dict().items()
    }
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    described = describe_single_file(path, FAMILIES["qwen-edit"])
    converted = convert_single_file(described, FAMILIES["qwen-edit"], tmp_path / "folder")
    found = load_file(converted.folder / converted.weights[0])
    for name, value in tensors.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value.to(torch.bfloat16))


def test_what_diffusers_cannot_convert_says_how_to(tmp_path: Path) -> None:
    family, tensors = FAMILIES["qwen-edit"], qwen().state_dict()
    path = tmp_path / "x.safetensors"

    def refused(content: dict[str, torch.Tensor], message: str) -> None:
        save_file(content, path)
        with pytest.raises(CheckpointError, match=message):
            convert_single_file(describe_single_file(path, family), family, tmp_path / "folder")

    key = "transformer_blocks.0.attn.to_q.scale_weight"
    refused({**tensors, key: torch.ones(1)}, "float8 weights with scales")
    refused({**tensors, "vae.x": torch.ones(3)}, "is not this model alone")
    refused({"a": torch.ones(1)}, r"no tensor img_in\.weight.*another --model")
    lacking = {name: v for name, v in tensors.items() if name != "proj_out.bias"}
    refused(lacking, r"is not this model alone|cannot be converted")
    refused({n: (100 * v).to(torch.int8) for n, v in tensors.items()}, "is of dtype I8")
    both = tensors | {f"model.diffusion_model.{name}": v + 1 for name, v in tensors.items()}
    refused(both, "tensors twice, with and without")
    refused(
        {**tensors, "img_in.weight": torch.tensor(1.0)}, r"no tensor img_in\.weight of that many"
    )
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF.*save_pretrained\(folder\)"):
        describe_single_file(tmp_path / "x.gguf", family)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="never opened"):
        describe_single_file(tmp_path / "x.ckpt", family)


@pytest.mark.slow
def test_a_single_file_of_flux_is_taken_apart_as_its_code_puts_it_together(
    tmp_path: Path,
) -> None:
    # diffusers' conversion knows the released width alone.
    width, generator = 3072, torch.Generator().manual_seed(0)
    config = {
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
    }
    with torch.device("meta"):
        empty = FluxTransformer2DModel(**config)
    shapes = {f"{n}.weight": shape for n, shape in original_flux_layers(empty).items()}
    shapes |= {n.replace(".weight", ".bias"): (shape[0],) for n, shape in list(shapes.items())}
    for stream in ("img", "txt"):
        for norm in ("query_norm", "key_norm"):
            shapes[f"double_blocks.0.{stream}_attn.norm.{norm}.scale"] = (128,)
    for norm in ("query_norm", "key_norm"):
        shapes[f"single_blocks.0.norm.{norm}.scale"] = (128,)
    for name, rows, columns in (
        ("img_in", width, 64),
        ("txt_in", width, 24),
        ("final_layer.linear", 64, width),
        ("final_layer.adaLN_modulation.1", 2 * width, width),
        ("time_in.in_layer", width, 256),
        ("time_in.out_layer", width, width),
        ("guidance_in.in_layer", width, 256),
        ("guidance_in.out_layer", width, width),
        ("vector_in.in_layer", width, 12),
        ("vector_in.out_layer", width, width),
    ):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
        for name, shape in shapes.items()
    }
    path = tmp_path / "flux.safetensors"
    save_file({f"model.diffusion_model.{name}": v for name, v in tensors.items()}, path)
    family = FAMILIES["flux-kontext"]
    converted = convert_single_file(describe_single_file(path, family), family, tmp_path / "made")
    found = load_file(converted.folder / converted.weights[0])
    query, key, value = tensors["double_blocks.0.img_attn.qkv.weight"].chunk(3)
    block = "transformer_blocks.0.attn"
    for name, part in (("to_q", query), ("to_k", key), ("to_v", value)):
        assert torch.equal(found[f"{block}.{name}.weight"], part)
    parts = tensors["single_blocks.0.linear1.weight"].split([width] * 3 + [4 * width])
    assert torch.equal(found["single_transformer_blocks.0.proj_mlp.weight"], parts[3])
    shift, scale = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(found["norm_out.linear.weight"], torch.cat([scale, shift]))
    assert {k: converted.config[k] for k in config} == config


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_a_variant_is_read_where_it_is_asked_for(shard: str, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit").half()
    folder = tmp_path / "pipeline" / "transformer"
    transformer.save_pretrained(folder, variant="fp16", max_shard_size=shard)
    options: dict[str, Any] = {
        "model": "qwen-edit",
        "weights": str(tmp_path / "pipeline"),
        "output": str(tmp_path / "set"),
        "graph_only": True,
        **LENGTHS,
    }
    with pytest.raises(CheckpointError, match="give --variant fp16"):
        build_engine_set(BuildOptions(**options))
    engine_set = build_engine_set(BuildOptions(**options, variant="fp16"))
    assert engine_set.manifest.source["variant"] == "fp16"
    assert "--variant fp16" in engine_set.manifest.command
    assert error_of(engine_set, transformer.float()) < 1e-4
    with pytest.raises(CheckpointError, match="give --variant fp16"):
        build_engine_set(BuildOptions(**options, variant="bf16"))
    path = save_single(qwen(), tmp_path / "qwen.safetensors")
    with pytest.raises(UsageError, match="is one file"):
        build_engine_set(BuildOptions(**options | {"weights": str(path)}, variant="fp16"))


@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loras_touch_only_their_tensors_of_an_assembled_set(
    family: str, stored: torch.dtype, tmp_path: Path
) -> None:
    transformer = tiny_transformer(family).to(stored)
    folder = tmp_path / "checkpoint"
    transformer.save_pretrained(folder, max_shard_size="60KB")
    layers = layers_of(transformer)
    some = {name: size for name, size in layers.items() if name.endswith(("to_q", "proj_out"))}
    path = write_lora(tmp_path / "style.safetensors", random_lora(some), "lightning", alpha=8)
    engine_set = build_engine_set(
        BuildOptions(
            model=family,
            weights=str(folder),
            graph_only=True,
            precision="fp32",
            lora=(f"{path}:0.5",),
            output=str(tmp_path / "set"),
            **LENGTHS,
        )
    )
    written = load_file(engine_set.folder / "merged_weights.safetensors")
    assert set(written) == {f"{name}.weight" for name in some}
    shards = list(folder.glob("*.safetensors"))
    linked = [s for s in shards if (engine_set.folder / s.name).exists()]
    assert linked
    assert all((engine_set.folder / shard.name).samefile(shard) for shard in linked)
    transformer = transformer.float()
    lora = random_lora(some)
    with torch.no_grad():
        for name, (down, up) in lora.items():
            weight = transformer.get_submodule(name).weight
            weight += 0.5 * 8 / down.shape[0] * up @ down
    assert error_of(engine_set, transformer, family) < 1e-4
