"""Baselines at the same seam: random dropping, ToMeSD and ToMA.

ToFu, which ToPi and IBTM also compare with, is not here: neither paper gives its formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.merging import check_scope, reduce_by_merging
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import CallView, Reducer, Reduction, check_count, check_share
from ditrim.runtime.tokens.draws import generator_of

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.plugins.layout import Grids
    from ditrim.runtime.policy import Role
    from ditrim.runtime.tokens.matching import TokenMerge


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomDrop(Reducer):
    """A baseline: as many tokens as `policy` would keep, chosen at random.

    Attributes:
        policy: decides roles and counts, those of each reference where it has budgets.
        seed: of the choice; the same step, influence and seed give the same tokens.
    """

    policy: ToPi
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)
        if self.policy.mode != "prune":
            raise UsageError(
                f"RandomDrop drops tokens and its policy has mode={self.policy.mode!r}; give it "
                "one with mode='prune'"
            )

    def begin(self, num_steps: int | None = None) -> Reducer:
        policy = self.policy.begin(num_steps)
        assert isinstance(policy, ToPi)
        return replace(self, policy=policy)

    @property
    def score_every(self) -> int:
        return self.policy.score_every

    @property
    def takes_region(self) -> bool:
        return True

    def role(self, step: int, reduction: Reduction | None = None) -> Role:
        return self.policy.role(step, reduction)

    def select(self, call: CallView) -> Reduction:
        import torch

        from ditrim.runtime.tokens.budget import keep_region, select_by_budget, select_top

        scores = self.policy.scores_of(call)
        # Seeded by the scores as well: other samples get other tokens.
        salt = int(scores.double().sum().view(torch.int64)) & 0xFFFFFFFFFFFFFFFF
        generator = generator_of(self.seed, call.step, salt)
        order = torch.rand(scores.shape, generator=generator).to(scores.device)
        if self.policy.budgets is not None:
            grids = call.reference_grids
            kept = select_by_budget(order, grids, self.policy.budgets, call.ladder)
        else:
            kept = select_top(order, self.policy.count(scores, call))
        if call.region is not None:
            kept = keep_region(kept, call.region, order, call.ladder)
        return Reduction(kept=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MergeAlways(Reducer):
    """Merging that looks at nothing but the features of the step itself.

    Attributes:
        ratio: share of the tokens to keep, 1 - r in the papers.
        scope: "both" merges noisy and reference tokens, each among themselves; "reference" the
            references alone (the starred rows of ToPi's Table 1).
        warmup: steps at the start that run the full context.
        interval: after them, every so many steps run the full context; none means no step does.
        seed: of random choices.
    """

    ratio: float = 0.5
    scope: Literal["reference", "both"] = "both"
    warmup: int = 0
    interval: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "it is the share of tokens to keep")
        check_scope(self.scope)
        check_count("warmup", self.warmup, 0)
        check_count("seed", self.seed, 0)
        if self.interval is not None:
            check_count("interval", self.interval)

    def begin(self, num_steps: int | None = None) -> Reducer:
        return self

    @property
    def reads_features(self) -> bool:
        return True

    def role(self, step: int, reduction: Reduction | None = None) -> Role:
        if step < self.warmup:
            return "full"
        is_full = self.interval is not None and (step - self.warmup) % self.interval == 0
        return "full" if is_full else "reduced"

    def regroup(self, call: CallView) -> Reduction | None:

        def references(features: Tensor, grids: Grids, count: int) -> TokenMerge:
            return self.group(features, grids, count, call.step, 0)

        def noisy(features: Tensor, grids: Grids, count: int) -> TokenMerge:
            return self.group(features, grids, count, call.step, 1)

        return reduce_by_merging(
            call, self.ratio, references, noisy if self.scope == "both" else None
        )

    def group(self, features: Tensor, grids: Grids, count: int, step: int, part: int) -> TokenMerge:
        """A merge of (B, N, d) into `count` tokens; part 0 are the references, 1 noisy tokens."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMeSD(_MergeAlways):
    """ToMeSD: of every 2 x 2 tokens one random destination, the most similar others merge.

    Grouped anew at every step, from FRONT's outputs; see `matching.tomesd`. Options are those of
    `ToMA` but for its own.
    """

    def group(self, features: Tensor, grids: Grids, count: int, step: int, part: int) -> TokenMerge:
        from ditrim.runtime.tokens.matching import tomesd

        return tomesd(features, grids, count, generator_of(self.seed, step, part))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMA(_MergeAlways):
    """ToMA: destinations by facility location in tiles, merging by attention weights.

    Grouped anew at every step, from FRONT's outputs; see `matching.toma`. Nothing is random.

    Attributes:
        tile: side of a tile in tokens.
        sharpness: of the attention weights; the authors' default for FLUX.
    """

    tile: int = 8
    sharpness: float = 1000.0

    def __post_init__(self) -> None:
        # `super()` without arguments does not know a dataclass with slots.
        _MergeAlways.__post_init__(self)
        check_count("tile", self.tile)
        if not self.sharpness > 0:
            raise UsageError(f"sharpness must be a number above 0, got {self.sharpness!r}")

    def group(self, features: Tensor, grids: Grids, count: int, step: int, part: int) -> TokenMerge:
        from ditrim.runtime.tokens.matching import toma

        return toma(features, grids, count, tile=self.tile, sharpness=self.sharpness)
