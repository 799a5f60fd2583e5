"""Whether an engine set can stand in for a pipeline's transformer, checked before it does.

An engine runs the weights that it was built from. What a pipeline's transformer has beyond them
(other weights, adapters, caches, processors) would be ignored, so it is refused here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ditrim.engines.sets.fingerprints import Floats, decode_samples, sample_places, samples_of
from ditrim.plugins.architectures.transformers import unwrapped
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.engine_set import EngineSet

logger = logging.getLogger(__name__)

# Configuration that may differ between two checkpoints of the same transformer.
_IRRELEVANT = {"pooled_projection_dim"}
# Pipelines, and the one whose model they run.
MODEL_OF = {
    "QwenImageEditPipeline": "QwenImageEditPipeline",
    "QwenImageEditInpaintPipeline": "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline": "QwenImageEditPlusPipeline",
    "FluxKontextPipeline": "FluxKontextPipeline",
    "FluxKontextInpaintPipeline": "FluxKontextPipeline",
}
# Hooks of diffusers that change where weights lie and how they are stored, not what is computed.
_HARMLESS_HOOKS = {
    "layerwise_casting",
    "peft_autocast_disable",
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
}
# Weights in memory are those of a file after a cast to one of these.
_COARSER = (torch.bfloat16, torch.float16)
_COARSEST = (torch.float8_e4m3fn, torch.float8_e5m2)
_INSTEAD = (
    "or load the pipeline with transformer=None, or pass check_weights=False to run the set's own"
)


def check_pipeline(pipe: Any, engine_set: EngineSet) -> None:
    """Check that a pipeline is one for an engine set's model.

    Models of one configuration but of other pipelines have other weights.

    Raises:
        UsageError: names both pipelines.
    """
    expected = engine_set.manifest.pipeline_class
    known = [MODEL_OF[b.__name__] for b in type(pipe).__mro__ if b.__name__ in MODEL_OF]
    if known and expected not in known:
        raise UsageError(
            f"the pipeline is a {type(pipe).__name__}, the engine set holds a model for "
            f"{expected}; build one for this pipeline with build-engine --model"
        )


def check_live(transformer: Any, held: Any) -> None:
    """Check that the torch backend runs what a pipeline's transformer would do.

    Args:
        transformer: of the pipeline, as it is now.
        held: what the backend was made for.

    Raises:
        UsageError: it is another one, or something acts on its whole forward.
    """
    inner = None if transformer is None else unwrapped(transformer)
    if inner is not held:
        raise UsageError(
            "the pipeline's transformer is not the one that these engines run: detach, and attach "
            "again"
        )
    hooks = getattr(getattr(inner, "_diffusers_hook", None), "hooks", {})
    parallel = getattr(inner, "_parallel_config", None)
    if parallel is not None or any(name.startswith("cp_") for name in hooks):
        raise UsageError(
            "the pipeline's transformer is set up for diffusers' parallelism, which splits what "
            "its own forward sees: reduction cannot run with it; leave enable_parallelism out"
        )
    for name, module in inner.named_modules():
        _check_caches(name or "the transformer", module)
        if getattr(module, "fused_projections", False):
            raise UsageError(
                f"{name} has fused projections, which scoring cannot look into: call "
                "pipe.transformer.unfuse_qkv_projections() first"
            )
    _check_forward("the transformer", inner)
    if not _is_diffusers(type(inner).forward):
        _refuse_forward("the transformer")


def dtype_of(transformer: Any) -> torch.dtype:
    """Return the dtype of the tensors that a pipeline makes for this transformer."""
    dtype = unwrapped(transformer).dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def check_transformer(
    transformer: Any, engine_set: EngineSet, *, check_weights: bool = True
) -> None:
    """Check that an engine set holds a pipeline's transformer, and that nothing of it gets lost.

    Args:
        transformer: of the pipeline, wrapped or not.
        engine_set: to stand in for it.
        check_weights: compare weights and adapters.

    Raises:
        UsageError: says what differs and what to do.
    """
    inner = unwrapped(transformer)
    _check_class(inner, engine_set)
    _check_hooks(inner)
    if check_weights:
        _check_weights(inner, engine_set)


def _check_class(transformer: Any, engine_set: EngineSet) -> None:
    """An engine set of another model must not run in silence."""
    manifest = engine_set.manifest
    names = [base.__name__ for base in type(transformer).__mro__]
    if manifest.transformer_class not in names:
        raise UsageError(
            f"the pipeline's transformer is a {names[0]}, the engine set holds a "
            f"{manifest.transformer_class}"
        )
    for key, built in manifest.transformer_config.items():
        if key.startswith("_") or key in _IRRELEVANT or key not in transformer.config:
            continue
        given = transformer.config[key]
        if _plain(given) != _plain(built):
            raise UsageError(
                f"the pipeline's transformer has {key} = {given!r}, the engine set was built with "
                f"{built!r}; build one from these weights with: {engine_set.rebuild_command()}"
            )


def _check_hooks(transformer: Any) -> None:
    """Refuse what changes the transformer's results from outside its weights."""
    for name, module in transformer.named_modules():
        where = name or "the transformer"
        _check_caches(where, module)
        processor = getattr(module, "processor", None)
        if processor is not None and not _is_standard(processor):
            raise UsageError(
                f"{where} has the attention processor {type(processor).__name__}, which an engine "
                "cannot run: put the default ones back "
                "(pipe.transformer.set_attn_processor(...)), or run without an engine set"
            )
        _check_forward(where, module)
    if not _is_diffusers(type(transformer).forward):
        _refuse_forward("the transformer")


