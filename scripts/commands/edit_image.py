"""The `edit-image` command."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditrim.commands.console import (
    MAX_SEED,
    CommandParser,
    Terminal,
    add_whole,
    run_command,
    steps_shown,
    warnings_noted,
)
from ditrim.commands.editing import (
    add_engine_options,
    add_machine_options,
    add_request_options,
    open_engines,
    request_of,
)
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import FullContext, Policy

if TYPE_CHECKING:
    import torch

    from ditrim.engines.backend import Engines
    from ditrim.runtime.caches.step_cache import Cache
    from ditrim.runtime.editing.pipelines import EditRequest
    from ditrim.runtime.editing.results import EditRun

_EXAMPLES = """\
  edit-image --engine engines-out/small --image in.png --prompt "make the red circle blue" \\
      --output out.png
  edit-image --engine <set> --image in.png --prompt "..." --output out.png \\
      --policy topi --tau 0.85 --interval 10 --report report.json --mask-output mask.png
  edit-image --engine <set> --image room.jpg --image lamp.jpg --prompt "..." --output out.png
  edit-image --engine <set> --image in.png --prompt "..." --output out.png \\
      --compare-full --strip strip.png
  edit-image --engine <set> --image in.png --prompt "..." --output out.png \\
      --policy "auto min_influence=0.9" """
_POLICY_OPTIONS = ("tau", "interval", "warmup", "score_every", "min_kept", "max_kept")


def _parser() -> CommandParser:
    parser = CommandParser(
        "edit-image",
        description="Edit a picture with an engine set. Between anchor steps, only the reference "
        "tokens that matter are run.",
        examples=_EXAMPLES,
    )
    edit = parser.add_argument_group("edit")
    add_engine_options(edit)
    edit.add_argument(
        "--image",
        required=True,
        action="append",
        metavar="FILE",
        help="the picture to edit; again for further references, in order",
    )
    edit.add_argument("--prompt", required=True, metavar="TEXT", help="the instruction")
    edit.add_argument("--output", required=True, metavar="FILE", help=".png, .jpg, .jpeg or .webp")
    add_whole(edit, "--seed", 0, MAX_SEED, "of the noise", 0)
    add_request_options(edit)
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--policy",
        default="topi",
        metavar="TEXT",
        help="topi (default), coverage, auto, tokendrop, ibtm, tomesd, toma, random, or full: no "
        "reduction; with options: 'coverage ratio=0.5'. docs/guide/policies.md lists them",
    )
    policy.add_argument(
        "--tau", type=float, metavar="X", help="influence to keep, 0 to 1 (default: 0.85)"
    )
    policy.add_argument(
        "--interval",
        type=int,
        metavar="N",
        help="steps between anchors (default: 10, or two anchors in fewer than 20 steps)",
    )
    policy.add_argument(
        "--warmup", type=int, metavar="N", help="full steps before the first anchor (default: 0)"
    )
    policy.add_argument(
        "--score-every", type=int, metavar="N", help="score every n-th noisy row (default: 1)"
    )
    policy.add_argument("--min-kept", type=int, metavar="N", help="tokens (default: 1)")
    policy.add_argument("--max-kept", type=int, metavar="N", help="tokens (default: no bound)")
    policy.add_argument(
        "--cache",
        metavar="X|FILE:X",
        help="spare BACK while FRONT's output has changed by less than X, or the change that a "
        "file of calibrate-cache predicts stays under X",
    )
    policy.add_argument(
        "--keep-region",
        metavar="FILE",
        help="mask of the first picture: reference tokens under its light parts are always kept",
    )
    add_machine_options(parser)
    more = parser.add_argument_group("further results")
    more.add_argument("--report", metavar="FILE", help="what every step did, as JSON")
    more.add_argument(
        "--mask-output", metavar="FILE", help="picture of the reference tokens that were kept"
    )
    more.add_argument(
        "--compare-full",
        action="store_true",
        help="also run the full context with the same seed; gives PSNR and speed-up",
    )
    more.add_argument(
        "--strip",
        metavar="FILE",
        help="with --compare-full: source | full context | pruned | kept-token mask",
    )
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Reducing:
    """Holds what makes a run shorter, as `attach` takes it."""

    policy: Policy
    cache: Cache | None = None
    region: torch.Tensor | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run `edit-image`; returns the exit code."""
    return run_command(_parser, _edit, argv)


