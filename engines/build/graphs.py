"""The graphs of an engine set: weights loaded or linked, traced or assembled, written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.progress import Progress
from ditrim.engines.build.source import Source
from ditrim.engines.build.task import BuildTask
from ditrim.engines.files import format_bytes
from ditrim.engines.sets.manifest import GraphSpec
from ditrim.engines.sets.profiles import plan_roles
from ditrim.engines.sets.specs import TensorSpec
from ditrim.engines.sets.staging import check_free_space
from ditrim.plugins.errors import DitrimError
from ditrim.plugins.precision import PRECISIONS

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn

    from ditrim.export.checkpoint import Checkpoint
    from ditrim.export.lora import Merge
    from ditrim.export.split import SplitPoint

logger = logging.getLogger(__name__)

# Graphs and inline constants, on top of the weights.
_GRAPH_BYTES = 64_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenGraphs:
    """Graphs that lie in a folder, and what the manifest says of their weights.

    Attributes:
        graphs: tensors of each role's graph.
        config: the transformer's.
        weights: samples of every weight before LoRAs are merged, by name.
        merged_weights: samples of those that LoRAs changed, after the merge.
    """

    graphs: dict[str, GraphSpec]
    config: dict[str, Any]
    weights: dict[str, str]
    merged_weights: dict[str, str]


@dataclass(slots=True)
class _Samples:
    """Samples of weights, as they are collected while the weights are read."""

    weights: dict[str, str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)

    def add_files(self, checkpoint: Checkpoint) -> None:
        """Take those of every tensor of a checkpoint."""
        from ditrim.engines.sets.fingerprints import encode_samples, samples_of_file
        from ditrim.export.tensor_header import read_headers

        for file, header in read_headers(checkpoint).items():
            sampled = samples_of_file(checkpoint.folder / file, header)
            self.weights |= {name: encode_samples(values) for name, values in sampled.items()}

    def add_weight(self, name: str, weight: torch.Tensor) -> None:
        """Take those of a weight in memory."""
        from ditrim.engines.sets.fingerprints import encode_samples, samples_of

        self.weights[name] = encode_samples(samples_of(weight))

    def add_merged(self, name: str, weight: torch.Tensor) -> None:
        """Take those of a weight that LoRAs changed."""
        from ditrim.engines.sets.fingerprints import encode_samples, samples_of

        self.merged[name] = encode_samples(samples_of(weight))


def write_graphs(task: BuildTask, folder: Path, progress: Progress) -> WrittenGraphs:
    """Load, merge, trace and write FRONT and BACK."""
    progress.stage("Import torch and diffusers")

    from ditrim.export.lora import read_merge
    from ditrim.export.split import SplitPoint
    from ditrim.export.transformer import check_overrides, empty_transformer

    options, source = task.options, task.source
    dtype = PRECISIONS[options.precision].dtype
    point = SplitPoint(
        num_layers=task.split.num_layers,
        front_depth=task.split.front_depth,
        representative_layers=task.split.representative_layers,
    )
    check_overrides(options.family, options.config)
    where = "the configuration of the random weights"
    if source.checkpoint is not None:
        where = str(source.checkpoint.folder / "config.json")
    empty: Any = empty_transformer(options.family, source.config, where)
    shapes = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    merge = read_merge(
        [(lora.path, lora.scale) for lora in source.loras], shapes, options.family.architecture
    )
    samples = _Samples()
    with _in_layout(task, folder, progress) as checkpoint:
        write = _link_graphs if task.links_weights else _trace_graphs
        graphs = write(
            _Writing(task, checkpoint, point, dtype, merge, samples, empty), folder, progress
        )
    config = {key: value for key, value in empty.config.items() if not key.startswith("_")}
    return WrittenGraphs(
        graphs=graphs, config=config, weights=samples.weights, merged_weights=samples.merged
    )


@dataclass(frozen=True, slots=True)
class _Writing:
    """What the graphs of a build are written from."""

    task: BuildTask
    checkpoint: Checkpoint | None
    point: SplitPoint
    dtype: torch.dtype
    merge: Merge
    samples: _Samples
    empty: nn.Module


@contextmanager
def _in_layout(task: BuildTask, folder: Path, progress: Progress) -> Iterator[Checkpoint | None]:
    """The checkpoint in diffusers' layout; of a single file, a copy for as long as it is needed."""
    described = task.source.checkpoint
    if described is None or not task.source.is_single_file:
        yield described
        return
    from ditrim.export.single_file import convert_single_file

    progress.stage("Convert the single file")
    num_bytes = (described.folder / described.weights[0]).stat().st_size
    check_free_space(folder, 2 * num_bytes)
    converted = folder / "converted"
    converted.mkdir()
    try:
        yield convert_single_file(described, task.options.family, converted / "transformer")
    finally:
        shutil.rmtree(converted)


def _trace_graphs(writing: _Writing, folder: Path, progress: Progress) -> dict[str, GraphSpec]:
    """Graphs that hold their weights in files of their own."""
    from ditrim.export.graph import export_graph, write_graph
    from ditrim.plugins.architectures.transformers import blocks_of

    options, point = writing.task.options, writing.point
    transformer = _load(writing, folder, progress)
    assert len(blocks_of(transformer)) == point.num_layers
    graphs = {}
    for role, part, is_scored in _parts(options):
        progress.stage(f"Trace {role}")
        model = export_graph(
            transformer,
            point,
            part,
            writing.dtype,
            scored=is_scored,
            detailed=options.score_details,
        )
        _adapt(model, options, transformer.config)
        graphs[role] = graph_spec(model, f"{role}.onnx")
        progress.stage(f"Write {role}")
        write_graph(model, folder, role)
        del model
        if role == "front":  # BACK does not need them any more
            for block in blocks_of(transformer)[: point.front_depth]:
                block.to("meta")
        _check_graph_file(folder / f"{role}.onnx")
    return graphs