def _check_caches(where: str, module: nn.Module) -> None:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    foreign = sorted(hook for hook in hooks if hook not in _HARMLESS_HOOKS)
    if foreign and not foreign[0].startswith("cp_"):  # context parallelism
        raise UsageError(
            f"{where} of the pipeline has the hook {foreign[0]!r}, as diffusers' caches set it, "
            "which has no effect on an engine: disable it first "
            "(pipe.transformer.disable_cache()) and give attach a cache of ditrim's "
            "(cache=ditrim.StepCache(...))"
        )


def _check_forward(where: str, module: nn.Module) -> None:
    """Refuse a call that is not the module's own; offloading wraps it."""
    forward: Any = vars(module).get("forward")
    is_replaced = forward is not None and _unhooked(forward) is not type(module).forward
    is_patched = _is_diffusers(type(module)) and not _is_diffusers(type(module).forward)
    if is_replaced or is_patched or module._forward_hooks or module._forward_pre_hooks:
        _refuse_forward(where)


def _unhooked(forward: Any) -> Any:
    """The function inside the wrappers of accelerate's and diffusers' hooks."""
    libraries = ("accelerate.", "diffusers.")
    while isinstance(forward, functools.partial) and forward.func.__module__.startswith(libraries):
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    return getattr(forward, "__func__", None)


def _is_diffusers(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).startswith("diffusers.")


def _refuse_forward(where: str) -> NoReturn:
    raise UsageError(
        f"the forward of {where} was replaced, or has hooks (as libraries that cache steps do), "
        "which has no effect on an engine: undo it first, and give attach a cache of ditrim's "
        "(cache=ditrim.StepCache(...))"
    )


def _is_standard(processor: Any) -> bool:
    kind = type(processor)
    return kind.__module__.startswith("diffusers.") and "IPAdapter" not in kind.__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """A transformer's weights by the names of its state dict without adapters.

    Attributes:
        tensors: the base weights.
        adapters: by weight, the adapters that act on it: (name, layer).
        names: of all active adapters.
    """

    tensors: Mapping[str, Tensor]
    adapters: Mapping[str, list[tuple[str, Any]]]
    names: list[str]


def _check_weights(transformer: Any, engine_set: EngineSet) -> None:
    manifest = engine_set.manifest
    current = _weights_of(transformer)
    merged = {name: decode_samples(text) for name, text in manifest.merged_weights.items()}
    if current.names and not merged:
        raise UsageError(
            f"the pipeline's transformer has the active adapter {', '.join(current.names)}, which "
            "the engine set was built without: unload it (pipe.unload_lora_weights()), or merge it "
            f"into a set with: {engine_set.rebuild_command()} --lora FILE:SCALE"
        )
    if not manifest.weights:
        logger.warning(
            "engine set %s was built by a version that noted nothing of its weights: they are not "
            "compared with the pipeline's",
            engine_set.folder,
        )
        return
    stored = {name: decode_samples(text) for name, text in manifest.weights.items()}
    owned = {name: _samples_in(current, name, engine_set) for name in stored}
    differing = _differing(current, stored, owned, merged)
    if current.names and not differing and any(name not in current.adapters for name in merged):
        differing = [name for name in merged if name not in current.adapters]
    if differing:
        _refuse_other_weights(differing, current.names, engine_set)


def _differing(
    found: _Weights,
    stored: Mapping[str, Floats],
    owned: Mapping[str, Floats],
    merged: Mapping[str, Floats],
) -> list[str]:
    """Weights whose samples are neither the set's own nor, with adapters, its merged ones."""
    # Values of one side that all fit a coarser type were cast to it once.
    casts = {
        kind
        for side in (stored, owned)
        for kind in (*_COARSER, *_COARSEST)
        if _is_of(np.concatenate(list(side.values())), kind)
    }
    differing = []
    for name, expected in stored.items():
        own, changes, tensor = owned[name], found.adapters.get(name, []), found.tensors[name]
        if not changes and _is_equal(own, expected, casts | {tensor.dtype}):
            continue
        for adapter, layer in changes:
            own = own + _change_of(layer, adapter, name, tuple(tensor.shape))
        if name in merged and _is_close(own, merged[name], expected):
            continue
        differing.append(name)
    return differing


def _samples_in(found: _Weights, name: str, engine_set: EngineSet) -> Floats:
    tensor = found.tensors.get(name)
    is_plain = tensor is not None and tensor.is_floating_point() and tensor.device.type != "meta"
    if tensor is None or not is_plain or hasattr(tensor, "__tensor_flatten__"):  # quantised
        _refuse_unreadable(name, tensor, engine_set)
    return samples_of(tensor)


