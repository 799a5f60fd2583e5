"""Importance-based token merging (IBTM): tokens that matter least merge first.

What the paper leaves open, and what is done here:

- It needs guidance. The importance of a noisy token is the size of the guidance difference at the
  last step (Eq. 2) where a request runs both branches. A model whose guidance is distilled runs
  one: there it is the residual between the clean estimate and the source (TokenDrop's D_t), and
  without a source on the same grid the mean absolute velocity.
- References are not generated and have no guidance difference in any model. The paper takes "all
  reliable per token importance signals" (Sec. 3): theirs is the influence (ToPi Eq. 9), which
  anchor steps measure.
- Merged noisy tokens get the clean estimate of their group back, and keep their own noise. The
  paper copies a layer's output, to which every token still adds its own hidden state; copying
  BACK's velocity alone leaves noise in the picture.
- It merges around single layers; here, FRONT runs on everything and BACK's tokens are merged once.
- Its early steps are given as a number of 50 (of 30 for video), not as a share of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.merging import check_scope, reduce_by_merging
from ditrim.runtime.policies.schedule import Schedule
from ditrim.runtime.policy import (
    UNCHANGED,
    CallView,
    Reducer,
    Reduction,
    Role,
    StepOutcome,
    StepView,
    check_count,
    check_share,
)
from ditrim.runtime.tokens.draws import generator_of

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.plugins.layout import Grids
    from ditrim.runtime.tokens.matching import Merge

METRICS = ("features", "places")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceMerge:
    """Importance-based token merging (IBTM Sec. 3, App. B).

    Every `interval`-th step is an anchor: it runs the full context and measures the references'
    influence. The steps between merge each part of the sequence into a share of its tokens, grouped
    anew from the features of the step: destinations are drawn from the pool of the most important
    tokens, and only the pool's tokens stay alone.

    Attributes:
        ratio: share of the tokens to keep, the paper's 1 - r.
        scope: "both" merges noisy and reference tokens, each among themselves, and copies the noisy
            results back; "reference" the references alone.
        p: the pool holds (1 + p) times as many tokens as are kept; the paper's 0.4 for pictures.
        k: share of the tokens that are destinations; the paper's, as in ToMeSD.
        prune_steps: in so many steps at the start, merged tokens are dropped instead of averaged,
            and destinations are one random token of every 2 x 2; the paper's 6 (of 50 steps).
        interval: steps between anchors.
        warmup: steps at the start that run the full context unscored.
        score_every: on an anchor, score every n-th noisy row.
        metric: what makes tokens alike: "features", or "places" as the paper does for PixArt.
        seed: of the destinations.
    """

    ratio: float = 0.5
    scope: Literal["reference", "both"] = "both"
    p: float = 0.4
    k: float = 0.25
    prune_steps: int = 6
    interval: int = 10
    warmup: int = 0
    score_every: int = 1
    metric: Literal["features", "places"] = "features"
    seed: int = 0
    schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "it is the share of tokens to keep")
        check_scope(self.scope)
        if not self.p >= 0 or not 0 < self.k <= 1:
            raise UsageError(
                f"p must not be negative and k in (0, 1], got p={self.p!r} and k={self.k!r}"
            )
        for name, least in (("prune_steps", 0), ("score_every", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        if self.metric not in METRICS:
            raise UsageError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        object.__setattr__(self, "schedule", Schedule(interval=self.interval, warmup=self.warmup))

    def begin(self, num_steps: int | None = None) -> Reducer:
        return ImportanceMergeReducer(policy=self)


@dataclass(slots=True, kw_only=True)
class ImportanceMergeReducer(Reducer):
    """`ImportanceMerge` at work on one request.

    Attributes:
        policy: its options.
        influence: (B, C) of each branch, from its last anchor.
        noisy_importance: (B, G), from the last finished step.
        signal: where that came from.
    """

    policy: ImportanceMerge
    influence: Mapping[str, Tensor] = field(default_factory=dict)
    noisy_importance: Tensor | None = None
    signal: str | None = None

    @property
    def score_every(self) -> int:
        return self.policy.score_every

    @property
    def reads_features(self) -> bool:
        return True

    @property
    def acts_on_steps(self) -> bool:
        return self.policy.scope == "both"

    def role(self, step: int, reduction: Reduction | None) -> Role:
        """Begin with an anchor where a request is joined half-way."""
        role = self.policy.schedule.role(step)
        return "anchor" if role == "reduced" and reduction is None else role

    def select(self, call: CallView) -> Reduction:
        """Keep the influence; tokens are grouped at the steps that follow."""
        assert call.influence is not None
        self.influence = {**self.influence, call.branch: call.influence}
        return Reduction()

    def regroup(self, call: CallView) -> Reduction | None:
        influence = self.influence[call.branch]

        def references(features: Tensor, grids: Grids, count: int) -> Merge:
            return self._group(features, grids, count, influence, call, 0)

        def noisy(features: Tensor, grids: Grids, count: int) -> Merge:
            assert self.noisy_importance is not None
            return self._group(features, grids, count, self.noisy_importance, call, 1)

        return reduce_by_merging(
            call, self.policy.ratio, references, noisy if self.policy.scope == "both" else None
        )

    def finish_step(self, step: StepView) -> StepOutcome:
        """Take in the step and change nothing of it."""
        self.noisy_importance, self.signal = _noisy_importance(step)
        return UNCHANGED

    def notes(self) -> Mapping[str, Any]:
        found = {"reference_importance": "influence"}
        return found if self.signal is None else found | {"noisy_importance": self.signal}

    def _group(
        self,
        features: Tensor,
        grids: Grids,
        count: int,
        importance: Tensor,
        call: CallView,
        part: int,
    ) -> Merge:
        from ditrim.runtime.tokens.matching import grid_positions, ibtm, tomesd

        policy = self.policy
        generator = generator_of(policy.seed, call.step, part)
        by_place = policy.metric == "places"
        if by_place:
            features = grid_positions(grids).to(features.device).expand(len(features), -1, -1)
        similarity: Literal["cosine", "distance"] = "distance" if by_place else "cosine"
        if call.step < policy.prune_steps:
            return tomesd(features, grids, count, generator, prune=True, similarity=similarity)
        importance = importance.to(features.device)
        if call.rows is not None:
            importance = importance[call.rows.to(features.device)]
        return ibtm(
            features, importance, count, generator, p=policy.p, k=policy.k, similarity=similarity
        )


def _noisy_importance(step: StepView) -> tuple[Tensor, str]:
    """(B, G) float32, and what it is."""
    from ditrim.runtime.tokens.matching import guidance_importance
    from ditrim.runtime.tokens.residual import residual_map

    if {"cond", "uncond"} <= set(step.branches):
        found = guidance_importance(step.branches["cond"], step.branches["uncond"])
        return found, "guidance difference"
    if step.source is not None:
        found = residual_map(step.latents, step.velocity, step.sigma, step.source)
        return found, "residual to the source, as only one branch runs"
    found = step.velocity.float().abs().mean(dim=-1)
    return found, "velocity, as only one branch runs and no source has the picture's grid"
