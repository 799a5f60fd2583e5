"""What all commands share: arguments, progress, messages, JSON and exit codes."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditrim.plugins.errors import DitrimError, UsageError

EXIT_OK, EXIT_FAILURE, EXIT_USAGE = 0, 1, 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
MAX_SEED, MAX_STEPS, MAX_THREADS = 2**32 - 1, 1000, 1024
_OS_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file is larger than this system allows; raise the limit (ulimit -f) or "
    "choose another place",
    errno.EROFS: "it is on a read-only file system; choose a place that can be written",
    errno.EACCES: "permission denied; choose a place that you can use, or change its permissions",
    errno.EPERM: "not permitted; choose a place that you can use, or change its permissions",
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file lies there already; choose another place",
    errno.EIO: "the disk reports an error",
}


class CommandParser(argparse.ArgumentParser):
    """A parser with the options that every command has; its errors are `UsageError`s."""

    def __init__(self, prog: str, *, description: str, examples: str) -> None:
        """Make a parser.

        Args:
            prog: the command's name.
            description: what it does, one or two sentences.
            examples: command lines for the end of `--help`.
        """
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        common = self.add_argument_group("output")
        common.add_argument(
            "--json", action="store_true", help="print one line of JSON last on stdout"
        )
        common.add_argument(
            "--verbose", action="store_true", help="log more; tracebacks of internal errors"
        )
        common.add_argument("--quiet", action="store_true", help="print errors only")

    def error(self, message: str) -> NoReturn:
        message = re.sub("^(--[^:]+): must", r"\1 must", message.removeprefix("argument "))
        raise UsageError(f"{message}. See {self.prog} --help")


def add_whole(
    group: Any,
    option: str,
    least: int,
    most: int | None,
    text: str,
    default: int | None = None,
    **more: Any,
) -> None:
    """Add an option that takes whole numbers in [least, most]; its help names the default."""
    _add(group, option, _ranged(int, least, most), text, default, metavar="N", **more)


def add_number(
    group: Any, option: str, least: float, most: float, text: str, default: float | None = None
) -> None:
    """Add an option that takes numbers in [least, most]; its help names the default."""
    _add(group, option, _ranged(float, least, most), text, default, metavar="X")


def _add(group: Any, option: str, kind: Any, text: str, default: Any, **more: Any) -> None:
    described = text if default is None else f"{text} (default: {default})"
    group.add_argument(option, type=kind, default=default, help=described, **more)


def _ranged(kind: Callable[[str], Any], least: float, most: float | None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if most is None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must lie in [{least}, {most}], got {value}")
        return value

    read.__name__ = kind.__name__  # argparse says it where the text is no number
    return read


class Terminal:
    """Writes a command's output: results on stdout, everything else on stderr."""

    def __init__(self, *, is_json: bool, is_verbose: bool, is_quiet: bool) -> None:
        self.is_json, self.is_verbose, self.is_quiet = is_json, is_verbose, is_quiet
        self.console = Console(stderr=True, highlight=False)
        self.interrupted_by: int | None = None
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """A result for a person, on stdout; not with --json or --quiet."""
        if not self.is_json and not self.is_quiet:
            print(text, flush=True)

    def note(self, message: str) -> None:
        """A remark on stderr; not with --quiet."""
        if not self.is_quiet:
            self.console.print(f"[yellow]note:[/yellow] {escape(message)}", soft_wrap=True)

    def complain(self, message: str) -> None:
        """Print an error on stderr."""
        self.console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Terminal]:
        """Show the stages of long work: a bar on a terminal, lines elsewhere."""
        if self.is_quiet or not self.console.is_terminal:
            yield self
            return
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        with bar:
            self._progress = bar
            try:
                yield self
                self._end_stage()
            finally:
                self._progress = self._task = None

    def check_interrupt(self) -> None:
        """Stop the work if a signal asked for it; a library may have swallowed the interrupt."""
        if self.interrupted_by is not None:
            raise KeyboardInterrupt

    def stage(self, name: str) -> None:
        """Start a stage: a bar on a terminal, a line elsewhere."""
        self.check_interrupt()
        if self._progress is not None:
            self._end_stage()
            self._task = self._progress.add_task(escape(name), total=None, amount="")
        elif not self.is_quiet:
            self.console.print(escape(name), soft_wrap=True)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        """Show how much of this stage is done of how much; in bytes, or in steps as a share."""
        if self._progress is not None and self._task is not None:
            amount = f"{done / 1e6:,.0f} / {total / 1e6:,.0f} MB"
            if unit != "bytes":
                amount = f"{100 * done / max(1, total):.0f} %"
            self._progress.update(self._task, completed=done, total=total, amount=amount)

    def _end_stage(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=1, total=1)
            self._progress.stop_task(self._task)


