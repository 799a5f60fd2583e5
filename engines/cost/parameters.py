"""Parameters of FRONT and BACK, counted from the configuration: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.streams import count_linear, width_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of a transformer cut in two.

    Attributes:
        front, back: those that the graphs hold.
        unused: those that neither holds: the text output of a last double-stream block.
    """

    front: int
    back: int
    unused: int

    @property
    def total(self) -> int:
        """Of the diffusers module."""
        return self.front + self.back + self.unused


def complete_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The configuration with the class's defaults where it has no value of its own."""
    return ARCHITECTURES[architecture].completed(config)


def count_parameters(
    config: Mapping[str, Any], architecture: str, front_depth: int
) -> ParameterCounts:
    """Count the parameters of FRONT (embeddings, blocks [0, K)) and of BACK (the rest).

    Args:
        config: of the diffusers transformer, keys left out as in the class.
        architecture: its name in `ARCHITECTURES`.
        front_depth: K.
    """
    config, known = complete_config(config, architecture), ARCHITECTURES[architecture]
    width = width_of(config)
    out_channels = (config["out_channels"] or config["in_channels"]) * config["patch_size"] ** 2
    front = known.num_embedding_parameters(config)
    back = count_linear(width, 2 * width) + count_linear(width, out_channels)
    unused, left = 0, front_depth
    for blocks in known.blocks:
        depth, num_parameters = config[blocks.depth_key], blocks.stream.num_parameters(config)
        in_front = min(left, depth)
        left -= in_front
        front += in_front * num_parameters
        back += (depth - in_front) * num_parameters
        if depth:  # BACK has no text output: the exporter drops what only that of its last needs
            unused = blocks.stream.num_unused(config)
    return ParameterCounts(front=front, back=back - unused, unused=unused)
