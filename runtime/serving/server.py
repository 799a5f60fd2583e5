"""Runs the application until a signal, then lets what was accepted finish."""

from __future__ import annotations

import logging
import sys
from typing import Any

import uvicorn

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
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("ditrim", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(logging.INFO)
        log.propagate = False
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    uvicorn.Server(
        uvicorn.Config(
            create_app(service, settings),
            host=host,
            port=port,
            timeout_graceful_shutdown=drain_s,
            lifespan="on",
            **options,
        )
    ).run()