def run_command(
    make_parser: Callable[[], CommandParser],
    body: Callable[[argparse.Namespace, Terminal], dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command and turn whatever happens into messages and an exit code.

    Args:
        make_parser: makes the command's parser.
        body: does the work; returns what `--json` prints besides `"ok": true`.
        argv: arguments; none means the process's.

    Returns:
        0 on success, 2 on a caller's mistake, 1 on a failure, 130 or 143 when stopped by a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    terminal = Terminal(
        is_json="--json" in arguments,
        is_verbose="--verbose" in arguments or os.environ.get("DITRIM_TRACEBACK") == "1",
        is_quiet="--quiet" in arguments,
    )
    with _signals_noted(terminal), _logged(terminal):
        try:
            content = body(make_parser().parse_args(arguments), terminal)
            code, message = EXIT_OK, ""
        except BrokenPipeError:  # whoever read stdout has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILURE
        except (Exception, KeyboardInterrupt) as error:
            code, message = explain(error, terminal)
            content = {"error": message, "exit_code": code}
    if code != EXIT_OK:
        terminal.complain(message)
    if terminal.is_json:
        print(json.dumps({"ok": code == EXIT_OK, **content}), flush=True)
    return code


def explain(error: BaseException, terminal: Terminal) -> tuple[int, str]:
    """The exit code and the message of an error; shows the traceback of an internal one."""
    if isinstance(error, KeyboardInterrupt) or terminal.interrupted_by is not None:
        if terminal.interrupted_by == signal.SIGTERM:
            return EXIT_TERMINATED, "terminated; nothing is left half done"
        return EXIT_INTERRUPTED, "interrupted; nothing is left half done"
    if isinstance(error, DitrimError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno is not None:
        remedy = _OS_REMEDIES.get(error.errno, error.strerror or "failed")
        return EXIT_FAILURE, f"{error.filename or 'reading or writing'}: {remedy}"
    if isinstance(error, MemoryError):
        return EXIT_FAILURE, "out of memory; free some, or use a smaller model or fewer tokens"
    if terminal.is_verbose:
        terminal.console.print_exception()
        return EXIT_FAILURE, f"internal error: {type(error).__name__}: {error}"
    return EXIT_FAILURE, (
        f"internal error: {type(error).__name__}: {error} (run with --verbose for the traceback)"
    )


@contextmanager
def _logged(terminal: Terminal) -> Iterator[None]:
    """Show the package's log while a command runs with --verbose."""
    if not terminal.is_verbose:
        yield
        return
    from rich.logging import RichHandler

    handler = RichHandler(console=terminal.console, show_path=False)
    package = logging.getLogger("ditrim")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


@contextmanager
def _signals_noted(terminal: Terminal) -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM, and remember which.

    An interrupt that arrives inside a library can be swallowed there, or come out as another
    exception; `Terminal.stage` and `explain` then know better.
    """

    def note_signal(number: int, frame: FrameType | None) -> NoReturn:
        terminal.interrupted_by = number
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    try:
        for number, handler in usual.items():
            if signal.getsignal(number) == handler:
                before[number] = signal.signal(number, note_signal)
    except ValueError as error:  # not in the main thread, which gets the signals
        logging.getLogger(__name__).info("signals stay as they are: %s", error)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def steps_shown(
    terminal: Terminal, title: str, steps: int, unit: str = "steps", lines: int = 1
) -> Iterator[Callable[[int, str], None]]:
    """A bar with the remaining time on a terminal, as many lines elsewhere.

    Gives a function that takes how many steps are done, and a word about the one at hand; it
    raises `KeyboardInterrupt` if a signal came in between.
    """
    if terminal.is_quiet or not terminal.console.is_terminal:
        terminal.stage(f"{title}: {steps} {unit}")
        every, started = max(1, steps // lines), time.monotonic()

        def tell(done: int, detail: str) -> None:
            nonlocal started
            terminal.check_interrupt()
            if done == 0:  # what comes before the first step is not counted
                started = time.monotonic()
            if 0 < done < steps and lines > 1 and done % every == 0:
                left = (time.monotonic() - started) / done * (steps - done)
                terminal.stage(f"{title}: {done} of {steps}; {detail}, about {left:,.0f} s left")

        yield tell
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}"),
        console=terminal.console,
    ) as bar:
        task = bar.add_task(title, total=steps, detail="")

        def advance(done: int, detail: str) -> None:
            terminal.check_interrupt()
            bar.update(task, completed=done, detail=escape(detail))

        yield advance


@contextmanager
def warnings_noted(terminal: Terminal) -> Iterator[None]:
    """Show this package's warnings as notes; with --verbose they are in the log already."""
    if terminal.is_verbose:
        yield
        return

    said: set[str] = set()  # --compare-full runs everything more than once

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message not in said:
                said.add(message)
                terminal.note(message)

    package, handler = logging.getLogger("ditrim"), Notes(logging.WARNING)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
