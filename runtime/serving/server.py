"""Runs the application until a signal, then lets what was accepted finish."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from ditrim.plugins.errors import DitrimError
from ditrim.runtime.service import EditService
from ditrim.runtime.serving.app import create_app
from ditrim.runtime.serving.logs import JsonLines
from ditrim.runtime.serving.settings import ServingSettings


def serve(
    service: EditService,
    settings: ServingSettings,
    *,
    host: str,
    port: int,
    drain_s: int | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        service: not started yet.
        settings: what is accepted.
        host, port: where to listen.
        drain_s: seconds that accepted edits get to finish; none means all that they need.

    Raises:
        DitrimError: a model cannot be loaded, or the address cannot be listened on.
    """
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    server = _Server(
        uvicorn.Config(
            create_app(service, settings),
            host=host,
            port=port,
            timeout_graceful_shutdown=drain_s,
            lifespan="on",
            **options,
        )
    )
    failures: list[Exception] = []

    def watch() -> None:
        try:
            service.wait_ready()
        except Exception as error:  # why it cannot start, for whoever started it
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    with _json_logs(with_prompts=settings.log_prompts):
        server.run()
    if failures:
        raise failures[0]
    if not server.started:
        raise DitrimError(f"cannot listen on {host}:{port}; choose another --host or --port")


# Loggers whose warnings quote the prompt that they are about.
_QUOTING = ("ditrim.runtime.small_editor", "diffusers", "transformers")


@contextmanager
def _json_logs(*, with_prompts: bool) -> Iterator[None]:
    """Write this package's and uvicorn's logs as lines of JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logs = [] if with_prompts else [logging.getLogger(name) for name in _QUOTING]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with _lines_of(handler):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _lines_of(handler: logging.Handler) -> Iterator[None]:
    """Let one handler write what this package and uvicorn log."""
    logs = [logging.getLogger(name) for name in ("ditrim", "uvicorn")]
    before = [(log.handlers[:], log.level, log.propagate) for log in logs]
    for log in logs:
        log.handlers[:], log.propagate = [handler], False
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, (handlers, level, propagate) in zip(logs, before, strict=True):
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)


class _Server(uvicorn.Server):
    """Ends cleanly on a signal, which uvicorn would raise again when it is done."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking connections; a second interrupt does not wait for those that are open."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
