"""FRONT and BACK as a denoiser calls them: tensors in, what a reduction leaves, tensors out."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ditrim.engines.backend import Engines
from ditrim.runtime.denoising.inputs import ModelInputs, rows_of
from ditrim.runtime.denoising.rope import RopeTables
from ditrim.runtime.policy import Reduction
from ditrim.runtime.tokens.matching import TokenMerge

_CACHED_TABLES = 4
RopeRows = tuple[Tensor, Tensor]  # cosines and sines, (B, K', D/2) each
_T = TypeVar("_T")


@dataclass(slots=True)
class Clock:
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


@dataclass(slots=True)
class FrontResult:
    """FRONT's results for batch entries whose text is equally long.

    Attributes:
        rows: the entries, or none where it is the whole batch.
        hidden: FRONT's outputs.
        rope: the tables that FRONT ran on.
        tables: of the whole geometry.
        latents: (B, G, c) that it ran on; timestep: (B,).
    """

    rows: Tensor | None
    hidden: dict[str, Tensor]
    rope: dict[str, Tensor]
    tables: RopeTables
    latents: Tensor
    timestep: Tensor


@dataclass(frozen=True, slots=True)
class BackResult:
    """BACK's outputs; `scores` are the layers' own, none where the engine set has none."""

    velocity: Tensor
    influence: Tensor
    scores: Tensor | None
    lengths: tuple[int, int]  # noisy and reference tokens that it ran on


class _LastUsed(Generic[_T]):
    """Cache of the values of the last few keys; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, _T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > _CACHED_TABLES:
                self._values.popitem(last=False)
        return value


class EngineCalls:
    """Calls loaded engines; remembers position tables by their geometry. Threads may share it."""

    def __init__(self, engines: Engines) -> None:
        """Take engines from `load_engines`."""
        self.engines = engines
        self._tables: _LastUsed[RopeTables] = _LastUsed()
        self._expanded: _LastUsed[RopeRows] = _LastUsed()
        manifest = engines.engine_set.manifest
        back = manifest.graphs["back"]
        self._width = _last_axis(back.inputs, "noisy")
        self._out_channels = _last_axis(back.outputs, "velocity")
        self._has_reference_temb = any(spec.name == "reference_temb" for spec in back.inputs)
        self.has_scores = any(spec.name == "layer_scores" for spec in back.outputs)

    def run_front(
        self,
        inputs: ModelInputs,
        group: tuple[Tensor, Tensor | None],
        early: Tensor | None,
        clock: Clock,
    ) -> FrontResult:
        """FRONT over batch entries whose text is equally long."""
        rows, text_rows = group
        inputs = rows_of(inputs, rows, text_rows)
        device, dtype = self.engines.device, self.engines.dtype
        batch, num_noisy = inputs.noisy_latents.shape[:2]
        num_text = inputs.text_embeds.shape[1]
        tables = self._tables.get((inputs.rope_key, device), inputs.make_rope)
        text_cos, text_sin = tables.text
        if text_rows is not None:
            text_cos, text_sin = text_cos[text_rows], text_sin[text_rows]
        reference = inputs.reference_latents.to(device, dtype)
        if early is not None:
            early = early if text_rows is None else early[rows]
            reference = gather_rows(reference, early)
            reference_rope = self.rope_rows(tables, early)
        else:
            reference_rope = self._expanded_rope(inputs.rope_key, tables, batch)
        num_reference = reference.shape[1]
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
            "reference_latents": reference.contiguous(),
            "text_embeds": ready(inputs.text_embeds),
            "timestep": ready(inputs.timestep, torch.float32),
            **rope,
        }
        if inputs.guidance is not None:
            front_inputs["guidance"] = ready(inputs.guidance, torch.float32)
        if inputs.pooled_text is not None:
            front_inputs["pooled_text"] = ready(inputs.pooled_text)
        # Of an input: engines that look at a transformer's modules for their device take a while.
        empty = front_inputs["noisy_latents"].new_empty
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
        return FrontResult(
            None if text_rows is None else rows,
            hidden,
            rope,
            tables,
            front_inputs["noisy_latents"],
            front_inputs["timestep"],
        )

    def run_back(
        self,
        front: FrontResult,
        graph: str,
        reduction: Reduction | None,
        score_rows: Tensor,
        clock: Clock,
        *,
        rope: RopeRows | None = None,
    ) -> BackResult:
        """BACK on what a reduction leaves of FRONT's outputs.

        Args:
            front: what `run_front` returned.
            graph: "back" or "anchor".
            reduction: none runs on everything.
            score_rows: (R,) noisy rows that are scored.
            clock: times the parts.
            rope: what `rope_rows` returned for the reduction's tokens; none computes it.
        """
        hidden, tables = dict(front.hidden), dict(front.rope)
        if reduction is not None and not reduction.before_front and reduction.kept is not None:
            if reduction.merge is not None:
                hidden["reference"] = reduction.merge.merge(hidden["reference"])
            else:
                hidden["reference"] = gather_rows(hidden["reference"], reduction.kept)
            rows = self.rope_rows(front.tables, reduction.kept) if rope is None else rope
            tables["reference_rope_cos"], tables["reference_rope_sin"] = rows
            clock.lap("gather")
        if reduction is None or reduction.noisy_merge is None:
            return self._call_back(graph, hidden, tables, score_rows, clock)
        merge = reduction.noisy_merge
        hidden["noisy"] = merge.merge(hidden["noisy"])
        clock.lap("gather")
        # The noisy tables have no batch axis: entries that keep other tokens run one by one.
        parts = []
        first_rows = torch.zeros(1, dtype=torch.int64, device=self.engines.device)
        for entry in range(len(merge.kept)):
            tokens = merge.kept[entry]
            one = {
                name: tensor[entry : entry + 1].contiguous()
                for name, tensor in (hidden | _batched(tables)).items()
            }
            for name, table in zip(("cos", "sin"), front.tables.noisy, strict=True):
                one[f"noisy_rope_{name}"] = table[tokens]
                one[f"text_rope_{name}"] = tables[f"text_rope_{name}"]
            parts.append(self._call_back(graph, one, {}, first_rows, clock))
        velocity = unmerge_velocity(
            merge, torch.cat([part.velocity for part in parts]), front.latents, front.timestep
        )
        clock.lap("gather")
        return replace(
            parts[0],
            velocity=velocity,
            influence=torch.cat([part.influence for part in parts]),
        )

    def _call_back(
        self,
        graph: str,
        hidden: dict[str, Tensor],
        rope: dict[str, Tensor],
        score_rows: Tensor,
        clock: Clock,
    ) -> BackResult:
        batch, num_noisy = hidden["noisy"].shape[:2]
        num_kept = hidden["reference"].shape[1]
        empty = hidden["noisy"].new_empty
        outputs = {
            "velocity": empty(batch, num_noisy, self._out_channels),
            "influence": empty(batch, num_kept, dtype=torch.float32),
        }
        if self.has_scores:
            num_layers = len(self.engines.engine_set.manifest.detailed_layers)
            outputs["layer_scores"] = empty(batch, num_layers, 3, num_kept, dtype=torch.float32)
        clock.lap("other")
        self.engines.run(graph, {**hidden, **rope, "score_rows": score_rows}, outputs)
        clock.lap("back")
        return BackResult(
            outputs["velocity"],
            outputs["influence"],
            outputs.get("layer_scores"),
            (num_noisy, num_kept),
        )

    def rope_rows(self, tables: RopeTables, kept: Tensor) -> RopeRows:
        """Reference tables at (B, K') tokens, (B, K', D/2) each."""
        cosines, sines = tables.reference
        # Indexing with a tensor is far slower than `index_select` on a CPU.
        flat = kept.flatten()
        return (
            cosines.index_select(0, flat).unflatten(0, kept.shape),
            sines.index_select(0, flat).unflatten(0, kept.shape),
        )

    def _expanded_rope(self, key: tuple[object, ...], tables: RopeTables, batch: int) -> RopeRows:
        """Reference tables repeated for a batch, (B, C, D/2) each."""
        cosines, sines = tables.reference
        return self._expanded.get(
            (key, batch, cosines.device),
            lambda: (
                cosines.expand(batch, -1, -1).contiguous(),
                sines.expand(batch, -1, -1).contiguous(),
            ),
        )


