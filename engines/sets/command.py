"""The options that a set is built with, and the command line of them.

Options are words by name, as {"layers": ("35,37",), "graph_only": ()}: a switch has none, and an
option that is given several times has several.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

Options = Mapping[str, tuple[str, ...]]
_PROGRAM = "build-engine"
# Options whose values follow from others: replacing one drops the ones that contradict it.
_CONTRADICTED = {
    "max_reference_tokens": ("ladder", "num_references"),
    "ladder": ("max_reference_tokens", "rungs"),
    "rungs": ("ladder",),
}


def command_of(options: Options) -> str:
    """The command line of some options, quoted for a shell."""
    arguments = [_PROGRAM]
    for name, words in options.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [part for word in words for part in (option, word)] or [option]
    return shlex.join(arguments)


def options_in(command: str) -> dict[str, tuple[str, ...]]:
    """The options of a command line, which is what older manifests hold.

    Raises:
        ValueError: it is no command line of build-engine.
    """
    if not command.startswith(f"{_PROGRAM} "):
        raise ValueError(f"{command!r:.80} is no command line of {_PROGRAM}")
    options: dict[str, tuple[str, ...]] = {}
    name = ""
    for argument in shlex.split(command)[1:]:
        if argument.startswith("--"):
            name = argument.removeprefix("--").replace("-", "_")
            options.setdefault(name, ())
        elif name:
            options[name] += (argument,)
    return options


def rebuild_command(options: Options, folder: Path | None, **changes: object) -> str:
    """The command line that builds a set again.

    Args:
        options: that it was built with.
        folder: where it is now; none means where it was built.
        changes: options to replace, as `max_reference_tokens=512`; a value of None drops one.
    """
    if folder is not None:
        changes.setdefault("output", str(folder))
    changed = dict(options)
    for name, value in changes.items():
        for other in (name, *_CONTRADICTED.get(name, ())):
            changed.pop(other, None)
        if value is not None:
            is_list = isinstance(value, (tuple, list))
            changed[name] = (",".join(map(str, value)) if is_list else str(value),)  # type: ignore[call-overload]
    return command_of(changed)
