"""Who is told how a build goes."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Who is told how a build goes."""

    def stage(self, name: str) -> None:
        """A new stage begins. May raise to stop the build."""
        ...

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        """How much of this stage's work is done, and in all; in bytes, or in steps."""
        ...

    def note(self, message: str) -> None:
        """Something that a person should know."""
        ...


class LoggedProgress:
    """Tells the log; what `build_engine_set` uses when nobody else asks."""

    def stage(self, name: str) -> None:
        logger.info("%s", name)

    def update(self, done: int, total: int, unit: str = "bytes") -> None:
        pass

    def note(self, message: str) -> None:
        logger.warning("%s", message)
