"""Parameters of FRONT and BACK, counted from the configuration: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What the diffusers classes assume for keys that a configuration leaves out.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "zero_cond_t": False,
    },
    "flux": {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
    },
}
# Width of the sinusoids that a timestep is embedded with.
_TIMESTEP_CHANNELS = 256


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
    return {**CLASS_DEFAULTS[architecture], **config}


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def count_block(config: Mapping[str, Any], *, is_single: bool = False) -> int:
    """Parameters of one block: a double-stream or a FLUX single-stream one."""
    head_dim = config["attention_head_dim"]
    width = config["num_attention_heads"] * head_dim
    if is_single:
        return (
            _linear(width, 3 * width)  # modulation
            + 3 * _linear(width, width)
            + 2 * head_dim  # norms of query and key
            + _linear(width, 4 * width)
            + _linear(5 * width, width)
        )
    stream = (
        _linear(width, 6 * width)
        + 4 * _linear(width, width)
        + 2 * head_dim
        + _linear(width, 4 * width)
        + _linear(4 * width, width)
    )
    return 2 * stream


def count_text_output(config: Mapping[str, Any]) -> int:
    """Parameters of a double-stream block that only its text output needs."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    query_and_output = 2 * _linear(width, width) + config["attention_head_dim"]
    return query_and_output + _linear(width, 4 * width) + _linear(4 * width, width)


def count_parameters(
    config: Mapping[str, Any], architecture: str, front_depth: int
) -> ParameterCounts:
    """Count the parameters of FRONT (embeddings, blocks [0, K)) and of BACK (the rest).

    Args:
        config: of the diffusers transformer, keys left out as in the class.
        architecture: "qwen" or "flux".
        front_depth: K.
    """
    config = complete_config(config, architecture)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text_width, channels = config["joint_attention_dim"], config["in_channels"]
    time = _linear(_TIMESTEP_CHANNELS, width) + _linear(width, width)
    embeddings = time + _linear(channels, width) + _linear(text_width, width)
    if architecture == "qwen":
        embeddings += text_width  # norm of the text
    else:
        embeddings += _linear(config["pooled_projection_dim"], width) + _linear(width, width)
        embeddings += time * bool(config["guidance_embeds"])
    out_channels = (config["out_channels"] or channels) * config["patch_size"] ** 2
    output = _linear(width, 2 * width) + _linear(width, out_channels)
    double, single = config["num_layers"], config.get("num_single_layers", 0)
    front_double = min(front_depth, double)
    front_single = front_depth - front_double
    block, single_block = count_block(config), count_block(config, is_single=True)
    front = embeddings + front_double * block + front_single * single_block
    back = output + (double - front_double) * block + (single - front_single) * single_block
    # BACK has no text output; where its last block is a double-stream one, the exporter drops it.
    unused = count_text_output(config) if single == 0 else 0
    return ParameterCounts(front=front, back=back - unused, unused=unused)
