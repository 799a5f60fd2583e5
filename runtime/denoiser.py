"""One model call after another: FRONT, what is kept, BACK (ToPi Alg. 1).

Shared by the diffusers drop-in and by `EditSession`. Holds the state of one request a branch; not
thread-safe, cheap to make: threads make one each over the same loaded engines.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditrim.engines.backend import Engines
from ditrim.plugins.errors import LadderError, UsageError
from ditrim.runtime.engine_calls import Clock, EngineCalls, FrontResult
from ditrim.runtime.model_inputs import (
    ModelInputs,
    check_finite,
    check_inputs,
    equal_text_groups,
)
from ditrim.runtime.policy import CallView, Policy, Reducer, Reduction, StepView
from ditrim.runtime.report import RunReport, StepRecord
from ditrim.runtime.step_cache import Cache, CacheMemory, FrontView


@dataclass(slots=True)
class BranchState:
    """What one guidance branch carries from step to step.

    Attributes:
        step: how many calls were made.
        num_reference: C of this request; none before the first call.
        reduction: what reduced steps run on; none before the policy chose.
        cache: of the step cache.
    """

    step: int = 0
    num_reference: int | None = None
    reduction: Reduction | None = None
    cache: CacheMemory | None = None


@dataclass(frozen=True, slots=True)
class DenoiserState:
    """A request as it stands between two steps.

    Attributes:
        branches: the state of each guidance branch.
        reducer: what the policy remembers.
        influence: the last anchor's, of the branch "cond".
    """

    branches: dict[str, BranchState]
    reducer: Reducer
    influence: Tensor | None


class Denoiser:
    """Runs model calls of one request at a time on loaded engines."""

    def __init__(
        self,
        engines: Engines,
        policy: Policy,
        *,
        cache: Cache | None = None,
        region: Tensor | None = None,
        timing: bool = False,
    ) -> None:
        """Make a denoiser.

        Args:
            engines: from `load_engines`; can be shared.
            policy: which tokens steps run on.
            cache: when steps reuse the last velocity; none means never.
            region: (height, width) bool, pixels of the first reference at any scale: reference
                tokens under it are always kept.
            timing: wait for the device after every part, so that a report's times are exact.
        """
        self.engines = engines
        self.policy = policy
        self.cache = cache
        self.region = region
        self.reducer = policy.begin()
        self.report = RunReport()
        self._timing = timing
        self._branches: dict[str, BranchState] = {}
        self._velocities: dict[str, Tensor] = {}
        self._influence: Tensor | None = None
        self._last_inputs: ModelInputs | None = None
        self._region_tokens: Tensor | None = None
        self._mask_groups: tuple[Tensor | None, list[tuple[Tensor, Tensor | None]]] | None = None
        self._calls = EngineCalls(engines)
        if region is not None and not self.reducer.takes_region:
            raise UsageError(
                f"{type(policy).__name__} takes no region; use a policy that keeps reference "
                "tokens as they are (ToPi, CoverageToPi, RandomDrop, TokenDrop)"
            )

    @property
    def acts_on_steps(self) -> bool:
        """Whether `finish_step` has anything to do."""
        return self.reducer.acts_on_steps

    def start_request(self) -> None:
        """Forget the previous request; its report is kept by whoever holds it."""
        self._branches = {}
        self._velocities = {}
        self._influence = self._last_inputs = self._region_tokens = None
        self._mask_groups = None
        self.reducer = self.policy.begin()
        self.report = RunReport()

    def branch(self, name: str) -> BranchState:
        """The state of a branch, made at its first use."""
        return self._branches.setdefault(name, BranchState())

    def restore(self, state: DenoiserState) -> None:
        """Continue a request from what `snapshot` returned."""
        self._branches = {name: copy.copy(branch) for name, branch in state.branches.items()}
        self.reducer = copy.copy(state.reducer)
        self._influence = state.influence

    def snapshot(self) -> DenoiserState:
        """The request as it stands, to continue from later."""
        branches = {name: copy.copy(branch) for name, branch in self._branches.items()}
        return DenoiserState(branches, copy.copy(self.reducer), self._influence)

    @torch.no_grad()
    def predict(self, branch: str, inputs: ModelInputs) -> Tensor:
        """One model call.

        Args:
            branch: "cond" or "uncond"; each has its own steps and kept tokens.
            inputs: of this step.

        Returns:
            (B, G, c_out) velocity, a tensor of its own, in the engines' dtype.

        Raises:
            LadderError: a length or batch that the engine set was not built for.
            UsageError: inputs that do not fit the model or are not finite.
        """
        clock = Clock(self.engines.synchronize if self._timing else None)
        state = self.branch(branch)
        batch, num_reference = inputs.reference_latents.shape[:2]
        num_noisy = inputs.noisy_latents.shape[1]
        check_inputs(inputs, self.engines.engine_set, is_first=state.num_reference is None)
        if state.num_reference not in (None, num_reference):
            raise UsageError(
                f"branch {branch!r} had {state.num_reference} reference tokens and now has "
                f"{num_reference}: start a new request (start_request) when the references change"
            )
        state.num_reference = num_reference
        self._last_inputs = inputs
        role: str = self.reducer.role(state.step, state.reduction)
        reduction = state.reduction if role == "reduced" else None
        early = reduction.kept if reduction is not None and reduction.before_front else None
        num_kept = num_reference
        if reduction is not None and reduction.kept is not None:
            num_kept = reduction.kept.shape[1]
        self._rung_for(num_reference if early is None else num_kept)
        groups = self._groups(inputs.text_mask, batch)
        fronts = [self._calls.run_front(inputs, group, early, clock) for group in groups]
        order = torch.cat([rows for rows, _ in groups]) if len(groups) > 1 else None
        noisy = [front.hidden["noisy"] for front in fronts]
        seen = None if self.cache is None else self._seen(fronts, order)

        is_reused, num_noisy_kept, selected = False, num_noisy, None
        if self.cache is not None and state.cache is not None and role != "anchor":
            assert seen is not None
            is_reused, state.cache = self.cache.look(state.cache, seen)
            clock.lap("other")
        if is_reused:
            assert state.cache is not None
            role, velocity = "reuse", state.cache.velocity.clone()
        else:
            view = self._view(branch, state, inputs)
            stride = self.reducer.score_every if role == "anchor" else num_noisy
            score_rows = torch.arange(0, num_noisy, stride, device=self.engines.device)
            results, regrouped = [], []
            for front in fronts:
                if role == "reduced" and early is None:
                    given = None if state.reduction is None else _entries_of(state.reduction, front)
                    reduction = self._regroup(front, replace(view, reduction=given))
                    if given is None or reduction is None or reduction.kept is not given.kept:
                        regrouped.append(reduction)
                graph = "anchor" if role == "anchor" else "back"
                results.append(self._calls.run_back(front, graph, reduction, score_rows, clock))
            num_noisy_kept, num_kept = results[0].lengths
            if len(regrouped) == len(fronts):
                selected = _kept_of(regrouped, order)
            velocity = _scattered([result.velocity for result in results], order)
            if self.cache is not None:
                assert seen is not None
                state.cache = self.cache.remember(state.cache, seen, velocity)
                velocity = velocity.clone()
            clock.lap("other")
            if role == "anchor":
                view = replace(
                    view,
                    influence=_scattered([result.influence for result in results], order),
                    scores=_scattered([result.scores for result in results], order)
                    if self._calls.has_scores
                    else None,
                )
                if self.reducer.reads_features:
                    view = replace(
                        view,
                        noisy=_scattered(noisy, order),
                        reference=_scattered([f.hidden["reference"] for f in fronts], order),
                    )
                assert view.influence is not None
                check_finite(inputs, velocity, view.influence, state.step)
                state.reduction = self.reducer.select(view)
                selected = state.reduction.kept
                if branch == "cond" or self._influence is None:
                    self._influence = view.influence
                clock.lap("select")
        self._velocities[branch] = velocity
        self.report.steps.append(
            StepRecord(
                step=state.step,
                branch=branch,
                role=role,
                timestep=self._time_of(inputs),
                batch=batch,
                num_noisy=num_noisy,
                num_text=inputs.text_embeds.shape[1],
                num_reference=num_reference,
                num_kept=num_kept,
                num_noisy_kept=num_noisy_kept,
                rung=self._rung_for(num_kept),
                kept_indices=selected if selected is not None else early,
                **{
                    f"{part}_ms": clock.parts.get(part, 0.0)
                    for part in ("front", "gather", "back", "select", "other")
                },
            )
        )
        self.report.notes = dict(self.reducer.notes())
        state.step += 1
        return velocity

    @torch.no_grad()
    def finish_step(
        self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float
    ) -> Tensor | None:
        """Let the policy look at a step whose branches have all run.

        Args:
            latents: (B, G, c) before the step.
            velocity: (B, G, c), guided where guidance is used.
            sigma, next_sigma: noise level before and after.

        Returns:
            (B, G, c) latents to go on from, or none for Euler's own.
        """
        inputs = self._last_inputs
        if not self.acts_on_steps or inputs is None:
            return None
        outcome = self.reducer.finish_step(
            StepView(
                step=max(branch.step for branch in self._branches.values()) - 1,
                ladder=self.engines.engine_set.manifest.ladder,
                grids=inputs.grids,
                latents=latents,
                velocity=velocity.to(latents.device),
                branches=self._velocities,
                sigma=sigma,
                next_sigma=next_sigma,
                reference=inputs.reference_latents.to(latents.device),
                influence=self._influence,
                region=self._region_of(inputs),
            )
        )
        reduction = outcome.reduction
        if reduction is not None:
            if reduction.kept is not None:  # latents may be on another device than the engines
                reduction = replace(reduction, kept=reduction.kept.to(self.engines.device))
            for state in self._branches.values():
                state.reduction = reduction
        self.report.notes = dict(self.reducer.notes())
        return outcome.latents

    def _view(self, branch: str, state: BranchState, inputs: ModelInputs) -> CallView:
        manifest = self.engines.engine_set.manifest
        return CallView(
            step=state.step,
            branch=branch,
            ladder=manifest.ladder,
            grids=inputs.grids,
            scored_layers=manifest.detailed_layers if self._calls.has_scores else (),
            calibrated_layers=manifest.representative_layers,
            region=self._region_of(inputs),
            reduction=state.reduction,
        )

    def _seen(self, fronts: list[FrontResult], order: Tensor | None) -> FrontView:
        """What a step cache compares, in batch order."""

        def whole(name: str) -> Tensor:
            return _scattered([front.hidden[name] for front in fronts], order)

        is_embedding = self.engines.engine_set.manifest.front_depth == 0
        return FrontView(
            noisy=whole("noisy"),
            reference=whole("reference"),
            temb=whole("temb") if is_embedding else None,
        )

    def _regroup(self, front: FrontResult, view: CallView) -> Reduction | None:
        """What a reduced step's BACK runs on, for one group of batch entries."""
        if front.rows is not None:
            view = replace(view, rows=front.rows)
        if self.reducer.reads_features:
            view = replace(view, noisy=front.hidden["noisy"], reference=front.hidden["reference"])
        return self.reducer.regroup(view)

    def _groups(self, mask: Tensor | None, batch: int) -> list[tuple[Tensor, Tensor | None]]:
        """Computed once for a mask that is the same tensor at every step, as pipelines pass it."""
        if self._mask_groups is None or self._mask_groups[0] is not mask or mask is None:
            self._mask_groups = (mask, equal_text_groups(mask, batch))
        return self._mask_groups[1]

    def _time_of(self, inputs: ModelInputs) -> float:
        return float(inputs.timestep.reshape(-1)[0]) if inputs.time is None else inputs.time

    def _region_of(self, inputs: ModelInputs) -> Tensor | None:
        """(C,) bool, the reference tokens under the user's region."""
        from ditrim.runtime.budget import region_of_mask

        if self.region is None or self._region_tokens is not None:
            return self._region_tokens
        if inputs.grids is None:
            raise UsageError("a region needs references whose tokens form whole grids")
        wanted = region_of_mask(self.region, inputs.grids[1])
        tokens = torch.zeros(inputs.reference_latents.shape[1], dtype=torch.bool)
        tokens[: len(wanted)] = wanted
        self._region_tokens = tokens.to(self.engines.device)
        return self._region_tokens

    def _rung_for(self, length: int) -> int:
        manifest = self.engines.engine_set.manifest
        if length > manifest.ladder.longest:
            command = self.engines.engine_set.rebuild_command(max_reference_tokens=length)
            raise LadderError(
                f"{length} reference tokens are more than the engine set's ladder holds "
                f"({manifest.ladder.longest}); use smaller or fewer references, or build a longer "
                f"ladder with: {command}"
            )
        return manifest.ladder.rung_for(length)


def _scattered(parts: list[Tensor], order: Tensor | None) -> Tensor:
    """Group results back in batch order."""
    if order is None:
        return parts[0]
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[order.to(joined.device)] = joined
    return result


def _kept_of(reductions: list[Reduction | None], order: Tensor | None) -> Tensor | None:
    """(B, K') tokens that a reduced step chose for itself; none where it kept them all."""
    kept = [found.kept for found in reductions if found is not None and found.kept is not None]
    return _scattered(kept, order) if len(kept) == len(reductions) else None


def _entries_of(reduction: Reduction, front: FrontResult) -> Reduction:
    """A reduction of the whole batch, for a group of its entries."""
    if front.rows is None:
        return reduction
    rows = front.rows.to(front.hidden["noisy"].device)
    return replace(
        reduction,
        kept=None if reduction.kept is None else reduction.kept[rows],
        merge=None if reduction.merge is None else reduction.merge.entries(rows),
        noisy_merge=None if reduction.noisy_merge is None else reduction.noisy_merge.entries(rows),
    )
