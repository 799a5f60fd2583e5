"""Engines and `fork`: their threads and their device stay with the process that loaded them.

The same holds for torch's threads, which the torch backend and every build use.

A child that was forked has the memory of both and none of their threads, so it would wait for ever
for the first one that it needs.
"""

from __future__ import annotations

import os

from ditrim.plugins.errors import BackendError

# Processes that loaded or built engines: this one, or those that it was forked from.
_LOADED_IN: set[int] = set()


def note_loaded() -> None:
    """Remember that this process loads or builds engines."""
    _LOADED_IN.add(os.getpid())


def check_not_forked() -> None:
    """Check that no process that this one was forked from had loaded engines.

    Raises:
        BackendError: one had; says how to start processes instead.
    """
    parents = _LOADED_IN - {os.getpid()}
    if parents:
        raise BackendError(
            f"this process was forked from process {max(parents)}, which had loaded or built "
            "engines, whose threads are not in it: start processes with "
            'multiprocessing.get_context("spawn"), or load and build engines only after the fork'
        )
