"""The lengths that a set serves, from its options: limits, ladder, ranges of profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ditrim.engines.build.checks import expect_count, option_of, shown
from ditrim.engines.sets.ladder import MOST_KEPT_COUNTS, Ladder
from ditrim.engines.sets.profiles import AxisRange, Ranges
from ditrim.engines.sets.specs import Limits
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.blocks import TOKEN_PIXELS
from ditrim.plugins.errors import LadderError, UsageError

if TYPE_CHECKING:
    from ditrim.export.family import Family

_DEFAULT_BATCH = 4
_DEFAULT_RUNGS = 8
# The shipped editor: 12x12 tokens a picture, with one reference of 18x18 beside one of 12x12.
_SMALL_LIMITS = Limits(batch=_DEFAULT_BATCH, noisy=144, text=64)
_SMALL_REFERENCE = 324 + 144
# 8192x8192 pixels: far beyond what a model is used with, what is larger is a slip of the finger.
MOST_PICTURE_TOKENS = 1 << 18
_MOST_PICTURE = "8192x8192 pixels"
_MOST_TEXT = 1 << 16


class LengthOptions(Protocol):
    """The options of a build that decide its lengths; `BuildOptions` describes them."""

    @property
    def family(self) -> Family: ...
    @property
    def model(self) -> str: ...
    @property
    def preset(self) -> str | None: ...
    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def reference_resolutions(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def num_references(self) -> int | None: ...
    @property
    def max_reference_tokens(self) -> int | None: ...
    @property
    def max_noisy_tokens(self) -> int | None: ...
    @property
    def max_text_tokens(self) -> int | None: ...
    @property
    def max_batch(self) -> int | None: ...
    @property
    def ladder(self) -> tuple[int, ...] | None: ...
    @property
    def rungs(self) -> int | None: ...
    @property
    def granularity(self) -> int | None: ...
    @property
    def needs_contexts(self) -> bool: ...
    @property
    def limits(self) -> Limits: ...


def limits_of(options: LengthOptions) -> Limits:
    """The largest batch, noisy and text lengths."""
    default = _SMALL_LIMITS
    if options.preset is None:
        sizing = options.family.sizing
        default = Limits(
            batch=_DEFAULT_BATCH,
            noisy=max(_tokens_of(options.resolutions), default=sizing.noisy_tokens),
            text=sizing.text_tokens(num_references_of(options)),
        )
    return Limits(
        batch=options.max_batch or default.batch,
        noisy=options.max_noisy_tokens or default.noisy,
        text=options.max_text_tokens or default.text,
    )


def num_references_of(options: LengthOptions) -> int:
    """References in an edit: as given, otherwise as many as the model was released for."""
    return options.num_references or options.family.max_references


def _tokens_of(resolutions: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of a picture of each resolution."""
    return [(width // TOKEN_PIXELS) * (height // TOKEN_PIXELS) for width, height in resolutions]


def ranges_of(options: LengthOptions) -> Ranges:
    """Least, best and largest sizes of the axes besides the references.

    Plans are tuned for one edit at a time, and for the sizes of a square picture and a prompt of
    some 30 words where the limits are the pipeline's own; else for the largest sizes.

    Raises:
        UsageError: sizes contradict each other.
    """
    largest = limits_of(options)
    noisy = text = None
    if options.preset is None:
        sizing = options.family.sizing
        noisy = sizing.usual_tokens if largest.noisy == sizing.noisy_tokens else None
        count = num_references_of(options)
        is_usual = largest.text == sizing.text_tokens(count)
        text = sizing.usual_text_tokens(count) if is_usual else None
    return Ranges(
        batch=_range(options, "batch", largest.batch, default_best=1),
        noisy=_range(options, "noisy_tokens", largest.noisy, default_best=noisy),
        text=_range(options, "text_tokens", largest.text, default_best=text),
    )


def usual_references(options: LengthOptions) -> tuple[int, ...]:
    """Whole reference lengths that plans are tuned for: of every number of square references.

    Empty where lengths were given, which are then tuned for themselves.
    """
    given = options.ladder or options.max_reference_tokens or options.reference_resolutions
    if options.preset is not None or given:
        return ()
    usual = options.family.sizing.usual_tokens
    return tuple(usual * number for number in range(1, num_references_of(options) + 1))


def _range(
    options: LengthOptions, name: str, most: int, default_best: int | None = None
) -> AxisRange:
    least, best = getattr(options, f"min_{name}") or 1, getattr(options, f"opt_{name}")
    if best is None:
        best = max(least, min(default_best or most, most))
    if not least <= best <= most:
        option = name.replace("_", "-")
        raise UsageError(
            f"--min-{option} {shown(least)}, --opt-{option} {shown(best)} and --max-{option} "
            f"{most} contradict each other: they must not fall in this order"
        )
    return AxisRange(least=least, best=best, most=most)


def ladder_of(options: LengthOptions) -> Ladder:
    """The ladder of reference lengths, which count all references together.

    Without a ladder or a length that is given, they are even parts of the longest, and the whole
    lengths of every number of references, at every resolution that is given for them.

    Raises:
        UsageError: the ladder or the granularity cannot be.
    """
    if options.ladder is not None:
        try:
            given = Ladder(rungs=options.ladder)
            granularity = _granularity_of(options, given.longest, 1, given.rungs)
            return Ladder(rungs=options.ladder, granularity=granularity)
        except LadderError as error:
            raise UsageError(f"--ladder: {error}") from error
    longest = options.max_reference_tokens
    if longest is None and options.preset is not None:
        longest = _SMALL_REFERENCE
    whole: set[int] = set()
    if longest is None:
        count = num_references_of(options)
        pictures = _tokens_of(options.reference_resolutions)
        pictures = pictures or [options.family.sizing.reference_tokens]
        whole = {number * tokens for number in range(1, count + 1) for tokens in pictures}
        longest = max(whole)
    num_rungs = options.rungs or _DEFAULT_RUNGS
    granularity = _granularity_of(options, longest, num_rungs)
    if granularity > longest:
        raise UsageError(
            f"--granularity is {granularity}; it must be at most {longest}, the longest reference "
            "length"
        )
    even = Ladder.even(longest, num_rungs=num_rungs, granularity=granularity)
    rungs = {*even.rungs, *(even.round_up(length) for length in whole)}
    return Ladder(rungs=tuple(sorted(rungs)), granularity=granularity)


def _granularity_of(
    options: LengthOptions, longest: int, num_rungs: int, rungs: tuple[int, ...] = ()
) -> int:
    """The granularity as given, otherwise 1 for graphs, and for plans what leaves few kept counts.

    In a set of plans each kept count may take kernels and a CUDA graph of its own. So it is the
    smallest power of two at which no more than `MOST_KEPT_COUNTS` are left; smaller where rungs lie
    closer, or where it would round a count past the rung of a given ladder that holds it.
    """
    if options.granularity is not None:
        return options.granularity
    size = 1
    if options.needs_contexts:
        while size * MOST_KEPT_COUNTS < longest:
            size *= 2
    while size > 1 and (size * num_rungs > longest or any(rung % size for rung in rungs[:-1])):
        size //= 2
    return size


def check_lengths(options: LengthOptions) -> None:
    """Check resolutions, references and lengths against each other and the model.

    Raises:
        UsageError: names the option, what was given, the limit and what to do.
    """
    for name in ("resolution", "reference_resolution"):
        given = getattr(options, name)
        if given is not None and not given:
            raise UsageError(f"{option_of(name)} is empty; give WIDTHxHEIGHT, as 1024x768")
    for width, height in options.resolutions:
        _check_resolution("--resolution", width, height)
    for width, height in options.reference_resolutions:
        _check_resolution("--reference-resolution", width, height)
    expect_count("--num-references", options.num_references)
    most, model = options.family.max_references, options.model
    if options.num_references is not None and options.num_references > most:
        raise UsageError(
            f"--num-references is {shown(options.num_references)}; {model} takes at most {most}"
        )
    _check_ladder(options)
    _check_count(options, "max_noisy_tokens", MOST_PICTURE_TOKENS, f"a picture of {_MOST_PICTURE}")
    _check_references(options, "--max-reference-tokens", options.max_reference_tokens)
    _check_count(options, "max_text_tokens", _MOST_TEXT, "far more than a prompt has")
    _check_positions(options)


def _check_resolution(option: str, width: Any, height: Any) -> None:
    for side, pixels in (("width", width), ("height", height)):
        expect_count(f"{option}: the {side}", pixels, most=MOST_PICTURE_TOKENS * TOKEN_PIXELS)
        if pixels % TOKEN_PIXELS:
            near = max(1, round(pixels / TOKEN_PIXELS)) * TOKEN_PIXELS
            raise UsageError(
                f"{option} {width}x{height}: the {side} {pixels} is not a multiple of "
                f"{TOKEN_PIXELS} pixels, the side of a token; the nearest is {near}"
            )
    tokens = (width // TOKEN_PIXELS) * (height // TOKEN_PIXELS)
    if tokens > MOST_PICTURE_TOKENS:
        raise UsageError(
            f"{option} {width}x{height} is {tokens} tokens; a picture has at most "
            f"{MOST_PICTURE_TOKENS}, as many as {_MOST_PICTURE}; give a smaller one"
        )


def _check_ladder(options: LengthOptions) -> None:
    if options.ladder is None:
        return
    if options.rungs is not None:
        raise UsageError("--ladder and --rungs both set the ladder; leave one out")
    if not options.ladder:
        raise UsageError("--ladder is empty; name lengths, as --ladder 512,1024,4096")
    for rung in options.ladder:
        if isinstance(rung, int):  # what is no number is the ladder's own error
            _check_references(options, "--ladder: the rung", rung)
    if options.max_reference_tokens not in (None, options.ladder[-1]):
        raise UsageError(
            f"--ladder ends at {options.ladder[-1]}, but --max-reference-tokens is "
            f"{options.max_reference_tokens}; make them equal or leave one out"
        )


def _check_references(options: LengthOptions, what: str, length: int | None) -> None:
    count = options.family.max_references
    most = count * MOST_PICTURE_TOKENS
    if length is not None and length > most:
        pictures = f"{count} reference{'s' if count > 1 else ''} of {_MOST_PICTURE}"
        raise UsageError(
            f"{what} is {shown(length)} tokens; {options.model} takes at most {most}, {pictures}; "
            "give shorter references"
        )


def _check_count(options: LengthOptions, name: str, most: int, meaning: str) -> None:
    value = getattr(options, name)
    if value is not None and value > most:
        raise UsageError(
            f"{option_of(name)} is {shown(value)}; it must be at most {most}, {meaning}"
        )


def _check_positions(options: LengthOptions) -> None:
    """Positions from a table: half of a picture's longer side, and the text after them."""
    most = ARCHITECTURES[options.family.architecture].positions_limit
    if most is None:
        return
    sides = () if options.preset is not None else options.resolutions
    sides += () if options.preset is not None else options.reference_resolutions
    longest = max((max(sizes) // TOKEN_PIXELS for sizes in sides), default=0)
    text = limits_of(options).text
    if longest // 2 + text > most:
        raise UsageError(
            f"{options.model} has {most} positions on each side of a picture's centre: "
            f"half of its longer side takes {longest // 2} and the text {text} of them; lower "
            "--resolution or --max-text-tokens"
        )
