"""TokenDrop: source tokens that the picture in the making agrees with are dropped before FRONT.

What the paper leaves open, and what is done here (see `residual` for the formulas):

- The update of a step uses the mask that this very step computed, as Alg. 1 has it; the same mask
  says which tokens the next step runs on. So the last of the steps with all tokens is pulled
  towards the source already: its mask is the first (Alg. 2's t < t_d).
- One engine call has one length: the batch's largest count decides and is rounded up by the ladder.
  Tokens that are kept for that reason alone are not pulled either, as the model sees their source.
- Several references: only the first is dropped from, where it lies on the grid of the picture in
  the making. Without such a source there is no residual, and every step runs on all tokens.
- Edits of the whole picture fail (Sec. 5, App. D.4). They are recognised by the residual after the
  first steps and served with all tokens; in a batch, one such entry is enough, as all share the
  length.
- omega is given for two models. Other editors of the Qwen family take Qwen-Image-Edit's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ditrim.plugins.errors import DitrimError, UsageError
from ditrim.runtime.policy import (
    UNCHANGED,
    Reducer,
    Reduction,
    StepOutcome,
    StepView,
    check_count,
    check_share,
)
from ditrim.runtime.tokens.draws import generator_of

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.runtime.policy import Role
    from ditrim.runtime.tokens.residual import ResidualMask

# The bias omega (Sec. 4.1: PIEBench; GEdit-Bench had 0.3 for Qwen), and the steps with all tokens
# at the start, of 50 for Qwen and of 28 for FLUX.
DEFAULTS = {"qwen-edit": (0.1, 4), "flux-kontext": (0.4, 2)}
# The same for distilled editors of eight steps, whatever the model.
FEW_STEPS = (0.0, 2)
_PRESETS = ("paper", "few-steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDrop:
    """Source token drop with consistency regularisation (TokenDrop, Alg. 1 and 2).

    After each step the clean estimate is compared with the source. Where they differ by more than
    the triangle threshold less omega deviations (Eq. 15), the next step runs on the source's
    tokens; the others are dropped before FRONT, and the update pulls the picture towards the source
    there (Eq. 10-12) with eta_t = sigma_t.

    Attributes:
        model: the engine set's model, for the two defaults below.
        preset: what the next two are where they are none: "paper", by the model, for schedules of
            some tens of steps; or "few-steps", the paper's for distilled editors of eight steps.
        omega: bias of the threshold, larger keeps more.
        full_steps: steps with all tokens at the start.
        regularise: update by Eq. 12; otherwise the scheduler's own step.
        random: as many tokens of the source, chosen at random (Sec. 3.1, Table 1).
        dense_if_non_local: serve edits of the whole picture with all tokens; see `is_non_local`.
        max_kept_ratio, max_spread: beyond either, an edit is one of the whole picture.
        num_bins: of the threshold's histogram; none means a quarter of the source's tokens, from 16
            to the usual 256 (from 1024 tokens on): with a few hundred tokens,
            256 bins are mostly empty, and the threshold finds nothing to drop.
        seed: of random tokens.
    """

    model: str = "qwen-edit"
    preset: Literal["paper", "few-steps"] = "paper"
    omega: float | None = None
    full_steps: int | None = None
    regularise: bool = True
    random: bool = False
    dense_if_non_local: bool = True
    max_kept_ratio: float = 0.9
    max_spread: float = 0.15
    num_bins: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.omega is not None and not _is_finite(self.omega):
            raise UsageError(f"omega must be a finite number, got {self.omega!r}")
        if self.full_steps is not None:
            check_count("full_steps", self.full_steps)
        for name in ("max_kept_ratio", "max_spread"):
            check_share(name, getattr(self, name), "1 never finds an edit non-local by it")
        if self.num_bins is not None:
            check_count("num_bins", self.num_bins, 2)
        check_count("seed", self.seed, 0)
        if self.preset not in _PRESETS:
            raise UsageError(f"preset must be one of {', '.join(_PRESETS)}, got {self.preset!r}")
        if None in (self.omega, self.full_steps):
            self._defaults()

    @property
    def bias(self) -> float:
        """The omega that is used."""
        return self._defaults()[0] if self.omega is None else self.omega

    @property
    def num_full_steps(self) -> int:
        """The steps with all tokens at the start."""
        return self._defaults()[1] if self.full_steps is None else self.full_steps

    def _defaults(self) -> tuple[float, int]:
        return FEW_STEPS if self.preset == "few-steps" else _defaults_of(self.model)

    def begin(self, num_steps: int | None = None) -> Reducer:
        return TokenDropReducer(policy=self)


@dataclass(slots=True, kw_only=True)
class TokenDropReducer(Reducer):
    """`TokenDrop` at work on one request.

    Attributes:
        policy: its options.
        dense_because: why all tokens are kept until the end; none where they are not.
        mask_ratios: of each mask that was made, the share of the source that it keeps.
        spread: the residual's, when the decision was made; the batch's largest.
    """

    policy: TokenDrop
    dense_because: str | None = None
    mask_ratios: tuple[float, ...] = ()
    spread: float | None = None

    @property
    def acts_on_steps(self) -> bool:
        return True

    @property
    def takes_region(self) -> bool:
        return True

    def role(self, step: int, reduction: Reduction | None) -> Role:
        is_full = step < self.policy.num_full_steps or reduction is None
        return "full" if is_full else "reduced"

    def finish_step(self, step: StepView) -> StepOutcome:
        """Work out the mask, then update the latents (Alg. 1)."""
        from ditrim.runtime.tokens import residual

        policy = self.policy
        if self.dense_because is not None or step.step < policy.num_full_steps - 1:
            return UNCHANGED
        source = step.source
        if source is None:
            self.dense_because = _why_no_source(step)
            return UNCHANGED
        assert step.grids is not None
        found = residual.adaptive_mask(
            residual.residual_map(step.latents, step.velocity, step.sigma, source),
            step.grids[0],
            policy.bias,
            num_bins=policy.num_bins or _bins_for(source.shape[1]),
        )
        self._look(found, step.step)
        if self.dense_because is not None:
            return UNCHANGED
        if policy.random:
            found = _shuffled(found, policy.seed, step.step)
        kept = _kept_tokens(found, step)
        latents = None
        if policy.regularise:
            mask = residual.kept_mask(kept, step.reference.shape[1])[:, : source.shape[1]]
            latents = residual.consistent_step(
                step.latents, step.velocity, step.sigma, step.next_sigma, source, mask
            )
        return StepOutcome(latents=latents, reduction=Reduction(kept=kept, before_front=True))

    def notes(self) -> Mapping[str, Any]:
        if self.dense_because is None and not self.mask_ratios:
            return {}
        found: dict[str, Any] = {
            "decision": f"all tokens: {self.dense_because}"
            if self.dense_because is not None
            else "tokens of the source are dropped"
        }
        if self.mask_ratios:
            mean = sum(self.mask_ratios) / len(self.mask_ratios)
            found |= {"mask_kept_ratio": round(mean, 4), "residual_spread": self.spread}
        return found

    def _look(self, found: ResidualMask, step: int) -> None:
        """Note a mask's figures; after the first one, decide whether the edit is local."""
        import torch

        from ditrim.runtime.tokens.residual import is_non_local

        limits = {
            "max_kept_ratio": self.policy.max_kept_ratio,
            "max_spread": self.policy.max_spread,
        }
        figures = (
            found.threshold,
            found.kept_ratio,
            found.spread.double(),
            is_non_local(found, **limits).double(),
        )
        thresholds, ratios, spreads, are_non_local = torch.stack(figures).tolist()  # synchronises
        if not all(map(math.isfinite, thresholds)):
            raise DitrimError(
                f"the residual of step {step} is not finite: the model overflowed on these "
                "inputs; with an fp16 engine set, try fp32 or bf16"
            )
        is_first = not self.mask_ratios
        self.mask_ratios = (*self.mask_ratios, sum(ratios) / len(ratios))
        if not is_first:
            return
        self.spread = round(max(spreads), 4)
        if self.policy.dense_if_non_local and any(are_non_local):
            worst = are_non_local.index(1.0)
            self.dense_because = (
                f"the edit{f' of batch entry {worst}' if len(ratios) > 1 else ''} is not local, "
                f"with a residual spread of {spreads[worst]:.3f} (limit {self.policy.max_spread}) "
                f"and a mask that keeps {ratios[worst]:.3f} (limit {self.policy.max_kept_ratio})"
            )


