"""Results that are computed once for tensors that stay as they are from step to step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Unchanged(Generic[T]):
    """Remembers what was made of some tensors for as long as their values stay the same.

    On a device, tensors that are the very same objects and were not written to since are taken as
    unchanged without a look, which would wait for the device; all others are compared by value.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        """Take the function whose latest result is remembered."""
        self._make = make
        self._given: tuple[Any, ...] | None = None
        self._versions: tuple[Any, ...] = ()
        self._values: tuple[Any, ...] = ()
        self._result: T | None = None

    def get(self, *arguments: Any) -> T:
        """Return `make`'s result for these arguments: tensors, none, or plain values."""
        if self._given is None or not self._is_as_before(arguments):
            self._result = self._make(*arguments)
            self._given = arguments
            self._values = tuple(
                value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                for value in arguments
            )
        self._versions = tuple(map(_version, arguments))
        return self._result  # type: ignore[return-value]

    def _is_as_before(self, arguments: tuple[Any, ...]) -> bool:
        assert self._given is not None
        if len(arguments) != len(self._given):
            return False
        rows = zip(arguments, self._given, self._versions, self._values, strict=True)
        return all(_is_same(*row) for row in rows)


def _is_same(value: Any, given: Any, version: int | None, before: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return value is before or (type(value) is type(before) and value == before)
    is_untouched = value is given and version is not None and _version(value) == version
    if is_untouched and value.device.type != "cpu":
        return True
    return (
        value.device == before.device and value.dtype == before.dtype and torch.equal(value, before)
    )


def _version(value: Any) -> int | None:
    """Return how often a tensor was written to; none where torch does not count it."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return value._version
