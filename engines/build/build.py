"""From options to an engine set: recognise, load, trace, write, verify, put in place."""

from __future__ import annotations

import datetime as dt
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ditrim.engines.backends.tensorrt.builder import (
    LibraryFacts,
    ask_library,
    build_plan,
    choose_target,
    describe_target,
)
from ditrim.engines.backends.tensorrt.library import present_gpu
from ditrim.engines.backends.tensorrt.request import PlanRequest, Target
from ditrim.engines.build.graphs import write_graphs
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.progress import LoggedProgress, Progress
from ditrim.engines.build.source import (
    LoraSource,
    Source,
    SplitChoice,
    check_unchanged,
    choose_split,
    describe,
    find_source,
    fingerprint,
    fingerprint_loras,
    weights_identity,
)
from ditrim.engines.build.task import BuildTask
from ditrim.engines.forking import check_not_forked, note_loaded
from ditrim.engines.sets.engine_set import (
    EngineSet,
    check_files,
    load_engine_set,
    read_manifest,
    sha256_of,
)
from ditrim.engines.sets.identity import backend_version, identity_of
from ditrim.engines.sets.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    GraphSpec,
    Manifest,
    PlanSpec,
)
from ditrim.engines.sets.place import check_place, check_replaceable
from ditrim.engines.sets.staging import (
    commit,
    fsync_path,
    recover,
    staging_folder,
    target_locked,
    write_durably,
)
from ditrim.plugins.errors import BackendError, EngineSetError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """Result of a build.

    Attributes:
        engine_set: at the target.
        is_reused: whether it was there already.
        seconds: wall time.
    """

    engine_set: EngineSet
    is_reused: bool
    seconds: float


def build_engine_set(options: BuildOptions, *, progress: Progress | None = None) -> EngineSet:
    """Build an engine set, or recognise that an unchanged one is there.

    Args:
        options: what to build.
        progress: receives how the build goes; none means the log.

    Raises:
        UsageError: the options, the weights or the target cannot be accepted.
        DitrimError: the build failed; what was at the target is still there; or this process was
            forked from one that had built or loaded engines.
    """
    return run_build(options, progress=progress).engine_set


def run_build(options: BuildOptions, *, progress: Progress | None = None) -> BuildResult:
    check_not_forked()
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
    if built_for is not None:
        _check_scoring(built_for)
    source = find_source(options)
    split = choose_split(options, source)
    known = _known_source(target, source)
    prints = fingerprint(source, known.get("files", {}), progress.update)
    loras = tuple(fingerprint_loras(source, known.get("loras", ())))
    task = BuildTask(
        options=options,
        source=source,
        split=split,
        prints=prints,
        loras=loras,
        identity=_identity(options, source, split, prints, loras, built_for),
        target=target,
        built_for=built_for,
    )
    reused = None if options.force else _find_unchanged(task)
    is_reused = isinstance(reused, EngineSet)
    if not isinstance(reused, EngineSet):
        if reused is not None:
            progress.note(reused)
        with target_locked(target, progress.note):
            # Whoever had the lock may have built this very set.
            reused = None if options.force else _find_unchanged(task)
            is_reused = isinstance(reused, EngineSet)
            if not is_reused:
                _build(task, progress)
    engine_set = reused if isinstance(reused, EngineSet) else load_engine_set(target)
    engine_set = replace(engine_set, folder=options.target)
    return BuildResult(engine_set=engine_set, is_reused=is_reused, seconds=time.monotonic() - start)


def _check_scoring(target: Target) -> None:
    """Check that the kernel with which plans of TensorRT score exists for the GPU."""
    if target.backend != "tensorrt":
        return
    from ditrim.plugins.compiled import target_for_capability

    gpu = target.gpu
    assert gpu is not None
    try:
        target_for_capability(gpu.capability)
    except UsageError as error:
        raise BackendError(
            f"{gpu.name} has compute capability {gpu.capability_name}, for which the scoring "
            "kernel of --backend tensorrt does not exist; use --backend tensorrt-rtx or onnxruntime"
        ) from error


def _known_source(target: Path, source: Source) -> Mapping[str, Any]:
    """Return the fingerprints that the last build of this target noted of the same weights."""
    try:
        known = read_manifest(target).source
    except (EngineSetError, OSError):
        return {}
    if (known.get("kind"), known.get("location")) != (source.kind, source.location):
        return {}
    kinds = {"files": Mapping, "loras": list}
    return {key: known[key] for key, kind in kinds.items() if isinstance(known.get(key), kind)}


