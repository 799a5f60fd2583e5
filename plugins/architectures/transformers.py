"""What a diffusers transformer is: its architecture and its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import BlockList
from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def architecture_of(transformer: nn.Module) -> str:
    """The name of a transformer's architecture in `ARCHITECTURES`.

    Raises:
        UsageError: the transformer is of no class that is known.
    """
    known = {value.transformer_class: name for name, value in ARCHITECTURES.items()}
    for base in type(transformer).__mro__:
        if base.__name__ in known:
            return known[base.__name__]
    raise UsageError(
        f"{type(transformer).__name__} is not a transformer that can be split; "
        f"known: {', '.join(known)}"
    )


def unwrapped(transformer: Any) -> Any:
    """The diffusers transformer inside `torch.compile`'s and peft's wrappers."""
    while True:
        if hasattr(transformer, "_orig_mod"):
            transformer = transformer._orig_mod
        elif type(transformer).__module__.startswith("peft.") and hasattr(
            transformer, "get_base_model"
        ):
            transformer = transformer.get_base_model()
        else:
            return transformer


def blocks_of(transformer: Any) -> list[nn.Module]:
    """Blocks in the order of ToPi's layer indices: FLUX counts double-stream blocks first."""
    return [block for _, block in listed_blocks(transformer)]


def listed_blocks(transformer: Any) -> list[tuple[BlockList, nn.Module]]:
    """The same, each with the list that it is of."""
    lists = ARCHITECTURES[architecture_of(transformer)].blocks
    return [(blocks, block) for blocks in lists for block in getattr(transformer, blocks.name)]