def unmerge_velocity(
    merge: TokenMerge, velocity: Tensor, latents: Tensor, timestep: Tensor
) -> Tensor:
    """The velocity of every token of merged ones, whose clean estimates are copied.

    Tokens of a group share what they will become, not the noise that they started from. With the
    clean estimate z - t v of the group's mean, a token's velocity is (z_i - (z - t v)) / t. Copying
    velocities alone leaves each token the difference between its noise and the group's.

    Args:
        merge: of the noisy tokens.
        velocity: (B, G', c), of the merged tokens; latents: (B, G, c), of all.
        timestep: (B,), t.
    """
    wide = torch.promote_types(velocity.dtype, torch.float32)
    own = latents.to(wide)
    noise = (own - merge.unmerge(merge.merge(own))) / timestep.to(wide)[:, None, None]
    return (merge.unmerge(velocity.to(wide)) + noise).to(velocity.dtype)


def gather_rows(hidden: Tensor, kept: Tensor) -> Tensor:
    """Rows of each batch entry (ToPi Eq. 12): (B, C, d) at (B, K') -> (B, K', d).

    Raises:
        IndexError: `kept` has a token that is not in [0, C).
    """
    batch, num_tokens, width = hidden.shape
    gathered = hidden.new_empty(batch, kept.shape[1], width)
    if hidden.device.type != "cpu" or hidden.dtype == torch.bfloat16:  # numpy has no bfloat16
        for entry in range(batch):
            torch.index_select(hidden[entry], 0, kept[entry], out=gathered[entry])
        return gathered
    # One thread copies as fast as memory goes. torch would wake its own threads, which takes
    # milliseconds where cores are busy, and which spin into the engine's next call.
    rows, source, target = kept.numpy(), hidden.detach().numpy(), gathered.numpy()
    if rows.size and not (rows.min() >= 0 and rows.max() < num_tokens):
        raise IndexError(f"kept reference tokens must be in [0, {num_tokens})")
    for entry in range(batch):
        # With "raise", numpy would copy through a buffer.
        source[entry].take(rows[entry], axis=0, out=target[entry], mode="clip")
    return gathered


def _last_axis(specs: object, name: str) -> int:
    for spec in specs:  # type: ignore[attr-defined]
        if spec.name == name:
            return int(spec.shape[-1])
    raise AssertionError(f"the manifest has no tensor {name}")


def _batched(rope: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables with a batch axis."""
    return {name: table for name, table in rope.items() if name.startswith("reference")}
