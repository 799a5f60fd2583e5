"""What distinguishes one kind of in-context editing transformer from another, as one value.

Nothing here needs torch, so that estimates and manifests can ask; functions that take tensors
import it when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ditrim.plugins.architectures.streams import CallSize, Config, MatrixProduct, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.plugins.attention import JointContext
    from ditrim.plugins.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockList:
    """A list of equal blocks of a diffusers transformer.

    Attributes:
        name: its attribute.
        depth_key: how many there are, in the configuration.
        depth: how many the released model has.
        stream: what a block costs.
        noisy_forward: a block's `forward` where it is BACK's last: called as `block_arguments`
            says, after the block, it returns the text as it was and (B, G, d), the noisy rows.
    """

    name: str
    depth_key: str
    depth: int
    stream: Stream
    noisy_forward: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Positions of tokens: (L, axes) each.

    Attributes:
        noisy, text, reference: of G, T and C tokens, all references together.
    """

    noisy: Tensor
    text: Tensor
    reference: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where the tokens of one call of a transformer lie.

    Attributes:
        num_noisy: G.
        layout: their pictures; none where they are no whole grids.
        key: equal for equal positions.
        positions: works them out.
    """

    num_noisy: int
    layout: Layout | None
    key: tuple[object, ...]
    positions: Callable[[], Positions]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallArguments:
    """Arguments of a pipeline's call of its transformer beyond those that all have.

    Attributes:
        positions: handed to `place`, in this order.
        text_mask, pooled_text: names of these; none where there is no such argument.
        ignored: say what others say too.
    """

    positions: tuple[str, ...]
    text_mask: str | None = None
    pooled_text: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFile:
    """How the configuration is read from a checkpoint of one file: by a tensor's name and axis.

    Attributes:
        width: channels of the hidden states; head_dim: of a head.
        depths: a configuration's key, and what the names of a list's blocks begin with.
        sizes: a key, and tensor, axis and what the size is divided by.
        flags: a key that is true where a tensor is there.
    """

    width: tuple[str, int]
    head_dim: tuple[str, int]
    depths: Mapping[str, str]
    sizes: Mapping[str, tuple[str, int, int]]
    flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalNames:
    """Modules of a model's own code, and the modules of diffusers' that they became.

    Attributes:
        top: those outside of blocks.
        swapped: an original module whose two halves diffusers keeps in the other order.
        blocks: what names of original blocks begin with, the name of diffusers' list, and of each
            module the ones that it was stacked of.
    """

    top: Mapping[str, str]
    swapped: tuple[str, str]
    blocks: tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A network of the pipeline besides the transformer, run in a 16-bit type.

    Attributes:
        name: what it is.
        part: its attribute in the pipeline.
        num_parameters: counted on the diffusers or transformers module.
        phase: when it runs: "text" or "pictures".
        transient_bytes: of the tensors that are alive at its peak, from the pixels of a picture
            and the number of text tokens.
        source: where the figures are from.
    """

    name: str
    part: str
    num_parameters: int
    phase: str
    transient_bytes: Callable[[int, int], int]
    source: str

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights in a 16-bit type, bytes."""
        return 2 * self.num_parameters


def _joint_processor(role: str, *, has_noisy_queries: bool) -> Any:
    from ditrim.plugins.attention import JointProcessor

    return JointProcessor(role, has_noisy_queries=has_noisy_queries)


def _block_arguments(
    hidden: Tensor, text: Tensor, temb: Tensor, context: JointContext, is_reference: Tensor | None
) -> dict[str, Any]:
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "temb": temb,
        "image_rotary_emb": context,
    }


def _plainly_guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A kind of transformer: its blocks, what it is called with, and what it costs.

    Attributes:
        name: what manifests call it.
        transformer_class: its class in diffusers.
        blocks: its lists of blocks, in the order of ToPi's layer indices.
        class_defaults: of the configuration, for keys that it leaves out.
        positions_limit: the largest sum of half a picture's side and the text; none if any will do.
        refusal: why a model of a configuration cannot be served; none where it can.

    What FRONT and BACK are made of:

        embeddings: the transformer's modules before its blocks.
        embed: (FRONT, latents, text embeddings, timestep, guidance, pooled text) -> hidden states
            of image and text, and time embeddings of noisy and, with `has_reference_temb`,
            of reference tokens.
        front_inputs: names of FRONT's inputs after latents, text embeddings and timestep.
        has_reference_temb: whether reference tokens are modulated as at another time.
        processor: makes an attention processor from a role, see `attention.attend`.
        block_arguments: what a block is called with: hidden states of image and text, time
            embeddings, context and, where time embeddings come in pairs, which tokens take the
            second. A block returns the hidden states of text and image.
        block_changes: attributes that a block has while it is called so.
        live_arguments: what diffusers' own forward calls a block with, given the time embeddings
            of reference tokens in place of which tokens take them.

    How it is called:

        arguments: of the pipeline's calls.
        place: (tokens of the image, T, the arguments that say positions) -> `Places`.
        positions: of a layout and T, as the pipeline makes them.
        angles: type of RoPE's angles, "float64" or "float32".
        joint_rope: diffusers' RoPE of a call -> (1, N, D/2) float32 cosines and sines, text first.
        guided: (cond, uncond, scale) -> the velocity with true classifier-free guidance.

    What its embeddings cost, beside `blocks` and the output, from a complete configuration:

        num_embedding_parameters: how many parameters they have.
        embedding_products: their matrix products.

    Files and networks beside it:

        single_file: see there; none where diffusers converts no file of it.
        original_names: that LoRAs can use; none if they are diffusers'.
        companions: what shares the device with its engines.
    """

    name: str
    transformer_class: str
    blocks: tuple[BlockList, ...]
    class_defaults: Mapping[str, Any]
    positions_limit: int | None = None
    refusal: Callable[[Config], str | None] = lambda config: None

    embeddings: tuple[str, ...]
    embed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    front_inputs: Callable[[Config], tuple[str, ...]] = lambda config: ()
    has_reference_temb: Callable[[Config], bool] = lambda config: False
    processor: Callable[..., Any] = _joint_processor
    block_arguments: Callable[..., dict[str, Any]] = _block_arguments
    block_changes: Callable[[Any], dict[str, Any]] = lambda block: {}
    live_arguments: Callable[..., dict[str, Any]] = _block_arguments

    arguments: CallArguments
    place: Callable[..., Places]
    positions: Callable[[Layout, int], Positions]
    angles: str
    joint_rope: Callable[[Any], tuple[Tensor, Tensor]]
    guided: Callable[[Tensor, Tensor, float], Tensor] = _plainly_guided

    num_embedding_parameters: Callable[[Config], int]
    embedding_products: Callable[[Config, CallSize], list[MatrixProduct]]

    single_file: SingleFile | None = None
    original_names: OriginalNames | None = None
    companions: tuple[Companion, ...] = ()

    @property
    def depths(self) -> dict[str, int]:
        """Number of blocks of the released model, by the configuration's key."""
        return {blocks.depth_key: blocks.depth for blocks in self.blocks}

    def completed(self, config: Config) -> dict[str, Any]:
        """The configuration with the class's defaults where it has no value of its own."""
        return {**self.class_defaults, **config}

    def stream_of(self, config: Config, layer: int) -> Stream:
        """The kind of a layer's block, for a complete configuration."""
        for blocks in self.blocks:
            if layer < config[blocks.depth_key]:
                return blocks.stream
            layer -= config[blocks.depth_key]
        return self.blocks[-1].stream

    def cut(self, num_layers: int) -> dict[str, int]:
        """Depths of a model of so many blocks, its lists in the released model's ratio."""
        depths, left = {}, num_layers
        for index, blocks in enumerate(self.blocks):
            others = self.blocks[index + 1 :]
            share = left
            if others:
                full = blocks.depth + sum(other.depth for other in others)
                share = min(max(round(left * blocks.depth / full), 1), left - len(others))
            depths[blocks.depth_key] = share
            left -= share
        return depths


def call_places(
    architecture: Architecture, arguments: Mapping[str, Any], num_tokens: int, num_text: int
) -> Places:
    """Where the tokens lie in a call with these arguments."""
    given: Sequence[Any] = [arguments.get(name) for name in architecture.arguments.positions]
    return architecture.place(num_tokens, num_text, *given)
