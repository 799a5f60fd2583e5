"""Attention processors that serve the pipeline's own calls and those of the torch backend.

Replaces: exchanging the processors for the time of a call, which every other pipeline over the same
transformer would notice. A live processor decides by its argument alone: given a
`JointContext` it runs this package's attention, given anything else it is what it stands for,
whose attributes it shares. So threads, offload hooks, compiled blocks and a second pipeline go on
as before.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ditrim.plugins.architectures.transformers import blocks_of
from ditrim.plugins.attention import JointContext
from ditrim.plugins.errors import UsageError

_LOCK = threading.Lock()
# How many attachments use a transformer's live processors.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def held_processors(transformer: nn.Module) -> Iterator[None]:
    """Make a transformer's attention serve the torch backend too, inside the block.

    Raises:
        UsageError: a block has a processor that is not diffusers' own.
    """
    hold_processors(transformer)
    try:
        yield
    finally:
        release_processors(transformer)


def hold_processors(transformer: nn.Module) -> None:
    """Begin what `held_processors` does; processors that were exchanged since are served again."""
    with _LOCK:
        attentions: list[Any] = [block.attn for block in blocks_of(transformer)]
        for layer, attn in enumerate(attentions):  # all of them, before one is exchanged
            _check(attn.processor, layer)
        for attn in attentions:
            if not isinstance(attn.processor, _Live):
                attn.processor = _live(attn.processor)
        _HOLDERS[transformer] = _HOLDERS.get(transformer, 0) + 1


def release_processors(transformer: nn.Module) -> None:
    """End what `hold_processors` began; the last one puts the processors back."""
    with _LOCK:
        _HOLDERS[transformer] -= 1
        if _HOLDERS[transformer]:
            return
        del _HOLDERS[transformer]
        for block in blocks_of(transformer):
            attn: Any = block.attn
            if isinstance(attn.processor, _Live):
                attn.processor = attn.processor._stands_for


def _check(processor: Any, layer: int) -> None:
    kind: Any = type(processor)
    if not _is_served(kind):
        raise UsageError(
            f"block {layer} has the attention processor {kind.__name__}, which cannot score or run "
            "reduced: put the default ones back (pipe.transformer.set_attn_processor(...)), or "
            "detach"
        )


@functools.cache
def _is_served(kind: Any) -> bool:
    is_default = kind.__module__.startswith("diffusers.") and "IPAdapter" not in kind.__name__
    return is_default and "image_rotary_emb" in inspect.signature(kind.__call__).parameters


def _live(processor: Any) -> Any:
    kind: Any = type(processor)
    live = object.__new__(_live_class(kind))
    live.__dict__ = processor.__dict__
    live._stands_for = processor
    return live


def _same(processor: Any) -> Any:
    return processor


class _Live:
    """Base class by which live processors are recognised."""

    __slots__ = ()
    _stands_for: Any


def _attend(backend: Any, parallel: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention that diffusers would use: (B, H, L, D) each."""
    output = dispatch_attention_fn(
        *(x.transpose(1, 2) for x in (query, key, value)), backend=backend, parallel_config=parallel
    )
    return output.transpose(1, 2)


@functools.cache
def _live_class(base: Any) -> type[Any]:
    parameters = list(inspect.signature(base.__call__).parameters)
    place = parameters.index("image_rotary_emb") - 1  # among the arguments after self

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = args[place] if len(args) > place else kwargs.get("image_rotary_emb")
        if not isinstance(context, JointContext):
            return base.__call__(self, *args, **kwargs)
        attn, hidden, *others = args
        text: Tensor | None = others[0] if others else kwargs.get("encoder_hidden_states")
        context.attention = functools.partial(
            _attend, self._attention_backend, self._parallel_config
        )
        assert context.processor is not None
        return context.processor(attn, hidden, text, image_rotary_emb=context)

    call.__signature__ = inspect.signature(base.__call__)  # type: ignore[attr-defined]
    members = {
        "__slots__": ("_stands_for",),
        "__call__": call,
        # Copies and pickles are plain processors.
        "__reduce_ex__": lambda self, protocol: (_same, (self._stands_for,)),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (_Live, base), members)
