"""One model call after another: FRONT, what is kept, BACK (ToPi Alg. 1).

Shared by the diffusers drop-in and by `EditSession`. Holds the state of one request a branch; not
thread-safe, cheap to make: threads make one each over the same loaded engines.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditrim.engines.backend import Engines
from ditrim.plugins.errors import DitrimError, LadderError, UsageError
from ditrim.runtime.policy import Policy
from ditrim.runtime.report import RunReport, StepRecord
from ditrim.runtime.rope import RopeTables

_CACHED_TABLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One model call, noisy and reference tokens apart.

    Attributes:
        noisy_latents: (B, G, c); reference_latents: (B, C, c), all references together.
        text_embeds: (B, T, c_text).
        text_mask: (B, T) bool, which text tokens exist; none means all.
        timestep: (B,) in [0, 1].
        guidance: (B,), models with guidance embeddings only.
        pooled_text: (B, c_pool), FLUX only.
        rope_key: identifies the geometry; equal keys have equal tables.
        make_rope: computes the tables of that geometry.
    """

    noisy_latents: Tensor
    reference_latents: Tensor
    text_embeds: Tensor
    text_mask: Tensor | None = None
    timestep: Tensor
    guidance: Tensor | None = None
    pooled_text: Tensor | None = None
    rope_key: tuple[object, ...]
    make_rope: Callable[[], RopeTables]


@dataclass(slots=True)
class BranchState:
    """What one guidance branch carries from step to step.

    Attributes:
        step: how many calls were made.
        num_reference: C of this request; none before the first call.
        kept: (B, K') after an anchor step, else none.
        gathered_rope: reference tables at `kept`, (B, K', D/2) each.
    """

    step: int = 0
    num_reference: int | None = None
    kept: Tensor | None = None
    gathered_rope: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True)
class _Clock:
    """Splits a call's wall-clock time into named parts."""

    wait: Callable[[], None] | None
    parts: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, part: str) -> None:
        if self.wait is not None:
            self.wait()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + (now - self.last) * 1e3
        self.last = now


