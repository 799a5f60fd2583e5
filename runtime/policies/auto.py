"""A policy that picks by request: it looks at the first steps, then takes the cheapest way on.

The first steps run the full context; the last of them is an anchor. Its influence scores and the
residual between clean estimate and source are then there, and three ways to go on are weighed:

- coverage: `CoverageToPi`, with as few tokens as the floor allows, found anew at every anchor;
- tokendrop: where there is a source, the edit is local, and its mask is above the floor;
- full: where neither saves `min_gain` of the remaining work.

The floor is a share of the influence (`min_influence`), or a predicted PSNR against the full
context (`min_psnr`, which needs a `QualityModel`). Costs are counted in tokens and blocks,
without the quadratic part of attention, so a long reference is worth more than is counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.quality import METHODS, Outlook, QualityModel, load_quality
from ditrim.runtime.policies.schedule import USUAL_INTERVAL
from ditrim.runtime.policies.tokendrop import TokenDrop, TokenDropReducer
from ditrim.runtime.policies.topi import CoverageToPi
from ditrim.runtime.policy import (
    UNCHANGED,
    CallView,
    FullContext,
    Reducer,
    Reduction,
    StepOutcome,
    StepView,
    check_count,
    check_share,
)

if TYPE_CHECKING:
    import torch

    from ditrim.runtime.policy import Role

_PARTS = 32  # kept counts that are tried, as parts of the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class FlooredCoverage(CoverageToPi):
    """`CoverageToPi` with the fewest tokens that stay above a floor.

    Eq. 10's count is that of the most influential tokens; spread ones hold less. Here the tokens
    that are kept hold the floor themselves.

    Attributes:
        min_influence: share of the influence that is kept at least.
        min_psnr: predicted PSNR in dB that is kept at least, in place of it.
        quality: predicts it.
    """

    min_influence: float = 0.85
    min_psnr: float | None = None
    quality: QualityModel | None = field(default=None, repr=False)

    def count(self, scores: torch.Tensor, call: CallView) -> int:
        """Find the count by bisection, as more tokens hold more."""
        length = scores.shape[1]
        low, high = 1, _PARTS
        while low < high:
            middle = (low + high) // 2
            if self._is_enough(scores, call, math.ceil(length * middle / _PARTS)):
                high = middle
            else:
                low = middle + 1
        return min(length, call.ladder.round_up(math.ceil(length * high / _PARTS)))

    def _is_enough(self, scores: torch.Tensor, call: CallView, count: int) -> bool:
        from ditrim.runtime.tokens.coverage import select_with_coverage

        count = min(scores.shape[1], call.ladder.round_up(count))
        kept = select_with_coverage(
            scores,
            call.reference_grids,
            count,
            exponent=self.exponent,
            floor=self.floor,
            min_share=self.min_share,
        )
        outlook = Outlook(ratio=count / scores.shape[1], influence=kept_influence(scores, kept))
        return is_above(outlook, "coverage", self.min_influence, self.min_psnr, self.quality)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Picks a policy by request; see the module.

    Attributes:
        min_influence: the floor: share of the influence that is kept at least.
        min_psnr: the floor as predicted PSNR in dB against the full context, in place of it.
        predictor: file of `calibrate-auto`, which `min_psnr` needs.
        look: steps before the choice.
        interval: steps between anchors where coverage is chosen; see `ToPi`.
        min_gain: share of the remaining work that must be saved, or the full context is run.
        only: leave the other of the two out of the choice.
        front_share: FRONT's share of the blocks; 10 of 60 or 57 in the paper's split.
        tokendrop, coverage: options of the two.
    """

    min_influence: float = 0.85
    min_psnr: float | None = None
    predictor: str | None = None
    look: int = 2
    interval: int | None = None
    min_gain: float = 0.05
    only: Literal["coverage", "tokendrop"] | None = None
    front_share: float = 1 / 6
    tokendrop: TokenDrop = field(default_factory=TokenDrop)
    coverage: CoverageToPi = field(default_factory=CoverageToPi)
    _quality: QualityModel | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_share("min_influence", self.min_influence, "0.85 keeps most of what matters")
        check_share("min_gain", self.min_gain, "0 takes any gain")
        check_share("front_share", self.front_share, "it is FRONT's share of the blocks")
        if self.only not in (None, *METHODS):
            raise UsageError(f"only must be one of {', '.join(METHODS)}, got {self.only!r}")
        check_count("look", self.look)
        if self.interval is not None:
            check_count("interval", self.interval)
        quality = None
        if self.min_psnr is not None:
            is_number = isinstance(self.min_psnr, (int, float)) and not isinstance(
                self.min_psnr, bool
            )
            if not is_number or not 0 < self.min_psnr <= 100:
                raise UsageError(f"min_psnr must lie in (0, 100] dB, got {self.min_psnr!r}")
            if self.predictor is None:
                raise UsageError(
                    "min_psnr needs a predictor: the file that calibrate-auto makes for the engine "
                    "set; or set min_influence"
                )
            quality = load_quality(self.predictor)
            if "coverage" not in quality.coefficients:
                raise UsageError(f"{self.predictor} predicts nothing for coverage; fit it again")
        object.__setattr__(self, "_quality", quality)

    @property
    def quality(self) -> QualityModel | None:
        """The model that predicts PSNR for `min_psnr`."""
        return self._quality

    def begin(self, num_steps: int | None = None) -> Reducer:
        inner = {name: getattr(self.coverage, name) for name in ("exponent", "floor", "min_share")}
        coverage = FlooredCoverage(
            **inner,
            interval=self.interval,
            warmup=self.look - 1,
            min_influence=self.min_influence,
            min_psnr=self.min_psnr,
            quality=self._quality,
        )
        drop = replace(self.tokendrop, full_steps=self.look).begin(num_steps)
        assert isinstance(drop, TokenDropReducer)
        placed = coverage.begin(num_steps)
        return AutoReducer(policy=self, coverage=placed, drop=drop, num_steps=num_steps)


