"""The seam between the runtime and what executes a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from ditrim.engines.sets.engine_set import EngineSet


class Engines(Protocol):
    """FRONT and BACK, ready to run. Shared by any number of sessions."""

    @property
    def engine_set(self) -> EngineSet:
        """The engine set that was loaded."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of latents, embeddings and hidden states."""
        ...

    @property
    def choice(self) -> str:
        """One sentence that names the execution provider and why it was chosen."""
        ...

    def run(
        self,
        role: str,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
    ) -> None:
        """Run "front", "back" or "anchor" from and into the caller's tensors. Thread-safe.

        Args:
            role: which graph; "anchor" is BACK on a step whose influence is read. A set without an
                anchor plan of its own runs BACK; one with it leaves the scoring out of BACK, which
                then does not write `influence`.
            inputs: contiguous tensors on `device` by name; names that the graph does not take are
                ignored.
            outputs: contiguous tensors on `device` of the right shapes, written in place.

        Raises:
            BackendError: this process was forked from the one that loaded the engines.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything run so far is done."""
        ...
