"""Graphs whose initializers lie in a checkpoint's own files: made, written and checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from ditrim.export.weights import LinkedTensor, WeightIndex, link_weights
from ditrim.plugins.precision import PRECISIONS

_DTYPES = {"F64": ir.DataType.DOUBLE} | {
    item.safetensors: ir.DataType[item.onnx] for item in PRECISIONS.values()
}


class WeightLinker:
    """Gives a graph initializers that lie in a checkpoint's files, each when it is asked for."""

    def __init__(self, graph: ir.Graph, weights: WeightIndex, dtype: ir.DataType) -> None:
        self.graph, self.weights, self.dtype = graph, weights, dtype
        self._values: dict[str, ir.Value] = {}
        self._casts: list[ir.Node] = []

    def weight(self, name: str) -> ir.Value:
        """A tensor of the checkpoint, in the graph's dtype."""
        if name not in self._values:
            tensor = self.weights.tensors[name]
            value = ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape),
                type=ir.TensorType(_DTYPES[tensor.dtype]),
                const_value=self._external(name, tensor),
            )
            self.graph.register_initializer(value)
            if value.dtype != self.dtype:
                cast = ir.node("Cast", [value], {"to": self.dtype.value})
                cast.name = f"{name}.cast"
                cast.outputs[0].name = cast.name
                cast.outputs[0].shape = value.shape
                cast.outputs[0].type = ir.TensorType(self.dtype)
                self._casts.append(cast)
                value = cast.outputs[0]
            self._values[name] = value
        return self._values[name]

    def _external(self, name: str, tensor: LinkedTensor) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location=tensor.file,
            offset=tensor.offset,
            length=tensor.num_bytes,
            dtype=_DTYPES[tensor.dtype],
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=str(self.weights.folder or ""),
        )

    def place_casts(self) -> None:
        """Insert the casts that were needed, before everything else."""
        if self._casts:
            self.graph.insert_before(self.graph[0], self._casts)


def count_nodes(model: ir.Model) -> int:
    """Nodes of a graph once its functions are inlined; those inside `Scan` count too."""

    def count(nodes: Iterable[ir.Node]) -> int:
        total = 0
        for node in nodes:
            function = model.functions.get(node.op_identifier())
            total += 1 if function is None else count(function.all_nodes())
        return total

    return count(model.graph.all_nodes())


def check_linked(path: Path, *, full_check: bool = False) -> None:
    """Run the ONNX checker on a graph whose weight files may be hard links.

    The checker takes a file with several names for an attack. So it is given the graph with inputs
    in the place of external initializers, and that these lie in their files is checked here.

    Args:
        path: of the graph.
        full_check: infer shapes and types too.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: it is not valid.
    """
    model = onnx.load(path, load_external_data=False)
    inline = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inline.append(tensor)
            continue
        entries = {item.key: item.value for item in tensor.external_data}
        file, end = path.parent / entries["location"], int(entries["offset"])
        end += int(entries["length"])
        if file.parent != path.parent or file.is_symlink() or not file.is_file():
            raise onnx.checker.ValidationError(
                f"the initializer {tensor.name} lies in {entries['location']}, which is not a "
                f"plain file beside {path.name}"
            )
        if end > file.stat().st_size:
            raise onnx.checker.ValidationError(
                f"the initializer {tensor.name} ends at byte {end} of {entries['location']}, which "
                f"has {file.stat().st_size}"
            )
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    del model.graph.initializer[:]
    model.graph.initializer.extend(inline)
    onnx.checker.check_model(model, full_check=full_check)


def write_linked(model: ir.Model, folder: Path, role: str, weights: WeightIndex) -> list[str]:
    """Write `<role>.onnx` and put the weight files that it reads beside it.

    Args:
        model: what `assemble_graph` returned.
        folder: of the engine set.
        role: of the graph.
        weights: what the model was assembled with; of a placeholder nothing is linked.

    Returns:
        the names of the files, the graph first.
    """
    files = set()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            files.add(str(value.const_value.location))
    ir.save(model, folder / f"{role}.onnx")
    if weights.is_placeholder:
        return [f"{role}.onnx"]
    link_weights(sorted(files), weights, folder)
    return [f"{role}.onnx", *sorted(files)]
