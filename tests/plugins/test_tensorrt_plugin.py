"""The TensorRT plugin without TensorRT: its functions, called as TensorRT calls them.

The native library is replaced by a stand-in that evaluates dimension expressions. Over it runs
TensorRT's own `tensorrt.plugin` package where its sources are installed (`pip install
tensorrt_cu12_bindings`, or their folder in DITRIM_TENSORRT_BINDINGS); it checks signatures, keeps
the registry and makes the plugin objects that the builder calls. Where they are not, a small
package with the same names serves.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from ditrim.plugins import tensorrt_plugin
from ditrim.plugins.compiled import MAX_SHARED_BYTES, PARAMETERS, compile_kernel
from ditrim.plugins.errors import BackendError, UsageError
from ditrim.plugins.kernel import tile_for_width
from ditrim.plugins.strip import PLUGIN_ATTRIBUTES, scoring_graph_for_backend
from ditrim.plugins.tensorrt_plugin import PLUGIN_ID, register_plugin

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"
)
CAPABILITY = (8, 0)
SCALE = 128**-0.5
LENGTHS = ("B", "H", "R", "N")
Dims = dict[str, int]


class DataType(enum.Enum):
    FLOAT = "FLOAT"
    HALF = "HALF"
    BF16 = "BF16"
    INT32 = "INT32"


class Operation(enum.Enum):
    SUM = staticmethod(lambda a, b: a + b)
    SUB = staticmethod(lambda a, b: a - b)
    PROD = staticmethod(lambda a, b: a * b)
    MAX = staticmethod(max)
    MIN = staticmethod(min)
    FLOOR_DIV = staticmethod(lambda a, b: a // b)
    CEIL_DIV = staticmethod(lambda a, b: -(-a // b))


@dataclass(eq=False)
class Expression:
    """A dimension: a name, a number, or an operation on two; `value` needs the names' values."""

    name: str = ""
    number: int | None = None
    operation: Callable[[int, int], int] | None = None
    operands: tuple[Expression, ...] = ()

    def is_constant(self) -> bool:
        return self.number is not None

    def get_constant_value(self) -> int:
        assert self.number is not None
        return self.number

    def value(self, dims: Dims) -> int:
        if self.operation is not None:
            return self.operation(*(operand.value(dims) for operand in self.operands))
        return dims[self.name] if self.number is None else self.number


class ExpressionBuilder:
    @staticmethod
    def constant(value: int) -> Expression:
        return Expression(number=value)

    @staticmethod
    def operation(operation: Any, first: Expression, second: Expression) -> Expression:
        return Expression(operation=operation, operands=(first, second))


class Base:
    """Stands for every native base class: takes anything, keeps nothing."""

    def __init__(self, *_: Any) -> None: ...


class DimsExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class NativeDims(list[int]):
    MAX_DIMS = 8

    def __init__(self, dims: Any = ()) -> None:
        super().__init__([] if isinstance(dims, int) else dims)


@dataclass
class PluginTensorDesc:
    dims: Any = ()
    type: Any = None
    format: Any = None
    scale: float = 1.0


@dataclass
class DynamicPluginTensorDesc:
    desc: PluginTensorDesc
    opt: Any = ()
    min: Any = ()
    max: Any = ()


@dataclass
class PluginField:
    name: str
    data: Any
    type: Any


@dataclass
class Registry:
    creators: dict[tuple[str, str, str], Any] = field(default_factory=dict)

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def native_library() -> types.ModuleType:
    """What `tensorrt.plugin` uses of TensorRT's native module."""
    library = types.ModuleType("tensorrt")
    registry = Registry()
    bases = "IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickAOTBuild ISymExpr"
    bases += " IPluginV3QuickRuntime IPluginCreatorV3Quick ITensor"
    for name in bases.split():
        setattr(library, name, type(name, (Base,), {}))
    kinds = "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN"
    names = SimpleNamespace(
        __version__="stand-in",
        Logger=type("Logger", (), {"WARNING": 1, "log": lambda *_: None}),
        DataType=DataType,
        float32=DataType.FLOAT,
        int32=DataType.INT32,
        TensorFormat=SimpleNamespace(LINEAR="LINEAR"),
        DimensionOperation=Operation,
        IDimensionExpr=Expression,
        DimsExprs=DimsExprs,
        Dims=NativeDims,
        PluginTensorDesc=PluginTensorDesc,
        DynamicPluginTensorDesc=DynamicPluginTensorDesc,
        PluginField=PluginField,
        PluginFieldCollection=list,
        PluginFieldType=enum.Enum("PluginFieldType", kinds),
        PluginArgType=enum.Enum("PluginArgType", "INT"),
        PluginArgDataType=enum.Enum("PluginArgDataType", "INT8 INT16 INT32"),
        QuickPluginCreationRequest=enum.Enum(
            "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
        ),
        TensorRTPhase=enum.Enum("TensorRTPhase", "BUILD RUNTIME"),
        get_plugin_registry=lambda: registry,
    )
    library.__dict__.update(vars(names))
    return library


