"""What the TensorRT runtime decides: which profile, which context, how much memory, when to replay.

Nothing here knows torch, CUDA or TensorRT; `engines.py` does what is decided here.

Replaces: a context for every set of shapes. Limits: a captured graph serves one set of addresses,
and the shapes that its context had, so it is worth its capture only where torch's allocator hands
out the same addresses again, which it usually does from step to step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from ditrim.engines.sets.manifest import PlanSpec
from ditrim.plugins.errors import LadderError, UsageError

K = TypeVar("K")
V = TypeVar("V")
Action = Literal["enqueue", "capture", "replay"]
GraphMode = Literal["auto", "on", "off"]
Addresses = tuple[int, ...]
Shapes = tuple[tuple[int, ...], ...]
GRAPH_MODES = ("auto", "on", "off")
# Memory is taken in steps of this size, so that near lengths do not grow the arena one by one.
ARENA_STEP_BYTES = 2 << 20
_OPTIONS = {
    "batch": ("a batch of", "max_batch"),
    "noisy": ("noisy tokens:", "max_noisy_tokens"),
    "text": ("text tokens:", "max_text_tokens"),
    "reference": ("reference tokens:", "max_reference_tokens"),
    "rows": ("scored rows:", "max_noisy_tokens"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextKey:
    """Identifies an execution context: what it was created for, which never changes.

    Attributes:
        role: of the plan.
        profile: index of the optimisation profile.
        shapes: of the inputs, in the plan's order; none where they are set in place.
    """

    role: str
    profile: int
    shapes: Shapes | None


class BoundedCache(Generic[K, V]):
    """The most recently used values, at most `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recent; none if it is not there."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def make_room(self) -> list[V]:
        """Take out what a new value would displace, oldest first."""
        evicted = []
        while len(self._items) >= self.most:
            evicted.append(self._items.popitem(last=False)[1])
        return evicted

    def put(self, key: K, value: V) -> None:
        """Keep a value as the most recent one, displacing the oldest."""
        if key not in self._items:
            self.make_room()
        self._items[key] = value
        self._items.move_to_end(key)

    def clear(self) -> None:
        """Drop all values."""
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[V]:
        return iter(self._items.values())


def axes_of(plan: PlanSpec, shapes: Mapping[str, tuple[int, ...]], role: str) -> dict[str, int]:
    """Sizes of a plan's named axes, from the shapes of its inputs.

    Raises:
        UsageError: an input is missing, has another shape, or two inputs differ in an axis.
    """
    axes: dict[str, int] = {}
    for spec in plan.inputs:
        shape = shapes.get(spec.name)
        if shape is None:
            raise UsageError(f"{role} needs the input {spec.name}, which was not given")
        fits = len(shape) == len(spec.shape)
        for axis, size in zip(spec.shape, shape, strict=False):
            fits = fits and size == (axis if isinstance(axis, int) else axes.setdefault(axis, size))
        if not fits:
            raise UsageError(
                f"{role}: the input {spec.name} has shape {shape}, expected "
                f"{_described(spec.shape, axes)}"
            )
    return axes


def _described(shape: tuple[str | int, ...], axes: Mapping[str, int]) -> str:
    parts = (f"{axis} = {axes[axis]}" if axis in axes else str(axis) for axis in shape)  # type: ignore[index]
    return f"({', '.join(parts)})"


def check_outputs(
    plan: PlanSpec, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], role: str
) -> None:
    """Check that every output has a tensor of the right size: a plan writes by address.

    Raises:
        UsageError: one is missing or has another shape.
    """
    for spec in plan.outputs:
        expected = tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if spec.name not in shapes:
            raise UsageError(f"{role} writes the output {spec.name}, for which no tensor was given")
        if shapes[spec.name] != expected:
            raise UsageError(
                f"{role}: the output {spec.name} has shape {shapes[spec.name]}, the plan writes "
                f"{expected}"
            )


def choose_profile(
    plan: PlanSpec, axes: Mapping[str, int], role: str, rebuild: Callable[..., str]
) -> int:
    """The smallest profile that holds all lengths: every one is tuned for its own longest.

    Args:
        plan: whose profiles.
        axes: sizes by axis.
        role: of the plan, for messages.
        rebuild: `EngineSet.rebuild_command`.

    Raises:
        LadderError: there is none; names the length, the limit and the command that builds one.
    """
    fitting = []
    for index, profile in enumerate(plan.profiles):
        if all(profile.range_of(axis).holds(size) for axis, size in axes.items()):
            fitting.append((profile.reference.most, profile.noisy.most, profile.text.most, index))
    if fitting:
        return min(fitting)[-1]
    for axis, size in axes.items():
        ranges = [profile.range_of(axis) for profile in plan.profiles]
        if any(span.holds(size) for span in ranges):
            continue
        what, option = _OPTIONS[axis]
        most, least = max(r.most for r in ranges), min(r.least for r in ranges)
        if size > most:
            raise LadderError(
                f"{what} {size} is more than the profiles of the {role} plan hold ({most}); build "
                f"it for more with: {rebuild(**{option: size})}"
            )
        raise LadderError(
            f"{what} {size} is no length that the profiles of the {role} plan hold ({least} to "
            f"{most}); build the set again with: {rebuild()}"
        )
    sizes = ", ".join(f"{axis} {size}" for axis, size in axes.items())
    raise LadderError(
        f"no single profile of the {role} plan holds {sizes}, though each fits one; build the set "
        f"again with: {rebuild()}"
    )


@dataclass(slots=True)
class ArenaSize:
    """Size of the activation memory that all contexts share, which run in turn.

    Attributes:
        num_bytes: of the present buffer; 0 before the first.
        generation: counts buffers; graphs and contexts that know an older one are stale.
    """

    num_bytes: int = 0
    generation: int = 0

    def needs_growth(self, num_bytes: int) -> bool:
        """Whether a context of this size has to wait for a larger buffer."""
        return num_bytes > self.num_bytes or self.num_bytes == 0

    def next_size(self, num_bytes: int) -> int:
        """The size of the buffer to allocate."""
        return max(1, -(-num_bytes // ARENA_STEP_BYTES)) * ARENA_STEP_BYTES

    def replaced(self, num_bytes: int) -> None:
        """A buffer of this size took the place of the last; 0 when it could not be had."""
        self.num_bytes = num_bytes
        self.generation += 1


class GraphBook(Generic[V]):
    """The captured graphs of one context, by the addresses that they read and write."""

    def __init__(self, *, most_graphs: int = 4, most_seen: int = 32) -> None:
        self._graphs: BoundedCache[Addresses, V] = BoundedCache(most_graphs)
        self._seen: BoundedCache[Addresses, bool] = BoundedCache(most_seen)

    def next_action(self, addresses: Addresses) -> Action:
        """Return the action for a call on these tensors: the second one is captured."""
        if self._graphs.get(addresses) is not None:
            return "replay"
        if self._seen.get(addresses):
            return "capture"
        self._seen.put(addresses, True)
        return "enqueue"

    def keep(self, addresses: Addresses, graph: V) -> None:
        """Store a captured graph under its addresses."""
        self._graphs.put(addresses, graph)

    def graph(self, addresses: Addresses) -> V:
        """The graph that `next_action` said to replay."""
        graph = self._graphs.get(addresses)
        assert graph is not None
        return graph

    def clear(self) -> None:
        """Forget all graphs: the memory that they use has moved; plain calls come first again."""
        self._graphs.clear()
        self._seen.clear()

    def __len__(self) -> int:
        return len(self._graphs)
