"""From options to an engine set: recognise, load, trace, write, verify, put in place."""

from __future__ import annotations

import datetime as dt
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ditrim.engines.engine_set import (
    EngineSet,
    check_files,
    load_engine_set,
    read_manifest,
    sha256_of,
)
from ditrim.engines.identity import backend_version, identity_of
from ditrim.engines.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    GraphSpec,
    Manifest,
    PlanSpec,
    TensorSpec,
)
from ditrim.engines.options import BuildOptions
from ditrim.engines.place import check_place, check_replaceable
from ditrim.engines.profiles import plan_roles
from ditrim.engines.source import (
    Source,
    SplitChoice,
    check_unchanged,
    choose_split,
    describe,
    find_source,
    fingerprint,
    weights_identity,
)
from ditrim.engines.staging import (
    check_free_space,
    commit,
    format_bytes,
    fsync_path,
    recover,
    staging_folder,
    target_locked,
    write_durably,
)
from ditrim.engines.tensorrt_builder import (
    LibraryFacts,
    PlanRequest,
    Target,
    ask_library,
    build_plan,
    choose_target,
    describe_target,
)
from ditrim.engines.tensorrt_library import present_gpu
from ditrim.plugins.errors import DitrimError, EngineSetError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ditrim.export.split import SplitPoint

logger = logging.getLogger(__name__)

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Graphs and inline constants, on top of the weights.
_GRAPH_BYTES = 64_000


class Progress(Protocol):
    """Who is told how a build goes."""

    def stage(self, name: str) -> None:
        """A new stage begins. May raise to stop the build."""
        ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        """How much of this stage's work is done, and in all; in bytes, or in steps."""
        ...

    def note(self, message: str) -> None:
        """Something that a person should know."""
        ...


class LoggedProgress:
    """Tells the log; what `build_engine_set` uses when nobody else asks."""

    def stage(self, name: str) -> None:
        logger.info("%s", name)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        pass

    def note(self, message: str) -> None:
        logger.warning("%s", message)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build came to.

    Attributes:
        engine_set: at the target.
        is_reused: whether it was there already.
        seconds: wall time.
    """

    engine_set: EngineSet
    is_reused: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A build that was decided on."""

    options: BuildOptions
    source: Source
    split: SplitChoice
    prints: Mapping[str, Mapping[str, Any]]
    identity: str
    target: Path
    built_for: Target | None


def build_engine_set(options: BuildOptions, *, progress: Progress | None = None) -> EngineSet:
    """Build an engine set, or recognise that an unchanged one is there.

    Args:
        options: what to build.
        progress: who is told; none means the log.

    Raises:
        UsageError: the options, the weights or the target cannot be accepted.
        DitrimError: the build failed; what was at the target is still there.
    """
    return run_build(options, progress=progress).engine_set


def run_build(options: BuildOptions, *, progress: Progress | None = None) -> BuildResult:
    """See `build_engine_set`."""
    progress = progress or LoggedProgress()
    start = time.monotonic()
    target = Path(os.path.realpath(options.target))
    check_place(target)
    recover(target)
    check_replaceable(target)
    progress.stage("Fingerprint")
    if options.needs_library:
        backend_version(options.backend)
    built_for = choose_target(options, present_gpu()) if options.builds_plans else None
    source = find_source(options)
    split = choose_split(options, source)
    prints = fingerprint(source, _known_prints(target, source), progress.update)
    plan = _Plan(
        options=options,
        source=source,
        split=split,
        prints=prints,
        identity=_identity(options, source, split, prints, built_for),
        target=target,
        built_for=built_for,
    )
    reused = None if options.force else _find_unchanged(plan)
    is_reused = isinstance(reused, EngineSet)
    if not isinstance(reused, EngineSet):
        if reused is not None:
            progress.note(reused)
        with target_locked(target, progress.note):
            # Whoever had the lock may have built this very set.
            reused = None if options.force else _find_unchanged(plan)
            is_reused = isinstance(reused, EngineSet)
            if not is_reused:
                _build(plan, progress)
    engine_set = reused if isinstance(reused, EngineSet) else load_engine_set(target)
    engine_set = replace(engine_set, folder=options.target)
    return BuildResult(engine_set=engine_set, is_reused=is_reused, seconds=time.monotonic() - start)


