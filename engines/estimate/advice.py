"""What to change where a set does not fit a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ditrim.engines.build.options import PLAN_BACKENDS, BuildOptions
from ditrim.plugins.blocks import TOKEN_PIXELS
from ditrim.plugins.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something to do where a set does not fit.

    Attributes:
        action: in words.
        option: of `build-engine`, none where it is done in the pipeline.
        needed_bytes: with it and all changes before it in the list.
        fits: whether that is enough.
    """

    action: str
    option: str | None
    needed_bytes: int
    fits: bool


_Changed = tuple[BuildOptions, frozenset[str]]


def _text_off(state: _Changed) -> _Changed | None:
    options, without = state
    parts = {"text_encoder", "text_encoder_2"}
    return None if parts <= without or options.preset else (options, without | parts)


def _unscored(state: _Changed) -> _Changed | None:
    options, without = state
    return (replace(options, separate_anchor=False), without) if options.separate_anchor else None


def _single(state: _Changed) -> _Changed | None:
    options, without = state
    if options.limits.batch == 1:
        return None
    return replace(options, max_batch=1, min_batch=None, opt_batch=None), without


def _half_size(state: _Changed) -> _Changed | None:
    options, without = state
    if options.precision != "fp32":
        return None
    precision = "bf16" if options.backend in PLAN_BACKENDS else "fp16"
    return replace(options, precision=precision), without


def _shortened(options: BuildOptions, **changes: Any) -> BuildOptions | None:
    """The options with shorter lengths; none where another option asks for more than is left."""
    try:
        return replace(options, **changes)
    except UsageError:  # as --granularity or --min-noisy-tokens
        return None


def _fewer_references(state: _Changed) -> _Changed | None:
    options, without = state
    if options.preset or options.ladder or options.max_reference_tokens:
        return None
    one = _shortened(options, num_references=1)
    if one is None or one.reference_ladder == options.reference_ladder:
        return None
    return one, without


def _pictures_of(side: int) -> Callable[[_Changed], _Changed | None]:
    def lower(state: _Changed) -> _Changed | None:
        options, without = state
        given = options.ladder or options.max_reference_tokens or options.max_noisy_tokens
        if options.preset or given or options.limits.noisy <= (side // TOKEN_PIXELS) ** 2:
            return None
        smaller = _shortened(options, resolution=(side, side))
        return None if smaller is None else (smaller, without)

    return lower


def _fewer_rungs(state: _Changed) -> _Changed | None:
    options, without = state
    if options.ladder or len(options.reference_ladder.rungs) <= 4:
        return None
    return replace(options, rungs=4), without


# In the order of what they cost: nothing but time, then how much is served.
_CHANGES: tuple[tuple[str, str | None, Callable[[_Changed], _Changed | None]], ...] = (
    ("leave out --separate-anchor: BACK is held once", "--separate-anchor", _unscored),
    ("hold weights in 16 bit: --precision bf16 or fp16", "--precision", _half_size),
    (
        "move the text encoder off the device once the prompt is encoded "
        "(pipe.text_encoder.to('cpu'), or encode prompts elsewhere)",
        None,
        _text_off,
    ),
    ("run one picture at a time: --max-batch 1", "--max-batch", _single),
    ("serve one reference: --num-references 1", "--num-references", _fewer_references),
    ("serve smaller pictures: --resolution 768x768", "--resolution", _pictures_of(768)),
    ("serve smaller pictures: --resolution 512x512", "--resolution", _pictures_of(512)),
    ("build fewer lengths: --rungs 4", "--rungs", _fewer_rungs),
)


def changes(
    options: BuildOptions,
    usable_bytes: int,
    needed: Callable[[BuildOptions, frozenset[str]], int],
) -> Iterator[Change]:
    """Every change that is enough by itself; without one, changes after another up to a fit.

    Args:
        options: of a set that does not fit.
        usable_bytes: what it may take.
        needed: device memory of a set, from its options and the parts of the pipeline that are kept
            off the device.
    """
    start: _Changed = (options, frozenset())
    before = needed(*start)
    steps = []
    for action, option, change in _CHANGES:
        state = change(start)
        if state is not None and needed(*state) < before:
            steps.append((action, option, change))
    alone = [
        Change(action=action, option=option, needed_bytes=total, fits=True)
        for action, option, change in steps
        if (state := change(start)) and (total := needed(*state)) <= usable_bytes
    ]
    if alone:
        yield from alone
        return
    state = start
    for action, option, change in steps:
        changed = change(state)
        if changed is None or (total := needed(*changed)) >= before:
            continue
        state, before = changed, total
        fits = total <= usable_bytes
        yield Change(action=action, option=option, needed_bytes=total, fits=fits)
        if fits:
            return
