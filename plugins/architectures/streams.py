"""Kinds of transformer blocks, as far as they cost something: parameters, matrix products, memory.

Matrix products only (a multiply-add is two operations): normalisation, activation and softmax are
left out, as ToPi's App. F leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Width of the sinusoids that a timestep is embedded with.
TIMESTEP_CHANNELS = 256
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSize:
    """Lengths of one call.

    Attributes:
        num_noisy, num_reference, num_text: G, C (or K' where reduced) and T.
        batch: B.
    """

    num_noisy: int
    num_reference: int
    num_text: int
    batch: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """`count` products (m, k) x (k, n).

    Attributes:
        is_batched: the products are one batched call (attention), not `count` calls.
    """

    m: int
    k: int
    n: int
    count: int = 1
    is_batched: bool = False

    @property
    def flops(self) -> int:
        """Operations of all `count` products."""
        return 2 * self.m * self.k * self.n * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Cost functions of blocks of one kind; they take a complete configuration.

    Attributes:
        num_parameters: of one block.
        num_unused: of them, those that only the text output of the model's last block needs.
        products: of one block (ToPi Eq. 13-17), given whether it is BACK's last, which gives its
            noisy rows alone: the others are keys and values.
        states: hidden states of width d that are alive at the peak, for a token of (image, text).
        logits: how much of a block of rows' float32 logits comes on top of what the graph takes
            anyway. TensorRT-RTX states up to 11 % less in another build of the same shapes; what is
            counted fits the highest.
        plan_bytes: of a plan's kernels, for each profile; the width does not matter.

    The last three were read off TensorRT-RTX 1.7.1.
    """

    num_parameters: Callable[[Config], int]
    num_unused: Callable[[Config], int]
    products: Callable[[Config, CallSize, bool], list[MatrixProduct]]
    states: Callable[[Config], tuple[float, float]]
    logits: float
    plan_bytes: int


def count_linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer."""
    return inputs * outputs + outputs


def width_of(config: Config) -> int:
    """Channels of the hidden states, d."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def count_time(config: Config) -> int:
    """Parameters of the embedding of a timestep, or of guidance."""
    width = width_of(config)
    return count_linear(TIMESTEP_CHANNELS, width) + count_linear(width, width)


def count_inputs(config: Config) -> int:
    """Parameters of the embeddings that every model has: of a timestep, latents and text."""
    width = width_of(config)
    latents = count_linear(config["in_channels"], width)
    return count_time(config) + latents + count_linear(config["joint_attention_dim"], width)


def input_products(config: Config, size: CallSize, num_times: int) -> list[MatrixProduct]:
    """Products of those embeddings, with so many timesteps."""
    width, batch = width_of(config), size.batch
    image = (size.num_noisy + size.num_reference) * batch
    return [
        MatrixProduct(m=image, k=config["in_channels"], n=width),
        MatrixProduct(m=size.num_text * batch, k=config["joint_attention_dim"], n=width),
        MatrixProduct(m=batch, k=TIMESTEP_CHANNELS, n=width, count=num_times),
        MatrixProduct(m=batch, k=width, n=width, count=num_times),
    ]


def attention_products(config: Config, size: CallSize, *, is_last: bool) -> list[MatrixProduct]:
    """The two products of joint attention's core."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    joint, count = size.num_noisy + size.num_reference + size.num_text, heads * size.batch
    queries = size.num_noisy if is_last else joint
    return [
        MatrixProduct(m=queries, k=head_dim, n=joint, count=count, is_batched=True),
        MatrixProduct(m=queries, k=joint, n=head_dim, count=count, is_batched=True),
    ]


def _count_double(config: Config) -> int:
    width = width_of(config)
    stream = (
        count_linear(width, 6 * width)  # modulation
        + 4 * count_linear(width, width)
        + 2 * config["attention_head_dim"]  # norms of query and key
        + count_linear(width, 4 * width)
        + count_linear(4 * width, width)
    )
    return 2 * stream


def _count_text_output(config: Config) -> int:
    width = width_of(config)
    query_and_output = 2 * count_linear(width, width) + config["attention_head_dim"]
    return query_and_output + count_linear(width, 4 * width) + count_linear(4 * width, width)


def _double_products(config: Config, size: CallSize, is_last: bool) -> list[MatrixProduct]:
    width, batch = width_of(config), size.batch
    num_times = batch * (1 + bool(config.get("zero_cond_t")))  # references modulated at t = 0
    image, text = (size.num_noisy + size.num_reference) * batch, size.num_text * batch
    noisy = size.num_noisy * batch
    attention = attention_products(config, size, is_last=is_last)
    if is_last:
        return [
            *attention,
            MatrixProduct(m=noisy, k=width, n=width, count=2),  # queries and output
            MatrixProduct(m=image, k=width, n=width, count=2),
            MatrixProduct(m=noisy, k=width, n=4 * width),
            MatrixProduct(m=noisy, k=4 * width, n=width),
            MatrixProduct(m=text, k=width, n=width, count=2),
            MatrixProduct(m=num_times, k=width, n=6 * width, count=2),
        ]
    streams = [
        product
        for tokens in (image, text)
        for product in (
            MatrixProduct(m=tokens, k=width, n=width, count=4),
            MatrixProduct(m=tokens, k=width, n=4 * width),
            MatrixProduct(m=tokens, k=4 * width, n=width),
            MatrixProduct(m=num_times, k=width, n=6 * width),
        )
    ]
    return [*attention, *streams]


def _double_states(config: Config) -> tuple[float, float]:
    return (11.0, 11.0) if config.get("zero_cond_t") else (10.0, 11.0)


def _count_single(config: Config) -> int:
    width = width_of(config)
    return (
        count_linear(width, 3 * width)  # modulation
        + 3 * count_linear(width, width)
        + 2 * config["attention_head_dim"]  # norms of query and key
        + count_linear(width, 4 * width)
        + count_linear(5 * width, width)
    )


def _single_products(config: Config, size: CallSize, is_last: bool) -> list[MatrixProduct]:
    width, batch = width_of(config), size.batch
    tokens = (size.num_noisy + size.num_reference + size.num_text) * batch
    rows = size.num_noisy * batch if is_last else tokens
    projections = [MatrixProduct(m=tokens, k=width, n=width, count=3)]
    if is_last:
        projections = [
            MatrixProduct(m=rows, k=width, n=width),
            MatrixProduct(m=tokens, k=width, n=width, count=2),
        ]
    return [
        *attention_products(config, size, is_last=is_last),
        *projections,
        MatrixProduct(m=rows, k=width, n=4 * width),
        MatrixProduct(m=rows, k=5 * width, n=width),
        MatrixProduct(m=batch, k=width, n=3 * width),
    ]


# Image and text each with weights of its own, as Qwen-Image and the first blocks of FLUX have.
DOUBLE_STREAM = Stream(
    num_parameters=_count_double,
    num_unused=_count_text_output,
    products=_double_products,
    states=_double_states,
    logits=1.0,
    plan_bytes=2_450_000,
)
# All tokens with the same weights, attention and MLP side by side, as the other blocks of FLUX.
SINGLE_STREAM = Stream(
    num_parameters=_count_single,
    num_unused=lambda config: 0,
    products=_single_products,
    states=lambda config: (17.0, 23.0),
    logits=0.5,
    plan_bytes=1_450_000,
)
