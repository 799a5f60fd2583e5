"""Receivers of a build's progress."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives the progress of a build."""

    def stage(self, name: str) -> None:
        """Begin a stage; may raise to stop the build."""
        ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        """Receive how much of this stage's work is done, and in all; in bytes, or in steps."""
        ...

    def note(self, message: str) -> None:
        """Receive a message for the person who builds."""
        ...


class LoggedProgress:
    """Writes the progress to the log; the default of `build_engine_set`."""

    def stage(self, name: str) -> None:
        logger.info("%s", name)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        pass

    def note(self, message: str) -> None:
        logger.warning("%s", message)
