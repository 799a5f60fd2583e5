"""Graphs of FRONT and BACK at full size, without loading the weights.

Replaces: tracing every block of a transformer whose weights are in memory. Each kind of block is
traced once, as an ONNX function that takes its weights as inputs; a layer is a call of it with that
layer's tensors, which lie in the checkpoint's own files. The graph around the blocks is traced by
`trace_graph`'s means with one node in the place of each block, so names, axes and dtypes are those
of `export_graph`.

Limits: what runs the graph has to inline functions (ONNX Runtime and TensorRT's parser do).
Trade-off: a linear layer's weight keeps the checkpoint's layout (out, in) and is transposed in the
graph, and one that is stored in another dtype is cast there; both are constants for the runtime to
fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ditrim.export.family import Family
from ditrim.export.graph import (
    back_input_names,
    back_output_names,
    example_inputs,
    finish_graph,
    front_input_names,
    front_output_names,
    graph_arguments,
    trace_module,
)
from ditrim.export.linked_graph import WeightLinker, check_linked, count_nodes, write_linked
from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, processors_installed
from ditrim.export.transformer import empty_transformer
from ditrim.export.weights import (
    WeightIndex,
    check_weights,
    index_placeholder,
    index_weights,
    num_bytes_to_copy,
)
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.attention import JointContext
from ditrim.plugins.log_sum_exp import DOMAIN, OP_VERSION
from ditrim.plugins.precision import precision_of

__all__ = [
    "WeightIndex",
    "assemble_graph",
    "check_linked",
    "count_nodes",
    "index_placeholder",
    "index_weights",
    "num_bytes_to_copy",
    "write_linked",
]

_LAYER = "layer"
# What the functions of blocks with a role are called, and what such a block gives.
_SUFFIXES = {"plain": "", "score": "Scored", "detail": "Detailed"}
_SCORE_OUTPUTS = {"plain": [], "score": ["influence"], "detail": ["scores"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Key of an ONNX function: blocks of equal keys share one.

    Attributes:
        block: the class's name.
        role: "plain", "score" (gives an influence) or "detail" (gives three scores).
        is_last: the last block of BACK, which gives its noisy rows alone and no text.
    """

    block: str
    role: str
    is_last: bool

    @property
    def is_scored(self) -> bool:
        """Whether the block takes `score_rows`."""
        return self.role != "plain"

    @property
    def has_noisy_positions(self) -> bool:
        """Whether it takes a tensor as long as the noisy tokens are many.

        A function has no integer inputs that are lengths: a tensor of that length says it.
        """
        return self.is_scored or self.is_last

    @property
    def op_type(self) -> str:
        """Name of the ONNX function."""
        return self.block + _SUFFIXES[self.role] + "Last" * self.is_last


class _CallNode(nn.Module):
    """Stands in for a block while the graph around it is traced: emits one node."""

    def __init__(self, kind: _Kind, layer: int) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: JointContext,
        modulate_index: Tensor | None = None,
        **_: None,
    ) -> tuple[Tensor, Tensor]:
        context, hidden, text = image_rotary_emb, hidden_states, encoder_hidden_states
        inputs = [hidden, text, temb, context.rope_cos, context.rope_sin]
        if modulate_index is not None:
            inputs.append(modulate_index)
        batch, num_noisy = hidden.shape[0], context.num_noisy
        if self.kind.has_noisy_positions:
            inputs.append(torch.arange(num_noisy))
        if self.kind.is_last:
            dtypes = [hidden.dtype]
            shapes = [torch.Size((batch, num_noisy, hidden.shape[2]))]
        else:
            dtypes, shapes = [hidden.dtype, text.dtype], [hidden.shape, text.shape]
        if self.kind.is_scored:
            assert context.score_rows is not None
            inputs.append(context.score_rows)
            dtypes.append(torch.float32)
            num_reference = hidden.shape[1] - num_noisy
            is_detailed = self.kind.role == "detail"
            shapes.append(torch.Size((batch, *[3] * is_detailed, num_reference)))
        outputs = list(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{self.kind.op_type}",
                inputs,
                attrs={_LAYER: self.layer},
                dtypes=dtypes,
                shapes=shapes,
                version=OP_VERSION,
            )
        )
        if self.kind.role == "score":
            context.influences.append(outputs.pop())
        elif self.kind.role == "detail":
            context.details.append(outputs.pop())
        return (text if self.kind.is_last else outputs[1]), outputs[0]


