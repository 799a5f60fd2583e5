from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from ditrim.commands.console import CommandParser, Terminal, run_command
from ditrim.plugins.errors import EngineSetError, UsageError

Capture = pytest.CaptureFixture[str]


def parser() -> CommandParser:
    made = CommandParser("do-it", description="Does it.", examples="  do-it --count 3")
    made.add_argument("--count", type=int, default=1)
    return made


def raising(error: BaseException) -> Callable[[argparse.Namespace, Terminal], dict[str, Any]]:
    def body(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
        raise error

    return body


def test_success_is_0_with_one_line_of_json_last(capsys: Capture) -> None:
    def body(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
        terminal.say("for people")
        terminal.note("by the way")
        return {"count": arguments.count}

    assert run_command(parser, body, ["--json", "--count", "2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"ok": True, "count": 2}
    assert printed.out.count("\n") == 1
    assert "by the way" in printed.err
    assert run_command(parser, body, []) == 0
    assert capsys.readouterr().out == "for people\n"
    assert run_command(parser, body, ["--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("bad value"), 2, "bad value"),
        (EngineSetError("[damaged] set"), 1, "[damaged] set"),
        (KeyboardInterrupt(), 130, "interrupted; nothing is left half done"),
        (OSError(errno.ENOSPC, "", "/a/b"), 1, "/a/b: the disk is full; free some space"),
        (OSError(errno.EROFS, "", "/a/b"), 1, "/a/b: it is on a read-only file system; choose"),
        (OSError(errno.EEXIST, "", "/a/b"), 1, "/a/b: a file lies there already; choose another"),
        (OSError(errno.EACCES, "", "/a/b"), 1, "/a/b: permission denied; choose a place"),
        (OSError(errno.ENOENT, "", "/a/b"), 1, "/a/b: there is no such file or folder"),
        (OSError(errno.ELOOP, "too many links", "/a"), 1, "/a: too many links"),
        (MemoryError(), 1, "out of memory; free some"),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (run with --verbose for the traceback)"),
    ],
)
def test_failures_are_one_message_and_a_code(
    capsys: Capture, error: BaseException, code: int, message: str
) -> None:
    assert run_command(parser, raising(error), ["--json"]) == code
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["ok"], answer["exit_code"]) == (False, code)
    assert message in answer["error"]
    assert message in printed.err.replace("\n", " ")
    assert "Traceback" not in printed.err


def test_wrong_arguments_are_2_with_json_if_asked(capsys: Capture) -> None:
    assert run_command(parser, raising(AssertionError()), ["--json", "--count", "many"]) == 2
    printed = capsys.readouterr()
    assert "--count: invalid int value: 'many'" in json.loads(printed.out)["error"]
    assert "See do-it --help" in printed.err
    assert run_command(parser, raising(AssertionError()), ["--cou", "3"]) == 2
    assert capsys.readouterr().out == ""


def test_help_is_0_and_has_the_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as raised:
        run_command(parser, raising(AssertionError()), ["--help"])
    assert raised.value.code == 0
    assert "examples:\n  do-it --count 3" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["option", "environment"])
def test_traceback_of_an_internal_error_is_shown_when_asked(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("DITRIM_TRACEBACK", "1")
    arguments = ["--verbose"] if how == "option" else []
    assert run_command(parser, raising(KeyError("x")), arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_that_a_library_swallows_stops_at_the_next_stage(capsys: Capture) -> None:
    def body(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with terminal.progress() as progress:
            progress.stage("Next")
        raise AssertionError("went on")

    before = signal.getsignal(signal.SIGINT)
    assert run_command(parser, body, []) == 130
    assert "error: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_that_comes_out_as_another_error_is_an_interrupt(capsys: Capture) -> None:
    def body(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("half a module") from error
        return {}

    assert run_command(parser, body, ["--json"]) == 143
    assert json.loads(capsys.readouterr().out)["error"].startswith("terminated")
