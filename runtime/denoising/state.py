"""State that a request carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.runtime.caches.step_cache import CacheMemory
    from ditrim.runtime.denoising.calls import RopeRows
    from ditrim.runtime.policy import Reducer, Reduction


@dataclass(slots=True)
class BranchState:
    """State that one guidance branch carries from step to step.

    Attributes:
        num_reference: C of this request; none before the first call.
        reduction: what reduced steps run on; none before the policy chose.
        cache: of the step cache.
        rope: the position rows of `reduction`'s tokens; none before they are needed.
    """

    num_reference: int | None = None
    reduction: Reduction | None = None
    cache: CacheMemory | None = None
    rope: RopeRows | None = None

    def reduce_to(self, reduction: Reduction) -> None:
        """Let the steps from here on run on `reduction`."""
        self.reduction, self.rope = reduction, None


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request as it stands between two steps.

    Attributes:
        step: steps done.
        branches: the state of each guidance branch.
        reducer: what the policy remembers; none before the first step.
        influence: the last anchor's, of the branch "cond".
    """

    step: int
    branches: dict[str, BranchState]
    reducer: Reducer | None
    influence: Tensor | None
