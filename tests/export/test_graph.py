"""The ONNX graphs in ONNX Runtime against the unmodified diffusers transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from algorithm_1 import run_model
from graph_sessions import GEOMETRIES, relative_error, run_sessions
from safetensors import safe_open
from shared_traces import export_graph
from tiny import MODEL_NAMES, make_call, tiny_transformer

from ditrim.export.graph import write_graph
from ditrim.export.split import SplitPoint


def written_sessions(transformer: Any, point: SplitPoint, folder: Path) -> dict[str, Any]:
    """Export both graphs, check them, and open them."""
    sessions = {}
    for role in ("front", "back"):
        files = write_graph(export_graph(transformer, point, role, torch.float32), folder, role)
        assert files == [f"{role}.onnx", f"{role}.safetensors"]
        onnx.checker.check_model(str(folder / files[0]), full_check=True)
        sessions[role] = onnxruntime.InferenceSession(
            str(folder / files[0]), providers=["CPUExecutionProvider"]
        )
    return sessions


def check_all(family: str, num_layers: int, front_depth: int, folder: Path) -> None:
    transformer = tiny_transformer(family, num_layers=num_layers)
    layers = (num_layers - 2, num_layers - 1)
    point = SplitPoint(num_layers=num_layers, front_depth=front_depth, representative_layers=layers)
    sessions = written_sessions(transformer, point, folder)
    for geometry in GEOMETRIES:
        call = make_call(family, **geometry)
        with torch.no_grad():
            expected = transformer(**call.kwargs)[0][:, : call.num_noisy]
        _, influence = run_model(transformer, call, front_depth=front_depth, layers=layers)
        assert influence is not None
        found = run_sessions(sessions, transformer, call)
        assert relative_error(found["velocity"], expected) < 1e-4
        assert relative_error(found["influence"].double(), influence) < 1e-4
        kept = torch.arange(0, influence.shape[1], 2)
        reduced, _ = run_model(transformer, call, front_depth=front_depth, kept=kept)
        found = run_sessions(sessions, transformer, call, kept)
        assert relative_error(found["velocity"], reduced) < 1e-4


@pytest.mark.parametrize("family", MODEL_NAMES)
def test_front_depth_zero_gives_the_models_own_result(family: str, tmp_path: Path) -> None:
    check_all(family, 4, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_NAMES)
def test_the_papers_front_depth_gives_the_models_own_result(family: str, tmp_path: Path) -> None:
    check_all(family, 12, 10, tmp_path)


def test_files_hold_standard_operators_and_every_weight_once(tmp_path: Path) -> None:
    transformer = tiny_transformer("qwen-edit")
    point = SplitPoint(num_layers=4, front_depth=1, representative_layers=(2,))
    written_sessions(transformer, point, tmp_path)
    model = onnx.load(tmp_path / "back.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Attention") == 3
    assert kinds.count("LogSumExp") == 2
    assert {node.domain for node in model.graph.node} <= {"", "ditrim"}
    assert [(f.domain, f.name) for f in model.functions] == [("ditrim", "LogSumExp")]
    assert next(o.version for o in model.opset_import if o.domain == "") == 23
    tables = [i for i in model.graph.input if "_rope_" in i.name]
    assert len(tables) == 6
    assert {i.type.tensor_type.elem_type for i in tables} == {onnx.TensorProto.FLOAT}
    # FRONT and BACK together hold the transformer's parameters, less what nothing reads.
    sizes = 0
    for role in ("front", "back"):
        with safe_open(tmp_path / f"{role}.safetensors", "np") as file:
            sizes += sum(np.prod(file.get_tensor(name).shape) for name in file.keys())  # noqa: SIM118
    total = sum(p.numel() for p in transformer.parameters() if p.numel() * 4 >= 1024)
    assert 0.7 * total < sizes <= total
    text = (tmp_path / "back.onnx").read_bytes()
    assert b"site-packages" not in text
    assert b".py" not in text