def _adapt(model: ir.Model, options: BuildOptions, config: Any) -> None:
    """Put in what ONNX Runtime runs faster; graphs alone are for any reader, and stay standard."""
    if options.backend == "onnxruntime" and not options.graph_only:
        from ditrim.engines.backends.onnxruntime.graph import use_own_operators

        is_half = options.precision != "fp32"
        use_own_operators(model, config["num_attention_heads"], is_half=is_half)


def _parts(options: BuildOptions) -> list[tuple[str, str, bool]]:
    """Graphs to write: role, which part of the model it is, and whether it scores."""
    separate = options.separate_anchor
    parts = {"front": ("front", False), "back": ("back", not separate), "anchor": ("back", True)}
    return [(role, *parts[role]) for role in plan_roles(separate_anchor=separate)]


def _link_graphs(writing: _Writing, folder: Path, progress: Progress) -> dict[str, GraphSpec]:
    """Graphs whose weights stay in the checkpoint's own files, but for those that LoRAs change."""
    from ditrim.export.assemble import (
        assemble_graph,
        index_weights,
        num_bytes_to_copy,
        write_linked,
    )
    from ditrim.export.merged_weights import num_bytes_merged, write_merged

    task, options, checkpoint = writing.task, writing.task.options, writing.checkpoint
    assert checkpoint is not None
    weights = index_weights(checkpoint)
    count = _count_of(writing.empty)
    num_bytes = 2 * _GRAPH_BYTES + num_bytes_to_copy(weights, folder)
    num_bytes += num_bytes_merged(writing.merge, weights, writing.dtype)
    if options.builds_plans and not options.weights_stripped:
        num_bytes += count * PRECISIONS[options.precision].num_bytes * (1 + options.separate_anchor)
    check_free_space(folder, num_bytes)
    writing.samples.add_files(checkpoint)
    if writing.merge.changes:
        progress.stage("Merge LoRAs")
        weights = write_merged(
            writing.merge, weights, writing.dtype, folder, writing.samples.add_merged
        )
    graphs = {}
    for role, part, is_scored in _parts(options):
        progress.stage(f"Assemble {role}")
        model = assemble_graph(
            options.family,
            task.source.config,
            writing.point,
            part,
            dtype=writing.dtype,
            weights=weights,
            scored=is_scored,
            detailed=options.score_details,
        )
        _adapt(model, options, writing.empty.config)
        graphs[role] = graph_spec(model, f"{role}.onnx")
        progress.stage(f"Write {role}")
        write_linked(model, folder, role, weights)
        _check_graph_file(folder / f"{role}.onnx")
    return graphs


def _count_of(transformer: nn.Module) -> int:
    return sum(value.numel() for value in transformer.parameters())


def _load(writing: _Writing, folder: Path, progress: Progress) -> Any:
    from torch import nn

    from ditrim.export.transformer import load_transformer

    options, source, merge = writing.task.options, writing.task.source, writing.merge
    samples, count = writing.samples, _count_of(writing.empty)
    # A plan holds the weights once more, and the graph is needed until it is built.
    copies = 1 + options.separate_anchor
    if options.builds_plans and not options.weights_stripped:
        copies *= 2
    check_free_space(
        folder, copies * count * PRECISIONS[options.precision].num_bytes + 2 * _GRAPH_BYTES
    )

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in merge:
            return weight
        changed = merge.apply(name, weight)
        samples.add_merged(name, changed)
        return changed

    progress.stage("Load weights")
    if writing.checkpoint is not None:
        samples.add_files(writing.checkpoint)
        return load_transformer(
            options.family,
            writing.checkpoint,
            writing.dtype,
            on_bytes=progress.update,
            change=merged,
        )
    transformer = _random(options, source, count)
    for name, value in transformer.state_dict().items():
        samples.add_weight(name, value)
        if name in merge:
            value.copy_(merged(name, value))
    return nn.Module.to(transformer, writing.dtype)


def _random(options: BuildOptions, source: Source, count: int) -> Any:
    """The transformer with random weights, in float32."""
    import torch

    from ditrim.export.transformer import load_transformer

    needed, available = count * 4, _available_memory()
    if available is not None and needed > available:
        raise DitrimError(
            f"random weights of {count / 1e9:.1f} G parameters need about {format_bytes(needed)} "
            f"of memory and {format_bytes(available)} are available; make a shallower trial with "
            "--num-layers, for example --num-layers 3"
        )
    config = {key: value for key, value in source.config.items() if not key.startswith("_")}
    return load_transformer(
        options.family, "random", torch.float32, seed=source.seed or 0, config=config
    )


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping; none where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        logger.info("available memory is not known: %s", error)
    return None


def graph_spec(model: ir.Model, file: str) -> GraphSpec:
    """The tensors of a graph that was traced."""
    return GraphSpec(
        file=file,
        inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    import onnx_ir as ir

    names = {ir.DataType[item.onnx]: item.torch_name for item in PRECISIONS.values()}
    names[ir.DataType.INT64] = "int64"
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(name=str(value.name), dtype=names[value.dtype], shape=shape)


def _check_graph_file(path: Path) -> None:
    import onnx

    from ditrim.export.assemble import check_linked

    try:
        check_linked(path)
    except onnx.checker.ValidationError as error:
        raise DitrimError(
            f"the graph {path.name} that was written is not valid ONNX ({error}); this is a fault "
            f"of ditrim with onnx {onnx.__version__}, please report it"
        ) from error