# --- A package with the names of `tensorrt.plugin`, for where that is not installed ---


class Length:
    def __init__(self, value: Any) -> None:
        value = Expression(number=value) if isinstance(value, int) else value
        self.expression: Expression = value.expression if isinstance(value, Length) else value

    @property
    def is_constant(self) -> bool:
        return self.expression.is_constant()

    def constant_value(self) -> int:
        return self.expression.get_constant_value()

    def apply(self, operation: Any, other: Any) -> Length:
        operands = (self.expression, Length(other).expression)
        return Length(Expression(operation=operation, operands=operands))

    def __mul__(self, other: Any) -> Length:
        return self.apply(Operation.PROD, other)


@dataclass
class TensorDesc:
    shape_expr: tuple[Length, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape_expr)


class KernelLaunchParams(SimpleNamespace):
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


@dataclass
class AutoTuneCombination:
    io_types: str
    layouts: str
    tactics: list[int]


def small_plugin_package() -> types.ModuleType:
    package = types.ModuleType("tensorrt.plugin")
    functions: dict[str, Callable[..., Any]] = {}

    def decorator(kind: str, last: tuple[str, ...]) -> Callable[..., Any]:
        def check_id(plugin_id: str) -> Callable[..., Any]:
            assert plugin_id == "ditrim::LogSumExp"

            def keep(function: Callable[..., Any]) -> Callable[..., Any]:
                parameters = inspect.signature(function).parameters
                assert not any(isinstance(p.annotation, str) for p in parameters.values())
                inputs = ("queries", "keys", "bias")
                assert tuple(parameters) == (*inputs, *last)
                assert kind not in functions, "registered twice"
                functions[kind] = function
                return function

            return keep

        return check_id

    names = SimpleNamespace(
        functions=functions,
        register=decorator("register", ("scale",)),
        autotune=decorator("autotune", ("outputs",)),
        aot_impl=decorator("aot_impl", ("scale", "outputs", "tactic")),
        TensorDesc=TensorDesc,
        KernelLaunchParams=KernelLaunchParams,
        SymIntExprs=SymIntExprs,
        SymInt32=Length,
        AutoTuneCombination=AutoTuneCombination,
        from_shape_expr=TensorDesc,
        cdiv=lambda a, b: a.apply(Operation.CEIL_DIV, b),
        max=lambda a, b: a.apply(Operation.MAX, b),
    )
    package.__dict__.update(vars(names))
    return package


# --- The builder's part: make the plugin, ask it, and evaluate what it answers ---


@dataclass
class Answer:
    """What the builder ends up with for one node."""

    output_dtype: Any
    output_shape: list[Expression]
    combinations: list[tuple[Any, ...]]
    tactics: list[int]
    name: str
    ptx: str
    launch: dict[str, Expression]
    scalars: list[Expression]


def dimensions(width: Expression) -> tuple[list[Expression], ...]:
    b, h, r, n = (Expression(name=name) for name in LENGTHS)
    return [b, h, r, width], [b, h, n, width], [b, h, n]


LAUNCH_FIELDS = ["grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem"]


def ask_package(library: Any, dtype: DataType, width: Expression, scale: float) -> Answer:
    """Through the plugin object that TensorRT's package makes."""
    creator = library.get_plugin_registry().get_creator("LogSumExp", "1", "ditrim")
    assert [f.name for f in creator.field_names] == ["scale"]
    fields = [PluginField("scale", np.array([scale], np.float32), None)]
    request = library.QuickPluginCreationRequest.STRICT_AOT
    phase = library.TensorRTPhase.BUILD
    plugin = creator.create_plugin("LogSumExp", "ditrim", fields, phase, request)
    types_in = [dtype, dtype, DataType.FLOAT]
    (output_dtype,) = plugin.get_output_data_types(types_in, [4, 4, 3])
    shapes = dimensions(width)
    (output_shape,) = plugin.get_output_shapes(shapes, [], ExpressionBuilder)
    described = [
        DynamicPluginTensorDesc(PluginTensorDesc([-1] * len(shape), kind, "LINEAR"))
        for shape, kind in zip((*shapes, output_shape), (*types_in, output_dtype), strict=True)
    ]
    supported = plugin.get_supported_format_combinations(described, 3)
    combinations = [
        tuple((d.type, d.format) for d in supported[i : i + 4]) for i in range(0, len(supported), 4)
    ]
    inputs, outputs = described[:3], described[3:]
    plugin.configure_plugin(inputs, outputs)
    tactics = plugin.get_valid_tactics()
    plugin = plugin.clone()
    plugin.set_tactic(tactics[0])
    launch = SimpleNamespace()
    scalars: dict[int, Any] = {}
    setter = type("Setter", (), {"__setitem__": lambda _, i, value: scalars.update({i: value})})()
    plugin.get_launch_params(shapes, described, 3, launch, setter, ExpressionBuilder)
    assert setter.nbSymExprs == len(scalars)
    assert {s.dtype for s in scalars.values()} == {library.PluginArgDataType.INT32}
    name, ptx = plugin.get_kernel([d.desc for d in inputs], [d.desc for d in outputs])
    return Answer(
        output_dtype=output_dtype,
        output_shape=list(output_shape),
        combinations=combinations,
        tactics=tactics,
        name=name,
        ptx=ptx.decode(),
        launch={f: getattr(launch, f).expr for f in LAUNCH_FIELDS},
        scalars=[scalars[i].expr for i in range(len(scalars))],
    )