class _LiftedGraph(nn.Module):
    """A graph that takes its weights as an argument, so that none need be in memory."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self._graph = (graph,)  # in a tuple: its parameters are not this module's

    def forward(
        self, inputs: dict[str, Tensor | None], weights: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        return torch.func.functional_call(self._graph[0], weights, kwargs=inputs)


class _LiftedBlock(nn.Module):
    """A block that takes its weights as an argument."""

    def __init__(self, block: nn.Module, kind: _Kind, architecture: str) -> None:
        super().__init__()
        self._block, self.kind = (block,), kind
        self._arguments = ARCHITECTURES[architecture].block_arguments

    def forward(
        self,
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        is_reference: Tensor | None,
        noisy_positions: Tensor | None,
        score_rows: Tensor | None,
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        context = JointContext(
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            num_text=text.shape[1],
            num_noisy=0 if noisy_positions is None else noisy_positions.shape[0],
            score_rows=score_rows,
            as_onnx_node=True,
        )
        arguments = self._arguments(hidden, text, temb, context, is_reference)
        text, hidden = torch.func.functional_call(self._block[0], weights, kwargs=arguments)
        scores = [*context.influences, *context.details]
        return (hidden, *scores) if self.kind.is_last else (hidden, text, *scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TracedKind:
    """A kind of block.

    Attributes:
        function: its ONNX function; shared by the graphs of a process, so never changed.
        weights: names of its weights in the block, in the order of the function's last inputs.
    """

    function: onnx.FunctionProto
    weights: tuple[str, ...]


# FRONT, BACK and a BACK without scoring share kinds of blocks, and tracing one takes seconds.
_TRACED: dict[tuple[Any, ...], _TracedKind] = {}
_TRACED_LIMIT = 16


def assemble_graph(
    family: Family,
    config: Mapping[str, Any],
    point: SplitPoint,
    role: str,
    *,
    dtype: torch.dtype,
    weights: WeightIndex,
    scored: bool = True,
    detailed: bool = False,
) -> ir.Model:
    """FRONT or BACK of a checkpoint, its initializers pointing into the checkpoint's files.

    Args:
        family: what model.
        config: the checkpoint's config.json.
        point: where to cut and which layers score.
        role: "front" or "back".
        dtype: of latents, embeddings and computation; RoPE tables and timesteps stay float32.
            Weights that are stored in another dtype are cast in the graph.
        weights: where the weights lie.
        scored: false leaves `score_rows` and `influence` out of BACK.
        detailed: true adds `layer_scores` to a BACK that is scored.

    Returns:
        a model for `write_linked`, with the inputs and outputs of `export_graph`.

    Raises:
        CheckpointError: the weights are not those of the configuration; names the tensor.
    """
    transformer: Any = empty_transformer(family, config, "config.json")
    check_weights(weights, transformer)
    nn.Module.to(transformer, dtype)
    is_scored = scored and role == "back"
    roles = point.scoring_roles(scored=is_scored, detailed=detailed)
    with processors_installed(transformer, roles):
        graph: FrontGraph | BackGraph
        if role == "front":
            graph = FrontGraph(transformer, point, as_onnx_node=True).eval()
            names, output_names = front_input_names(graph), front_output_names(graph)
            first = 0
        else:
            graph = BackGraph(transformer, point, as_onnx_node=True).eval()
            names = back_input_names(graph, scored=scored)
            output_names = back_output_names(scored=scored, detailed=detailed)
            first = point.front_depth
        blocks = {first + i: block for i, block in enumerate(graph.blocks)}
        kinds = {
            layer: _Kind(
                block=type(block).__name__,
                role=roles.get(layer, "plain"),
                is_last=layer == point.num_layers - 1,
            )
            for layer, block in blocks.items()
        }
        inputs = example_inputs(transformer, dtype)
        model_key = (type(transformer).__name__, repr(sorted(transformer.config.items())), dtype)
        traced: dict[_Kind, _TracedKind] = {}
        for layer, kind in kinds.items():
            if kind not in traced:
                traced[kind] = _traced_once((*model_key, kind), blocks[layer], kind, inputs, graph)
        graph.blocks = nn.ModuleList(_CallNode(kind, layer) for layer, kind in kinds.items())
        model = _trace_around(graph, inputs, names, output_names)
    linker = WeightLinker(model.graph, weights, ir.DataType[precision_of(dtype).onnx])
    for value in [value for value in model.graph.inputs[len(names) :] if value.uses()]:
        ir.convenience.replace_all_uses_with(value, linker.weight(str(value.name)))
    del model.graph.inputs[len(names) :]
    paths = {id(module): path for path, module in transformer.named_modules()}
    _fill_calls(
        model.graph,
        linker,
        {layer: (paths[id(block)], traced[kinds[layer]]) for layer, block in blocks.items()},
    )
    linker.place_casts()
    for traced_kind in traced.values():
        function = ir.serde.deserialize_function(traced_kind.function)
        model.functions[function.identifier()] = function
    finish_graph(model, len(names))
    return model


def _traced_once(
    key: tuple[Any, ...],
    block: nn.Module,
    kind: _Kind,
    inputs: Mapping[str, Tensor],
    graph: FrontGraph | BackGraph,
) -> _TracedKind:
    """`_trace_block`, or what it returned when this process called it with this key before."""
    if key not in _TRACED:
        while len(_TRACED) >= _TRACED_LIMIT:
            del _TRACED[next(iter(_TRACED))]
        _TRACED[key] = _trace_block(block, kind, inputs, graph)
    return _TRACED[key]


def _untouched(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters by name, in memory that is never written and so never taken."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype)
        for name, value in module.named_parameters()
    }


def _trace_around(
    graph: FrontGraph | BackGraph,
    inputs: Mapping[str, Tensor],
    names: list[str],
    output_names: list[str],
) -> ir.Model:
    """Trace a graph whose blocks are `_CallNode`s; its weights become inputs after the others."""
    import inspect

    parameters = list(inspect.signature(graph.forward).parameters)
    arguments, dynamic = graph_arguments(parameters, inputs, names)
    weights = _untouched(graph)
    return trace_module(
        _LiftedGraph(graph),
        {"inputs": arguments, "weights": weights},
        {"inputs": dynamic, "weights": dict.fromkeys(weights)},
        [*names, *weights],
        output_names,
    )


def _trace_block(
    block: nn.Module, kind: _Kind, inputs: Mapping[str, Tensor], graph: FrontGraph | BackGraph
) -> _TracedKind:
    """Trace one block as a function of its tensors and its weights.

    Args:
        block: with this package's attention processor.
        kind: what it is.
        inputs: example tensors of the graphs.
        graph: that it is of.
    """
    is_paired = graph.has_reference_temb  # time embeddings come as (B, 2, d), see `run_blocks`
    noisy, reference, text = inputs["noisy"], inputs["reference"], inputs["text"]
    hidden = torch.cat([noisy, reference], dim=1)
    length, temb = hidden.shape[1] + text.shape[1], inputs["temb"]
    half = inputs["noisy_rope_cos"].shape[1]
    tensors: dict[str, Tensor | None] = {
        "hidden": hidden,
        "text": text,
        "temb": torch.stack([temb, temb], dim=1) if is_paired else temb,
        "rope_cos": torch.zeros(hidden.shape[0], length, half),
        "rope_sin": torch.zeros(hidden.shape[0], length, half),
        "is_reference": torch.zeros(hidden.shape[1], 1, dtype=torch.bool) if is_paired else None,
        "noisy_positions": torch.arange(noisy.shape[1]) if kind.has_noisy_positions else None,
        "score_rows": inputs["score_rows"] if kind.is_scored else None,
    }
    free = torch.export.Dim.DYNAMIC
    sequences = {"hidden", "text", "rope_cos", "rope_sin"}
    dynamic = {
        name: None if value is None else {0: free, 1: free} if name in sequences else {0: free}
        for name, value in tensors.items()
    }
    names = [name for name, value in tensors.items() if value is not None]
    weights = _untouched(block)
    text_outputs = [] if kind.is_last else ["text_out"]
    outputs = ["hidden_out", *text_outputs, *_SCORE_OUTPUTS[kind.role]]
    model = trace_module(
        _LiftedBlock(block, kind, graph.architecture),
        {**tensors, "weights": weights},
        {**dynamic, "weights": dict.fromkeys(weights)},
        [*names, *weights],
        outputs,
    )
    used = [value for value in model.graph.inputs[len(names) :] if value.uses()]
    model.graph.inputs[len(names) :] = used
    _inline_constants(model.graph)
    function = ir.Function(DOMAIN, kind.op_type, graph=model.graph, attributes=[])
    return _TracedKind(
        function=ir.serde.serialize_function(function),
        weights=tuple(str(value.name) for value in used),
    )


def _inline_constants(graph: ir.Graph) -> None:
    """Turn initializers into `Constant` nodes, since a function has none; forget the shapes."""
    nodes = []
    for value in list(graph.initializers.values()):
        node = ir.node("Constant", [], {"value": value.const_value})
        node.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        nodes.append(node)
    graph.initializers.clear()
    if nodes:
        graph.insert_before(graph[0], nodes)
    for node in graph:
        for value in node.outputs:
            value.shape = value.type = None


def _fill_calls(
    graph: ir.Graph, linker: WeightLinker, layers: Mapping[int, tuple[str, _TracedKind]]
) -> None:
    """Give the nodes of `_CallNode`s their weights.

    Args:
        layers: by layer, the path of its block in the transformer and its kind.
    """
    for node in list(graph):
        if _LAYER not in node.attributes or node.domain != DOMAIN:
            continue
        path, kind = layers[node.attributes[_LAYER].as_int()]
        inputs = [linker.weight(f"{path}.{name}") for name in kind.weights]
        call = ir.Node(
            DOMAIN, node.op_type, [*node.inputs, *inputs], num_outputs=len(node.outputs), name=path
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [call], node.outputs, call.outputs
        )
