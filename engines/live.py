"""Engines of a transformer in memory: a pipeline's own, run reduced without a build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ditrim.engines.forking import check_not_forked
from ditrim.plugins.architectures.transformers import unwrapped
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.backends.torch.engines import TorchEngines


def torch_engines(
    pipe: Any,
    *,
    model: str | None = None,
    front_depth: int | None = None,
    layers: Sequence[int] | None = None,
    granularity: int | None = None,
    compile: Literal["blocks"] | None = None,
    cuda_graphs: int = 0,
) -> TorchEngines:
    """Run a pipeline's own transformer reduced, without a build.

    Args:
        pipe: a diffusers pipeline, or a transformer by itself.
        model: the family's name where the pipeline does not name it; see `build-engine --model`.
        front_depth: K, the first layers that always see the full context (ToPi App. B); the
            family's by default, scaled to the transformer's depth.
        layers: L, the layers whose attention is scored (ToPi App. C.3); the family's by default.
        granularity: kept counts are rounded up to a multiple of it by keeping the next-ranked
            tokens. By default 1, and with `compile` or `cuda_graphs` what leaves at most 64 counts.
        compile: "blocks" compiles each kind of block once, for every length.
        cuda_graphs: how many CUDA graphs to keep, one for each role and shape; 0 for none.

    Raises:
        UsageError: the transformer is of no known family, or K, L or the granularity do not fit.
    """
    import torch

    from ditrim.engines.backends.torch.engines import TorchEngines
    from ditrim.engines.build.live_set import describe, family_of

    check_not_forked()
    if compile not in (None, "blocks"):
        raise UsageError(f"compile={compile!r}; give 'blocks', or leave it out")
    if cuda_graphs < 0:
        raise UsageError(f"cuda_graphs={cuda_graphs} must not be negative")
    given = pipe.transformer if hasattr(pipe, "transformer") else pipe
    if given is None:
        raise UsageError(
            "the pipeline was loaded without its transformer, which the torch backend runs: load "
            "it with one, or attach an engine set"
        )
    transformer = unwrapped(given)
    if cuda_graphs and transformer.device.type == "cpu" and not torch.cuda.is_available():
        raise UsageError("CUDA graphs need a GPU, and torch sees none: leave cuda_graphs out")
    if compile is None and (given is not transformer or _is_compiled(transformer)):
        compile = "blocks"  # as a transformer that is compiled as a whole was meant
    name = type(pipe).__name__ if pipe is not given else None
    is_small = name == "SmallEditPipeline"
    family = family_of(transformer, name, model)
    engine_set = describe(
        transformer,
        family=family,
        pipeline_class=family.pipeline_class,
        is_small=is_small,
        front_depth=front_depth,
        layers=None if layers is None else tuple(layers),
        few_lengths=compile is not None or cuda_graphs > 0,
        granularity=granularity,
    )
    return TorchEngines(transformer, engine_set, compile=compile, cuda_graphs=cuda_graphs)


def _is_compiled(transformer: Any) -> bool:
    return getattr(transformer, "_compiled_call_impl", None) is not None
