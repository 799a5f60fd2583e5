"""`EditSession`: denoising without diffusers, step by step, for embedding."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditrim.engines.load import load_engines
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Layout
from ditrim.runtime.caches.step_cache import Cache
from ditrim.runtime.denoising.denoiser import Denoiser
from ditrim.runtime.denoising.inputs import ModelInputs
from ditrim.runtime.denoising.rope import rope_for
from ditrim.runtime.denoising.state import RequestState
from ditrim.runtime.fit import check_live
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import Policy
from ditrim.runtime.report import RunReport, StepRecord

if TYPE_CHECKING:
    from ditrim.engines.backend import Engines
    from ditrim.engines.sets.engine_set import EngineSet


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """Where a denoising run stands; hand it to `EditSession.denoise` to go on from there.

    Attributes:
        index: steps done.
        latents: (B, G, c) after them.
        request: kept tokens of each guidance branch, and the policy's memory.
    """

    index: int
    latents: Tensor
    request: RequestState


@dataclass(frozen=True, slots=True, kw_only=True)
class EditStep:
    """One finished step.

    Attributes:
        index: from 0; `num_steps` in all.
        sigma, next_sigma: noise level before and after.
        latents: (B, G, c) float32 after the step.
        velocity: (B, G, c) float32, guided if there is guidance.
        records: of the model calls made, one a branch.
        state: to resume from later, also in another session over the same engine set.
    """

    index: int
    num_steps: int
    sigma: float
    next_sigma: float
    latents: Tensor
    velocity: Tensor
    records: tuple[StepRecord, ...]
    state: SessionState


class EditSession:
    """Denoises latents on an engine set. One request at a time; threads make their own."""

    def __init__(
        self,
        engines: str | os.PathLike[str] | EngineSet | Engines,
        policy: Policy | None = None,
        *,
        cache: Cache | None = None,
        region: Tensor | None = None,
        device: str = "auto",
        threads: int = 0,
        timing: bool = False,
    ) -> None:
        """Open a session.

        Args:
            engines: a folder, an `EngineSet`, or what `load_engines` returned (to share it).
            policy: defaults to `ToPi()`.
            device, threads: see `load_engines`.
            cache, region, timing: see `Denoiser`.
        """
        loaded: Any = engines
        if not hasattr(engines, "run"):
            loaded = load_engines(engines, device=device, threads=threads)
        self._denoiser = Denoiser(
            loaded,
            policy if policy is not None else ToPi(),
            cache=cache,
            region=region,
            timing=timing,
        )
        manifest = self._denoiser.engines.engine_set.manifest
        self._request = self._denoiser.begin()
        self._architecture = ARCHITECTURES[manifest.architecture]
        self._axes = tuple(manifest.transformer_config["axes_dims_rope"])

    @property
    def report(self) -> RunReport:
        """Report of the current or last run."""
        return self._request.report

    def denoise(
        self,
        *,
        noisy: Tensor,
        noisy_grid: tuple[int, int],
        references: Sequence[Tensor],
        reference_grids: Sequence[tuple[int, int]],
        text_embeds: Tensor,
        sigmas: Sequence[float],
        text_mask: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        negative_text_mask: Tensor | None = None,
        true_cfg_scale: float = 1.0,
        guidance: float | None = None,
        pooled_text: Tensor | None = None,
        negative_pooled_text: Tensor | None = None,
        resume: SessionState | None = None,
    ) -> Iterator[EditStep]:
        """Euler steps of the flow ODE, one at a time, as the caller asks for them.

        Stop by not asking for more; go on later by handing the last step's `state` as `resume`.

        Args:
            noisy: (B, G, c) noise at `sigmas[0]`.
            noisy_grid: (height, width) of the picture in tokens; their product is G.
            references: (B, C_i, c) packed latents of each reference.
            reference_grids: (height, width) of each reference.
            text_embeds: (B, T, c_text); text_mask: (B, T), none means all tokens.
            sigmas: decreasing noise levels, the last of them 0 (added if it is missing).
            negative_text_embeds, negative_text_mask: the branch of true classifier-free guidance.
            true_cfg_scale: its strength; 1 runs no second branch.
            guidance: the embedded guidance scale, for models that have one.
            pooled_text, negative_pooled_text: (B, c_pool), FLUX only.
            resume: the state of an earlier step of the same request.

        Yields:
            an `EditStep` after each step.

        Raises:
            UsageError, LadderError: when the first step is asked for at the latest.
        """
        live = getattr(self._denoiser.engines, "transformer", None)
        if live is not None:
            check_live(live, live)
        levels = _checked_sigmas(sigmas)
        layout = _checked_layout(noisy, noisy_grid, references, reference_grids)
        branches = {"cond": (text_embeds, text_mask, pooled_text)}
        if true_cfg_scale != 1.0:
            if negative_text_embeds is None:
                raise UsageError(f"true_cfg_scale = {true_cfg_scale} needs negative_text_embeds")
            branches["uncond"] = (negative_text_embeds, negative_text_mask, negative_pooled_text)
        for name, value in (("true_cfg_scale", true_cfg_scale), ("guidance", guidance)):
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} must be finite, got {value}")
        reference = torch.cat(list(references), dim=1)
        request = self._request = self._denoiser.begin(levels[:-1])
        latents, start = noisy.float(), 0
        if resume is not None:
            if not 0 <= resume.index < len(levels) - 1 or resume.latents.shape != noisy.shape:
                raise UsageError(
                    f"cannot resume at step {resume.index} with latents "
                    f"{tuple(resume.latents.shape)}: this run has {len(levels) - 1} steps and "
                    f"latents {tuple(noisy.shape)}"
                )
            latents, start = resume.latents.float(), resume.index
            request.restore(resume.request)
        return self._steps(
            latents, start, levels, layout, reference, branches, true_cfg_scale, guidance
        )

    def _steps(
        self,
        latents: Tensor,
        start: int,
        levels: list[float],
        layout: Layout,
        reference: Tensor,
        branches: dict[str, tuple[Tensor, Tensor | None, Tensor | None]],
        true_cfg_scale: float,
        guidance: float | None,
    ) -> Iterator[EditStep]:
        request = self._request
        batch = latents.shape[0]
        num_steps = len(levels) - 1
        for index in range(start, num_steps):
            if request is not self._request:
                raise UsageError(
                    "this run was ended by another denoise() of the same session; open a session "
                    "a run (they share loaded engines), or resume from a step's state"
                )
            sigma, next_sigma = levels[index], levels[index + 1]
            before = len(request.report.steps)
            request.begin_step(sigma)
            velocities = {}
            for branch, (text, mask, pooled) in branches.items():
                num_text = text.shape[1]
                velocities[branch] = request.predict(
                    branch,
                    ModelInputs(
                        noisy_latents=latents,
                        reference_latents=reference,
                        text_embeds=text,
                        text_mask=mask,
                        timestep=torch.full((batch,), sigma),
                        time=sigma,
                        layout=layout,
                        guidance=None if guidance is None else torch.full((batch,), guidance),
                        pooled_text=pooled,
                        rope_key=(layout, num_text),
                        make_rope=functools.partial(
                            rope_for,
                            self._architecture.name,
                            layout,
                            num_text,
                            self._axes,
                            self._denoiser.engines.device,
                        ),
                    ),
                ).float()
            velocity = velocities["cond"]
            if "uncond" in velocities:
                guided = self._architecture.guided
                velocity = guided(velocity, velocities["uncond"], true_cfg_scale)
            velocity = velocity.to(latents.device)
            changed = request.end_step(latents, velocity, sigma, next_sigma)
            latents = latents + (next_sigma - sigma) * velocity if changed is None else changed
            yield EditStep(
                index=index,
                num_steps=num_steps,
                sigma=sigma,
                next_sigma=next_sigma,
                latents=latents.clone(),  # an observer may write into it
                velocity=velocity,
                records=tuple(request.report.steps[before:]),
                state=SessionState(
                    index=index + 1, latents=latents.clone(), request=request.snapshot()
                ),
            )


def _checked_layout(
    noisy: Tensor,
    noisy_grid: tuple[int, int],
    references: Sequence[Tensor],
    reference_grids: Sequence[tuple[int, int]],
) -> Layout:
    """The picture and its references, whose tensors fit their grids and each other."""
    if len(references) != len(reference_grids) or not references:
        raise UsageError(
            f"{len(references)} references with {len(reference_grids)} grids; give at least "
            "one reference and a (height, width) for each"
        )
    layout = Layout((*noisy_grid,), tuple((*grid,) for grid in reference_grids))
    names = ["noisy", *(f"references[{i}]" for i in range(len(references)))]
    for name, tensor, grid in zip(names, [noisy, *references], layout.grids, strict=True):
        if tensor.dim() != 3 or tensor.shape[1] != grid[0] * grid[1]:
            raise UsageError(
                f"{name} has shape {tuple(tensor.shape)}, but its grid {grid} needs "
                f"(batch, {grid[0] * grid[1]}, channels)"
            )
        if tensor.shape[::2] != noisy.shape[::2]:
            raise UsageError(
                f"{name} has shape {tuple(tensor.shape)}, but its batch and channels must be those "
                f"of noisy, {tuple(noisy.shape)}"
            )
    return layout


def _checked_sigmas(sigmas: Sequence[float]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if levels and levels[-1] != 0.0:
        levels.append(0.0)
    if len(levels) < 2 or any(b >= a for a, b in itertools.pairwise(levels)):
        raise UsageError(f"sigmas must decrease and hold at least one level above 0, got {sigmas}")
    if not all(map(math.isfinite, levels)):
        raise UsageError(f"sigmas must be finite, got {sigmas}")
    if not 0.0 < levels[0] <= 1.0:
        raise UsageError(f"sigmas must lie in (0, 1], got {levels[0]}")
    return levels
