"""ONNX graphs of FRONT and BACK, with their weights in safetensors files."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, processors_installed
from ditrim.plugins.log_sum_exp import DOMAIN, OP_NAME, OP_VERSION
from ditrim.plugins.onnx_function import OPSET, log_sum_exp_function
from ditrim.plugins.precision import PRECISIONS

logger = logging.getLogger(__name__)

# Initializers from this size on go to the safetensors file; shapes and scalars stay inline.
_EXTERNAL_BYTES = 1024
# What each axis of the seam tensors is called in the graphs.
_AXES: dict[str, tuple[str | int, ...]] = {
    "noisy_latents": ("batch", "noisy", 2),
    "reference_latents": ("batch", "reference", 2),
    "text_embeds": ("batch", "text", 2),
    "timestep": ("batch",),
    "guidance": ("batch",),
    "pooled_text": ("batch", 1),
    "noisy": ("batch", "noisy", 2),
    "reference": ("batch", "reference", 2),
    "text": ("batch", "text", 2),
    "temb": ("batch", 1),
    "reference_temb": ("batch", 1),
    "noisy_rope_cos": ("noisy", 1),
    "noisy_rope_sin": ("noisy", 1),
    "text_rope_cos": ("text", 1),
    "text_rope_sin": ("text", 1),
    "reference_rope_cos": ("batch", "reference", 2),
    "reference_rope_sin": ("batch", "reference", 2),
    "score_rows": ("rows",),
}
_ROPE = tuple(name for name in _AXES if "_rope_" in name)


def front_input_names(graph: FrontGraph) -> list[str]:
    """Inputs of FRONT in order; see `docs/guide/engine-set.md` for shapes and dtypes."""
    names = ["noisy_latents", "reference_latents", "text_embeds", "timestep", *graph.front_inputs]
    return names + list(_ROPE) * (len(graph.blocks) > 0)


def front_output_names(graph: FrontGraph) -> list[str]:
    """Outputs of FRONT in order."""
    return ["noisy", "reference", "text", "temb"] + ["reference_temb"] * graph.has_reference_temb


def back_input_names(graph: BackGraph, *, scored: bool = True) -> list[str]:
    """Inputs of BACK in order, with or without scoring."""
    names = ["noisy", "reference", "text", "temb"]
    names += ["reference_temb"] * graph.has_reference_temb + list(_ROPE)
    return names + ["score_rows"] * scored


def back_output_names(*, scored: bool = True, detailed: bool = False) -> list[str]:
    """Outputs of BACK in order, with or without scoring, and with every layer's scores."""
    return ["velocity"] + ["influence"] * scored + ["layer_scores"] * (scored and detailed)