def ask_functions(library: Any, dtype: DataType, width: Expression, scale: float) -> Answer:
    """Straight from the functions that the small package was given."""
    functions = library.plugin.functions
    kinds = (dtype, dtype, DataType.FLOAT)
    tensors = [
        TensorDesc(tuple(map(Length, shape)), kind)
        for shape, kind in zip(dimensions(width), kinds, strict=True)
    ]
    field = np.array([scale], np.float32)
    output = functions["register"](*tensors, field)
    (choice,) = functions["autotune"](*tensors, (output,))
    names = {"FP32": DataType.FLOAT, "FP16": DataType.HALF, "BF16": DataType.BF16}
    columns = [column.strip().split("|") for column in choice.io_types.split(",")]
    combinations = [
        tuple((names[c[min(i, len(c) - 1)]], choice.layouts) for c in columns) for i in range(2)
    ]
    name, ptx, launch, scalars = functions["aot_impl"](*tensors, field, (output,), 1)
    return Answer(
        output_dtype=output.dtype,
        output_shape=[length.expression for length in output.shape_expr],
        combinations=combinations,
        tactics=choice.tactics,
        name=name,
        ptx=ptx,
        launch={f: Length(getattr(launch, f)).expression for f in LAUNCH_FIELDS},
        scalars=[scalar.expression for scalar in scalars],
    )


def bindings_folder() -> Path | None:
    """Where the sources of TensorRT's `plugin` package are, found without importing them."""
    if folder := os.environ.get("DITRIM_TENSORRT_BINDINGS"):
        return Path(folder)
    spec = importlib.util.find_spec("tensorrt_bindings")
    return Path(spec.origin).parent if spec and spec.origin else None


Ask = Callable[..., Answer]


