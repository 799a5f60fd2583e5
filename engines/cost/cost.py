"""What a call costs: operations and bytes of FRONT and BACK from the configuration, and a device's
bound on them. ToPi's own count of a block (Table 6, Eq. 13-17) beside it.

Bytes are what matrix products must move where everything else is fused into them: each reads its
two operands and writes its result once; attention reads queries, keys and values and writes its
output, without its logits; weights are read once a call, biases and norms with them. A device that
keeps something in its caches moves less, a library that writes logits moves more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ditrim.engines.cost.flops import CallSize, MatrixProduct, block_products, graph_products
from ditrim.engines.cost.parameters import complete_config, count_parameters
from ditrim.engines.json_file import Positive
from ditrim.plugins.errors import UsageError
from ditrim.plugins.precision import PRECISIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Operations and bytes of some work.

    Attributes:
        flops: of matrix products, a multiply-add is two.
        weight_bytes: read once.
        activation_bytes: operands and results of matrix products and attention.
    """

    flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Weight and activation traffic, bytes."""
        return self.weight_bytes + self.activation_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            activation_bytes=self.activation_bytes + other.activation_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Peak rates of a device; none where not established.

    Attributes:
        tflops: 10^12 operations a second in the precision of the work.
        gb_s: 10^9 bytes a second.
        source: where the two are from.
    """

    tflops: Positive | None
    gb_s: Positive | None
    source: str

    def roofline_ms(self, cost: Cost) -> float | None:
        """The least time that the work can take: bound by operations or by bytes."""
        bounds = []
        if self.tflops:
            bounds.append(cost.flops / self.tflops / 1e9)
        if self.gb_s:
            bounds.append(cost.num_bytes / self.gb_s / 1e6)
        return max(bounds) if len(bounds) == 2 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """The cost of an engine set's calls.

    Attributes:
        config: of the diffusers transformer.
        architecture: its name in `ARCHITECTURES`.
        front_depth, num_layers: K and the number of blocks.
        num_scored: layers that an anchor step scores.
        precision: "fp32", "fp16" or "bf16".
        backend: "onnxruntime" scores in one pass in fp32, all others in two.
    """

    config: Mapping[str, Any]
    architecture: str
    front_depth: int
    num_layers: int
    num_scored: int
    precision: str
    backend: str = "tensorrt"

    def front(self, size: CallSize) -> Cost:
        """Return the cost of FRONT over the full context."""
        products = graph_products(
            self.config, self.architecture, range(self.front_depth), size, "front"
        )
        return self._cost(products, "front", size, self.front_depth)

    def back(self, size: CallSize, *, num_rows: int = 0) -> Cost:
        """Return the cost of BACK.

        Args:
            size: of the call; `num_reference` is K'.
            num_rows: noisy rows that are scored; all of them on an anchor step.
        """
        layers = range(self.front_depth, self.num_layers)
        products = graph_products(
            self.config,
            self.architecture,
            layers,
            size,
            "back",
            num_rows=num_rows,
            num_scored=self.num_scored,
            num_passes=self._num_passes,
        )
        cost = self._cost(products, "back", size, len(layers))
        return cost + self._scoring(size, num_rows)

    def block(self, layer: int, size: CallSize, *, is_last: bool = False) -> Cost:
        """One block, without its weights' biases and norms; `is_last` as in `block_products`."""
        products = block_products(self.config, self.architecture, layer, size, is_last=is_last)
        element = PRECISIONS[self.precision].num_bytes
        weights = sum(p.k * p.n * p.count for p in products if not p.is_batched)
        return Cost(
            flops=sum(product.flops for product in products),
            weight_bytes=weights * element,
            activation_bytes=self._activations(products, size, 1, is_last=is_last) * element,
        )

    def gather(self, size: CallSize) -> Cost:
        """The kept hidden states of a reduced step, read and written."""
        moved = (
            2 * size.batch * size.num_reference * self._width * PRECISIONS[self.precision].num_bytes
        )
        return Cost(activation_bytes=moved)

    @property
    def _num_passes(self) -> int:
        return 1 if self.backend == "onnxruntime" and self.precision == "fp32" else 2

    @property
    def _width(self) -> int:
        config = complete_config(self.config, self.architecture)
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def _activations(
        self, products: list[MatrixProduct], size: CallSize, num_blocks: int, *, is_last: bool
    ) -> int:
        """Elements of operands that are no weights, and of results."""
        others = size.num_reference + size.num_text
        linear = sum(p.m * (p.k + p.n) * p.count for p in products if not p.is_batched)
        rows = num_blocks * 4 * (size.num_noisy + others)
        if is_last:  # queries and output of noisy tokens alone
            rows -= 2 * others
        return linear + rows * size.batch * self._width

    def _cost(
        self, products: list[MatrixProduct], role: str, size: CallSize, num_blocks: int
    ) -> Cost:
        counts = count_parameters(self.config, self.architecture, self.front_depth)
        element = PRECISIONS[self.precision].num_bytes
        return Cost(
            flops=sum(product.flops for product in products),
            weight_bytes=element * (counts.front if role == "front" else counts.back),
            activation_bytes=element
            * self._activations(products, size, num_blocks, is_last=role == "back"),
        )

    def _scoring(self, size: CallSize, num_rows: int) -> Cost:
        """Bytes of scoring: its passes' queries, keys and sums, and the values for norms."""
        if not num_rows:
            return Cost()
        config, width = complete_config(self.config, self.architecture), self._width
        references = size.num_reference
        joint = size.num_noisy + references + size.num_text
        states, sums = num_rows + joint + references, joint + references
        if self._num_passes == 2:
            states += references + num_rows
            sums = 2 * num_rows + references  # normalisers, written and read
        sums *= 4 * config["num_attention_heads"]  # float32
        moved = states * width * PRECISIONS[self.precision].num_bytes + sums
        return Cost(activation_bytes=self.num_scored * size.batch * moved)

    def at(self, precision: str) -> ModelCost:
        """The same model in another precision."""
        return replace(self, precision=precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFlops:
    """Operations of one block as ToPi's App. F counts them.

    Attributes:
        attention: its core (Eq. 13, 16).
        image, text: linear operations of each stream (Eq. 14, 15); a single-stream block has one
            stream, `image`, over all tokens (Eq. 17).
    """

    attention: int
    image: int
    text: int

    @property
    def total(self) -> int:
        """Operations of the whole block."""
        return self.attention + self.image + self.text


# Operations a token, in units of d^2: projections of q, k, v and the output, and the MLP.
_PAPER_BLOCKS = {"flux-double": 8 + 16, "flux-single": 6 + 8 + 10, "qwen-double": 8 + 24}


def topi_block_flops(kind: str, *, num_image: int, num_prompt: int, width: int) -> BlockFlops:
    """ToPi Eq. 13-17: operations of one block by the paper's own formulas.

    Counted: the two products of attention's core, the projections of queries, keys, values and
    output, and the MLP as two plain matrices (of 4 d in FLUX, of 6 d in Qwen-Image-Edit). Left out:
    modulation, norms, softmax, rotary positions, embeddings and output layers, and scoring.
    The paper takes d = 4096; the released models have d = 3072, and diffusers' Qwen-Image blocks
    an MLP of 4 d. `ModelCost` counts those; this reproduces Table 6.

    Args:
        kind: "flux-double" (Eq. 13, 14), "flux-single" (Eq. 16, 17) or "qwen-double" (Eq. 13, 15).
        num_image: noisy and reference tokens.
        num_prompt: text tokens.
        width: d.

    Raises:
        UsageError: of another kind there is no formula.
    """
    if kind not in _PAPER_BLOCKS:
        raise UsageError(f"unknown kind of block {kind!r}; known: {', '.join(_PAPER_BLOCKS)}")
    joint, linear = num_image + num_prompt, _PAPER_BLOCKS[kind] * width**2
    attention = 4 * joint**2 * width
    if kind == "flux-single":
        return BlockFlops(attention=attention, image=linear * joint, text=0)
    return BlockFlops(attention=attention, image=linear * num_image, text=linear * num_prompt)
