"""A real server on the loopback, over the shipped small editor."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image

from ditrim.runtime.service import EditService, ModelSource, ServiceOptions
from ditrim.runtime.serving.app import create_app
from ditrim.runtime.serving.settings import ServingSettings
from ditrim.runtime.small_editor import samples_folder

SMALL = ModelSource(engine="torch", pipeline="small", device="cpu")


@contextlib.contextmanager
def running(options: dict[str, Any], settings: dict[str, Any]) -> Iterator[Any]:
    """A client of a server of its own."""
    service = EditService(SMALL, ServiceOptions(**{"warm_up": False} | options))
    service.start()
    app = create_app(service, ServingSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client: Any = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    client.service = service
    try:
        yield client
    finally:
        client.close()
        service.close()
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of a server with two workers."""
    with running({"workers": 2, "queue_size": 14, "max_steps": 1000}, {}) as client:
        yield client


@pytest.fixture
def server() -> Iterator[Callable[..., Any]]:
    """Start servers with options of `ServiceOptions`; gives a client each."""
    with contextlib.ExitStack() as stack:
        yield lambda settings=None, **options: stack.enter_context(running(options, settings or {}))


@pytest.fixture(scope="session")
def png() -> bytes:
    """A held-out picture of the small editor."""
    return (samples_folder() / "remove-source.png").read_bytes()


def picture_bytes(mode: str, size: tuple[int, int], colour: Any = 0, form: str = "PNG") -> bytes:
    """A file of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture_of() -> Callable[..., bytes]:
    """Make files of one colour."""
    return picture_bytes