@pytest.fixture(params=["package", "small"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """The plugin registered for sm_80, and how to ask it what a builder asks."""
    before = {name for name in sys.modules if name.partition(".")[0] == "tensorrt"}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    library = native_library()
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    if request.param == "package":
        if (folder := bindings_folder()) is None:
            pytest.skip("needs TensorRT's Python sources: pip install tensorrt_cu12_bindings")
        library.__path__ = [str(folder)]
    else:
        package = small_plugin_package()
        library.plugin = package  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", package)
    monkeypatch.setattr(tensorrt_plugin, "_capability_registered", None)
    register_plugin(CAPABILITY)
    function = ask_package if request.param == "package" else ask_functions

    def ask_for(
        dtype: DataType = DataType.BF16, width: int | None = 128, scale: float = SCALE
    ) -> Answer:
        return function(library, dtype, Expression(name="D", number=width), scale)

    yield ask_for
    for name in [n for n in sys.modules if n.startswith("tensorrt.")]:
        if name not in before:
            del sys.modules[name]


def test_the_result_is_float32_and_has_one_number_a_row(ask: Ask) -> None:
    answer = ask()
    assert answer.output_dtype == DataType.FLOAT
    dims = {"B": 2, "H": 24, "R": 4096, "N": 8704}
    assert [length.value(dims) for length in answer.output_shape] == [2, 24, 4096]


def test_types_are_bfloat16_or_float16_throughout_in_linear_layout(ask: Ask) -> None:
    answer = ask()
    expected = {
        tuple((kind, "LINEAR") for kind in (dtype, dtype, DataType.FLOAT, DataType.FLOAT))
        for dtype in (DataType.BF16, DataType.HALF)
    }
    assert set(answer.combinations) == expected
    assert answer.tactics == [1]


@pytest.mark.parametrize(
    ("dtype", "name"), [(DataType.BF16, "bfloat16"), (DataType.HALF, "float16")]
)
def test_the_kernel_is_the_compiled_one_with_its_scale(
    ask: Ask, dtype: DataType, name: str
) -> None:
    answer = ask(dtype)
    # A graph holds the scale as float32.
    images = [compile_kernel(name, 128, s, 80) for s in (SCALE, float(np.float32(SCALE)))]
    assert answer.ptx in [image.ptx for image in images]
    assert answer.name == images[0].name
    assert f".entry {answer.name}(" in answer.ptx


@pytest.mark.parametrize(
    "lengths", [(1, 24, 4096, 8704), (4, 24, 1, 8704), (2, 3, 65, 1), (1, 24, 0, 7), (0, 4, 9, 9)]
)
@pytest.mark.parametrize("width", [64, 128])
def test_grid_and_scalars_follow_the_lengths(
    ask: Ask, width: int, lengths: tuple[int, ...]
) -> None:
    answer, tile = ask(width=width), tile_for_width(width)
    dims = dict(zip(LENGTHS, lengths, strict=True))
    batch, heads, rows, keys = lengths
    launch = {name: length.value(dims) for name, length in answer.launch.items()}
    programs = batch * heads * -(-rows // tile.block_rows)
    assert launch["grid_x"] == max(programs, 1)
    assert [launch[axis] for axis in ("grid_y", "grid_z", "block_y", "block_z")] == [1] * 4
    assert launch["block_x"] == 32 * tile.num_warps
    assert 0 < launch["shared_mem"] < MAX_SHARED_BYTES
    assert [scalar.value(dims) for scalar in answer.scalars] == [batch * heads, rows, keys]


def test_what_tensorrt_passes_is_what_the_kernel_takes(ask: Ask) -> None:
    answer = ask()
    inputs, outputs = 3, 1
    passed = ["u64"] * inputs + ["u32"] * len(answer.scalars) + ["u64"] * outputs
    declared = answer.ptx.partition(".entry")[2].partition(")")[0]
    found = [
        line.split()[1].removeprefix(".") for line in declared.splitlines() if ".param" in line
    ]
    assert found == passed == list(PARAMETERS)


def test_other_types_are_named() -> None:
    with pytest.raises(UsageError, match=r"takes bfloat16 or float16.*got DataType\.FLOAT"):
        tensorrt_plugin._dtype_name(native_library(), DataType.FLOAT)


def test_other_widths_and_scales_are_named(ask: Ask) -> None:
    with pytest.raises(UsageError, match="needs a fixed head width"):
        ask(width=None)
    with pytest.raises(UsageError, match=r"multiples of 16 .* got 72"):
        ask(width=72)
    with pytest.raises(UsageError, match=r"got scale 0\.0, which is no scale"):
        ask(scale=0.0)


def test_registering_again_is_harmless_but_not_for_another_gpu(ask: Ask) -> None:
    register_plugin(CAPABILITY)
    register_plugin((8, 6))  # runs the same code
    with pytest.raises(UsageError, match=r"registered for compute capability \(8, 0\)"):
        register_plugin((9, 0))


def test_the_node_of_the_stripped_graph_finds_the_plugin(ask: Ask) -> None:
    node = helper.make_node("LogSumExp", ["q", "k", "b"], ["y"], domain="ditrim", scale=SCALE)
    names = ("q", "k", "b", "y")
    values = {n: helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names}
    graph = helper.make_graph([node], "g", [values[n] for n in "qkb"], [values["y"]])
    stripped = scoring_graph_for_backend(helper.make_model(graph), "tensorrt").graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in stripped.attribute}
    # The parser looks a plugin up by these and hands it every attribute that it declares.
    assert f"{attributes['plugin_namespace'].decode()}::{stripped.op_type}" == PLUGIN_ID
    assert set(attributes) == {*PLUGIN_ATTRIBUTES, "scale"}
    assert attributes["aot"] == 1
    assert ask(scale=attributes["scale"]).ptx


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plugin, "_capability_registered", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'ditrim\[tensorrt\]'"):
        register_plugin(CAPABILITY)
    with pytest.raises(UsageError, match=r"not compiled for compute capability 7\.5"):
        register_plugin((7, 5))


def test_a_tensorrt_without_ahead_of_time_plugins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_plugin, "_capability_registered", None)
    library = native_library()
    library.plugin = types.ModuleType("tensorrt.plugin")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    with pytest.raises(
        BackendError, match=r"TensorRT stand-in has no ahead-of-time plugins; 10\.9"
    ):
        register_plugin(CAPABILITY)


def test_without_a_gpu_the_capability_has_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(tensorrt_plugin, "_capability_registered", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no NVIDIA GPU is visible"):
        register_plugin()