class Denoiser:
    """Runs model calls of one request at a time on loaded engines."""

    def __init__(self, engines: Engines, policy: Policy, *, timing: bool = False) -> None:
        """Make a denoiser.

        Args:
            engines: from `load_engines`; can be shared.
            policy: which tokens steps run on.
            timing: wait for the device after every part, so that a report's times are exact.
        """
        self.engines = engines
        self.policy = policy
        self.report = RunReport()
        self._timing = timing
        self._branches: dict[str, BranchState] = {}
        self._tables: OrderedDict[tuple[object, ...], RopeTables] = OrderedDict()
        self._expanded: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()
        manifest = engines.engine_set.manifest
        back = manifest.graphs["back"]
        self._width = _last_axis(back.inputs, "noisy")
        self._out_channels = _last_axis(back.outputs, "velocity")
        self._has_reference_temb = any(spec.name == "reference_temb" for spec in back.inputs)
        self._input_widths = {
            spec.name: spec.shape[-1]
            for spec in manifest.graphs["front"].inputs
            if spec.name in ("noisy_latents", "text_embeds", "pooled_text")
        }
        self._takes_guidance = any(
            spec.name == "guidance" for spec in manifest.graphs["front"].inputs
        )

    def start_request(self) -> None:
        """Forget the previous request; its report is kept by whoever holds it."""
        self._branches = {}
        self.report = RunReport()

    def branch(self, name: str) -> BranchState:
        """The state of a branch, made at its first use."""
        return self._branches.setdefault(name, BranchState())

    def restore(self, branches: dict[str, BranchState]) -> None:
        """Continue a request from states that `snapshot` returned."""
        self._branches = {
            name: BranchState(state.step, state.num_reference, state.kept)
            for name, state in branches.items()
        }

    def snapshot(self) -> dict[str, BranchState]:
        """States of all branches, to continue from later."""
        return {
            name: BranchState(state.step, state.num_reference, state.kept)
            for name, state in self._branches.items()
        }

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
        clock = _Clock(self.engines.synchronize if self._timing else None)
        state = self.branch(branch)
        batch, num_reference = inputs.reference_latents.shape[:2]
        self._check(inputs, is_first=state.num_reference is None)
        if state.num_reference not in (None, num_reference):
            raise UsageError(
                f"branch {branch!r} had {state.num_reference} reference tokens and now has "
                f"{num_reference}: start a new request (start_request) when the references change"
            )
        state.num_reference = num_reference
        role = self.policy.role(state.step)
        if role == "reduced" and state.kept is None:
            role = "anchor"  # a request that was joined half-way has nothing to go by
        kept = state.kept if role == "reduced" else None
        num_kept = num_reference if kept is None else kept.shape[1]
        rung = self._rung_for(num_kept)
        num_noisy = inputs.noisy_latents.shape[1]
        stride = self.policy.score_every if role == "anchor" else num_noisy
        score_rows = torch.arange(0, num_noisy, stride, device=self.engines.device)

        groups = _equal_text_groups(inputs.text_mask, batch)
        velocities, influences = [], []
        graph = "anchor" if role == "anchor" else "back"
        for rows, text_rows in groups:
            group = _rows_of(inputs, rows, text_rows)
            velocity, influence = self._run_group(
                graph, group, kept, rows, text_rows, state, score_rows, clock
            )
            velocities.append(velocity)
            influences.append(influence)
        order = torch.cat([rows for rows, _ in groups]) if len(groups) > 1 else None
        velocity = _scattered(velocities, order)
        clock.lap("other")

        selected = None
        if role == "anchor":
            influence = _scattered(influences, order)
            self._check_finite(inputs, velocity, influence, state.step)
            selected = self.policy.select(influence, self.engines.engine_set.manifest.ladder)
            state.kept, state.gathered_rope = selected, None
            clock.lap("select")
        self.report.steps.append(
            StepRecord(
                step=state.step,
                branch=branch,
                role=role,
                timestep=float(inputs.timestep.reshape(-1)[0]),
                batch=batch,
                num_noisy=num_noisy,
                num_text=inputs.text_embeds.shape[1],
                num_reference=num_reference,
                num_kept=num_kept,
                rung=rung,
                kept_indices=selected,
                **{
                    f"{part}_ms": clock.parts.get(part, 0.0)
                    for part in ("front", "gather", "back", "select", "other")
                },
            )
        )
        state.step += 1
        return velocity

    def _run_group(
        self,
        graph: str,
        inputs: ModelInputs,
        kept: Tensor | None,
        rows: Tensor,
        text_rows: Tensor | None,
        state: BranchState,
        score_rows: Tensor,
        clock: _Clock,
    ) -> tuple[Tensor, Tensor]:
        """FRONT and BACK over batch entries whose text is equally long."""
        device, dtype = self.engines.device, self.engines.dtype
        batch, num_noisy = inputs.noisy_latents.shape[:2]
        num_reference, num_text = inputs.reference_latents.shape[1], inputs.text_embeds.shape[1]
        tables = self._rope(inputs)
        text_cos, text_sin = tables.text
        if text_rows is not None:
            text_cos, text_sin = text_cos[text_rows], text_sin[text_rows]
        reference_rope = self._expanded_rope(inputs.rope_key, tables, batch)
        rope = {
            "noisy_rope_cos": tables.noisy[0],
            "noisy_rope_sin": tables.noisy[1],
            "text_rope_cos": text_cos[:num_text],
            "text_rope_sin": text_sin[:num_text],
            "reference_rope_cos": reference_rope[0],
            "reference_rope_sin": reference_rope[1],
        }

        def ready(tensor: Tensor, as_type: torch.dtype = dtype) -> Tensor:
            return tensor.to(device, as_type).contiguous()

        front_inputs = {
            "noisy_latents": ready(inputs.noisy_latents),
            "reference_latents": ready(inputs.reference_latents),
            "text_embeds": ready(inputs.text_embeds),
            "timestep": ready(inputs.timestep, torch.float32),
            **rope,
        }
        if inputs.guidance is not None:
            front_inputs["guidance"] = ready(inputs.guidance, torch.float32)
        if inputs.pooled_text is not None:
            front_inputs["pooled_text"] = ready(inputs.pooled_text)

        def empty(*shape: int, as_type: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=as_type, device=device)

        hidden = {
            "noisy": empty(batch, num_noisy, self._width),
            "reference": empty(batch, num_reference, self._width),
            "text": empty(batch, num_text, self._width),
            "temb": empty(batch, self._width),
        }
        if self._has_reference_temb:
            hidden["reference_temb"] = empty(batch, self._width)
        clock.lap("other")
        self.engines.run("front", front_inputs, hidden)
        clock.lap("front")
        if kept is not None:
            if len(rows) != kept.shape[0]:
                kept = kept[rows]
            hidden["reference"] = gather_rows(hidden["reference"], kept)
            if state.gathered_rope is None:
                cosines, sines = tables.reference
                state.gathered_rope = cosines[state.kept], sines[state.kept]
            cosines, sines = state.gathered_rope
            if len(rows) != cosines.shape[0]:
                cosines, sines = cosines[rows], sines[rows]
            rope["reference_rope_cos"], rope["reference_rope_sin"] = cosines, sines
            clock.lap("gather")
        outputs = {
            "velocity": empty(batch, num_noisy, self._out_channels),
            "influence": empty(batch, hidden["reference"].shape[1], as_type=torch.float32),
        }
        clock.lap("other")
        self.engines.run(graph, {**hidden, **rope, "score_rows": score_rows}, outputs)
        clock.lap("back")
        return outputs["velocity"], outputs["influence"]

    def _rope(self, inputs: ModelInputs) -> RopeTables:
        if inputs.rope_key not in self._tables:
            self._tables[inputs.rope_key] = inputs.make_rope()
            while len(self._tables) > _CACHED_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(inputs.rope_key)
        return self._tables[inputs.rope_key]

    def _expanded_rope(
        self, key: tuple[object, ...], tables: RopeTables, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Reference tables repeated for a batch, (B, C, D/2) each."""
        full_key = (key, batch)
        if full_key not in self._expanded:
            cosines, sines = tables.reference
            self._expanded[full_key] = (
                cosines.expand(batch, -1, -1).contiguous(),
                sines.expand(batch, -1, -1).contiguous(),
            )
            while len(self._expanded) > _CACHED_TABLES:
                self._expanded.popitem(last=False)
        self._expanded.move_to_end(full_key)
        return self._expanded[full_key]

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

    def _check_finite(
        self, inputs: ModelInputs, velocity: Tensor, influence: Tensor, step: int
    ) -> None:
        """What an anchor step read and made; choosing tokens waits for the device in any case."""
        tensors = (inputs.noisy_latents, velocity, influence)
        flags = [torch.isfinite(tensor).all().to(influence.device) for tensor in tensors]
        latents_are, velocity_is, influence_is = torch.stack(flags).tolist()
        if not latents_are:
            raise UsageError(f"noisy_latents hold NaN or infinite values at step {step}")
        if not velocity_is or not influence_is:
            what = "velocity" if not velocity_is else "influence scores"
            raise DitrimError(
                f"the {what} of step {step} are not finite: the model overflowed on these inputs; "
                "with an fp16 engine set, try fp32 or bf16"
            )

    def _check(self, inputs: ModelInputs, *, is_first: bool) -> None:
        """Sizes at every call; values where that costs no wait for a device, else at the first.

        On a GPU an anchor step looks at its latents again (`_check_finite`).
        """
        limits = self.engines.engine_set.manifest.limits
        batch, num_noisy, _ = inputs.noisy_latents.shape
        for what, value, limit, option in (
            ("a batch of", batch, limits.batch, "max_batch"),
            ("noisy tokens:", num_noisy, limits.noisy, "max_noisy_tokens"),
            ("text tokens:", inputs.text_embeds.shape[1], limits.text, "max_text_tokens"),
        ):
            if value > limit:
                command = self.engines.engine_set.rebuild_command(**{option: value})
                raise LadderError(
                    f"{what} {value} is more than the engine set was built for ({limit}); "
                    f"build it for more with: {command}"
                )
        if inputs.reference_latents.shape[1] < 1:
            raise UsageError(
                "no reference tokens: an in-context editor needs at least one reference picture"
            )
        for name, tensor in (
            ("noisy_latents", inputs.noisy_latents),
            ("reference_latents", inputs.reference_latents),
            ("text_embeds", inputs.text_embeds),
            ("pooled_text", inputs.pooled_text),
        ):
            if tensor is None:
                if name in self._input_widths:
                    raise UsageError(f"{name} is missing; this model needs it")
                continue
            width = self._input_widths.get("noisy_latents" if "latents" in name else name)
            if width is not None and tensor.shape[-1] != width:
                raise UsageError(f"{name} has {tensor.shape[-1]} channels, the model takes {width}")
            if tensor.shape[0] != batch:
                raise UsageError(f"{name} has batch {tensor.shape[0]}, noisy_latents have {batch}")
            looks = is_first or (name == "noisy_latents" and tensor.device.type == "cpu")
            if looks and not bool(torch.isfinite(tensor).all()):
                raise UsageError(f"{name} hold NaN or infinite values")
        mask = inputs.text_mask
        if mask is not None and mask.shape != inputs.text_embeds.shape[:2]:
            raise UsageError(
                f"the text mask has shape {tuple(mask.shape)}, the text embeddings need "
                f"{tuple(inputs.text_embeds.shape[:2])}"
            )
        if self._takes_guidance and inputs.guidance is None:
            raise UsageError("guidance is missing; this model has guidance embeddings")


def gather_rows(hidden: Tensor, kept: Tensor) -> Tensor:
    """Rows of each batch entry (ToPi Eq. 12): (B, C, d) at (B, K') -> (B, K', d)."""
    gathered = hidden.new_empty(kept.shape[0], kept.shape[1], hidden.shape[2])
    for entry in range(kept.shape[0]):
        torch.index_select(hidden[entry], 0, kept[entry], out=gathered[entry])
    return gathered


def _last_axis(specs: object, name: str) -> int:
    for spec in specs:  # type: ignore[attr-defined]
        if spec.name == name:
            return int(spec.shape[-1])
    raise AssertionError(f"the manifest has no tensor {name}")


def _equal_text_groups(mask: Tensor | None, batch: int) -> list[tuple[Tensor, Tensor | None]]:
    """Batch entries with the same text mask, and the text tokens that each group keeps.

    A masked text token is a key for nobody and is not decoded, so removing it is exact.
    """
    everything = torch.arange(batch)
    if mask is None:
        return [(everything, None)]
    mask = mask.bool().cpu()
    if bool(mask.all()):
        return [(everything, None)]
    patterns, which = mask.unique(dim=0, return_inverse=True)
    groups: list[tuple[Tensor, Tensor | None]] = []
    for index, pattern in enumerate(patterns):
        text_rows = pattern.nonzero().flatten()
        if len(text_rows) == 0:
            raise UsageError("a text mask without any token: every prompt needs at least one")
        groups.append(((which == index).nonzero().flatten(), text_rows))
    return groups


def _rows_of(inputs: ModelInputs, rows: Tensor, text_rows: Tensor | None) -> ModelInputs:
    """The inputs of some batch entries and text tokens."""
    from dataclasses import replace

    if text_rows is None:
        return inputs

    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows.to(tensor.device)]

    return replace(
        inputs,
        noisy_latents=inputs.noisy_latents[rows],
        reference_latents=inputs.reference_latents[rows],
        text_embeds=inputs.text_embeds[rows][:, text_rows],
        timestep=inputs.timestep[rows],
        guidance=pick(inputs.guidance),
        pooled_text=pick(inputs.pooled_text),
        text_mask=None,
    )


def _scattered(parts: list[Tensor], order: Tensor | None) -> Tensor:
    """Group results back in batch order."""
    if order is None:
        return parts[0]
    joined = torch.cat(parts)
    result = torch.empty_like(joined)
    result[order.to(joined.device)] = joined
    return result
