"""A service over the shipped small editor, and edits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from ditrim.runtime.service import (
    EditJob,
    EditRequest,
    EditService,
    ModelSource,
    Progress,
    ServiceOptions,
)
from ditrim.runtime.small_editor import samples_folder

SMALL = ModelSource(engine="torch", pipeline="small", device="cpu")
PROMPT = "take away the black ring"


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A held-out picture of the small editor."""
    return Image.open(samples_folder() / "remove-source.png").convert("RGB")


@pytest.fixture
def job(picture: Image.Image) -> Callable[..., EditJob]:
    """Make a job of four steps; arguments of `EditRequest` and of `EditJob` change it."""

    def make(**changes: Any) -> EditJob:
        of_edit = {"images": (picture,), "prompt": PROMPT, "steps": 4}
        names = EditRequest.__dataclass_fields__
        of_edit |= {name: changes.pop(name) for name in list(changes) if name in names}
        return EditJob(edit=EditRequest(**of_edit), **changes)

    return make


@pytest.fixture
def started() -> Iterator[Callable[..., EditService]]:
    """Start services with options; they are closed at the end."""
    services: list[EditService] = []

    def start(models: Any = SMALL, **options: Any) -> EditService:
        service = EditService(models, ServiceOptions(**{"warm_up": False} | options))
        services.append(service)
        service.start()
        return service

    yield start
    for service in services:
        service.close()


class Gate:
    """Holds an edit after its first step until it is opened."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        self.steps = 0

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "step":
            self.steps = progress.done
            self.reached.set()
            assert self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
