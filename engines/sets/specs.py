"""What a manifest and the profiles of plans are made of."""

from __future__ import annotations

from dataclasses import dataclass

from ditrim.engines.json_file import Count

AXES = ("batch", "noisy", "reference", "text", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: of the tensor.
        dtype: "float32", "float16", "bfloat16" or "int64".
        shape: sizes, and for free axes "batch", "noisy", "reference", "text" or "rows".
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest values served; the longest reference is the ladder's."""

    batch: Count
    noisy: Count
    text: Count
