"""The torch backend: a pipeline's own transformer behind the seam of engines.

Replaces: a build. There is no copy of the weights and no file: FRONT and BACK are the transformer's
own modules, called in diffusers' order. So whatever acts on them, as LoRA layers, quantisation and
offloading do, acts at the next call.
Limits: what acts on the whole transformer's forward (step caches of other libraries, context
parallelism) would have no effect and is refused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ditrim.engines.backends.torch.blocks import call_block, embed, run_blocks, streams_of
from ditrim.engines.backends.torch.cuda_graphs import CudaGraphs, state_of
from ditrim.engines.backends.torch.processors import (
    held_processors,
    hold_processors,
    release_processors,
)
from ditrim.engines.forking import check_not_forked, note_loaded
from ditrim.engines.sets.engine_set import EngineSet
from ditrim.plugins.architectures.transformers import blocks_of, listed_blocks
from ditrim.plugins.precision import PRECISIONS


class TorchEngines:
    """FRONT and BACK of a transformer in memory (see `Engines`). Threads may share it."""

    def __init__(
        self,
        transformer: Any,
        engine_set: EngineSet,
        *,
        compile: Literal["blocks"] | None = None,
        cuda_graphs: int = 0,
    ) -> None:
        """Take a transformer; `engines.build.live` describes and checks it.

        Args:
            transformer: of diffusers, without wrappers.
            engine_set: its description.
            compile: see `torch_engines`.
            cuda_graphs: the same.
        """
        self.transformer = transformer
        self.engine_set = engine_set
        self._is_compiled = compile is not None
        self._call_block: Callable[..., Any] = call_block
        if self._is_compiled:
            self._call_block = torch.compile(call_block, dynamic=True)
        self._graphs = CudaGraphs(cuda_graphs) if cuda_graphs else None
        how = ", blocks compiled" if compile is not None else ""
        how += f", up to {cuda_graphs} CUDA graphs" if cuda_graphs else ""
        self._how = f"torch {torch.__version__}{how}"

    @property
    def device(self) -> torch.device:
        """The device that the transformer computes on, also where its weights are offloaded."""
        return execution_device(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in."""
        return dtype_of(self.transformer)

    @property
    def choice(self) -> str:
        """One sentence that says what runs on which device."""
        return f"{self._how} on {self.device}: the pipeline's own transformer"

    def hold(self) -> None:
        """Keep the transformer's attention processors ready between calls.

        Raises:
            UsageError: a processor is not diffusers' own.
        """
        hold_processors(self.transformer)

    def release(self) -> None:
        """Undo one `hold`; the last one leaves the transformer as it was."""
        release_processors(self.transformer)

    @torch.no_grad()
    def run(self, role: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run a graph of the transformer's own modules."""
        check_not_forked()
        note_loaded()  # torch's own threads
        graph = self._front if role == "front" else self._back
        with held_processors(self.transformer), _around_forward(self.transformer):
            if self._graphs is None:
                graph(role, inputs, outputs)
            else:
                state = state_of(self.transformer)
                self._graphs.run(graph, role, state, inputs, outputs)

    def synchronize(self) -> None:
        """Wait until everything run so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _front(
        self, role: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        manifest, num_noisy = self.engine_set.manifest, inputs["noisy_latents"].shape[1]
        embedded = embed(self.transformer, inputs)
        if self._is_compiled:  # a view would be compiled for apart from what blocks return
            embedded = {name: tensor.clone() for name, tensor in embedded.items()}
        streams = streams_of({**inputs, **embedded}, embedded["hidden"], scored=False)
        run_blocks(
            blocks_of(self.transformer)[: manifest.front_depth],
            streams,
            architecture=manifest.architecture,
            call=self._call_block,
        )
        outputs["noisy"].copy_(streams.hidden[:, :num_noisy])
        outputs["reference"].copy_(streams.hidden[:, num_noisy:])
        outputs["text"].copy_(streams.text)
        outputs["temb"].copy_(streams.temb)
        if streams.reference_temb is not None:
            outputs["reference_temb"].copy_(streams.reference_temb)

    def _back(self, role: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        manifest, transformer = self.engine_set.manifest, self.transformer
        hidden = torch.cat([inputs["noisy"], inputs["reference"]], dim=1)  # (B, G + K', d)
        streams = streams_of(inputs, hidden, scored=role == "anchor")
        lists = listed_blocks(transformer)
        run_blocks(
            [block for _, block in lists][manifest.front_depth :],
            streams,
            architecture=manifest.architecture,
            scoring=frozenset(
                layer - manifest.front_depth for layer in manifest.representative_layers
            ),
            last=lists[-1],
            call=self._call_block,
        )
        velocity = transformer.proj_out(transformer.norm_out(streams.hidden, streams.temb))
        outputs["velocity"].copy_(velocity)
        if streams.influences:
            outputs["influence"].copy_(torch.stack(streams.influences).sum(dim=0))


def dtype_of(transformer: Any) -> torch.dtype:
    """What a transformer computes in; quantised ones say it of what is not quantised."""
    for module in transformer.modules():  # as `transformer.dtype` looks, in a tenth of the time
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
        if "layerwise_casting" in hooks:
            found = hooks["layerwise_casting"].compute_dtype
            break
    else:
        weights = (weight.dtype for weight in transformer.parameters())
        found = next((dtype for dtype in weights if dtype.is_floating_point), torch.bfloat16)
    return found if found in {item.dtype for item in PRECISIONS.values()} else torch.bfloat16


def execution_device(transformer: Any) -> torch.device:
    """Where a transformer computes; offload hooks bring the weights there."""
    # Hooks are on the whole, or on every block or leaf alike: one block of many tells.
    for module in itertools.chain([transformer], blocks_of(transformer)[0].modules()):
        own = vars(module)  # asking a module for what it lacks is slow
        device = getattr(own.get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
        for hook in getattr(own.get("_diffusers_hook"), "hooks", {}).values():
            device = getattr(getattr(hook, "group", None), "onload_device", None)
            if device is not None:
                return torch.device(device)
    first: torch.device = next(transformer.parameters()).device
    return first


@contextlib.contextmanager
def _around_forward(transformer: Any) -> Iterator[None]:
    """Do what offloading does around the transformer's own forward, which is not called."""
    hook = getattr(transformer, "_hf_hook", None)
    registry = getattr(getattr(transformer, "_diffusers_hook", None), "hooks", {})
    groups = [found for name, found in registry.items() if name == "group_offloading"]
    if hook is not None:
        hook.pre_forward(transformer)
    for group in groups:
        group.pre_forward(transformer)
    yield
    for group in reversed(groups):
        group.post_forward(transformer, None)
    if hook is not None:
        hook.post_forward(transformer, None)
