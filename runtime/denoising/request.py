"""One request: its steps, its guidance branches, and what policy and cache remember of it.

A step is `begin_step`, one `predict` for each guidance branch (ToPi Alg. 1: FRONT, what is kept,
BACK), and `end_step`. Everything that belongs to a request is here and nowhere else, so requests
over the same engines run side by side in threads of their own. One request is for one thread.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ditrim.plugins.errors import LadderError, UsageError
from ditrim.runtime.caches.step_cache import FrontView
from ditrim.runtime.denoising.calls import BackResult, Clock, FrontResult, RopeRows
from ditrim.runtime.denoising.entries import entries_of, is_same, scattered, with_entries
from ditrim.runtime.denoising.inputs import (
    ModelInputs,
    TextGroup,
    check_finite,
    check_inputs,
    equal_text_groups,
)
from ditrim.runtime.denoising.state import BranchState, RequestState
from ditrim.runtime.denoising.unchanged import Unchanged
from ditrim.runtime.policy import CallView, Reducer, Reduction, StepView
from ditrim.runtime.report import RunReport, StepRecord

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines
    from ditrim.runtime.caches.step_cache import Cache
    from ditrim.runtime.denoising.calls import EngineCalls
    from ditrim.runtime.policy import Policy


@dataclass(slots=True, kw_only=True)
class _Call:
    """One model call on its way.

    Attributes:
        branch: its name; state: what that branch carries.
        inputs: of the call.
        role: what the report says of it.
        before_front: (B, K') the tokens that FRONT runs on; none where it runs on all.
        groups: batch entries whose text is equally long.
        order: batch entries in the order of the groups; none where there is one group.
        clock: times its parts.
        num_kept, num_noisy_kept: tokens that BACK runs on.
        selected: (B, K') tokens that this call chose.
    """

    branch: str
    state: BranchState
    inputs: ModelInputs
    role: str
    before_front: Tensor | None
    groups: list[TextGroup]
    order: Tensor | None
    clock: Clock
    num_kept: int
    num_noisy_kept: int
    selected: Tensor | None = None


class Shared(Protocol):
    """State that all requests of a `Denoiser` share."""

    @property
    def engines(self) -> Engines: ...
    @property
    def calls(self) -> EngineCalls: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def cache(self) -> Cache | None: ...
    @property
    def region(self) -> Tensor | None: ...
    @property
    def timing(self) -> bool: ...


class Request:
    """The state of one request, and its steps."""

    def __init__(self, denoiser: Shared, times: Sequence[float] | None = None) -> None:
        """Take the denoiser that opens the request and, where known, its timesteps."""
        self.report = RunReport()
        self._denoiser = denoiser
        self._engines, self._calls = denoiser.engines, denoiser.calls
        self._manifest = denoiser.engines.engine_set.manifest
        self._times = None if times is None else list(times)
        self._step = 0
        self._time: float | None = None
        self._reducer: Reducer | None = None
        self._branches: dict[str, BranchState] = {}
        self._velocities: dict[str, Tensor] = {}  # of this step
        self._influence: Tensor | None = None
        self._inputs: ModelInputs | None = None
        self._region: Tensor | None = None
        self._groups = Unchanged(lambda mask, batch: equal_text_groups(mask, batch))

    @property
    def is_in_step(self) -> bool:
        """Whether a step was begun and has not ended."""
        return self._time is not None

    @property
    def time(self) -> float | None:
        """The timestep of this step; none between steps."""
        return self._time

    @property
    def num_steps(self) -> int | None:
        """Number of steps that the request will have; none where it is not known."""
        return None if self._times is None else len(self._times)

    @property
    def branches_run(self) -> int:
        """Number of branches that have run in this step."""
        return len(self._velocities)

    def has_run(self, branch: str) -> bool:
        """Whether a branch has run in this step."""
        return branch in self._velocities

    def time_of(self, timestep: Tensor) -> float:
        """The timestep of the coming call as a number.

        It is read from the device once a request, where the times are known beforehand: reading
        waits for the device. The first one also gives the place in its schedule where a request
        begins, as for those that start from a picture.

        Args:
            timestep: (B,) in [0, 1].
        """
        times = self._times
        is_known = times is not None and 0 < self._step < len(times)
        if times is not None and is_known and timestep.device.type != "cpu":
            return times[self._step]
        time = float(timestep.reshape(-1)[0])
        if times and self._step == 0 and not self.is_in_step:
            distances = [abs(known - time) for known in times]
            self._times = times[distances.index(min(distances)) :]
        return time

    def begin_step(self, time: float) -> None:
        """Begin a step.

        Args:
            time: its timestep, in [0, 1].
        """
        assert self._time is None
        if self._reducer is None:
            self._reducer = self._denoiser.policy.begin(self.num_steps)
        self._time, self._velocities = time, {}

    @torch.no_grad()
    def predict(self, branch: str, inputs: ModelInputs) -> Tensor:
        """One model call of a step that was begun.

        Args:
            branch: "cond" or "uncond"; each has its own kept tokens.
            inputs: of this step.

        Returns:
            (B, G, c_out) velocity, a tensor of its own, in the engines' dtype.

        Raises:
            LadderError: a length or batch that the engine set was not built for.
            UsageError: inputs that do not fit the model or are not finite.
        """
        call = self._open(branch, inputs)
        fronts = [
            self._calls.run_front(inputs, group, call.before_front, call.clock)
            for group in call.groups
        ]
        velocity = self._reused(call, fronts)
        if velocity is None:
            backs = [self._run_back(call, front) for front in fronts]
            velocity = self._joined(call, fronts, backs)
            if call.role == "anchor":
                self._select(call, fronts, backs, velocity)
        self._velocities[branch] = velocity
        self._record(call)
        return velocity

    def skip(self, branch: str, inputs: ModelInputs) -> Tensor:
        """Note that another process runs a branch of this step; (B, G, c_out) NaN to be filled."""
        latents = inputs.noisy_latents
        velocity = torch.full(latents.shape, torch.nan, dtype=latents.dtype, device=latents.device)
        self._velocities[branch] = velocity
        return velocity

    @torch.no_grad()
    def end_step(
        self,
        latents: Tensor | None = None,
        velocity: Tensor | None = None,
        sigma: float = 0.0,
        next_sigma: float = 0.0,
    ) -> Tensor | None:
        """End a step whose branches have all run; the policy looks at it.

        Args:
            latents: (B, G, c) before the step; none where the policy does not act on steps.
            velocity: (B, G, c), guided where guidance is used.
            sigma, next_sigma: noise level before and after.

        Returns:
            (B, G, c) latents to go on from, or none for the scheduler's own.
        """
        assert self._reducer is not None
        changed = None
        if self._reducer.acts_on_steps and latents is not None and self._inputs is not None:
            assert velocity is not None
            changed = self._finish(self._inputs, latents, velocity, sigma, next_sigma)
        self._step += 1
        self._time = None
        return changed

    def snapshot(self) -> RequestState:
        """The request as it stands between two steps, to continue from later."""
        return RequestState(
            step=self._step,
            branches={name: copy.copy(branch) for name, branch in self._branches.items()},
            reducer=copy.copy(self._reducer),
            influence=self._influence,
        )

    def restore(self, state: RequestState) -> None:
        """Continue from what `snapshot` returned, of this request or of an equal one."""
        self._step = state.step
        self._branches = {name: copy.copy(branch) for name, branch in state.branches.items()}
        self._reducer = copy.copy(state.reducer)
        self._influence = state.influence

    def _open(self, branch: str, inputs: ModelInputs) -> _Call:
        """Check a call and decide what it is."""
        clock = Clock(self._engines.synchronize if self._denoiser.timing else None)
        state = self._branches.setdefault(branch, BranchState())
        batch, num_reference = inputs.reference_latents.shape[:2]
        check_inputs(inputs, self._engines.engine_set, is_first=state.num_reference is None)
        if state.num_reference not in (None, num_reference):
            raise UsageError(
                f"branch {branch!r} had {state.num_reference} reference tokens and now has "
                f"{num_reference}: start a new request when the references change"
            )
        state.num_reference = num_reference
        self._inputs = inputs
        if self.report.grids is None:
            self.report.grids = inputs.grids
        assert self._reducer is not None
        role = self._reducer.role(self._step, state.reduction)
        reduction = state.reduction if role == "reduced" else None
        kept = None if reduction is None else reduction.kept
        num_kept = num_reference if kept is None else kept.shape[1]
        before_front = kept if reduction is not None and reduction.before_front else None
        self._rung_for(num_reference if before_front is None else num_kept)
        groups = self._groups.get(inputs.text_mask, batch)
        return _Call(
            branch=branch,
            state=state,
            inputs=inputs,
            role=role,
            before_front=before_front,
            groups=groups,
            order=torch.cat([rows for rows, _ in groups]) if len(groups) > 1 else None,
            clock=clock,
            num_kept=num_kept,
            num_noisy_kept=inputs.noisy_latents.shape[1],
        )

    def _reused(self, call: _Call, fronts: list[FrontResult]) -> Tensor | None:
        """The last velocity, where the step cache says that it will do; else none."""
        cache, state = self._denoiser.cache, call.state
        if cache is None or state.cache is None or call.role == "anchor":
            return None
        is_reused, state.cache = cache.look(state.cache, self._seen(call, fronts))
        call.clock.lap("other")
        if not is_reused:
            return None
        call.role = "reuse"
        return state.cache.velocity.clone()

    def _run_back(self, call: _Call, front: FrontResult) -> BackResult:
        """BACK for one group of batch entries."""
        assert self._reducer is not None
        num_noisy = call.inputs.noisy_latents.shape[1]
        stride = self._reducer.score_every if call.role == "anchor" else num_noisy
        rows = torch.arange(0, num_noisy, stride, device=self._engines.device)
        reduction, rope = None, None
        if call.role == "reduced" and call.before_front is None:
            reduction, rope = self._regrouped(call, front)
        graph = "anchor" if call.role == "anchor" else "back"
        return self._calls.run_back(front, graph, reduction, rows, call.clock, rope=rope)

    def _regrouped(
        self, call: _Call, front: FrontResult
    ) -> tuple[Reduction | None, RopeRows | None]:
        """What a reduced step's BACK runs on, for one group, and its position rows if known."""
        assert self._reducer is not None
        standing, rows = call.state.reduction, front.rows
        own = None if standing is None else entries_of(standing, front)
        view = replace(self._view(call), reduction=own)
        if rows is not None:
            view = replace(view, rows=rows)
        if self._reducer.reads_features:
            view = replace(view, noisy=front.hidden["noisy"], reference=front.hidden["reference"])
        changed = self._reducer.regroup(view)
        if changed is not None:
            kept = changed.kept
            if kept is not None and (own is None or not is_same(kept, own.kept)):
                batch = call.inputs.noisy_latents.shape[0]
                call.selected = with_entries(call.selected, kept, front, batch)
            return changed, None
        if standing is None or standing.kept is None:
            return own, None
        if call.state.rope is None:
            call.state.rope = self._calls.rope_rows(front.tables, standing.kept)
        rope = call.state.rope
        return own, rope if rows is None else tuple(table[rows] for table in rope)  # type: ignore[return-value]

    def _joined(self, call: _Call, fronts: list[FrontResult], backs: list[BackResult]) -> Tensor:
        """The velocity of the whole batch; remembered by the step cache."""
        call.num_noisy_kept, call.num_kept = backs[0].lengths
        velocity = scattered([back.velocity for back in backs], call.order)
        cache = self._denoiser.cache
        if cache is not None:
            seen = self._seen(call, fronts)
            call.state.cache = cache.remember(call.state.cache, seen, velocity)
            velocity = velocity.clone()
        call.clock.lap("other")
        return velocity

    def _select(
        self,
        call: _Call,
        fronts: list[FrontResult],
        backs: list[BackResult],
        velocity: Tensor,
    ) -> None:
        """Let the policy choose, after an anchor, what the steps from here on run on."""
        assert self._reducer is not None
        influence = scattered([back.influence for back in backs], call.order)
        view = replace(self._view(call), influence=influence)
        if self._calls.has_scores:
            scores = [back.scores for back in backs if back.scores is not None]
            view = replace(view, scores=scattered(scores, call.order))
        if self._reducer.reads_features:
            view = replace(
                view,
                noisy=scattered([front.hidden["noisy"] for front in fronts], call.order),
                reference=scattered([front.hidden["reference"] for front in fronts], call.order),
            )
        check_finite(call.inputs, velocity, influence, self._step)
        reduction = self._reducer.select(view)
        call.state.reduce_to(reduction)
        call.selected = reduction.kept
        if call.branch == "cond" or self._influence is None:
            self._influence = influence
        call.clock.lap("select")

    def _record(self, call: _Call) -> None:
        inputs, parts = call.inputs, call.clock.parts
        assert self._reducer is not None
        assert self._time is not None
        batch, num_reference = inputs.reference_latents.shape[:2]
        self.report.steps.append(
            StepRecord(
                step=self._step,
                branch=call.branch,
                role=call.role,
                timestep=self._time,
                batch=batch,
                num_noisy=inputs.noisy_latents.shape[1],
                num_text=inputs.text_embeds.shape[1],
                num_reference=num_reference,
                num_kept=call.num_kept,
                num_noisy_kept=call.num_noisy_kept,
                rung=self._rung_for(call.num_kept),
                kept_indices=call.before_front if call.selected is None else call.selected,
                front_ms=parts.get("front", 0.0),
                gather_ms=parts.get("gather", 0.0),
                back_ms=parts.get("back", 0.0),
                select_ms=parts.get("select", 0.0),
                other_ms=parts.get("other", 0.0),
            )
        )
        self.report.notes = dict(self._reducer.notes())

    def _finish(
        self,
        inputs: ModelInputs,
        latents: Tensor,
        velocity: Tensor,
        sigma: float,
        next_sigma: float,
    ) -> Tensor | None:
        assert self._reducer is not None
        outcome = self._reducer.finish_step(
            StepView(
                step=self._step,
                ladder=self._manifest.ladder,
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
                reduction = replace(reduction, kept=reduction.kept.to(self._engines.device))
            for state in self._branches.values():
                state.reduce_to(reduction)
        self.report.notes = dict(self._reducer.notes())
        return outcome.latents

    def _view(self, call: _Call) -> CallView:
        return CallView(
            step=self._step,
            branch=call.branch,
            ladder=self._manifest.ladder,
            grids=call.inputs.grids,
            scored_layers=self._manifest.detailed_layers if self._calls.has_scores else (),
            calibrated_layers=self._manifest.representative_layers,
            region=self._region_of(call.inputs),
            reduction=call.state.reduction,
        )

    def _seen(self, call: _Call, fronts: list[FrontResult]) -> FrontView:
        """Return what a step cache compares, in batch order."""

        def whole(name: str) -> Tensor:
            return scattered([front.hidden[name] for front in fronts], call.order)

        return FrontView(
            noisy=whole("noisy"),
            reference=whole("reference"),
            temb=whole("temb") if self._manifest.front_depth == 0 else None,
        )

    def _region_of(self, inputs: ModelInputs) -> Tensor | None:
        """(C,) bool, the reference tokens under the user's region."""
        from ditrim.runtime.tokens.budget import region_of_mask

        region = self._denoiser.region
        if region is None or self._region is not None:
            return self._region
        if inputs.grids is None:
            raise UsageError("a region needs references whose tokens form whole grids")
        wanted = region_of_mask(region, inputs.grids[1])
        tokens = torch.zeros(inputs.reference_latents.shape[1], dtype=torch.bool)
        tokens[: len(wanted)] = wanted
        self._region = tokens.to(self._engines.device)
        return self._region

    def _rung_for(self, length: int) -> int:
        ladder = self._manifest.ladder
        if length > ladder.longest:
            command = self._engines.engine_set.rebuild_command(max_reference_tokens=length)
            raise LadderError(
                f"{length} reference tokens are more than the engine set's ladder holds "
                f"({ladder.longest}); use smaller or fewer references, or build a longer "
                f"ladder with: {command}"
            )
        return ladder.rung_for(length)
