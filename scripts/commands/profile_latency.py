"""The `profile-latency` command."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import (
    CommandParser,
    Terminal,
    add_number,
    add_whole,
    run_command,
    steps_shown,
    warnings_noted,
)
from ditrim.commands.editing import (
    add_device_options,
    add_engine_options,
    check_packages,
    is_torch,
    open_engines,
)
from ditrim.plugins.errors import DitrimError, LadderError, UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.engines.sets.manifest import Manifest
    from ditrim.runtime.profiling.measure import Geometry
    from ditrim.runtime.profiling.profile import Profile
    from ditrim.runtime.profiling.projection import ProfileComparison, Projection, ProjectionTarget
    from ditrim.runtime.profiling.run_cost import RecordedRun, ReplayedRun, ScheduleEstimate

_EXAMPLES = """\
  profile-latency --engine engines-out/small --output profile
  profile-latency --engine <set> --batch 1 --batch 2 --resolution 1024x1024 --output profile \\
      --schedule "steps=40 interval=10 tau=0.85 kept=0.6"
  profile-latency --profile profile/profile.json --report report.json
  profile-latency --profile profile/profile.json --project h20
  profile-latency --engine <set> --compare profile/profile.json"""
_MOST_GEOMETRIES, _LEAST_REPEATS, _MOST_REPEATS = 64, 3, 10_000
_FILES = {suffix: f"profile.{suffix}" for suffix in ("json", "csv", "html")}
_SIZES = ("batch", "text", "noisy", "resolution", "reference", "rung")


def _parser() -> CommandParser:
    parser = CommandParser(
        "profile-latency",
        description="Measure FRONT, BACK at each rung, anchors and what stands between them, and "
        "say what a schedule\nwill cost.",
        examples=_EXAMPLES,
    )
    source = parser.add_argument_group("what is profiled")
    add_engine_options(source, is_required=False)
    source.add_argument(
        "--pipeline", metavar="FOLDER|HUB-ID", help="with --engine torch: whose transformer"
    )
    source.add_argument(
        "--profile", metavar="FILE", help="a profile.json, in place of measuring again"
    )
    sizes = parser.add_argument_group("sizes (each again for more; all combinations are measured)")
    sizes.add_argument(
        "--resolution",
        action="append",
        metavar="WxH",
        help="pixels of the picture, in place of --noisy; the references are as large unless "
        "--reference says otherwise",
    )
    for option, text in (
        ("--batch", "default: 1"),
        ("--text", "tokens (default: the set's most)"),
        ("--noisy", "tokens (default: the set's most)"),
        ("--reference", "reference tokens in all (default: the ladder's longest)"),
        ("--rung", "of BACK (default: all rungs)"),
    ):
        add_whole(sizes, option, 1, None, text, action="append")
    measuring = parser.add_argument_group("measuring")
    repeats = _LEAST_REPEATS, _MOST_REPEATS
    add_whole(measuring, "--repeats", *repeats, "rounds that count", 20)
    add_whole(measuring, "--warmup", 1, _MOST_REPEATS, "rounds before them", 3)
    add_number(measuring, "--tau", 0.0, 1.0, "of the selection", 0.85)
    measuring.add_argument(
        "--max-noise",
        type=float,
        metavar="X",
        help="how far the interval of a median may reach to each side, as a share of it "
        "(default: 0.1)",
    )
    add_device_options(measuring)
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--schedule",
        metavar="TEXT",
        help="'steps=40 interval=10 tau=0.85 kept=0.6'; also warmup= and branches= (2 with true "
        "guidance); without kept=, the most that tau lets a step keep",
    )
    questions.add_argument(
        "--report",
        metavar="FILE",
        help="of edit-image: its schedule and kept share, in place of --schedule or beside it, and "
        "its calls priced one by one",
    )
    questions.add_argument("--compare", metavar="FILE", help="another profile.json")
    questions.add_argument(
        "--project", metavar="DEVICE|FILE", help="an estimate for h20, h100, ..., or for the "
        "device of another profile.json",
    )  # fmt: skip
    questions.add_argument(
        "--precision", choices=("bf16", "fp16"), help="with --project, of the engines there"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--wide", action="store_true", help="show every column of the table, as the page does"
    )
    results.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for profile.json, profile.csv and profile.html",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `profile-latency`; returns the exit code."""
    return run_command(_parser, _run, argv)


