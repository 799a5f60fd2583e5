"""Assembled graphs against traced ones and against diffusers, in ONNX Runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from algorithm_1 import run_model
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from graph_sessions import GEOMETRIES, relative_error, run_sessions
from shared_traces import export_graph
from tiny import FLUX_CONFIG, MODEL_NAMES, QWEN_CONFIG, make_call, tiny_transformer

from ditrim.engines.backends.tensorrt.graph import graph_for_backend
from ditrim.export import weights as weights_module
from ditrim.export.assemble import (
    WeightIndex,
    assemble_graph,
    check_linked,
    count_nodes,
    index_placeholder,
    index_weights,
    num_bytes_to_copy,
    write_linked,
)
from ditrim.export.checkpoint import Checkpoint, find_checkpoint
from ditrim.export.family import FAMILIES
from ditrim.export.graph import write_graph
from ditrim.export.split import SplitPoint
from ditrim.plugins.errors import CheckpointError

ROLES = ("front", "back")
LAYERS = (2, 3)  # the last layer too


def save_shards(transformer: Any, folder: Path) -> Checkpoint:
    """Save as several files, as released models are."""
    transformer.save_pretrained(folder, max_shard_size="100KB")
    found = find_checkpoint(folder)
    assert len(found.weights) > 3
    return found


def split_at(front_depth: int, layers: tuple[int, ...] = LAYERS) -> SplitPoint:
    return SplitPoint(num_layers=4, front_depth=front_depth, representative_layers=layers)


def open_session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assembled_sessions(
    family: str,
    checkpoint: Checkpoint,
    point: SplitPoint,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Assemble both graphs, check them, and open them."""
    weights = index_weights(checkpoint)
    sessions = {}
    folder.mkdir(exist_ok=True)
    for role in ROLES:
        model = assemble_graph(
            FAMILIES[family], checkpoint.config, point, role, dtype=dtype, weights=weights
        )
        files = write_linked(model, folder, role, weights)
        assert files[0] == f"{role}.onnx"
        assert set(files[1:]) <= set(checkpoint.weights)
        check_linked(folder / files[0], full_check=True)
        sessions[role] = open_session(folder / files[0])
    return sessions


