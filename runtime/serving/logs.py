"""Logs as lines of JSON, one a request, each with the request's id."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON; what `extra={"fields": ...}` holds stands beside it."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


class RequestLog:
    """Gives every request an id, counts it and writes a line when it was answered."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        """Take the application and who counts a path and a status."""
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "log": fields}
        start, status = time.perf_counter(), 499  # where the client leaves before an answer
        path: str | None = None

        def count() -> str:
            counted: str = getattr(scope.get("route"), "path", "other")
            self._count(counted, status)
            return counted

        async def told(message: Message) -> None:
            nonlocal status, path
            if message["type"] == "http.response.start":
                status = message["status"]
                path = count()  # before the client has the answer, and may ask for the count
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            path = path or count()
            logger.info(
                "request",
                extra={
                    "fields": {
                        "request_id": request_id,
                        "method": scope["method"],
                        "path": path,
                        "status": status,
                        "seconds": round(time.perf_counter() - start, 4),
                        **fields,
                    }
                },
            )
