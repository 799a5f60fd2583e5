"""Graphs that tell the scores of every layer, against a plain statement on diffusers' modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from algorithm_1 import run_details, run_model
from shared_traces import export_graph
from tiny import MODEL_NAMES, Call, make_call, rope_of, tiny_transformer
from torch import Tensor

from ditrim.engines.backends.tensorrt.graph import graph_for_backend
from ditrim.export.assemble import assemble_graph, check_linked, index_weights, write_linked
from ditrim.export.checkpoint import find_checkpoint
from ditrim.export.family import FAMILIES
from ditrim.export.graph import back_input_names, write_graph
from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, processors_installed
from ditrim.runtime.policy import SCORES

POINT = SplitPoint(num_layers=4, front_depth=1, representative_layers=(1, 3))
STRIDE = 2
GEOMETRIES: list[dict[str, Any]] = [
    {"batch": 2, "noisy": (3, 3), "references": ((6, 2), (1, 5)), "num_text": 1},
    {"batch": 1, "noisy": (4, 5), "references": ((5, 4),), "num_text": 6},
    {"batch": 1, "noisy": (1, 1), "references": ((1, 1),), "num_text": 9},
]


def back_inputs(transformer: Any, call: Call, kept: Tensor) -> dict[str, Tensor]:
    """What BACK takes at a reduced length, every second noisy row scored; from FRONT in torch."""
    kwargs, rope = call.kwargs, rope_of(transformer, call)
    batch = kwargs["hidden_states"].shape[0]
    tables = [*rope.noisy, *rope.text, *(table.expand(batch, -1, -1) for table in rope.reference)]
    with processors_installed(transformer), torch.no_grad():
        front = FrontGraph(transformer, POINT)
        outputs = front(
            kwargs["hidden_states"][:, : call.num_noisy],
            kwargs["hidden_states"][:, call.num_noisy :],
            kwargs["encoder_hidden_states"],
            kwargs["timestep"],
            kwargs.get("guidance"),
            kwargs.get("pooled_projections"),
            *tables,
        )
        names = back_input_names(BackGraph(transformer, POINT))
    values = [*outputs, *tables, torch.arange(0, call.num_noisy, STRIDE)]
    inputs = dict(zip(names, values, strict=True))
    for name in ("reference", "reference_rope_cos", "reference_rope_sin"):
        inputs[name] = inputs[name][:, kept]
    return inputs


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check_scores(
    transformer: Any, call: Call, kept: Tensor, outputs: list[Tensor], bound: float
) -> None:
    """Compare BACK's outputs, and its layers' scores one by one."""
    velocity, influence, scores = outputs
    expected_velocity, expected = run_details(
        transformer, call, front_depth=1, layers=POINT.back_layers, kept=kept, stride=STRIDE
    )
    assert relative_error(velocity, expected_velocity) < bound
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape == (len(velocity), 3, len(SCORES), len(kept))
    assert float(scores.min()) >= 0.0
    for layer in range(3):
        for score in range(len(SCORES)):
            assert relative_error(scores[:, layer, score], expected[:, layer, score]) < bound
    assert torch.equal(influence, scores[:, 0, 0] + scores[:, 2, 0])


def kept_of(call: Call) -> Tensor:
    return torch.arange(0, sum(height * width for _, height, width in call.grids[1:]), 2)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("family", MODEL_NAMES)
def test_scores_of_every_layer_equal_the_plain_statement(
    family: str, geometry: dict[str, Any]
) -> None:
    transformer = tiny_transformer(family)
    call = make_call(family, **geometry)
    kept = kept_of(call)
    inputs = back_inputs(transformer, call, kept)
    inputs.setdefault("reference_temb", None)  # type: ignore[arg-type]
    with processors_installed(transformer, POINT.scoring_roles(detailed=True)), torch.no_grad():
        outputs = BackGraph(transformer, POINT)(**inputs)
    check_scores(transformer, call, kept, list(outputs), 1e-5)
    with processors_installed(transformer, POINT.scoring_roles()), torch.no_grad():
        plain = BackGraph(transformer, POINT)(**inputs)
    assert len(plain) == 2
    assert torch.equal(plain[0], outputs[0])
    assert relative_error(outputs[1], plain[1]) < 1e-6


def test_scores_and_layers_rank_tokens_differently() -> None:
    """The comparisons above could not fail if the three scores, or the layers, were alike."""
    transformer = tiny_transformer("qwen-edit")
    call = make_call("qwen-edit")
    _, scores = run_details(transformer, call, front_depth=1, layers=(1, 2, 3))
    orders = {tuple(row.tolist()) for row in scores[0].argsort(dim=-1).flatten(0, 1)}
    assert len(orders) == 9
    _, influence = run_model(transformer, call, front_depth=1, layers=(2,))
    assert influence is not None
    assert torch.equal(influence, scores[:, 1, 0])


def test_key_similarity_spans_opposite_to_equal_keys() -> None:
    from ditrim.plugins.attention import key_similarity

    keys = torch.tensor([[3.0, 0.0], [-2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])[None, None]
    found = key_similarity(torch.tensor([[1.0, 0.0], [7.0, 0.0]])[None, None], keys)
    assert found.tolist() == [[1.0, 0.0, 0.5, 0.5]]


def traced(transformer: Any, family: str, folder: Path) -> Path:
    model = export_graph(transformer, POINT, "back", torch.float32, detailed=True)
    return folder / write_graph(model, folder, "back")[0]


def assembled(transformer: Any, family: str, folder: Path) -> Path:
    transformer.save_pretrained(folder / "checkpoint", max_shard_size="100KB")
    checkpoint = find_checkpoint(folder / "checkpoint")
    weights = index_weights(checkpoint)
    model = assemble_graph(
        FAMILIES[family],
        checkpoint.config,
        POINT,
        "back",
        dtype=torch.float32,
        weights=weights,
        detailed=True,
    )
    kinds = {node.op_type.split("Block")[1] for node in model.graph if "Block" in node.op_type}
    assert kinds == {"Detailed", "DetailedLast"}
    path = folder / write_linked(model, folder, "back", weights)[0]
    check_linked(path, full_check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "make"),
    [  # qwen-edit and qwen-edit-plus are one graph; traced, it is run in test_ablations.py
        ("qwen-edit-plus", assembled),
        ("qwen-edit-2511", assembled),
        ("qwen-edit-2511", traced),
        ("flux-kontext", assembled),
        ("flux-kontext", traced),
    ],
)
def test_graphs_tell_the_scores_of_every_layer(family: str, make: Any, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    path = make(transformer, family, tmp_path)
    model = onnx.load(path, load_external_data=False)
    output = model.graph.output[2]
    axes = [axis.dim_param or axis.dim_value for axis in output.type.tensor_type.shape.dim]
    assert (output.name, axes) == ("layer_scores", ["batch", 3, 3, "reference"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for geometry in GEOMETRIES:
        call = make_call(family, **geometry)
        kept = kept_of(call)
        inputs = back_inputs(transformer, call, kept)
        feeds = {name: value.contiguous().numpy() for name, value in inputs.items()}
        outputs = [torch.from_numpy(value) for value in session.run(None, feeds)]
        check_scores(transformer, call, kept, outputs, 1e-4)


@pytest.mark.slow
def test_tensorrt_rtx_parses_a_graph_with_details(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = assembled(tiny_transformer("flux-kontext"), "flux-kontext", tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    model = graph_for_backend(onnx.load(path, load_external_data=False), "tensorrt-rtx")
    parsed = parser.parse(model.SerializeToString(), str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    names = {network.get_output(i).name for i in range(network.num_outputs)}
    assert names == {"velocity", "influence", "layer_scores"}