def _refuse_unreadable(name: str, tensor: Tensor | None, engine_set: EngineSet) -> NoReturn:
    what = "is missing"
    if tensor is not None:
        kind = type(tensor).__name__ if hasattr(tensor, "__tensor_flatten__") else tensor.dtype
        what = f"is {kind} on {tensor.device}"
    raise UsageError(
        f"the pipeline's transformer cannot be compared with the engine set: its tensor {name} "
        f"{what} (quantised or rebuilt?); attach to the pipeline as it was loaded, {_INSTEAD}"
    )


def _refuse_other_weights(differing: list[str], adapters: list[str], engine_set: EngineSet) -> None:
    more = f" and {len(differing) - 1} more tensors" if len(differing) > 1 else ""
    loras = engine_set.manifest.source.get("loras") or []
    built = " with " + ", ".join(str(lora["file"]) for lora in loras) if loras else ""
    if adapters:
        raise UsageError(
            f"the pipeline's transformer has the active adapter {', '.join(adapters)}, and the "
            f"engine set was built{built}: {differing[0]}{more} come out differently. Unload it "
            "(pipe.unload_lora_weights()), or merge it into a set with build-engine --lora"
        )
    raise UsageError(
        f"the pipeline's transformer has other weights than the engine set was built from{built}: "
        f"{differing[0]}{more} differ (a fine-tune, or a fused LoRA). Build a set from these "
        f"weights (build-engine --weights FOLDER, or --lora FILE:SCALE), {_INSTEAD}"
    )


def _weights_of(transformer: Any) -> _Weights:
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, list[tuple[str, Any]]] = {}
    names: set[str] = set()
    for path, module in transformer.named_modules():
        if "base_layer" in module._modules and hasattr(module, "active_adapters"):
            active = _acting_adapters(module)
            names |= set(active)
            if active:
                adapters[f"{path}.weight"] = [(name, module) for name in active]
        for leaf, value in _own_tensors(module):
            name = f"{path}.{leaf}" if path else leaf
            tensors[name.replace(".base_layer.", ".")] = value
    return _Weights(tensors=tensors, adapters=adapters, names=sorted(names))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers; those that accelerate keeps elsewhere, from there."""
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    for leaf, value in (*module._parameters.items(), *module._buffers.items()):
        if value is None:
            continue
        if value.device.type == "meta" and elsewhere is not None:
            with contextlib.suppress(KeyError):
                value = elsewhere[leaf]
        yield leaf, value


def _acting_adapters(layer: Any) -> list[str]:
    """Adapters of a peft layer that change its result and are not in its weight already."""
    if getattr(layer, "disable_adapters", False):
        return []
    merged = set(getattr(layer, "merged_adapters", ()))
    scaling = getattr(layer, "scaling", {})
    return [
        name
        for name in layer.active_adapters
        if name not in merged and name in scaling and scaling[name] != 0
    ]


def _change_of(layer: Any, adapter: str, name: str, shape: tuple[int, ...]) -> Floats:
    """Return what an adapter adds to the sampled places of a weight."""
    is_plain = adapter in getattr(layer, "lora_A", {}) and len(shape) == 2
    if not is_plain or adapter in getattr(layer, "lora_magnitude_vector", {}):
        raise UsageError(
            f"the adapter {adapter} of {name} is no plain LoRA, so it cannot be compared with the "
            "engine set's: unload it (pipe.unload_lora_weights()), or pass check_weights=False"
        )
    rows, columns = (torch.from_numpy(axis) for axis in sample_places(shape))
    down = layer.lora_A[adapter].weight.detach().float().cpu()[:, columns]  # (r, n)
    up = layer.lora_B[adapter].weight.detach().float().cpu()[rows]  # (n, r)
    added = float(layer.scaling[adapter]) * (up * down.T).sum(dim=1)
    change: Floats = added.numpy()
    return change


def _is_equal(own: Floats, stored: Floats, casts: Iterable[torch.dtype]) -> bool:
    """Whether two samples are the same weights, one of them perhaps cast to another dtype."""
    if len(own) != len(stored):
        return False
    return np.array_equal(own, stored) or any(
        np.array_equal(_cast(own, kind), _cast(stored, kind)) for kind in casts
    )


def _is_close(own: Floats, merged: Floats, base: Floats) -> bool:
    """Whether weights are merged ones but for the rounding of a merge in 16 bits."""
    size = np.abs(base) + np.abs(merged - base)
    return len(own) == len(merged) and bool((np.abs(own - merged) <= 2.0**-7 * size + 1e-7).all())


def _is_of(values: Floats, dtype: torch.dtype) -> bool:
    return np.array_equal(_cast(values, dtype), values)


def _cast(values: Floats, dtype: torch.dtype) -> Floats:
    cast: Floats = torch.from_numpy(np.array(values)).to(dtype).float().numpy()
    return cast


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
