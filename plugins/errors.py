"""Errors that a caller can act on; every command turns them into one message and an exit code."""

from __future__ import annotations


class DitrimError(Exception):
    """A failure that is understood: its message says what happened and what to do about it."""

    exit_code = 1


class UsageError(DitrimError, ValueError):
    """A caller's mistake: a name, value or file that cannot be accepted."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint that is missing, incomplete or does not match the model."""


class EngineSetError(DitrimError):
    """An engine set that is missing, damaged, or made for something else."""


class LadderError(UsageError):
    """A step that needs a shape the engine set was not built for."""


class BackendError(DitrimError):
    """A backend that is not installed or cannot run what was asked."""


class DeviceError(BackendError):
    """A device that failed while it ran: nothing that it computes can be trusted any more."""
