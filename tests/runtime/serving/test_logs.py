"""What is counted of a request, and when."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ditrim.runtime.serving.logs import RequestLog

Counts = list[tuple[str, int]]


class Exchange:
    """One request to an application; `before` holds what was counted before each message."""

    def __init__(self) -> None:
        self.counted: Counts = []
        self.before: list[Counts] = []

    def run(self, app: Any) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def told(message: Any) -> None:
            self.before.append(list(self.counted))

        log = RequestLog(app, lambda path, status: self.counted.append((path, status)))
        asyncio.run(log({"type": "http", "method": "GET", "headers": []}, receive, told))


def test_a_request_is_counted_once_and_before_its_answer_can_be_read() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 418})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    exchange = Exchange()
    exchange.run(app)
    assert exchange.before == [[("other", 418)]] * 3
    assert exchange.counted == [("other", 418)]


def test_a_request_without_an_answer_is_counted_as_left() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionResetError

    exchange = Exchange()
    with pytest.raises(ConnectionResetError):
        exchange.run(app)
    assert exchange.counted == [("other", 499)]