def interface(model: Any) -> list[tuple[str, Any, list[Any]]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(v.name, v.dtype, [getattr(a, "value", a) for a in v.shape]) for v in values]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_shards(tiny_transformer("qwen-edit"), tmp_path_factory.mktemp("qwen"))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_NAMES)
def test_assembled_graphs_give_the_models_own_result(family: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    checkpoint = save_shards(transformer, tmp_path / "checkpoint")
    for front_depth in (0, 1):
        sessions = assembled_sessions(
            family, checkpoint, split_at(front_depth), tmp_path / f"k{front_depth}"
        )
        for geometry in GEOMETRIES:
            call = make_call(family, **geometry)
            with torch.no_grad():
                expected = transformer(**call.kwargs)[0][:, : call.num_noisy]
            _, influence = run_model(transformer, call, front_depth=front_depth, layers=LAYERS)
            assert influence is not None
            found = run_sessions(sessions, transformer, call)
            assert relative_error(found["velocity"], expected) < 1e-4
            assert relative_error(found["influence"].double(), influence) < 1e-4
            kept = torch.arange(0, influence.shape[1], 2)
            reduced, _ = run_model(transformer, call, front_depth=front_depth, kept=kept)
            found = run_sessions(sessions, transformer, call, kept)
            assert relative_error(found["velocity"], reduced) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_assembled_graphs_equal_traced_ones(family: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    checkpoint = save_shards(transformer, tmp_path / "checkpoint")
    point, traced, assembled = split_at(1), {}, {}
    weights = index_weights(checkpoint)
    for role in ROLES:
        one = export_graph(transformer, point, role, torch.float32)
        other = assemble_graph(
            FAMILIES[family],
            checkpoint.config,
            point,
            role,
            dtype=torch.float32,
            weights=weights,
        )
        assert interface(one) == interface(other)
        (tmp_path / "traced").mkdir(exist_ok=True)
        write_graph(one, tmp_path / "traced", role)
        write_linked(other, tmp_path, role, weights)
        traced[role] = open_session(tmp_path / "traced" / f"{role}.onnx")
        assembled[role] = open_session(tmp_path / f"{role}.onnx")
    for geometry in GEOMETRIES:
        call = make_call(family, **geometry)
        one, other = (run_sessions(item, transformer, call) for item in (traced, assembled))
        for name in ("noisy", "reference", "text", "temb", "velocity", "influence"):
            assert relative_error(other[name], one[name]) < 1e-5


def test_weights_stored_as_bfloat16_are_cast_in_the_graph(tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit").to(torch.bfloat16)
    checkpoint = save_shards(transformer, tmp_path / "checkpoint")
    sessions = assembled_sessions("qwen-edit", checkpoint, split_at(1), tmp_path / "set")
    transformer.to(torch.float32)
    call = make_call("qwen-edit")
    with torch.no_grad():
        expected = transformer(**call.kwargs)[0][:, : call.num_noisy]
    found = run_sessions(sessions, transformer, call)
    assert relative_error(found["velocity"], expected) < 1e-4
    model = onnx.load(tmp_path / "set" / "back.onnx", load_external_data=False)
    assert {i.data_type for i in model.graph.initializer if i.external_data} == {
        onnx.TensorProto.BFLOAT16
    }


def test_back_without_scoring_gives_the_same_velocity(qwen: Checkpoint, tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit")
    sessions = assembled_sessions("qwen-edit", qwen, split_at(1), tmp_path)
    call = make_call("qwen-edit", batch=2)
    scored = run_sessions(sessions, transformer, call)["velocity"]
    weights = index_weights(qwen)
    family, config = FAMILIES["qwen-edit"], qwen.config
    models = {
        "assembled": assemble_graph(
            family, config, split_at(1), "back", dtype=torch.float32, weights=weights, scored=False
        ),
        "traced": export_graph(transformer, split_at(1), "back", torch.float32, scored=False),
    }
    assert interface(models["assembled"]) == interface(models["traced"])
    assert "LogSumExp" not in {key[1] for model in models.values() for key in model.functions}
    write_linked(models["assembled"], tmp_path, "back", weights)
    (tmp_path / "traced").mkdir()
    write_graph(models["traced"], tmp_path / "traced", "back")
    for folder in (tmp_path, tmp_path / "traced"):
        session = open_session(folder / "back.onnx")
        assert "score_rows" not in {value.name for value in session.get_inputs()}
        assert [value.name for value in session.get_outputs()] == ["velocity"]
        found = run_sessions({**sessions, "back": session}, transformer, call)
        assert relative_error(found["velocity"], scored) < 1e-5


def test_layers_of_a_kind_are_calls_of_one_function(qwen: Checkpoint, tmp_path: Path) -> None:
    weights = index_weights(qwen)
    back = assemble_graph(
        FAMILIES["qwen-edit"],
        qwen.config,
        split_at(0, (1,)),
        "back",
        dtype=torch.float32,
        weights=weights,
    )
    block = "QwenImageTransformerBlock"
    calls = [(node.name, node.op_type) for node in back.graph if node.op_type.startswith(block)]
    assert calls == [
        ("transformer_blocks.0", block),
        ("transformer_blocks.1", f"{block}Scored"),
        ("transformer_blocks.2", block),
        ("transformer_blocks.3", f"{block}Last"),
    ]
    assert len(back.functions) == 4
    kinds = {f.name: [node.op_type for node in f.all_nodes()] for f in back.functions.values()}
    assert kinds[block].count("Attention") == 1
    assert kinds[f"{block}Scored"].count("LogSumExp") == 2
    # Nobody reads the last block's text: what it alone needs is not in the graph.
    last = [name for name in back.graph.initializers if name.startswith("transformer_blocks.3.")]
    assert not [name for name in last if "txt_mlp" in name or "to_add_out" in name]
    assert not [name for name in last if "add_q_proj" in name or "norm_added_q" in name]
    assert count_nodes(back) > 4 * 100


def test_files_are_hard_links_beside_the_graph(qwen: Checkpoint, tmp_path: Path) -> None:
    weights = index_weights(qwen)
    names: set[str] = set()
    for role in ROLES:
        model = assemble_graph(
            FAMILIES["qwen-edit"],
            qwen.config,
            split_at(1),
            role,
            dtype=torch.float32,
            weights=weights,
        )
        files = write_linked(model, tmp_path, role, weights)
        names |= set(files[1:])
        text = (tmp_path / files[0]).read_bytes()
        assert str(tmp_path).encode() not in text
        assert str(qwen.folder).encode() not in text
        assert b"site-packages" not in text
        assert b".py" not in text
        loaded = onnx.load(tmp_path / files[0], load_external_data=False)
        for tensor in loaded.graph.initializer:
            places = {item.key: item.value for item in tensor.external_data}
            if places:
                assert Path(places["location"]).name == places["location"]
                assert places["location"] in files
                shape = weights.tensors[tensor.name].shape
                assert tuple(tensor.dims) == shape
    assert names == set(qwen.weights)
    for name in names:
        assert (tmp_path / name).samefile(qwen.folder / name)
    assert num_bytes_to_copy(weights, tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == names | {"front.onnx", "back.onnx"}


@pytest.mark.slow
def test_equal_builds_give_equal_bytes(qwen: Checkpoint, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from ditrim.export.assemble import *\n"
        "from ditrim.export.checkpoint import find_checkpoint\n"
        "from ditrim.export.family import FAMILIES\n"
        "from ditrim.export.split import SplitPoint\n"
        "found = find_checkpoint(sys.argv[1]); weights = index_weights(found)\n"
        "point = SplitPoint(num_layers=4, front_depth=1, representative_layers=(2, 3))\n"
        "model = assemble_graph(FAMILIES['qwen-edit'], found.config, point, 'back',\n"
        "                       dtype=torch.float32, weights=weights)\n"
        "write_linked(model, Path(sys.argv[2]), 'back', weights)\n"
    )
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "set"
    shutil.copytree(qwen.folder, elsewhere)
    target.mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, str(elsewhere), str(target)], env=environment, check=True
    )
    weights = index_weights(qwen)
    model = assemble_graph(
        FAMILIES["qwen-edit"],
        qwen.config,
        split_at(1),
        "back",
        dtype=torch.float32,
        weights=weights,
    )
    write_linked(model, tmp_path, "back", weights)
    assert (target / "back.onnx").read_bytes() == (tmp_path / "back.onnx").read_bytes()


def test_files_are_copied_where_there_can_be_no_link(
    qwen: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link", str(source), None, str(target))

    monkeypatch.setattr(weights_module.os, "link", refuse)
    weights = index_weights(qwen)
    for _ in range(2):  # the second finds its copies
        weights_module.link_weights(qwen.weights, weights, tmp_path)
    for name in qwen.weights:
        assert not (tmp_path / name).samefile(qwen.folder / name)
        assert (tmp_path / name).read_bytes() == (qwen.folder / name).read_bytes()


def test_a_file_of_other_weights_is_replaced(qwen: Checkpoint, tmp_path: Path) -> None:
    name = qwen.weights[0]
    (tmp_path / name).write_bytes(b"other")
    weights_module.link_weights([name], index_weights(qwen), tmp_path)
    assert (tmp_path / name).samefile(qwen.folder / name)


def test_files_of_the_hub_cache_are_linked_through_their_symbolic_links(
    qwen: Checkpoint, tmp_path: Path
) -> None:
    snapshot, target = tmp_path / "snapshot", tmp_path / "set"
    snapshot.mkdir()
    target.mkdir()
    for path in qwen.folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    weights = index_weights(find_checkpoint(snapshot))
    weights_module.link_weights(qwen.weights, weights, target)
    for name in qwen.weights:
        assert not (target / name).is_symlink()
        assert (target / name).samefile(qwen.folder / name)


def edit_header(path: Path, change: Any) -> None:
    """Rewrite a safetensors file's header; its length stays, so that the offsets stay right."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(content[:8] + text.ljust(length) + content[8 + length :])


def test_missing_and_mismatched_tensors_are_named(qwen: Checkpoint, tmp_path: Path) -> None:
    name = "transformer_blocks.2.attn.to_q.weight"
    path = qwen.folder / index_weights(qwen).tensors[name].file

    def damaged(change: Any) -> Checkpoint:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(qwen.folder, folder)
        edit_header(folder / path.name, change)
        return find_checkpoint(folder)

    def shorten(header: Any) -> None:
        header[name]["shape"] = [48, 47]

    def rename(header: Any) -> None:
        header[name[:-1]] = header.pop(name)

    def overlap(header: Any) -> None:
        header[name]["data_offsets"][0] += 4

    with pytest.raises(CheckpointError, match=rf"the tensor {name} has shape \[48, 47\], and"):
        index_weights(damaged(shorten))
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {name}\. It has {name[:-1]},"):
        index_weights(damaged(rename))
    with pytest.raises(CheckpointError, match=rf"the tensor {name} has 9212 bytes, and \[48, 48\]"):
        index_weights(damaged(overlap))
    config = {**qwen.config, "_class_name": "UNet2DModel"}
    with pytest.raises(CheckpointError, match="'_class_name' is 'UNet2DModel'; known: Flux"):
        index_weights(Checkpoint(folder=qwen.folder, config=config, weights=qwen.weights))


def test_an_index_of_another_model_is_refused(qwen: Checkpoint) -> None:
    weights = index_weights(qwen)
    fewer = WeightIndex(
        folder=weights.folder,
        tensors={k: v for k, v in weights.tensors.items() if k != "img_in.bias"},
    )
    with pytest.raises(CheckpointError, match=r"lacks the tensor img_in\.bias"):
        assemble_graph(
            FAMILIES["qwen-edit"],
            qwen.config,
            split_at(1),
            "front",
            dtype=torch.float32,
            weights=fewer,
        )


def test_a_placeholder_gives_a_graph_and_no_weights(qwen: Checkpoint, tmp_path: Path) -> None:
    family = FAMILIES["qwen-edit"]
    weights = index_placeholder(family, qwen.config, torch.bfloat16)
    assert weights.is_placeholder
    assert not index_weights(qwen).is_placeholder
    model = assemble_graph(
        family, qwen.config, split_at(1), "front", dtype=torch.bfloat16, weights=weights
    )
    assert write_linked(model, tmp_path, "front", weights) == ["front.onnx"]
    assert num_bytes_to_copy(weights, tmp_path) == 0
    with pytest.raises(onnx.checker.ValidationError, match="is not a plain file beside"):
        check_linked(tmp_path / "front.onnx")


def test_a_graph_that_points_past_its_file_is_refused(qwen: Checkpoint, tmp_path: Path) -> None:
    weights = index_weights(qwen)
    model = assemble_graph(
        FAMILIES["qwen-edit"],
        qwen.config,
        split_at(1),
        "front",
        dtype=torch.float32,
        weights=weights,
    )
    files = write_linked(model, tmp_path, "front", weights)
    check_linked(tmp_path / files[0])
    (tmp_path / files[1]).unlink()
    (tmp_path / files[1]).write_bytes(b"short")
    with pytest.raises(onnx.checker.ValidationError, match="which has 5"):
        check_linked(tmp_path / files[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_blocks_of_the_real_width_give_the_models_own_result(family: str, tmp_path: Path) -> None:
    # A plain and a scored block of 24 heads of 128, stored as bfloat16 and run as float32.
    width = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    transformer: Any
    torch.manual_seed(0)
    if family == "qwen-edit":
        transformer = QwenImageTransformer2DModel(**(QWEN_CONFIG | width | {"num_layers": 2}))
    else:
        depths = {"num_layers": 1, "num_single_layers": 1}
        transformer = FluxTransformer2DModel(**(FLUX_CONFIG | width | depths))
    transformer.eval().requires_grad_(False).to(torch.bfloat16)
    transformer.save_pretrained(tmp_path / "checkpoint", max_shard_size="500MB")
    transformer.to(torch.float32)
    call = make_call(family, noisy=(4, 6), references=((5, 4),), num_text=9)
    expected = transformer(**call.kwargs)[0][:, : call.num_noisy].clone()
    _, influence = run_model(transformer, call, front_depth=1, layers=(1,))
    assert influence is not None
    transformer.to("meta")  # its configuration is needed, its memory is not
    try:
        sessions = assembled_sessions(
            family,
            find_checkpoint(tmp_path / "checkpoint"),
            SplitPoint(num_layers=2, front_depth=1, representative_layers=(1,)),
            tmp_path / "set",
        )
        found = run_sessions(sessions, transformer, call)
    finally:
        for path in tmp_path.rglob("*.safetensors"):
            path.unlink()
    assert relative_error(found["velocity"], expected) < 1e-4
    assert relative_error(found["influence"].double(), influence) < 1e-4


def parsed_by_tensorrt_rtx(path: Path) -> Any:
    """The network that TensorRT-RTX's parser makes of a graph."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = graph_for_backend(onnx.load(path, load_external_data=False), "tensorrt-rtx")
    parsed = parser.parse(model.SerializeToString(), str(path))
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert parsed, errors
    return network, builder, logger


@pytest.mark.slow
def test_tensorrt_rtx_parses_assembled_graphs(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for family in ("qwen-edit-2511", "flux-kontext"):
        transformer = tiny_transformer(family).to(torch.bfloat16)
        checkpoint = save_shards(transformer, tmp_path / family)
        weights = index_weights(checkpoint)
        for role, kinds in (("front", {"noisy", "reference", "text", "temb"}), ("back", set())):
            model = assemble_graph(
                FAMILIES[family],
                checkpoint.config,
                split_at(1),
                role,
                dtype=torch.bfloat16,
                weights=weights,
            )
            folder = tmp_path / f"{family}-set"
            folder.mkdir(exist_ok=True)
            write_linked(model, folder, role, weights)
            network, *_ = parsed_by_tensorrt_rtx(folder / f"{role}.onnx")
            names = {network.get_output(i).name for i in range(network.num_outputs)}
            assert kinds <= names if kinds else names == {"velocity", "influence"}
            layers = {network.get_layer(i).name for i in range(network.num_layers)}
            used = {name for name in model.graph.initializers if name.endswith(".to_q.weight")}
            # Weights keep the checkpoint's names, by which a plan is refitted.
            assert used
            assert used <= layers