def _identity(
    options: BuildOptions,
    source: Source,
    split: SplitChoice,
    prints: Mapping[str, Mapping[str, Any]],
    loras: Sequence[Mapping[str, Any]],
    built_for: Target | None,
) -> str:
    return identity_of(
        options={**options.shaping(), "split": asdict(split), "source": source.kind},
        config=dict(source.config),
        weights=weights_identity(source, prints, loras),
        backend=options.backend,
        device="any" if built_for is None else built_for.identity(),
        is_graph_only=not options.needs_library,
    )


def _find_unchanged(task: BuildTask) -> EngineSet | str | None:
    """The set at the target if it is the one to build; otherwise why not, or none if none is."""
    target = task.target
    if not (target / MANIFEST_NAME).is_file():
        return None
    try:
        engine_set = EngineSet(folder=target, manifest=read_manifest(target))
        manifest = engine_set.manifest
        if manifest.identity != task.identity:
            return f"{target} was built from other inputs; building it anew"
        check_files(engine_set, hashes=task.options.verify == "hashes")
    except EngineSetError as error:
        return f"{error.args[0].split('. Build it again')[0]}; building it anew"
    return _refresh_prints(task, engine_set)


def _refresh_prints(task: BuildTask, engine_set: EngineSet) -> EngineSet:
    """Note the new status of weight files that were touched but not changed."""
    described = describe(task.source, task.prints, task.loras)
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


def _build(task: BuildTask, progress: Progress) -> None:
    with _naming_path(task.target), staging_folder(task.target) as folder:
        facts = None
        if task.built_for is not None:
            progress.stage("Check the builder")
            facts = ask_library(task.built_for)
        note_loaded()  # tracing starts torch's threads
        written = write_graphs(task, folder, progress)
        graphs = written.graphs
        plans: dict[str, PlanSpec] = {}
        built_for: dict[str, Any] = {}
        if facts is not None:
            graphs, plans, built_for = _build_plans(task, facts, graphs, folder, progress)
        progress.stage("Verify")
        were_linked = task.links_weights and not task.source.is_single_file
        prints = check_unchanged(task.source, task.prints, were_linked=were_linked)
        files = _finish_files(folder, progress, _known_hashes(task, folder))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            identity=task.identity,
            ditrim_version=version("ditrim"),
            model=task.options.model,
            architecture=task.options.family.architecture,
            transformer_class=task.options.family.transformer_class,
            pipeline_class=task.options.family.pipeline_class,
            transformer_config=written.config,
            num_layers=task.split.num_layers,
            front_depth=task.split.front_depth,
            representative_layers=task.split.representative_layers,
            detailed_layers=task.detailed_layers,
            layers_source=task.split.layers_source,
            ladder=task.options.reference_ladder,
            limits=task.options.limits,
            precision=task.options.precision,
            backend=task.options.backend,
            backend_version=backend_version(task.options.backend)
            if task.options.needs_library
            else "",
            graphs=graphs,
            plans=plans,
            target=built_for,
            files=files,
            source=describe(task.source, prints, task.loras),
            weights=written.weights,
            merged_weights=written.merged_weights,
            options=_options(task),
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        write_durably(folder / MANIFEST_NAME, manifest.to_json())
        load_engine_set(folder)
        check_replaceable(task.target)
        progress.stage("Place")
        commit(folder, task.target)


def _options(task: BuildTask) -> dict[str, tuple[str, ...]]:
    """Options that ask for the set from any folder."""
    options = replace(task.options, output=str(task.target))
    if task.source.kind in ("folder", "file"):
        options = replace(options, weights=task.source.location)
    loras = tuple(f"{_place_of(lora)}:{lora.scale:g}" for lora in task.source.loras)
    return replace(options, lora=loras).given()


def _place_of(lora: LoraSource) -> str:
    """A LoRA's file, or its hub id if it came from there."""
    is_here = Path(lora.location).expanduser().exists()
    return str(lora.path.resolve()) if is_here else lora.location


@contextmanager
def _naming_path(path: Path) -> Iterator[None]:
    """Let an OSError that names no file name the target."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _build_plans(
    task: BuildTask,
    facts: LibraryFacts,
    graphs: Mapping[str, GraphSpec],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, GraphSpec], dict[str, PlanSpec], dict[str, Any]]:
    """Build a plan from each graph; without the graphs, unless the plans need them to be loaded.

    Returns:
        the manifest's graphs, plans and target.
    """
    options, target = task.options, task.built_for
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


def _known_hashes(task: BuildTask, folder: Path) -> dict[str, str]:
    """Hashes of files that are the checkpoint's own, which were taken already."""
    if task.source.checkpoint is None:
        return {}
    return {
        name: entry["sha256"]
        for name, entry in task.prints.items()
        if (folder / name).is_file()
        and (folder / name).samefile(task.source.checkpoint.folder / name)
    }


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
    """Return a build's summary as `build-engine --json` prints it."""
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
        "detailed_layers": list(manifest.detailed_layers),
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