def _known_prints(target: Path, source: Source) -> Mapping[str, Any]:
    """Fingerprints that the last build of this target took of the same weights."""
    try:
        known = read_manifest(target).source
    except (EngineSetError, OSError):
        return {}
    if (known.get("kind"), known.get("location")) != (source.kind, source.location):
        return {}
    files = known.get("files")
    return files if isinstance(files, Mapping) else {}


def _identity(
    options: BuildOptions,
    source: Source,
    split: SplitChoice,
    prints: Mapping[str, Mapping[str, Any]],
    built_for: Target | None,
) -> str:
    return identity_of(
        options={**options.shaping(), "split": asdict(split), "source": source.kind},
        config=dict(source.config),
        weights=weights_identity(source, prints),
        backend=options.backend,
        device="any" if built_for is None else built_for.identity(),
        is_graph_only=not options.needs_library,
    )


def _find_unchanged(plan: _Plan) -> EngineSet | str | None:
    """The set at the target if it is the one to build; otherwise why not, or none if none is."""
    target = plan.target
    if not (target / MANIFEST_NAME).is_file():
        return None
    try:
        engine_set = EngineSet(folder=target, manifest=read_manifest(target))
        manifest = engine_set.manifest
        if manifest.identity != plan.identity:
            return f"{target} was built from other inputs; building it anew"
        check_files(engine_set, hashes=plan.options.verify == "hashes")
    except EngineSetError as error:
        return f"{error.args[0].split('. Build it again')[0]}; building it anew"
    return _refresh_prints(plan, engine_set)


def _refresh_prints(plan: _Plan, engine_set: EngineSet) -> EngineSet:
    """Note the new status of weight files that were touched but not changed."""
    described = describe(plan.source, plan.prints)
    if described == engine_set.manifest.source:
        return engine_set
    manifest = replace(engine_set.manifest, source=described)
    target = engine_set.folder
    try:
        with target_locked(target, wait=False), staging_folder(target) as folder:
            if read_manifest(target) != engine_set.manifest:
                return engine_set  # replaced since it was read
            write_durably(folder / MANIFEST_NAME, manifest.to_json())
            os.replace(folder / MANIFEST_NAME, target / MANIFEST_NAME)
    except OSError as error:
        logger.info("the fingerprints in %s stay as they were: %s", target, error)
        return engine_set
    return replace(engine_set, manifest=manifest)


def _build(plan: _Plan, progress: Progress) -> None:
    with _naming_path(plan.target), staging_folder(plan.target) as folder:
        facts = None
        if plan.built_for is not None:
            progress.stage("Check the builder")
            facts = ask_library(plan.built_for)
        graphs, config = _write_graphs(plan, folder, progress)
        plans: dict[str, PlanSpec] = {}
        built_for: dict[str, Any] = {}
        if facts is not None:
            graphs, plans, built_for = _build_plans(plan, facts, graphs, folder, progress)
        progress.stage("Verify")
        prints = check_unchanged(plan.source, plan.prints, were_linked=_links_weights(plan))
        files = _finish_files(folder, progress, _known_hashes(plan, folder))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            identity=plan.identity,
            ditrim_version=version("ditrim"),
            model=plan.options.model,
            architecture=plan.options.family.architecture,
            transformer_class=plan.options.family.transformer_class,
            pipeline_class=plan.options.family.pipeline_class,
            transformer_config=config,
            num_layers=plan.split.num_layers,
            front_depth=plan.split.front_depth,
            representative_layers=plan.split.representative_layers,
            layers_source=plan.split.layers_source,
            ladder=plan.options.reference_ladder,
            limits=plan.options.limits,
            precision=plan.options.precision,
            backend=plan.options.backend,
            backend_version=backend_version(plan.options.backend)
            if plan.options.needs_library
            else "",
            graphs=graphs,
            plans=plans,
            target=built_for,
            files=files,
            source=describe(plan.source, prints),
            command=_command(plan),
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        write_durably(folder / MANIFEST_NAME, manifest.to_json())
        load_engine_set(folder)
        check_replaceable(plan.target)
        progress.stage("Place")
        commit(folder, plan.target)


def _command(plan: _Plan) -> str:
    """A command line that works from any folder."""
    options = replace(plan.options, output=str(plan.target))
    if plan.source.kind == "folder":
        options = replace(options, weights=plan.source.location)
    return options.command()


