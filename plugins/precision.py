"""What each library calls the types that weights and hidden states are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A floating-point type.

    Attributes:
        name: what `--precision` takes.
        torch_name: its name in torch and in manifests.
        onnx, tensorrt, safetensors: its names there.
        num_bytes: of a value.
    """

    name: str
    torch_name: str
    onnx: str
    tensorrt: str
    safetensors: str
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of this type."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype


PRECISIONS = {
    name: Precision(
        name=name,
        torch_name=torch_name,
        onnx=onnx,
        tensorrt=tensorrt,
        safetensors=stored,
        num_bytes=size,
    )
    for name, torch_name, onnx, tensorrt, stored, size in (
        ("fp32", "float32", "FLOAT", "FLOAT", "F32", 4),
        ("fp16", "float16", "FLOAT16", "HALF", "F16", 2),
        ("bf16", "bfloat16", "BFLOAT16", "BF16", "BF16", 2),
    )
}


# By the type's name in torch.
_OF_TORCH = {item.torch_name: item for item in PRECISIONS.values()}


def precision_of(dtype: torch.dtype) -> Precision:
    """The precision of a type that sets are built in; raises `KeyError` for others."""
    return _OF_TORCH[str(dtype).removeprefix("torch.")]