@dataclass(slots=True, kw_only=True)
class AutoReducer(Reducer):
    """`Auto` at work on one request.

    Attributes:
        policy: its options.
        coverage, drop: the two that may be chosen.
        num_steps: of the request; none where it is not known.
        chosen: what works from the choice on; none before it.
        coverage_outlook: what coverage would keep, of the branch that would keep most.
        facts: what the report says.
    """

    policy: Auto
    coverage: FlooredCoverage
    drop: TokenDropReducer
    num_steps: int | None = None
    chosen: Reducer | None = None
    coverage_outlook: Outlook | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __copy__(self) -> AutoReducer:
        drop = copy.copy(self.drop)
        return replace(self, drop=drop, chosen=drop if self.chosen is self.drop else self.chosen)

    @property
    def acts_on_steps(self) -> bool:
        return True

    @property
    def takes_region(self) -> bool:
        return True

    def role(self, step: int, reduction: Reduction | None) -> Role:
        if self.chosen is not None:
            return self.chosen.role(step, reduction)
        return self.coverage.role(step, reduction)

    def select(self, call: CallView) -> Reduction:
        found = self.coverage.select(call)
        if self.chosen is None:
            assert call.influence is not None
            assert found.kept is not None
            outlook = Outlook(
                ratio=found.kept.shape[1] / call.influence.shape[1],
                influence=kept_influence(call.influence, found.kept),
            )
            if self.coverage_outlook is None or outlook.ratio > self.coverage_outlook.ratio:
                self.coverage_outlook = outlook
            share = round(concentration(call.influence), 4)
            self.facts = {**self.facts, "influence_concentration": share}
        return found

    def finish_step(self, step: StepView) -> StepOutcome:
        """Make the choice, once a step has shown what it needs."""
        if self.chosen is self.drop:
            return self.drop.finish_step(step)
        if self.chosen is not None:
            return UNCHANGED
        outcome = self.drop.finish_step(step)
        if step.step < self.policy.look - 1:
            return UNCHANGED
        self._choose(step, outcome)
        if self.chosen is self.drop:
            return outcome
        if self.chosen is self.coverage:
            return UNCHANGED
        return StepOutcome(reduction=Reduction())

    def notes(self) -> Mapping[str, Any]:
        found = dict(self.facts)
        if self.chosen is self.drop:
            found["tokendrop"] = dict(self.drop.notes())
        return found

    def _choose(self, step: StepView, outcome: StepOutcome) -> None:
        """Weigh the candidates by cost, of those above the floor."""
        policy = self.policy
        num_noisy, num_reference = step.latents.shape[1], step.reference.shape[1]

        def work(ratio: float) -> float:
            return (num_noisy + ratio * num_reference) / (num_noisy + num_reference)

        candidates: list[dict[str, Any]] = []
        seen = self.coverage_outlook
        if seen is not None:
            back = work(seen.ratio)
            share = policy.front_share + (1 - policy.front_share) * back
            anchors = self._share_of_anchors(step.step)
            cost = anchors + (1 - anchors) * share
            candidates.append(self._candidate("coverage", seen, cost))
        drop = self._drop_outlook(step, outcome)
        if isinstance(drop, str):
            candidates.append({"policy": "tokendrop", "ruled_out": drop})
        else:
            candidates.append(self._candidate("tokendrop", drop, work(drop.ratio)))
        candidates = [item for item in candidates if policy.only in (None, item["policy"])]
        possible = [item for item in candidates if "ruled_out" not in item]
        best = min(possible, key=lambda item: item["cost"], default=None)
        floor = (
            f"kept influence {policy.min_influence:g}"
            if policy.min_psnr is None
            else f"predicted PSNR {policy.min_psnr:g} dB"
        )
        if best is None:
            name, why = "full", f"no candidate stays above the floor, {floor}"
        elif best["cost"] > 1 - policy.min_gain:
            name = "full"
            why = (
                f"{best['policy']} would save {1 - best['cost']:.1%} of the work, less than "
                f"{policy.min_gain:.0%}"
            )
        else:
            name = best["policy"]
            why = f"the cheapest above the floor, {floor}: {best['cost']:.1%} of the full work"
        self.chosen = {"coverage": self.coverage, "tokendrop": self.drop, "full": FullContext()}[
            name
        ]
        self.facts = {
            **self.facts,
            "chosen": name,
            "why": why,
            "at_step": step.step,
            "candidates": candidates,
        }

    def _share_of_anchors(self, step: int) -> float:
        """The share of the steps after `step` that coverage would run in full."""
        if self.num_steps is None or step + 1 >= self.num_steps:
            return 1 / (self.policy.interval or USUAL_INTERVAL)
        remaining = range(step + 1, self.num_steps)
        roles = [self.coverage.role(i, Reduction()) for i in remaining]
        return roles.count("anchor") / len(roles)

    def _drop_outlook(self, step: StepView, outcome: StepOutcome) -> Outlook | str:
        """Return what TokenDrop would keep, or why it cannot serve."""
        if self.drop.dense_because is not None:
            return self.drop.dense_because
        kept = None if outcome.reduction is None else outcome.reduction.kept
        if kept is None or step.influence is None:
            return "there is no mask"
        quality = self.policy.quality
        if quality is not None and "tokendrop" not in quality.coefficients:
            return "the predictor was not fitted for it"
        return Outlook(
            ratio=kept.shape[1] / step.reference.shape[1],
            influence=kept_influence(step.influence, kept),
            spread=self.drop.spread,
        )

    def _candidate(self, method: str, outlook: Outlook, cost: float) -> dict[str, Any]:
        policy = self.policy
        found: dict[str, Any] = {
            "policy": method,
            "kept_ratio": round(outlook.ratio, 4),
            "kept_influence": round(outlook.influence, 4),
            "cost": round(cost, 4),
        }
        if outlook.spread is not None:
            found["residual_spread"] = round(outlook.spread, 4)
        if policy.quality is not None:
            found["predicted_psnr_db"] = round(policy.quality.predict(method, outlook), 2)
        if not is_above(outlook, method, policy.min_influence, policy.min_psnr, policy.quality):
            found["ruled_out"] = "it is below the floor"
        return found


def kept_influence(influence: torch.Tensor, kept: torch.Tensor) -> float:
    """Share of the influence (B, C) that kept tokens (B, K') hold; of a batch, the least."""
    total = influence.double().sum(dim=1)
    held = influence.double().gather(1, kept).sum(dim=1)
    shares = (held / total).where(total > 0, kept.shape[1] / influence.shape[1])
    return float(shares.min())


def concentration(influence: torch.Tensor) -> float:
    """How unevenly influence (B, C) is spread: the Gini coefficient, of a batch the mean."""
    import torch

    length = influence.shape[1]
    ranked = influence.double().sort(dim=1).values
    ranks = torch.arange(1, length + 1, device=influence.device, dtype=torch.float64)
    total = ranked.sum(dim=1)
    gini = 2 * (ranked * ranks).sum(dim=1) / (length * total) - (length + 1) / length
    return float(gini.where(total > 0, 0.0).mean())


def is_above(
    outlook: Outlook,
    method: str,
    min_influence: float,
    min_psnr: float | None,
    quality: QualityModel | None,
) -> bool:
    """Whether a reduction stays above the floor."""
    if min_psnr is None or quality is None:
        return outlook.influence >= min_influence
    return quality.predict(method, outlook) >= min_psnr