@contextmanager
def _naming_path(path: Path) -> Iterator[None]:
    """Let an OSError that names no file name the target."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write_graphs(
    plan: _Plan, folder: Path, progress: Progress
) -> tuple[dict[str, GraphSpec], dict[str, Any]]:
    """Load, trace and write FRONT and BACK; the tensors of each and the transformer's config."""
    progress.stage("Import torch and diffusers")
    import torch

    from ditrim.export.graph import export_graph, write_graph
    from ditrim.export.split import SplitPoint, blocks_of

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
        plan.options.precision
    ]
    point = SplitPoint(
        num_layers=plan.split.num_layers,
        front_depth=plan.split.front_depth,
        representative_layers=plan.split.representative_layers,
    )
    if _links_weights(plan):
        return _link_graphs(plan, point, dtype, folder, progress)
    transformer = _load(plan, folder, dtype, progress)
    assert len(blocks_of(transformer)) == point.num_layers
    graphs = {}
    for role, part, is_scored in _parts(plan.options):
        progress.stage(f"Trace {role}")
        model = export_graph(transformer, point, part, dtype, scored=is_scored)
        graphs[role] = graph_spec(model, f"{role}.onnx")
        progress.stage(f"Write {role}")
        write_graph(model, folder, role)
        del model
        if role == "front":  # BACK does not need them any more
            for block in blocks_of(transformer)[: point.front_depth]:
                block.to("meta")
        _check_graph_file(folder / f"{role}.onnx")
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return graphs, config


def _links_weights(plan: _Plan) -> bool:
    """Whether the graphs point into the checkpoint's own files."""
    options = plan.options
    return plan.source.checkpoint is not None and (options.graph_only or options.builds_plans)


def _parts(options: BuildOptions) -> list[tuple[str, str, bool]]:
    """Graphs to write: role, which part of the model it is, and whether it scores."""
    separate = options.separate_anchor
    parts = {"front": ("front", False), "back": ("back", not separate), "anchor": ("back", True)}
    return [(role, *parts[role]) for role in plan_roles(separate_anchor=separate)]


def _link_graphs(
    plan: _Plan, point: SplitPoint, dtype: torch.dtype, folder: Path, progress: Progress
) -> tuple[dict[str, GraphSpec], dict[str, Any]]:
    """`_write_graphs` for a checkpoint whose weights stay in its own files."""
    from ditrim.export.assemble import (
        assemble_graph,
        index_weights,
        num_bytes_to_copy,
        write_linked,
    )
    from ditrim.export.checkpoint import empty_transformer

    checkpoint, options = plan.source.checkpoint, plan.options
    assert checkpoint is not None
    weights = index_weights(checkpoint)
    where = str(checkpoint.folder / "config.json")
    transformer = empty_transformer(options.family, plan.source.config, where)
    count = sum(value.numel() for value in transformer.parameters())
    num_bytes = 2 * _GRAPH_BYTES + num_bytes_to_copy(weights, folder)
    if options.builds_plans and not options.weights_stripped:
        num_bytes += count * _ELEMENT_BYTES[options.precision] * (1 + options.separate_anchor)
    check_free_space(folder, num_bytes)
    graphs = {}
    for role, part, is_scored in _parts(options):
        progress.stage(f"Assemble {role}")
        model = assemble_graph(
            options.family,
            plan.source.config,
            point,
            part,
            dtype=dtype,
            weights=weights,
            scored=is_scored,
        )
        graphs[role] = graph_spec(model, f"{role}.onnx")
        progress.stage(f"Write {role}")
        write_linked(model, folder, role, weights)
        _check_graph_file(folder / f"{role}.onnx")
    config: Any = transformer.config
    return graphs, {key: value for key, value in config.items() if not key.startswith("_")}


def _build_plans(
    plan: _Plan,
    facts: LibraryFacts,
    graphs: Mapping[str, GraphSpec],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, GraphSpec], dict[str, PlanSpec], dict[str, Any]]:
    """Build a plan from each graph; without the graphs, unless the plans need them to be loaded.

    Returns:
        the manifest's graphs, plans and target.
    """
    options, target = plan.options, plan.built_for
    assert target is not None
    plans: dict[str, PlanSpec] = {}
    for role, profiles in options.profiles().items():
        graph = graphs[role]
        request = PlanRequest(
            role=role,
            graph=folder / graph.file,
            plan=folder / f"{role}.plan",
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=profiles,
            target=target,
            options=options,
        )
        plans[role] = build_plan(request, progress).spec
    if not options.weights_stripped:
        kept = {spec.file for spec in plans.values()}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()
    scored = {"front": "front", "back": "anchor" if options.separate_anchor else "back"}
    described = {
        role: replace(graphs[other], file=plans[other].file) for role, other in scored.items()
    }
    return described, plans, describe_target(target, facts, options)


