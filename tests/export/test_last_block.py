"""BACK's last block computes its noisy rows alone, in torch and in the exported graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from algorithm_1 import run_model
from diffusers import FluxTransformer2DModel
from graph_sessions import relative_error
from shared_traces import export_graph
from tiny import FLUX_CONFIG, make_call, rope_of, tiny_transformer
from torch import Tensor

from ditrim.export.assemble import assemble_graph, index_weights, write_linked
from ditrim.export.checkpoint import find_checkpoint
from ditrim.export.family import FAMILIES
from ditrim.export.graph import back_input_names, example_inputs, write_graph
from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, processors_installed, run_blocks
from ditrim.plugins.architectures.transformers import blocks_of
from ditrim.plugins.attention import JointContext

POINT = SplitPoint(num_layers=4, front_depth=1, representative_layers=(2, 3))
G, C, T = 12, 10, 7  # of `example_inputs`
QWEN_ROWS = {
    "attn.to_q": G,
    "attn.to_k": G + C,
    "attn.to_v": G + C,
    "attn.to_out.0": G,
    "img_mlp.net.0.proj": G,
    "img_mlp.net.2": G,
    "attn.add_k_proj": T,
    "attn.add_v_proj": T,
}
FLUX_ROWS = {
    "attn.to_q": G,
    "attn.to_k": T + G + C,
    "attn.to_v": T + G + C,
    "proj_mlp": G,
    "proj_out": G,
}
ROWS = {"qwen-edit": QWEN_ROWS, "qwen-edit-2511": QWEN_ROWS, "flux-kontext": FLUX_ROWS}
MODULATION = ("img_mod", "txt_mod", "norm")


def last_name(family: str) -> str:
    """Path of the last block in the transformer."""
    return "single_transformer_blocks.1" if family == "flux-kontext" else "transformer_blocks.3"


@pytest.mark.parametrize("family", ROWS)
def test_rows_that_nothing_reads_are_not_computed(family: str) -> None:
    transformer = tiny_transformer(family)
    inputs: dict[str, Any] = example_inputs(transformer, torch.float32)
    found: dict[str, int] = {}

    def record(name: str) -> Any:
        return lambda _, __, output: found.update({name: output.shape[1]})

    block = blocks_of(transformer)[-1]
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(MODULATION):
            module.register_forward_hook(record(name))
    with processors_installed(transformer, POINT.scoring_roles()), torch.no_grad():
        back = BackGraph(transformer, POINT)
        inputs = {name: inputs[name] for name in back_input_names(back)}
        velocity, influence = back(**{"reference_temb": None, **inputs})
    assert (velocity.shape[1], influence.shape[1]) == (G, C)
    assert found == ROWS[family]


def rows_in_graph(path: Path, prefix: str, inputs: dict[str, Tensor]) -> dict[str, int]:
    """By layer of a block, how many rows its product with the weight has when the graph is run."""
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    biases = {
        node.output[0]: name.removeprefix(prefix).removesuffix(".bias")
        for node in model.graph.node
        if node.op_type == "Add"
        for name in node.input
        if name.startswith(prefix) and name.endswith(".bias")
    }
    biases = {at: layer for at, layer in biases.items() if not layer.startswith(MODULATION)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in biases)
    target = path.with_name("shown.onnx")
    onnx.save(model, target)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    feeds = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    shapes = [value.shape for value in session.run(list(biases), feeds)]
    return {layer: shape[1] for layer, shape in zip(biases.values(), shapes, strict=True)}


@pytest.mark.parametrize("family", ["qwen-edit-2511", "flux-kontext"])
def test_traced_graphs_do_not_compute_them(family: str, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    inputs = example_inputs(transformer, torch.float32, seed=3)
    write_graph(export_graph(transformer, POINT, "back", torch.float32), tmp_path, "back")
    assert rows_in_graph(tmp_path / "back.onnx", "blocks.2.", inputs) == ROWS[family]


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
@pytest.mark.parametrize("scored", [True, False])
def test_assembled_graphs_do_not_compute_them(family: str, scored: bool, tmp_path: Path) -> None:
    transformer = tiny_transformer(family)
    inputs = example_inputs(transformer, torch.float32, seed=3)
    transformer.save_pretrained(tmp_path / "checkpoint")
    checkpoint = find_checkpoint(tmp_path / "checkpoint")
    weights = index_weights(checkpoint)
    model = assemble_graph(
        FAMILIES[family],
        checkpoint.config,
        POINT,
        "back",
        dtype=torch.float32,
        weights=weights,
        scored=scored,
    )
    path = tmp_path / write_linked(model, tmp_path, "back", weights)[0]
    assert rows_in_graph(path, f"{last_name(family)}.", inputs) == ROWS[family]


@pytest.mark.parametrize("num_kept", [13, 1, 0])
def test_a_double_stream_block_of_flux_may_be_the_last(num_kept: int) -> None:
    torch.manual_seed(0)
    depths = {"num_layers": 3, "num_single_layers": 0}
    transformer: Any = FluxTransformer2DModel(**(FLUX_CONFIG | depths)).eval()
    call = make_call("flux-kontext", batch=2, noisy=(3, 3), references=((6, 2), (1, 5)))
    kept = torch.arange(num_kept)
    expected, expected_influence = run_model(
        transformer, call, front_depth=1, layers=(1, 2), kept=kept
    )
    point = SplitPoint(num_layers=3, front_depth=1, representative_layers=(1, 2))
    kwargs, num_noisy = call.kwargs, call.num_noisy
    rope = rope_of(transformer, call)
    tables = [*rope.noisy, *rope.text]
    reference_rope = [table.expand(2, -1, -1) for table in rope.reference]
    with processors_installed(transformer, point.scoring_roles()), torch.no_grad():
        noisy, reference, text, temb = FrontGraph(transformer, point)(
            kwargs["hidden_states"][:, :num_noisy],
            kwargs["hidden_states"][:, num_noisy:],
            kwargs["encoder_hidden_states"],
            kwargs["timestep"],
            kwargs["guidance"],
            kwargs["pooled_projections"],
            *tables,
            *reference_rope,
        )
        velocity, influence = BackGraph(transformer, point)(
            noisy,
            reference[:, kept],
            text,
            temb,
            None,
            *tables,
            *(table[:, kept] for table in reference_rope),
            torch.arange(num_noisy),
        )
    assert relative_error(velocity, expected) < 1e-5
    assert expected_influence is not None
    assert influence.shape == expected_influence.shape == (2, num_kept)
    if num_kept:
        assert relative_error(influence.double(), expected_influence) < 1e-5


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_float16_is_kept_from_overflow_as_diffusers_does(family: str) -> None:
    transformer = tiny_transformer(family).half()
    architecture = FAMILIES[family].architecture
    inputs = example_inputs(transformer, torch.float16)
    block = blocks_of(transformer)[-1]
    hidden = torch.cat([inputs["noisy"], inputs["reference"]], dim=1) * 2e4
    hidden = hidden.clip(-65504, 65504)
    zeros = torch.zeros(2, T + G + C, sum(transformer.config.axes_dims_rope) // 2)
    outputs = []
    for is_last in (False, True):
        context = JointContext(rope_cos=zeros + 1, rope_sin=zeros, num_text=T, num_noisy=G)
        with processors_installed(transformer, pairs_modulation=is_last), torch.no_grad():
            found, _ = run_blocks(
                architecture, [block], hidden, inputs["text"], inputs["temb"] * 50, None, context
            )
        outputs.append(found[:, :G])
    assert float(outputs[0].abs().max()) == 65504.0
    assert relative_error(outputs[1].float(), outputs[0].float()) < 1e-3