def example_inputs(
    transformer: Any, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Small random tensors of the right widths for every input of FRONT and BACK, by name."""
    config = transformer.config
    width = transformer.inner_dim
    half = sum(config.axes_dims_rope) // 2
    batch, noisy, reference, text, rows = 2, 12, 10, 7, 5
    sizes = {
        "noisy_latents": (batch, noisy, config.in_channels),
        "reference_latents": (batch, reference, config.in_channels),
        "text_embeds": (batch, text, config.joint_attention_dim),
        "timestep": (batch,),
        "guidance": (batch,),
        "pooled_text": (batch, config.get("pooled_projection_dim", 1)),
        "noisy": (batch, noisy, width),
        "reference": (batch, reference, width),
        "text": (batch, text, width),
        "temb": (batch, width),
        "reference_temb": (batch, width),
        "noisy_rope_cos": (noisy, half),
        "noisy_rope_sin": (noisy, half),
        "text_rope_cos": (text, half),
        "text_rope_sin": (text, half),
        "reference_rope_cos": (batch, reference, half),
        "reference_rope_sin": (batch, reference, half),
    }
    float32 = {"timestep", "guidance", *_ROPE}
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(size, generator=generator).to(
            device, torch.float32 if name in float32 else dtype
        )
        for name, size in sizes.items()
    }
    inputs["score_rows"] = torch.arange(rows, device=device)
    return inputs


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's own chatter off the terminal; its errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for item, level in zip(loggers, levels, strict=True):
                item.setLevel(level)


def trace_graph(
    graph: nn.Module, inputs: dict[str, Tensor], names: list[str], output_names: list[str]
) -> ir.Model:
    """Trace one of the two graphs with dynamic batch and lengths.

    Args:
        graph: a `FrontGraph` or `BackGraph` made with `as_onnx_node=True`, its transformer's
            processors installed.
        inputs: tensors by name, as from `example_inputs`.
        names, output_names: the graph's inputs and outputs, in order.
    """
    import inspect

    parameters = list(inspect.signature(graph.forward).parameters)
    kwargs, dynamic = graph_arguments(parameters, inputs, names)
    model = trace_module(graph, kwargs, dynamic, names, output_names)
    finish_graph(model, len(names))
    return model


def graph_arguments(
    parameters: Iterable[str], inputs: Mapping[str, Tensor], names: Container[str]
) -> tuple[dict[str, Tensor | None], dict[str, dict[int, Any] | None]]:
    """Return the arguments of a graph's `forward`, none for those not in `names`, and free axes."""
    kwargs = {name: inputs[name] if name in names else None for name in parameters}
    free = torch.export.Dim.DYNAMIC
    dynamic = {
        name: None
        if value is None
        else {i: free for i, axis in enumerate(_AXES[name]) if isinstance(axis, str)}
        for name, value in kwargs.items()
    }
    return kwargs, dynamic


def trace_module(
    module: nn.Module,
    kwargs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Trace a module to ONNX, without stack traces and paths: equal modules give equal graphs.

    Args:
        module: to trace.
        kwargs: its arguments, all of them.
        dynamic_shapes: the free axes, in the structure of `kwargs`.
        names, output_names: what the graph's inputs and outputs are called, in order.
    """
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (),
            kwargs=kwargs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=names,
            output_names=output_names,
            verbose=False,
            optimize=True,
            external_data=False,
        )
    assert program is not None
    model: ir.Model = program.model
    model.producer_name, model.producer_version = "ditrim", None
    _drop_tracing_metadata(model)
    return model


def finish_graph(model: ir.Model, num_inputs: int) -> None:
    """Name the free axes of the first inputs and of the outputs; add the scoring function."""
    _name_axes(model, num_inputs)
    model.opset_imports[DOMAIN] = OP_VERSION
    function = ir.serde.deserialize_function(log_sum_exp_function())
    inner = [node for item in model.functions.values() for node in item.all_nodes()]
    if any(node.op_type == OP_NAME for node in (*model.graph.all_nodes(), *inner)):
        model.functions[function.identifier()] = function


def _name_axes(model: ir.Model, num_inputs: int) -> None:
    """Give the inputs' free axes readable names in place of the tracer's symbols."""
    for value in model.graph.inputs[:num_inputs]:
        axes = _AXES[str(value.name)]
        assert value.shape is not None
        value.shape = ir.Shape(
            [
                axis if isinstance(axis, str) else size
                for axis, size in zip((*axes, *range(9)), value.shape, strict=False)
            ]
        )
    lengths: dict[str, tuple[str | int, ...]] = {
        "velocity": ("batch", "noisy"),
        "influence": ("batch", "reference"),
        "layer_scores": ("batch", 1, 2, "reference"),
    }
    for value in model.graph.outputs:
        axes = lengths.get(str(value.name)) or _AXES[str(value.name)]
        assert value.shape is not None
        value.shape = ir.Shape(
            [
                axes[i] if i < len(axes) and isinstance(axes[i], str) else size
                for i, size in enumerate(value.shape)
            ]
        )


def _drop_tracing_metadata(model: ir.Model) -> None:
    """Remove stack traces and paths of the tracing machine: equal builds give equal files."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def export_graph(
    transformer: Any,
    point: SplitPoint,
    role: str,
    dtype: torch.dtype,
    *,
    scored: bool = True,
    detailed: bool = False,
) -> ir.Model:
    """Trace FRONT or BACK of a diffusers transformer; the transformer is left as it was.

    Args:
        transformer: in `dtype`, in evaluation mode.
        point: where to cut and which layers score.
        role: "front" or "back".
        dtype: of latents, embeddings and weights; RoPE tables and timesteps stay float32.
        scored: false leaves `score_rows` and `influence` out of BACK.
        detailed: true adds `layer_scores` to a BACK that is scored.
    """
    inputs = example_inputs(transformer, dtype)
    roles = point.scoring_roles(scored=scored, detailed=detailed)
    with processors_installed(transformer, roles):
        if role == "front":
            front = FrontGraph(transformer, point, as_onnx_node=True).eval()
            return trace_graph(front, inputs, front_input_names(front), front_output_names(front))
        back = BackGraph(transformer, point, as_onnx_node=True).eval()
        names = back_input_names(back, scored=scored)
        output_names = back_output_names(scored=scored, detailed=detailed)
        return trace_graph(back, inputs, names, output_names)


def write_graph(model: ir.Model, folder: Path, role: str) -> list[str]:
    """Write `<role>.onnx` and `<role>.safetensors` into a folder.

    The graph's initializers point into the safetensors file by offset; no weight is stored twice.

    Returns:
        the names of the files written.
    """
    import numpy as np

    external = {
        str(value.name): value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _EXTERNAL_BYTES
    }
    weights = f"{role}.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in external.items():
        tensor = value.const_value
        assert tensor is not None
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape.numpy()),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Runtimes map the file: a header padded to 4096 bytes keeps the first tensor aligned.
    encoded += b" " * (-(len(encoded) + 8) % 4096)
    base = 8 + len(encoded)
    with open(folder / weights, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for value in external.values():
            tensor = value.const_value
            assert tensor is not None
            array = tensor.numpy()
            file.write(np.ascontiguousarray(array).tobytes())
    for name, value in external.items():
        tensor = value.const_value
        assert tensor is not None
        start, end = header[name]["data_offsets"]
        value.const_value = ir.ExternalTensor(
            location=weights,
            offset=base + start,
            length=end - start,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=str(folder),
        )
    ir.save(model, folder / f"{role}.onnx")
    return [f"{role}.onnx", weights]


_SAFETENSORS_DTYPES = {ir.DataType[item.onnx]: item.safetensors for item in PRECISIONS.values()}
_SAFETENSORS_DTYPES |= {
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.DOUBLE: "F64",
}
