"""ToPi, its ablations, and the same budget spent with coverage."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.schedule import Schedule
from ditrim.runtime.policy import (
    SCORES,
    CallView,
    Reducer,
    Reduction,
    Role,
    check_count,
    check_share,
)

if TYPE_CHECKING:
    import torch

    from ditrim.runtime.tokens.matching import Merge

LayerChoice = Literal["calibrated", "random", "first", "last", "all"]
LAYERS = ("calibrated", "random", "first", "last", "all")
MODES = ("prune", "merge")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPi(Reducer):
    """Token pruning for in-context generation (ToPi, Alg. 1).

    A step every now and then is an anchor: it runs the full context and scores every reference
    token (Eq. 9). The steps between run on the fewest tokens that hold a fraction `tau` of that
    influence (Eq. 10, 11).

    Attributes:
        tau: fraction of the influence to keep, in [0, 1]; the paper's 0.85.
        interval: steps between anchors, the paper's Delta T. None places them by the number of
            steps: every tenth as in the paper, or two in less than 20 steps (see `Schedule`).
        warmup: steps at the start that run the full context unscored.
        score_every: score every n-th noisy row; 1 scores all, as the paper does.
        min_kept: keep at least so many tokens.
        max_kept: keep at most so many tokens; none means no bound.
        ratio: keep this share of the tokens whatever their influence, in place of `tau` (Sec. 5.4
            keeps one half).
        budgets: of each reference, a number of tokens or a share, in place of `tau`.
        is_static: the first anchor decides for all steps (App. E.1).
        score: what tokens are ranked by: "influence" (Eq. 9), "attention" (without the values'
            norms) or "key-similarity" (Table 3).
        layers: whose scores are summed: "calibrated" (Sec. 4.1), or as many "random", "first" or
            "last" ones of BACK, or "all" of them (Tables 2, 5).
        mode: "prune", or "merge" dropped tokens into the nearest kept one (App. E.2).
        seed: of random layers.

    Scores and layers other than the default need an engine set that was built with
    `--score-details`.
    """

    tau: float = 0.85
    interval: int | None = None
    warmup: int = 0
    score_every: int = 1
    min_kept: int = 1
    max_kept: int | None = None
    ratio: float | None = None
    budgets: tuple[float | int, ...] | None = None
    is_static: bool = False
    score: Literal["influence", "attention", "key-similarity"] = "influence"
    layers: LayerChoice = "calibrated"
    mode: Literal["prune", "merge"] = "prune"
    seed: int = 0
    _schedule: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_share("tau", self.tau, "1 keeps every reference token, the paper uses 0.85")
        if self.ratio is not None:
            check_share("ratio", self.ratio, "it is the share of reference tokens to keep")
        for name in ("score_every", "min_kept"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, 0)
        if self.max_kept is not None:
            check_count("max_kept", self.max_kept)
            if self.max_kept < self.min_kept:
                raise UsageError(
                    f"max_kept ({self.max_kept}) is less than min_kept ({self.min_kept})"
                )
        if self.ratio is not None and self.budgets is not None:
            raise UsageError("ratio and budgets both say how many tokens to keep; give one of them")
        for name, allowed in (("score", SCORES), ("layers", LAYERS), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        object.__setattr__(self, "_schedule", Schedule(interval=self.interval, warmup=self.warmup))

    def begin(self, num_steps: int | None = None) -> Self:
        if self.interval is not None or num_steps is None:
            return self
        placed = copy.copy(self)
        schedule = Schedule(warmup=self.warmup, num_steps=num_steps)
        object.__setattr__(placed, "_schedule", schedule)
        return placed

    @property
    def reads_features(self) -> bool:
        return self.mode == "merge"

    @property
    def takes_region(self) -> bool:
        return True

    def role(self, step: int, reduction: Reduction | None = None) -> Role:
        """Begin with an anchor where a request is joined half-way."""
        role = self._schedule.role(step)
        if self.is_static and step > self.warmup:
            role = "reduced"
        return "anchor" if role == "reduced" and reduction is None else role

    def select(self, call: CallView) -> Reduction:
        from ditrim.runtime.tokens.budget import keep_region

        scores = self.scores_of(call)
        kept = self.choose(scores, call)
        if call.region is not None:
            kept = keep_region(kept, call.region, scores, call.ladder)
        return Reduction(kept=kept, merge=self._merge(kept, call))

    def regroup(self, call: CallView) -> Reduction | None:
        """Merge by the features of the step, where the policy merges."""
        if call.reduction is None or call.reduction.kept is None or self.mode == "prune":
            return None
        kept = call.reduction.kept
        return Reduction(kept=kept, merge=self._merge(kept, call))

    def scores_of(self, call: CallView) -> torch.Tensor:
        """(B, C) float32, not negative: what tokens are ranked by."""
        assert call.influence is not None
        if self.score == "influence" and self.layers == "calibrated":
            return call.influence
        if call.scores is None:
            raise UsageError(
                f"score {self.score!r} of {self.layers} layers needs an engine set that returns "
                "the scores of every layer: build one with --score-details"
            )
        chosen = self._layers_of(call)
        return call.scores[:, chosen, SCORES.index(self.score)].sum(dim=1)

    def choose(self, scores: torch.Tensor, call: CallView) -> torch.Tensor:
        """The tokens to keep: (B, K') int64, ascending."""
        from ditrim.runtime.tokens.budget import select_by_budget, select_top

        if self.budgets is not None:
            return select_by_budget(scores, call.reference_grids, self.budgets, call.ladder)
        return select_top(scores, self.count(scores, call))

    def count(self, scores: torch.Tensor, call: CallView) -> int:
        """Return the number of kept tokens: the batch's largest, rounded up by the ladder."""
        from ditrim.runtime.tokens.selection import bounded_count, count_by_influence

        if self.ratio is None:
            count = count_by_influence(scores, self.tau)
        else:
            count = math.ceil(self.ratio * scores.shape[1])
        return bounded_count(
            count, scores.shape[1], call.ladder, min_kept=self.min_kept, max_kept=self.max_kept
        )

    def _layers_of(self, call: CallView) -> list[int]:
        """Return the positions in `call.scored_layers` whose scores are summed."""
        total, wanted = len(call.scored_layers), len(call.calibrated_layers)
        if self.layers == "calibrated":
            return [call.scored_layers.index(layer) for layer in call.calibrated_layers]
        if self.layers == "random":
            import numpy as np

            rng = np.random.default_rng(self.seed)
            return sorted(rng.choice(total, size=min(wanted, total), replace=False).tolist())
        everything = list(range(total))
        return {
            "first": everything[:wanted],
            "last": everything[-wanted:],
            "all": everything,
        }[self.layers]

    def _merge(self, kept: torch.Tensor, call: CallView) -> Merge | None:
        from ditrim.runtime.tokens.matching import merge_into_kept

        if self.mode == "prune":
            return None
        assert call.reference is not None
        return merge_into_kept(call.reference, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageToPi(ToPi):
    """ToPi's budget (Eq. 10), spent on influence and coverage both; see `coverage`.

    Attributes:
        exponent: chances are proportional to influence to this power; 0 spreads evenly, a large
            one approaches ToPi. Chosen on training scenes of the small editor.
        floor: added to every token's influence, as a share of the mean.
        min_share: a reference keeps at least this share of what it would by its length alone.
    """

    exponent: float = 2.0
    floor: float = 0.0
    min_share: float = 0.25

    def choose(self, scores: torch.Tensor, call: CallView) -> torch.Tensor:
        from ditrim.runtime.tokens.budget import select_by_budget
        from ditrim.runtime.tokens.coverage import select_with_coverage

        def spread(part: torch.Tensor, grids: object, count: int) -> torch.Tensor:
            return select_with_coverage(
                part,
                grids,  # type: ignore[arg-type]
                count,
                exponent=self.exponent,
                floor=self.floor,
                min_share=self.min_share,
            )

        grids = call.reference_grids
        if self.budgets is not None:
            return select_by_budget(scores, grids, self.budgets, call.ladder, selection=spread)
        return spread(scores, grids, self.count(scores, call))
