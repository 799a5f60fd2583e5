"""Checks of single options: each error says the option, what was given and what is allowed."""

from __future__ import annotations

from typing import Any

from ditrim.plugins.errors import UsageError


def option_of(name: str) -> str:
    """The option of the command line that a name stands for: "max_batch" is "--max-batch"."""
    return f"--{name.replace('_', '-')}"


def expect_one_of(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that an option's value is one of those allowed.

    Raises:
        UsageError: it is none of those allowed.
    """
    if value not in allowed:
        raise UsageError(f"{option} is {value!r}; allowed: {', '.join(allowed)}")


def expect_count(option: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Check a whole number; none is no number that was given.

    Raises:
        UsageError: it is something else, or out of range.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{option} is {value!r}; it must be a whole number, {least} or more")
    if most is not None and value > most:
        raise UsageError(f"{option} is {shown(value)}; it must be at most {most}")


def shown(value: int) -> str:
    """A whole number for a message; of one that nobody would read, its size."""
    bits = value.bit_length()
    return str(value) if bits <= 128 else f"a number of {bits} bits"
