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
        """Parameters of the whole diffusers module."""
        return self.front + self.back + self.unused


def complete_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The configuration with the class's defaults where it has no value of its own."""
    return ARCHITECTURES[architecture].completed(config)


def check_sizes(config: Mapping[str, Any], architecture: str) -> None:
    """Check that everything that is counted in a configuration can be counted with.

    Raises:
        ValueError: a size is not a whole number above 0 (a depth: of at least 0); names the key.
    """
    known = ARCHITECTURES[architecture]
    for key, default in known.class_defaults.items():
        value, least = config.get(key, default), 0 if key in known.depths else 1
        is_left_open = key == "out_channels" and value is None
        if isinstance(default, bool) or is_left_open:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} is {value!r:.80}; it must be a whole number, {least} or more")


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
