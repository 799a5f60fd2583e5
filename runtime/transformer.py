"""`EngineTransformer`: stands where a diffusers pipeline expects its transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ditrim.engines.backend import Engines
from ditrim.plugins.errors import UsageError
from ditrim.runtime.denoiser import Denoiser
from ditrim.runtime.model_inputs import ModelInputs
from ditrim.runtime.policy import Policy, TokenGrid
from ditrim.runtime.report import RunReport
from ditrim.runtime.rope import Grid, flux_rope, qwen_rope
from ditrim.runtime.step_cache import Cache


@dataclass(frozen=True, slots=True, eq=False)
class _FluxIds:
    """FLUX's ids (picture, row, column), read from the device.

    Attributes:
        given: the pipeline's tensors.
        image, text: (G + C, 3) and (T, 3) float32.
        num_noisy: G.
        key: equal for equal ids.
        grids: see `ModelInputs.grids`.
    """

    given: tuple[Tensor, Tensor]
    image: Tensor
    text: Tensor
    num_noisy: int
    key: tuple[object, ...]
    grids: tuple[TokenGrid, ...] | None

    @classmethod
    def read(cls, img_ids: Tensor, txt_ids: Tensor) -> _FluxIds:
        # Pipelines make the ids in the embeddings' dtype, which can be bfloat16.
        image = (img_ids[0] if img_ids.dim() == 3 else img_ids).float()
        text = (txt_ids[0] if txt_ids.dim() == 3 else txt_ids).float()
        on_cpu = image.cpu()
        return cls(
            (img_ids, txt_ids),
            image,
            text,
            int((on_cpu[:, 0] == 0).sum()),
            (on_cpu.numpy().tobytes(), text.cpu().numpy().tobytes()),
            _grids_of_ids(on_cpu),
        )


class EngineTransformer(nn.Module):
    """Takes the calls of `QwenImageTransformer2DModel` or `FluxTransformer2DModel`.

    Returns the velocity of the noisy tokens only, which is what the pipelines read. Serves one
    request at a time; a thread makes its own over the same engines.
    """

    def __init__(
        self,
        engines: Engines,
        policy: Policy,
        *,
        cache: Cache | None = None,
        region: Tensor | None = None,
        timing: bool = False,
    ) -> None:
        """Make a stand-in.

        Args:
            engines: from `load_engines`.
            policy: e.g. `ToPi()`.
            cache, region, timing: see `Denoiser`.
        """
        super().__init__()
        manifest = engines.engine_set.manifest
        self._denoiser = Denoiser(engines, policy, cache=cache, region=region, timing=timing)
        self._architecture = manifest.architecture
        self._axes = tuple(manifest.transformer_config["axes_dims_rope"])
        self.config = FrozenDict(manifest.transformer_config)
        self._branch: str | None = None
        self._calls_in_step = 0
        self._last_timesteps: dict[str, float] = {}
        self._times: list[float] | None = None
        self._flux_ids: _FluxIds | None = None
        self._steps_done = 0

    @property
    def device(self) -> torch.device:
        """Where the engines' tensors live."""
        return self._denoiser.engines.device

    @property
    def dtype(self) -> torch.dtype:
        """Of latents and embeddings."""
        return self._denoiser.engines.dtype

    @property
    def report(self) -> RunReport:
        """What the current or last request did."""
        return self._denoiser.report

    def start_request(self) -> None:
        """Forget the previous request. `attach` calls this whenever a pipeline starts one."""
        self._denoiser.start_request()
        self._calls_in_step = self._steps_done = 0
        self._last_timesteps = {}
        self._times = self._flux_ids = None

    def expect_times(self, times: Sequence[float]) -> None:
        """What `timestep` will be at each step. `attach` calls this.

        A number that is known need not be read from the device, which waits for it.
        """
        self._times = list(times)

    @property
    def acts_on_steps(self) -> bool:
        """Whether the policy looks at finished steps, and may change their result."""
        return self._denoiser.acts_on_steps

    @property
    def is_in_step(self) -> bool:
        """Whether a call was made since the last step ended."""
        return self._calls_in_step > 0

    def end_step(self) -> None:
        """Count calls anew: the next one is of the next step. `attach` calls this."""
        self._calls_in_step = 0
        self._steps_done += 1

    def finish_step(
        self, latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float
    ) -> Tensor | None:
        """See `Denoiser.finish_step`. `attach` calls this."""
        return self._denoiser.finish_step(latents, velocity, sigma, next_sigma)

    @contextmanager
    def cache_context(self, name: str, **_: object) -> Iterator[None]:
        """Name the guidance branch of the calls inside, as diffusers' pipelines do."""
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def forward(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence[Any] | None = None,
        txt_seq_lens: Sequence[int] | None = None,
        pooled_projections: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        additional_t_cond: Tensor | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        controlnet_blocks_repeat: bool = False,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """One model call with the arguments of either diffusers class, by keyword.

        Args:
            hidden_states: (B, G + C, c), noisy tokens first.
            encoder_hidden_states: (B, T, c_text).
            encoder_hidden_states_mask: (B, T), Qwen only; `txt_seq_lens` is ignored, as the mask
                or the embeddings' length say the same.
            timestep: (B,) in [0, 1].
            img_shapes: Qwen: a batch of lists of (frames, height, width), the picture's first.
            img_ids, txt_ids: FLUX: (G + C, 3) and (T, 3); the picture's first id is 0.
            pooled_projections: (B, c_pool), FLUX only.
            guidance: (B,), models with guidance embeddings.
            return_dict: return an output object rather than a tuple.

        Returns:
            the velocity, (B, G, c_out), in the dtype of `hidden_states`.

        Raises:
            UsageError: what an engine cannot do (ControlNet, IP-Adapter, LoRA scales), or inputs
                that do not fit.
            LadderError: a size that the engine set was not built for.
        """
        if encoder_hidden_states is None or timestep is None:
            raise UsageError("encoder_hidden_states and timestep must be given")
        self._refuse(
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            additional_t_cond=additional_t_cond,
        )
        for kwargs in (attention_kwargs, joint_attention_kwargs):
            self._refuse(**{k: v for k, v in (kwargs or {}).items() if (k, v) != ("scale", 1.0)})
        batch = hidden_states.shape[0]
        timestep = timestep.reshape(-1).expand(batch) if timestep.numel() == 1 else timestep
        if guidance is not None:
            guidance = guidance.reshape(-1).expand(batch) if guidance.numel() == 1 else guidance
        num_text = encoder_hidden_states.shape[1]
        if self._architecture == "qwen":
            grids = _grids_of(img_shapes)
            num_noisy = _num_tokens(grids[:1])
            if _num_tokens(grids) != hidden_states.shape[1]:
                raise UsageError(
                    f"img_shapes {grids} describe {_num_tokens(grids)} tokens, hidden_states have "
                    f"{hidden_states.shape[1]}"
                )
            key: tuple[object, ...] = (tuple(grids), num_text)
            token_grids: tuple[TokenGrid, ...] | None = tuple(
                (frames * height, width) for frames, height, width in grids
            )

            def make_rope() -> Any:
                return qwen_rope(grids, num_text, self._axes, self.device)
        else:
            if img_ids is None or txt_ids is None or pooled_projections is None:
                raise UsageError("img_ids, txt_ids and pooled_projections must be given")
            ids = self._ids_of(img_ids, txt_ids)
            num_noisy, key, token_grids = ids.num_noisy, ids.key, ids.grids

            def make_rope() -> Any:
                return flux_rope(ids.image, ids.text, num_noisy, self._axes, self.device)

        time = self._time_of(timestep)
        velocity = self._denoiser.predict(
            self._branch_of(time),
            ModelInputs(
                noisy_latents=hidden_states[:, :num_noisy],
                reference_latents=hidden_states[:, num_noisy:],
                text_embeds=encoder_hidden_states,
                text_mask=encoder_hidden_states_mask,
                timestep=timestep,
                time=time,
                grids=token_grids,
                guidance=guidance if self.config["guidance_embeds"] else None,
                pooled_text=pooled_projections,
                rope_key=key,
                make_rope=make_rope,
            ),
        ).to(hidden_states.device, hidden_states.dtype)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _time_of(self, timestep: Tensor) -> float:
        is_known = self._times is not None and self._steps_done < len(self._times)
        if is_known and timestep.device.type != "cpu":
            assert self._times is not None
            return self._times[self._steps_done]
        return float(timestep.reshape(-1)[0])

    def _ids_of(self, img_ids: Tensor, txt_ids: Tensor) -> _FluxIds:
        """Read once for ids that are the same tensors at every step, as the pipeline's are."""
        known = self._flux_ids
        if known is None or known.given[0] is not img_ids or known.given[1] is not txt_ids:
            known = self._flux_ids = _FluxIds.read(img_ids, txt_ids)
        return known

    def _branch_of(self, value: float) -> str:
        """The branch of this call: the pipeline's word, or the order of calls within a step.

        FluxKontextPipeline names no branch; with true CFG it calls the transformer twice a step.
        A timestep that rises within a branch begins a request that nobody announced, as with a
        scheduler that was exchanged after `attach`.
        """
        if value not in self._last_timesteps.values():
            self._calls_in_step = 0
        names = {0: "cond", 1: "uncond"}
        branch = self._branch or names.get(self._calls_in_step, f"branch-{self._calls_in_step}")
        if value > self._last_timesteps.get(branch, value):
            self.start_request()
            branch = self._branch or "cond"
        self._last_timesteps[branch] = value
        self._calls_in_step += 1
        return branch

    @staticmethod
    def _refuse(**arguments: object) -> None:
        for name, value in arguments.items():
            if value is not None:
                raise UsageError(
                    f"{name} was given, which a compiled engine cannot apply; merge it into the "
                    "weights and rebuild the engine set, or run without it"
                )


def _num_tokens(grids: Sequence[Grid]) -> int:
    return sum(frames * height * width for frames, height, width in grids)


def _grids_of_ids(img_ids: Tensor) -> tuple[TokenGrid, ...] | None:
    """Grids from FLUX's ids (picture, row, column); none where a picture is no whole grid."""
    grids = []
    for picture in img_ids[:, 0].unique(sorted=True):
        rows, columns = img_ids[img_ids[:, 0] == picture, 1:].unbind(dim=1)
        height, width = len(rows.unique()), len(columns.unique())
        if height * width != len(rows):
            return None
        grids.append((height, width))
    return tuple(grids)


def _grids_of(img_shapes: Sequence[Any] | None) -> list[Grid]:
    """The one geometry of a batch, from diffusers' nested `img_shapes`.

    The pipelines give one entry a prompt, whatever the number of pictures a prompt.
    """
    if not img_shapes:
        raise UsageError("img_shapes must be given: it tells noisy from reference tokens")
    samples = [
        [tuple(int(n) for n in shape) for shape in (s if isinstance(s, list) else [s])]
        for s in img_shapes
    ]
    if any(sample != samples[0] for sample in samples):
        raise UsageError(
            f"img_shapes of a batch must be one geometry for every entry, got {samples}"
        )
    return samples[0]  # type: ignore[return-value]
