"""Diffusers transformers: without memory, of random weights, or loaded from a checkpoint.

Replaces: `from_pretrained`, which fills missing tensors with noise and warns. Limits: safetensors
only. Trade-off: the model is first made without memory, so a wrong checkpoint costs seconds.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditrim.export.checkpoint import (
    Checkpoint,
    check_config,
    fetch_checkpoint,
    find_checkpoint,
    is_hub_id,
)
from ditrim.export.family import Family
from ditrim.export.tensor_header import compare_tensors, read_headers
from ditrim.plugins.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)


def empty_transformer(family: Family, config: Mapping[str, Any], where: str) -> nn.Module:
    """The model of a configuration, with parameters that have shapes but no memory.

    Raises:
        CheckpointError: diffusers cannot make it; says why.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        return _instantiate(family, config, where)


def _instantiate(family: Family, config: Mapping[str, Any], where: str) -> nn.Module:
    import inspect

    import diffusers

    make = getattr(diffusers, family.transformer_class)
    known = set(inspect.signature(make.__init__).parameters) - {"self"}
    for key in sorted(set(config) - known):
        if not key.startswith("_"):
            logger.warning("%s: key %r is not one of %s's; ignored", where, key, make.__name__)
    arguments = {key: value for key, value in config.items() if key in known}
    try:
        model: Any = make(**arguments)
    except Exception as error:
        raise CheckpointError(
            f"{where}: diffusers cannot make a {make.__name__} of this configuration: "
            f"{str(error) or type(error).__name__}"
        ) from error
    head_dim, axes = arguments.get("attention_head_dim", 128), model.config.axes_dims_rope
    if sum(axes) != head_dim:
        raise CheckpointError(
            f"{where}: key 'attention_head_dim' is {head_dim}, and 'axes_dims_rope' {list(axes)} "
            f"adds up to {sum(axes)}; the two must be equal"
        )
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def check_overrides(family: Family, overrides: Iterable[str]) -> None:
    """Check keys that a caller wants to change in a configuration.

    Raises:
        UsageError: names the key, the nearest one and all that exist.
    """
    import inspect

    import diffusers

    make = getattr(diffusers, family.transformer_class)
    known = sorted(set(inspect.signature(make.__init__).parameters) - {"self"})
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"--config: {make.__name__} has no key {key!r}.{hint} Known keys: "
                f"{', '.join(known)}"
            )


def load_transformer(
    family: Family,
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """A family's transformer in evaluation mode, from a folder, the hub, or random.

    Args:
        family: what it must be.
        source: a folder, a hub id, "random", or what `find_checkpoint` returned.
        dtype: of all parameters.
        revision: for a hub id.
        seed: for random weights.
        config: for random weights, differences from the family's configuration.
        on_bytes: called with the bytes loaded so far and the bytes in all.
        change: what becomes of a weight, given its name, before it is cast; for checkpoints.

    Raises:
        CheckpointError: the checkpoint is missing or does not match; names the tensor or file.
    """
    if source == "random":
        check_overrides(family, config or {})
        return random_transformer(family, {**family.config, **(config or {})}, seed, dtype)
    if config:
        raise UsageError("a configuration can only be given with random weights")
    if not isinstance(source, Checkpoint):
        text = os.fspath(source)
        if not Path(text).expanduser().exists() and is_hub_id(text):
            source, _ = fetch_checkpoint(text, revision)
        else:
            source = find_checkpoint(text)
    return _load_checkpoint(
        family,
        source,
        dtype,
        on_bytes or (lambda done, total: None),
        change or (lambda name, weight: weight),
    )


def _load_checkpoint(
    family: Family,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    on_bytes: Callable[[int, int], None],
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> nn.Module:
    from safetensors import SafetensorError, safe_open

    where = str(checkpoint.folder)
    check_config(family, checkpoint.config, str(checkpoint.folder / "config.json"))
    headers = read_headers(checkpoint)
    found = {name: place for header in headers.values() for name, place in header.items()}
    model = empty_transformer(family, checkpoint.config, str(checkpoint.folder / "config.json"))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    compare_tensors(expected, found, where)
    total = sum(place.num_bytes for place in found.values())
    done = 0
    for name, header in headers.items():
        try:
            with safe_open(checkpoint.folder / name, framework="pt", device="cpu") as file:
                for tensor_name in header:
                    value = change(tensor_name, file.get_tensor(tensor_name))
                    _place(model, tensor_name, value.to(dtype))
                    done += header[tensor_name].num_bytes
                    on_bytes(done, total)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint.folder / name} cannot be read: {error}") from error
    left = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    assert not left, left
    return _converted(model, dtype)  # buffers; the parameters are of the dtype already


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert in place, past diffusers' own `to`, which warns at every call."""
    from torch import nn

    return nn.Module.to(model, dtype=dtype)


def _place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter or buffer its value without a copy."""
    import torch

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def random_transformer(
    family: Family, config: Mapping[str, Any], seed: int, dtype: torch.dtype
) -> nn.Module:
    """A family's transformer with random weights; equal seeds give equal weights.

    Args:
        family: which class.
        config: its configuration; keys left out have the class's defaults.
        seed: of the initialisation; the caller's random state is left as it was.
        dtype: of all parameters.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _instantiate(family, config, "the configuration of the random weights")
    return _converted(model, dtype)
