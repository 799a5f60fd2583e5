"""Reads JSON files into dataclasses, and says in a sentence what is wrong with one.

Replaces: a grammar written out a file. Pydantic does the checking and is imported when the first
file is read.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, MinLen

from ditrim.plugins.errors import DitrimError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
NotEmpty = MinLen(1)
_T = TypeVar("_T")
_Extra = Literal["forbid", "ignore"]
_MOST_BYTES = 256 << 20


def parse_json(text: str) -> Any:
    """Read JSON, without the NaN and Infinity that Python adds to it.

    Raises:
        UsageError: it is none, or nested too deep.
    """

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is no number")
        return value

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is truncated or not JSON ({error})") from None


def check_header(content: Any, noun: str, header: Mapping[str, str | int]) -> dict[str, Any]:
    """Check what a file says that it is; returns the rest of its content.

    Args:
        content: as parsed.
        noun: what it should be, as "profile of profile-latency".
        header: keys and their values; a number is the version of the format.

    Raises:
        UsageError: it is something else, or of another version.
    """
    if not isinstance(content, dict):
        raise UsageError(f"it is no {noun}")
    for key, value in header.items():
        given = content.get(key)
        if type(given) is type(value) and given == value:
            continue
        if isinstance(value, str):
            raise UsageError(f"it is no {noun}")
        raise UsageError(
            f"it is of format version {given!r:.80}; this version of ditrim reads format version "
            f"{value}"
        )
    return {key: value for key, value in content.items() if key not in header}


def value_from(kind: type[_T], content: Any, *, where: str = "", extra: _Extra = "forbid") -> _T:
    """Make a dataclass of parsed JSON, its fields and theirs checked strictly.

    Args:
        kind: the dataclass; errors of its `__post_init__` are reported with the key's name.
        content: as parsed.
        where: the key that it was found at.
        extra: whether keys that it does not have are an error.

    Raises:
        UsageError: names the first key that is wrong, as "plans.back.profiles[0]".
    """
    from pydantic import ValidationError

    # A dataclass takes no settings from an adapter; what holds one does, and hands them on.
    holder: Any = GenericAlias(tuple, (kind,))
    value: _T
    try:
        (value,) = _adapter(holder, extra).validate_json(json.dumps([content]), strict=True)
    except ValidationError as error:
        raise UsageError(_sentence(error, where)) from None
    except RecursionError:
        raise UsageError("it is nested too deep") from None
    return value


@functools.cache
def _adapter(holder: Any, extra: _Extra) -> TypeAdapter[tuple[Any]]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(holder, config=ConfigDict(extra=extra, allow_inf_nan=False))


def read_file(
    path: str | os.PathLike[str],
    make: Callable[[str], _T],
    *,
    what: str,
    remedy: str,
    error: type[DitrimError] = UsageError,
) -> _T:
    """Read a file of text.

    Args:
        path: of the file.
        make: of its text; a `UsageError` of it says what is wrong.
        what: the file, in words.
        remedy: what to do about a file that is no good.
        error: what to raise.

    Raises:
        DitrimError: of the type `error`: the file cannot be read, or `make` refuses it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"it is larger than {_MOST_BYTES} bytes")
        return make(path.read_text("utf-8"))
    except OSError as problem:
        raise error(f"{what} {path} cannot be read: {problem.strerror}; {remedy}") from problem
    except UnicodeDecodeError:
        raise error(f"{what} {path}: it is no text; {remedy}") from None
    except UsageError as problem:
        raise error(f"{what} {path}: {problem}; {remedy}") from problem


def _sentence(error: ValidationError, where: str) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
    name = (where + "".join(parts)).removeprefix(".")
    key = f"key {name!r}" if name else "it"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"{key} is unknown"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}"
    what = first["msg"].replace("Input should", "it must")
    return f"{key} is {first['input']!r:.80}; {what}"