def _edit(args: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Everything that can be refused is refused before the first step."""
    with warnings_noted(terminal):
        from ditrim.runtime.caches.calibration import step_cache_from
        from ditrim.runtime.policy_text import policy_from_text

        _check_prompts(args)
        text = _policy_text(args, terminal)
        policy = policy_from_text(text).policy
        _check_files(args, policy, has_cache=args.cache is not None)
        from ditrim.runtime.editing.pictures import open_picture
        from ditrim.runtime.editing.pipelines import prepare_request, region_from

        images = tuple(open_picture(path) for path in args.image)
        request = request_of(args, images, args.prompt, args.seed)
        opened = open_engines(args, terminal)
        engines, engine_set = opened.engines, opened.engine_set
        policy, cache = policy_from_text(text, engine_set.manifest.model)
        if args.cache is not None:
            cache = step_cache_from(args.cache, engine_set)
        pipe = opened.pipeline()
        request = prepare_request(pipe, engine_set, request)
        region = None
        if args.keep_region is not None:
            region = region_from(pipe, open_picture(args.keep_region), request)

        is_timed = args.compare_full or args.report is not None
        full = None
        if args.compare_full:
            terminal.stage("warming up")
            _warm_up(pipe, engines, request)
            plain = Reducing(policy=FullContext())
            full = _run(pipe, engines, plain, request, terminal, is_timed, "full context")
        reducing = Reducing(policy=policy, cache=cache, region=region)
        run = _run(
            pipe, engines, reducing, request, terminal, is_timed, f"{text.split()[0]} policy"
        )
        return _write(args, terminal, engines, request, reducing, run, full)


def _policy_text(args: argparse.Namespace, terminal: Terminal) -> str:
    """`--policy` with the options that have switches of their own."""
    from ditrim.runtime.policy_text import options_of

    words = args.policy.split()
    if not words:
        raise UsageError("--policy is empty; name one, as --policy topi")
    given = {
        name: getattr(args, name) for name in _POLICY_OPTIONS if getattr(args, name) is not None
    }
    if words[0] == "full" and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        terminal.note(f"--policy full runs every token in every step; {names} has no effect")
        given = {}
    taken = {word.partition("=")[0] for word in words[1:]}
    if "seed" in options_of(words[0]) and "seed" not in taken:
        given["seed"] = args.seed
    return " ".join([*words, *(f"{name}={value}" for name, value in given.items())])


def _check_prompts(args: argparse.Namespace) -> None:
    for option, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{option} is not valid UTF-8: {error.reason}") from error
    if not args.prompt.strip():
        raise UsageError(
            'the prompt is empty: an edit needs an instruction, as --prompt "make the sky darker"'
        )


def _check_files(args: argparse.Namespace, policy: Policy, *, has_cache: bool) -> None:
    """Results can be written, and none replaces a source or another result."""
    from ditrim.runtime.editing.pictures import check_output, check_picture_output

    if args.strip is not None and not args.compare_full:
        raise UsageError("--strip shows the full-context picture too: add --compare-full")
    if isinstance(policy, FullContext):
        for option, is_given in (
            ("--compare-full", args.compare_full and not has_cache),
            ("--mask-output", args.mask_output is not None),
        ):
            if is_given:
                raise UsageError(f"{option} needs a policy that drops tokens, as --policy topi")
    taken = {os.path.realpath(path): "--image" for path in args.image}
    if args.keep_region is not None:
        taken[os.path.realpath(args.keep_region)] = "--keep-region"
    for option in ("--output", "--strip", "--mask-output", "--report"):
        path = getattr(args, option[2:].replace("-", "_"))
        if path is None:
            continue
        check = check_output if option == "--report" else check_picture_output
        real = os.path.realpath(check(path, option))
        if real in taken:
            raise UsageError(f"{option} {path} is the file of {taken[real]} too; choose another")
        taken[real] = option


def _warm_up(pipe: Any, engines: Engines, request: EditRequest) -> None:
    """One anchor and one reduced step, so that the run measured first is not the slower for it."""
    from dataclasses import replace

    from ditrim.runtime.attachment import attach
    from ditrim.runtime.editing.pipelines import run_edit

    with attach(pipe, engines, ToPi(interval=2)):
        run_edit(pipe, replace(request, steps=2))


def _run(
    pipe: Any,
    engines: Engines,
    reducing: Reducing,
    request: EditRequest,
    terminal: Terminal,
    is_timed: bool,
    title: str,
) -> EditRun:
    from ditrim.runtime.attachment import attach
    from ditrim.runtime.editing.pipelines import (
        describe_references,
        run_edit,
        seen_references,
    )
    from ditrim.runtime.editing.results import EditRun

    assert request.steps is not None
    with attach(
        pipe,
        engines,
        reducing.policy,
        cache=reducing.cache,
        region=reducing.region,
        timing=is_timed,
    ) as attachment:
        with steps_shown(terminal, f"denoising, {title}", request.steps) as advance:

            def on_step(done: int, total: int) -> None:
                record = attachment.report.steps[-1]
                kept = record.num_kept / record.num_reference
                advance(done, f"{record.role}, {kept:.0%} of reference tokens")

            start = time.perf_counter()
            image = run_edit(pipe, request, on_step)
            seconds = time.perf_counter() - start
        grids = (attachment.report.grids or ())[1:]
        seen = seen_references(pipe, request.images, grids)
        return EditRun(
            image=image.convert("RGB"),
            report=attachment.report,
            seen=seen,
            grids=grids,
            geometry=describe_references(pipe, seen, image),
            seconds=seconds,
        )


def _write(
    args: argparse.Namespace,
    terminal: Terminal,
    engines: Engines,
    request: EditRequest,
    reducing: Reducing,
    run: EditRun,
    full: EditRun | None,
) -> dict[str, Any]:
    """Write every result that was asked for; returns what `--json` prints."""
    from ditrim.engines.files import write_file
    from ditrim.runtime.editing import results
    from ditrim.runtime.editing.pictures import save_picture

    policy = reducing.policy
    metadata = results.picture_metadata(request, policy, engines)
    content = {"output": args.output, **results.summarise_run(run, policy, request)}
    save_picture(run.image, args.output, metadata)
    if reducing.cache is not None:
        content["cache"] = {
            **results.options_of(reducing.cache),
            "reused_calls": len(run.report.of_role("reuse")),
        }
    if args.keep_region is not None:
        content["keep_region"] = args.keep_region
    if full is not None:
        content["comparison"] = results.compare_runs(run, full)
    if args.mask_output is not None:
        save_picture(results.draw_mask(run), args.mask_output, metadata)
        content["mask_output"] = args.mask_output
    if args.strip is not None:
        assert full is not None
        strip = results.draw_comparison(request.prompt, policy, run, full, content["comparison"])
        save_picture(strip, args.strip, metadata)
        content["strip"] = args.strip
    if args.report is not None:
        text = results.report_of(content, request, args.image, engines, run, full)
        write_file(args.report, text.encode())
        content["report"] = args.report
    _say(terminal, content, has_reduced=bool(run.report.of_role("reduced")))
    return content


def _say(terminal: Terminal, content: dict[str, Any], *, has_reduced: bool) -> None:
    kept = f", {content['kept_ratio']:.0%} of them between anchor steps" if has_reduced else ""
    terminal.say(
        f"{content['output']}: {content['width']}x{content['height']}, {content['seconds']:.2f} s, "
        f"{content['reference_tokens']} reference tokens{kept}"
    )
    if "size_reason" in content:
        terminal.say(f"size: {content['size_reason']}")
    if "comparison" in content:
        compared = content["comparison"]
        terminal.say(
            f"against the full context ({compared['full_seconds']:.2f} s): "
            f"{compared['psnr_db']:.1f} dB PSNR, {compared['speedup']:.2f}x as fast"
        )
    for key in ("strip", "mask_output", "report"):
        if key in content:
            terminal.say(f"{key.replace('_output', '')}: {content[key]}")