def _known_hashes(plan: _Plan, folder: Path) -> dict[str, str]:
    """Hashes of files that are the checkpoint's own, which were taken already."""
    if plan.source.checkpoint is None:
        return {}
    return {
        name: entry["sha256"]
        for name, entry in plan.prints.items()
        if (folder / name).is_file()
        and (folder / name).samefile(plan.source.checkpoint.folder / name)
    }


def _load(plan: _Plan, folder: Path, dtype: torch.dtype, progress: Progress) -> Any:
    from ditrim.export.checkpoint import check_overrides, empty_transformer, load_transformer

    options, source = plan.options, plan.source
    check_overrides(options.family, options.config)
    where = "the configuration of the random weights"
    if source.checkpoint is not None:
        where = str(source.checkpoint.folder / "config.json")
    empty = empty_transformer(options.family, source.config, where)
    count = sum(value.numel() for value in empty.parameters())
    # A plan holds the weights once more, and the graph is needed until it is built.
    copies = 1 + options.separate_anchor
    if options.builds_plans and not options.weights_stripped:
        copies *= 2
    check_free_space(folder, copies * count * _ELEMENT_BYTES[options.precision] + 2 * _GRAPH_BYTES)
    progress.stage("Load weights")
    if source.checkpoint is not None:
        return load_transformer(options.family, source.checkpoint, dtype, on_bytes=progress.update)
    needed, available = count * 4, _available_memory()
    if available is not None and needed > available:
        raise DitrimError(
            f"random weights of {count / 1e9:.1f} G parameters need about {format_bytes(needed)} "
            f"of memory and {format_bytes(available)} are available; make a shallower trial with "
            "--num-layers, for example --num-layers 3"
        )
    config = {key: value for key, value in source.config.items() if not key.startswith("_")}
    return load_transformer(options.family, "random", dtype, seed=source.seed or 0, config=config)


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

    names = {
        ir.DataType.FLOAT: "float32",
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
        ir.DataType.INT64: "int64",
    }
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


def _finish_files(
    folder: Path, progress: Progress, known: Mapping[str, str]
) -> tuple[FileEntry, ...]:
    """Bring the files to the disk and take their hashes, where they are not known."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    done, entries = 0, []
    for path in paths:
        fsync_path(path)
        size = path.stat().st_size
        sha256 = known.get(path.name) or sha256_of(path)
        entries.append(FileEntry(path=path.name, num_bytes=size, sha256=sha256))
        done += size
        progress.update(done, total)
    return tuple(entries)


def summary_of(result: BuildResult) -> dict[str, Any]:
    """What `build-engine --json` says of a build."""
    manifest = result.engine_set.manifest
    sizes = {entry.path: entry.num_bytes for entry in manifest.files}
    return {
        "engine_set": str(result.engine_set.folder),
        "is_reused": result.is_reused,
        "seconds": round(result.seconds, 3),
        "identity": manifest.identity,
        "model": manifest.model,
        "source": manifest.source["kind"],
        "backend": manifest.backend,
        "backend_version": manifest.backend_version,
        "precision": manifest.precision,
        "num_layers": manifest.num_layers,
        "front_depth": manifest.front_depth,
        "representative_layers": list(manifest.representative_layers),
        "layers_source": manifest.layers_source,
        "ladder": list(manifest.ladder.rungs),
        "granularity": manifest.ladder.granularity,
        "limits": asdict(manifest.limits),
        "plans": {
            role: {
                "num_profiles": len(spec.profiles),
                "num_bytes": sizes[spec.file],
                "device_memory_bytes": spec.device_memory_bytes,
            }
            for role, spec in manifest.plans.items()
        },
        "target": manifest.target,
        "num_bytes": sum(entry.num_bytes for entry in manifest.files),
        "command": manifest.command,
    }
