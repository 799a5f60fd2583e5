"""Weights for a plan that was built without them, from the files that the set's graphs point into.

**Not run on a GPU yet.** A stripped plan knows its weights by the names of the graph's
initializers, which its constants were made too before it was built. They are handed over by
address, straight from the mapped files, so that host memory does not grow by the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.plugins.errors import BackendError, EngineSetError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from ditrim.engines.backends.tensorrt.library import Library
    from ditrim.engines.sets.engine_set import EngineSet

# ONNX TensorProto element type -> name in TensorRT's DataType and bytes an element.
_TYPES = {
    1: ("FLOAT", 4),
    6: ("INT32", 4),
    7: ("INT64", 8),
    9: ("BOOL", 1),
    10: ("HALF", 2),
    16: ("BF16", 2),
}
_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Bytes of one initializer.

    Attributes:
        name: in the graph.
        kind: name of TensorRT's data type.
        data: its bytes, flat; of a mapped file where they lie outside the graph.
        count: elements.
    """

    name: str
    kind: str
    data: np.ndarray[Any, Any]
    count: int


def weights_of(graph: Path) -> Iterator[Weight]:
    """Every initializer of a graph file, in order.

    Raises:
        EngineSetError: a weight has a type that no plan takes, or lies past the end of its file.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_type not in _TYPES:
            raise EngineSetError(
                f"{graph.name}: the weight {tensor.name} is of ONNX type {tensor.data_type}, which "
                "no plan takes"
            )
        kind, size = _TYPES[tensor.data_type]
        data = _bytes_of(graph, tensor)
        yield Weight(name=tensor.name, kind=kind, data=data, count=data.nbytes // size)


def _bytes_of(graph: Path, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    import numpy as np
    from onnx import numpy_helper

    if tensor.data_location != tensor.EXTERNAL:
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    entries = {item.key: item.value for item in tensor.external_data}
    path = graph.parent / entries["location"]
    start, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    if start + length > path.stat().st_size:
        raise EngineSetError(f"{path} ends before the weight {tensor.name}")
    if length == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(length,))


def refit(library: Library, engine: Any, graph: Path, engine_set: EngineSet) -> None:
    """Give a stripped engine its weights; nothing may run on it meanwhile.

    Raises:
        EngineSetError: the graph is missing, or lacks a weight that the plan needs.
        BackendError: the library refuses a weight, or cannot refit.
    """
    module, again = library.module, f"Build it again with: {engine_set.rebuild_command()} --force"
    if not hasattr(module, "Refitter"):
        raise BackendError(
            f"{library.backend} {library.version} cannot refit a plan. Build it without "
            "--weights-stripped"
        )
    if not graph.is_file():
        raise EngineSetError(
            f"engine set {engine_set.folder}: {graph.name}, which says where the weights of a "
            f"stripped plan are, is missing. {again}"
        )
    refitter = module.Refitter(engine, library.logger)
    wanted = set(refitter.get_all_weights())
    held = []
    for weight in weights_of(graph):
        if weight.name not in wanted:
            continue
        kind = getattr(module.DataType, weight.kind)
        held.append(weight.data)  # must outlive the call that reads it
        given = module.Weights(kind, int(weight.data.ctypes.data), weight.count)
        if not refitter.set_named_weights(weight.name, given):
            expected = refitter.get_weights_prototype(weight.name)
            raise BackendError(
                f"the plan refuses the weight {weight.name}: the set holds {weight.count} of "
                f"{weight.kind}, the plan takes {expected.size} of {expected.dtype}. {again}"
            )
    missing = list(refitter.get_missing_weights())
    if missing:
        shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise EngineSetError(
            f"{graph.name} lacks {len(missing)} weights that the plan needs ({shown}). {again}"
        )
    if not refitter.refit_cuda_engine():
        raise BackendError(
            f"{library.backend} {library.version} could not refit the plan. Build the set without "
            "--weights-stripped"
        )