def _run(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything that can be refused is refused before the first round."""
    with warnings_noted(terminal):
        _check(args)
        from ditrim.runtime.profiling.file import load_profile
        from ditrim.runtime.profiling.profile import noise_complaint
        from ditrim.runtime.profiling.projection import compare, project
        from ditrim.runtime.profiling.run_cost import load_report, parse_schedule

        recorded = None if args.report is None else load_report(args.report)
        schedule = None
        if args.schedule is not None:
            schedule = parse_schedule(args.schedule, None if recorded is None else recorded.kept)
        elif recorded is not None:
            schedule = recorded.schedule
            if schedule is None:
                terminal.note(
                    f"--report {args.report}: its calls follow no schedule of anchors, so that no "
                    "break-even share or best interval is computed; give a --schedule for those"
                )
        other = None if args.compare is None else load_profile(args.compare, "--compare")
        target: ProjectionTarget | None = None
        if args.profile is not None:
            profile = load_profile(args.profile)
            if args.max_noise is not None:
                settings = {**profile.settings, "max_noise": args.max_noise}
                profile = replace(profile, settings=settings)
            target = _target(args, profile.engine["precision"])
            _check_output(args.output)
        else:
            profile, target = _measure(args, terminal, recorded, other)
        complaint = noise_complaint(profile)
        if complaint is not None:
            raise DitrimError(complaint)
        estimates = _estimates(profile, schedule, recorded)
        replays = _replays(profile, recorded)
        projection = None if target is None else project(profile, target)
        projected = [] if projection is None else _estimates(projection.profile, schedule, recorded)
        comparison = None if other is None else compare(profile, other)
        return _write(
            args, terminal, profile, estimates, replays, projection, projected, comparison
        )


def _check(args: argparse.Namespace) -> None:
    if (args.engine is None) == (args.profile is None):
        raise UsageError("give either --engine FOLDER to measure, or --profile FILE to read")
    if args.profile is not None:
        for name in _SIZES:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} says what to measure; --profile measures nothing")
    if args.noisy is not None and args.resolution is not None:
        raise UsageError("--noisy and --resolution both say how large the picture is; give one")
    if args.precision is not None and args.project is None:
        raise UsageError("--precision goes with --project")
    if args.max_noise is not None and not 0.0 < args.max_noise <= 10.0:
        raise UsageError(f"--max-noise must lie in (0, 10], got {args.max_noise}")


def _check_output(folder: Path | None) -> None:
    if folder is None:
        return
    from ditrim.runtime.editing.pictures import check_output

    check_packages("--output: the page of a profile", "jinja2", "matplotlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be made: {error.strerror}") from error
    for name in _FILES.values():
        check_output(folder / name, "--output")


def _target(args: argparse.Namespace, own: str) -> ProjectionTarget | None:
    from ditrim.runtime.profiling.projection import target_from

    return None if args.project is None else target_from(args.project, own, args.precision)


def _measure(
    args: argparse.Namespace,
    terminal: Terminal,
    recorded: RecordedRun | None,
    other: Profile | None,
) -> tuple[Profile, ProjectionTarget | None]:
    from ditrim.engines.sets.engine_set import load_engine_set
    from ditrim.runtime.profiling.projection import check_common_size, check_model
    from ditrim.runtime.profiling.run_cost import check_report_model

    opened = None
    if is_torch(args):
        opened = open_engines(args, terminal)
        engine_set = opened.engine_set
    else:
        terminal.stage(f"loading {args.engine}")
        engine_set = load_engine_set(args.engine, verify=args.verify)
    geometries = geometries_of(args, engine_set)
    rungs = _rungs_of(args.rung, engine_set, geometries)
    target = _target(args, engine_set.manifest.precision)
    if target is not None:
        check_model(target, engine_set.manifest.transformer_config)
    if recorded is not None:
        check_report_model(recorded, engine_set.manifest.model)
    if other is not None:
        check_common_size(other, [geometry.key for geometry in geometries])
    _check_output(args.output)
    import torch

    from ditrim.engines.load import load_engines
    from ditrim.runtime.profiling.machine import clocks, describe_machine, load_average
    from ditrim.runtime.profiling.measure import Meter, profile_of

    if args.threads:
        torch.set_num_threads(args.threads)
    if opened is not None:
        engines = opened.engines
    else:
        engines = load_engines(engine_set, device=args.device, threads=args.threads)
    machine = describe_machine(engines, args.threads)
    meter = Meter(engines, geometries, rungs, args.tau)
    rounds = args.warmup + args.repeats
    with steps_shown(terminal, _title(len(geometries)), rounds) as advance:
        meter.measure(args.repeats, args.warmup, advance)
    machine["clocks"]["after"] = clocks(meter.is_cuda)
    machine["load"]["after"] = load_average()
    settings = {
        "repeats": args.repeats,
        "warmup": args.warmup,
        "tau": args.tau,
        "max_noise": 0.1 if args.max_noise is None else args.max_noise,
        "resolutions": _resolutions(args.resolution or (), engine_set.manifest),
    }
    return profile_of(meter, settings, machine), target


def _title(count: int) -> str:
    return "measuring one size in rounds" if count == 1 else f"measuring {count} sizes in rounds"


def geometries_of(args: argparse.Namespace, engine_set: EngineSet) -> list[Geometry]:
    """All combinations of the sizes that were asked for.

    Raises:
        UsageError: a resolution does not parse, or there are too many combinations.
        LadderError: a size that the engine set was not built for; says how to build it.
    """
    from ditrim.runtime.profiling.measure import Geometry, grid_of

    _check_limits(args, engine_set)
    manifest = engine_set.manifest
    most_noisy, most_text, longest = engine_set.largest_edit
    pictures: list[tuple[int, int]]
    if args.resolution is not None:
        pictures = [_picture_grid(text, manifest) for text in args.resolution]
    else:
        pictures = [grid_of(noisy) for noisy in args.noisy or [most_noisy]]
    found: dict[object, Geometry] = {}  # pictures of as many tokens take the same time
    for batch, text, picture in itertools.product(
        args.batch or [1], args.text or [most_text], pictures
    ):
        references = [grid_of(number) for number in args.reference or ()]
        if not references:
            references = [picture if args.resolution is not None else grid_of(longest)]
        for reference in references:
            geometry = Geometry(
                batch=batch, num_text=text, noisy_grid=picture, reference_grid=reference
            )
            found.setdefault(geometry.size, geometry)
    if len(found) > _MOST_GEOMETRIES:
        raise UsageError(
            f"{len(found)} combinations of sizes are more than {_MOST_GEOMETRIES}: profile some of "
            "them at a time"
        )
    return list(found.values())


def _check_limits(args: argparse.Namespace, engine_set: EngineSet) -> None:
    """Refuse a size that the engine set was not built for."""
    manifest = engine_set.manifest
    limits, longest = manifest.limits, manifest.ladder.longest
    pictures = [_picture_grid(text, manifest) for text in args.resolution or ()]
    tokens = [height * width for height, width in pictures]
    references = args.reference or tokens
    for what, values, limit, option in (
        ("a batch of", args.batch, limits.batch, "max_batch"),
        ("noisy tokens:", args.noisy or tokens, limits.noisy, "max_noisy_tokens"),
        ("text tokens:", args.text, limits.text, "max_text_tokens"),
        ("reference tokens:", references, longest, "max_reference_tokens"),
    ):
        value = max(values or (), default=0)
        if value > limit:
            command = engine_set.rebuild_command(**{option: value})
            raise LadderError(
                f"{what} {value} is more than {engine_set.folder} was built for ({limit}); "
                f"build it for more with: {command}"
            )


def _resolutions(asked: Sequence[str], manifest: Manifest) -> dict[str, str]:
    """Noisy tokens -> the first resolution that has so many."""
    found: dict[str, str] = {}
    for text in asked:
        height, width = _picture_grid(text, manifest)
        found.setdefault(str(height * width), text.lower())
    return found


def _picture_grid(text: str, manifest: Manifest) -> tuple[int, int]:
    """(height, width) in tokens of a picture of WxH pixels."""
    from ditrim.plugins.blocks import TOKEN_PIXELS

    config = manifest.transformer_config
    patch = int(config["patch_size"])
    # A model on pixels has their three colours in its channels; the others have a VAE before them.
    pixels = patch if config["in_channels"] == 3 * patch**2 else TOKEN_PIXELS
    width, cross, height = text.lower().partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--resolution {text!r} is no WxH, as 1024x1024")
    grid = int(height) // pixels, int(width) // pixels
    if not all(grid) or int(height) % pixels or int(width) % pixels:
        raise UsageError(
            f"--resolution {text}: both sides must be multiples of {pixels} pixels, the side of a "
            "token"
        )
    return grid


def _rungs_of(
    asked: Sequence[int] | None, engine_set: EngineSet, geometries: Sequence[Geometry]
) -> tuple[int, ...]:
    ladder = engine_set.manifest.ladder
    longest = max(geometry.size.num_reference for geometry in geometries)
    for rung in asked or ():
        if rung not in ladder.rungs:
            wanted = sorted({*ladder.rungs, rung})
            command = engine_set.rebuild_command(ladder=wanted)
            raise LadderError(
                f"--rung {rung} is not a rung of {engine_set.folder} "
                f"({', '.join(map(str, ladder.rungs))}); build a set that has it with: {command}"
            )
        if rung > longest:
            raise UsageError(
                f"--rung {rung} is longer than the references that are measured ({longest}); give "
                f"--reference {rung}"
            )
    return tuple(asked or ladder.rungs)


def _estimates(
    profile: Profile, schedule: Any, recorded: RecordedRun | None
) -> list[ScheduleEstimate]:
    from ditrim.runtime.profiling.run_cost import estimate_schedule

    if schedule is None:
        return []
    geometries = profile.geometries
    if recorded is not None and recorded.geometry in geometries:
        geometries = [recorded.geometry]
    return [estimate_schedule(profile, geometry, schedule) for geometry in geometries]


def _replays(profile: Profile, recorded: RecordedRun | None) -> list[ReplayedRun]:
    from ditrim.runtime.profiling.run_cost import replay

    if recorded is None:
        return []
    geometries = profile.geometries
    if recorded.geometry in geometries:
        geometries = [recorded.geometry]
    return [replay(profile, geometry, recorded) for geometry in geometries]


def _write(
    args: argparse.Namespace,
    terminal: Terminal,
    profile: Profile,
    estimates: Sequence[ScheduleEstimate],
    replays: Sequence[ReplayedRun],
    projection: Projection | None,
    projected: Sequence[ScheduleEstimate],
    comparison: ProfileComparison | None,
) -> dict[str, Any]:
    """Write and say everything; returns what `--json` prints."""
    from ditrim.runtime.profiling import text as profile_text
    from ditrim.runtime.profiling.page import draw_page
    from ditrim.runtime.profiling.profile import PRODUCT, describe_row, ratios_of

    content: dict[str, Any] = {
        "machine": dict(profile.machine),
        "peak": asdict(profile.peak),
        "settings": dict(profile.settings),
        "rows": [describe_row(profile, row) for row in profile.rows if row.part != PRODUCT],
        "pulse": [describe_row(profile, row) for row in profile.rows if row.part == PRODUCT],
    }
    content["ratios"] = [
        {
            "geometry": list(geometry),
            **{name: asdict(item) for name, item in ratios_of(profile, geometry).items()},
        }
        for geometry in profile.geometries
    ]
    terminal.say(profile_text.profile_table(profile, is_wide=args.wide))
    if estimates:
        content["schedule"] = [asdict(estimate) for estimate in estimates]
        terminal.say(profile_text.broken(profile_text.schedule_lines(estimates, profile)))
    if replays:
        content["report"] = [asdict(item) for item in replays]
        terminal.say(profile_text.broken(profile_text.replay_lines(replays)))
    if projection is not None:
        content["projection"] = profile_text.projection_dict(projection)
        terminal.say(profile_text.projection_table(projection))
        if projected:
            content["projection"]["schedule"] = [asdict(estimate) for estimate in projected]
            terminal.say(
                profile_text.broken(profile_text.schedule_lines(projected, projection.profile))
            )
    if comparison is not None:
        content["comparison"] = profile_text.comparison_dict(comparison)
        terminal.say(profile_text.comparison_table(comparison))
    if args.output is not None:
        page = draw_page(profile, estimates, replays, projection, projected, comparison)
        content |= _write_files(args.output, terminal, profile, page)
    return content


def _write_files(folder: Path, terminal: Terminal, profile: Profile, page: str) -> dict[str, str]:
    """Write the files, all of which are there before the first is written."""
    from ditrim.engines.files import write_file

    files = {"json": profile.to_json(), "csv": profile.to_csv(), "html": page}
    written = {suffix: str(folder / name) for suffix, name in _FILES.items()}
    for suffix, text in files.items():
        write_file(written[suffix], text.encode())
    terminal.say("\n".join(written.values()))
    return written
