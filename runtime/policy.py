"""The seam between a reduction policy and the runtime.

A policy is a frozen, shareable description. `begin` gives what works on one request, its reducer;
a policy that remembers nothing is its own reducer. The denoiser asks a reducer, in this order:

- `role` before a step: full, anchor (full and scored) or reduced;
- `select` after an anchor: what the steps after it run on;
- `regroup` after FRONT of a reduced step: the same again, or something that this step calls for;
- `finish_step` once a step, when every guidance branch has run: TokenDrop works there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Grids, TokenGrid

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.engines.sets.ladder import Ladder
    from ditrim.runtime.tokens.matching import TokenMerge

# What a step is: all tokens, unscored or scored, or those that an anchor chose.
Role = Literal["full", "anchor", "reduced"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """The tokens that reduced steps run on.

    Attributes:
        kept: (B, K') int64, ascending: reference tokens; none means all of them.
        merge: averages the references into as many tokens at `kept`, in place of dropping.
        noisy_merge: the same for the noisy tokens; the clean estimate is copied back to all of
            them (`engine_calls.unmerge_velocity`).
        before_front: FRONT too runs on `kept` alone (there is no `merge` then).
    """

    kept: Tensor | None = None
    merge: TokenMerge | None = None
    noisy_merge: TokenMerge | None = None
    before_front: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallView:
    """One model call, as a reducer sees it.

    Attributes:
        step: from 0; branch: "cond" or "uncond".
        ladder: of the engine set.
        grids: (height, width) in tokens of the noisy picture and of each reference, where the
            caller's geometry says so.
        noisy: (B, G, d), reference: (B, C, d): FRONT's outputs; none where the reducer does not
            read features.
        influence: (B, C) float32 (ToPi Eq. 9), on an anchor.
        scores: (B, L, 3, C) float32, for each scored layer the scores of `SCORES`, on an anchor of
            an engine set that was built with them.
        scored_layers: the L layers of `scores`; calibrated_layers: those that `influence` sums.
        region: (C,) bool, reference tokens that the user wants kept.
        reduction: what the steps since the last anchor ran on.
        rows: (n,) int64, which batch entries these are; none where they are all. Entries whose text
            differs in length run apart, and `regroup` is asked for each of them.
    """

    step: int
    branch: str
    ladder: Ladder
    grids: Grids | None
    noisy: Tensor | None = None
    reference: Tensor | None = None
    influence: Tensor | None = None
    scores: Tensor | None = None
    scored_layers: tuple[int, ...] = ()
    calibrated_layers: tuple[int, ...] = ()
    region: Tensor | None = None
    reduction: Reduction | None = None
    rows: Tensor | None = None

    @property
    def reference_grids(self) -> Grids:
        """(height, width) of each reference."""
        return self._known_grids()[1:]

    @property
    def noisy_grid(self) -> TokenGrid:
        """(height, width) of the picture in the making."""
        return self._known_grids()[0]

    def _known_grids(self) -> Grids:
        if self.grids is None:
            raise UsageError(
                "this policy needs to know where tokens lie, and the picture ids of this request "
                "are no whole grids; use ToPi or RandomDrop"
            )
        return self.grids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepView:
    """A finished step, all guidance branches together.

    Attributes:
        step: from 0.
        ladder, grids: see `CallView`.
        latents: (B, G, c) before the step.
        velocity: (B, G, c), guided where guidance is used.
        branches: the velocity of each branch.
        sigma, next_sigma: noise level before and after.
        reference: (B, C, c), the references' latents.
        influence: the last anchor's (B, C), of the branch "cond"; none before one.
        region: see `CallView`.
    """

    step: int
    ladder: Ladder
    grids: Grids | None
    latents: Tensor
    velocity: Tensor
    branches: Mapping[str, Tensor]
    sigma: float
    next_sigma: float
    reference: Tensor
    influence: Tensor | None = None
    region: Tensor | None = None

    @property
    def source(self) -> Tensor | None:
        """(B, G, c): the first reference, if it lies on the grid of the picture in the making."""
        if self.grids is None or len(self.grids) < 2 or self.grids[0] != self.grids[1]:
            return None
        return self.reference[:, : self.latents.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutcome:
    """Result of a reducer's `finish_step`.

    Attributes:
        latents: (B, G, c) to go on from; none leaves the scheduler's own.
        reduction: of the next step, for all branches; none leaves what is.
    """

    latents: Tensor | None = None
    reduction: Reduction | None = None


UNCHANGED = StepOutcome()
SCORES = ("influence", "attention", "key-similarity")


class Reducer:
    """A policy at work on one request; a policy without memory can be its own.

    This one does nothing. `copy.copy` of a reducer is its state at that time: it replaces what it
    remembers and never writes into it.
    """

    __slots__ = ()

    @property
    def score_every(self) -> int:
        """On an anchor step, score every n-th noisy row."""
        return 1

    @property
    def reads_features(self) -> bool:
        """Whether `select` and `regroup` are shown FRONT's outputs."""
        return False

    @property
    def acts_on_steps(self) -> bool:
        """Whether `finish_step` does anything; schedulers are watched for it."""
        return False

    @property
    def takes_region(self) -> bool:
        """Whether a region that the user wants kept is heeded."""
        return False

    def role(self, step: int, reduction: Reduction | None) -> Role:
        """Decide what step `step` (from 0) is, given what a reduced step would run on."""
        return "full"

    def select(self, call: CallView) -> Reduction:
        """Choose what the steps after this anchor run on."""
        raise AssertionError(f"{type(self).__name__} has no anchor steps")

    def regroup(self, call: CallView) -> Reduction | None:
        """Choose what this reduced step runs on; none means what `call.reduction` says."""
        return None

    def finish_step(self, step: StepView) -> StepOutcome:
        """Look at a finished step."""
        return UNCHANGED

    def notes(self) -> Mapping[str, Any]:
        """Return what a report should say of this request: plain values."""
        return {}


class Policy(Protocol):
    """Decides which tokens steps run on. Holds nothing of a request and can be shared."""

    def begin(self, num_steps: int | None = None) -> Reducer:
        """Return a reducer for one request.

        Args:
            num_steps: number of steps it will have; none where it is not known.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FullContext(Reducer):
    """No reduction: every step runs on every reference token."""

    def begin(self, num_steps: int | None = None) -> Reducer:
        return self


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise `UsageError` where an option is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_share(name: str, value: object, advice: str) -> None:
    """Raise `UsageError` where an option is no number in [0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise UsageError(f"{name} must be a number in [0, 1], got {value!r}; {advice}")