def _bins_for(length: int) -> int:
    return min(256, max(16, length // 4))


def _kept_tokens(found: ResidualMask, step: StepView) -> Tensor:
    """(B, K') int64, ascending, among all references' tokens."""
    import torch

    from ditrim.runtime.tokens.residual import embed, select_by_residual

    device = found.mask.device
    tokens = torch.arange(found.mask.shape[1], device=device)
    whole = embed(found, tokens, step.reference.shape[1])
    if step.region is not None:
        region = step.region.to(device)
        whole = replace(
            whole,
            scores=whole.scores.masked_fill(region, torch.inf),
            mask=whole.mask | region,
        )
    return select_by_residual(whole, step.ladder)


def _shuffled(found: ResidualMask, seed: int, step: int) -> ResidualMask:
    """A mask of random tokens, as many in each entry as before."""
    import torch

    scores = torch.rand(found.scores.shape, generator=generator_of(seed, step))
    scores = scores.to(found.scores.device)
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return replace(found, scores=scores, mask=ranks < found.mask.sum(dim=1, keepdim=True))


def _why_no_source(step: StepView) -> str:
    if step.grids is None:
        return "the request's picture ids form no whole grids"
    picture, first = (f"{height} x {width}" for height, width in step.grids[:2])
    return f"the first reference has {first} tokens, the picture in the making {picture}"


def _defaults_of(model: str) -> tuple[float, int]:
    family = "qwen-edit" if model.startswith(("qwen-edit", "firered-edit")) else model
    if family not in DEFAULTS:
        raise UsageError(
            f"the paper gives no omega and full_steps for {model!r}, only for "
            f"{', '.join(DEFAULTS)}; give both"
        )
    return DEFAULTS[family]


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
