"""What the TensorRT runtime decides: which profile, which context, how much memory, when to replay.

Nothing here knows torch, CUDA or TensorRT; `tensorrt.py` does what is decided here.

Replaces: one context whose shapes change (slow, and leaking CUDA modules where a plan embeds plugin
code, NVIDIA/TensorRT#4849), and CUDA graphs taken on faith. Limits: a captured graph serves one
context and one set of addresses, so it is worth its capture only where torch's allocator hands out
the same addresses again, which it usually does from step to step. Trade-off: a trial of a few calls
a profile runs before replay is chosen or dropped.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ditrim.engines.sets.ladder import Ladder
from ditrim.engines.sets.manifest import PlanSpec
from ditrim.plugins.errors import LadderError, UsageError

K = TypeVar("K")
V = TypeVar("V")
Action = Literal["enqueue", "capture", "replay"]
GraphMode = Literal["auto", "on", "off"]
Addresses = tuple[int, ...]
GRAPH_MODES = ("auto", "on", "off")
# Memory is taken in steps of this size, so that near lengths do not grow the arena one by one.
ARENA_STEP_BYTES = 2 << 20
# More kept counts than this, and compiling kernels for each of them would not end (TensorRT-RTX).
MOST_SPECIALISED_LENGTHS = 64
_TRIALS = 5
_LEAST_GAIN = 0.02
_OPTIONS = {
    "batch": ("a batch of", "max_batch"),
    "noisy": ("noisy tokens:", "max_noisy_tokens"),
    "text": ("text tokens:", "max_text_tokens"),
    "reference": ("reference tokens:", "max_reference_tokens"),
    "rows": ("scored rows:", "max_noisy_tokens"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextKey:
    """What a context was made for; it never changes.

    Attributes:
        role: of the plan.
        profile: index of the optimisation profile.
        shapes: of the inputs, in the plan's order.
    """

    role: str
    profile: int
    shapes: tuple[tuple[int, ...], ...]


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
        """Forget everything."""
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


def specialisation(ladder: Ladder, mode: GraphMode) -> tuple[Literal["eager", "lazy"], str]:
    """How TensorRT-RTX compiles kernels for a new shape, and why.

    Eager kernels do not change, so graphs of them can be captured; every new kept count waits for
    its compilation. Lazy ones are compiled beside the run and exchanged when they are done, which a
    captured graph would not notice.
    """
    lengths = math.ceil(ladder.longest / ladder.granularity)
    if mode == "off":
        return "lazy", "CUDA graphs are off"
    if mode == "on":
        return "eager", "CUDA graphs were asked for"
    if lengths <= MOST_SPECIALISED_LENGTHS:
        return "eager", f"there are {lengths} kept counts at granularity {ladder.granularity}"
    return "lazy", (
        f"there are {lengths} kept counts at granularity {ladder.granularity}, too many to compile "
        f"kernels for each ({MOST_SPECIALISED_LENGTHS}), so nothing is captured"
    )


@dataclass(slots=True)
class ArenaSize:
    """How large the activation memory is that all contexts share, which run in turn.

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


@dataclass(slots=True)
class ReplayVerdict:
    """Whether replaying graphs pays, measured on one profile of one plan.

    Attributes:
        mode: "auto" measures, "on" replays whatever it costs, "off" never captures.
        reason: why nothing is captured, where that is settled.
        times_ms: by action; the trial's.
        capture_ms: host time of the last capture.
    """

    mode: GraphMode = "auto"
    reason: str | None = None
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {"enqueue": [], "replay": []})
    capture_ms: float | None = None

    def __post_init__(self) -> None:
        if self.mode == "off" and self.reason is None:
            self.reason = "switched off"

    @property
    def outcome(self) -> Literal["undecided", "enqueue", "replay"]:
        """What was decided."""
        if self.reason is not None:
            return "enqueue"
        if self.mode == "on":
            return "replay"
        if any(len(times) < _TRIALS for times in self.times_ms.values()):
            return "undecided"
        return "replay" if self.saving_ms > _LEAST_GAIN * self._median("enqueue") else "enqueue"

    @property
    def saving_ms(self) -> float:
        """Median milliseconds that a replay saves a call."""
        return self._median("enqueue") - self._median("replay")

    def _median(self, action: str) -> float:
        return statistics.median(self.times_ms[action])

    def record(self, action: str, milliseconds: float) -> None:
        """Note one timed call of the trial."""
        if len(self.times_ms[action]) < _TRIALS:
            self.times_ms[action].append(milliseconds)

    def refuse(self, reason: str) -> None:
        """Capture no more."""
        self.reason = reason

    def trial_action(self) -> Literal["enqueue", "replay"]:
        """What the trial lacks more of."""
        enqueued, replayed = (len(self.times_ms[name]) for name in ("enqueue", "replay"))
        return "enqueue" if enqueued < _TRIALS and enqueued <= replayed else "replay"

    def sightings_before_capture(self) -> int:
        """Plain calls at one set of addresses before a graph of it is captured.

        One while undecided. Later as many as lose what a capture costs: so a graph that is never
        needed again costs at most as much as waiting did.
        """
        if self.outcome != "replay" or self.mode == "on" or not self.capture_ms:
            return 1
        return max(1, math.ceil(self.capture_ms / max(self.saving_ms, 1e-6)))

    def as_dict(self) -> dict[str, Any]:
        """For a report: the outcome, medians in milliseconds and the reason."""
        return {
            "outcome": self.outcome,
            "enqueue_ms": self._median("enqueue") if self.times_ms["enqueue"] else None,
            "replay_ms": self._median("replay") if self.times_ms["replay"] else None,
            "capture_ms": self.capture_ms,
            "reason": self.reason,
        }


class GraphBook(Generic[V]):
    """The captured graphs of one context, by the addresses that they read and write."""

    def __init__(
        self, verdict: ReplayVerdict, *, most_graphs: int = 4, most_seen: int = 32
    ) -> None:
        self.verdict = verdict
        self._graphs: BoundedCache[Addresses, V] = BoundedCache(most_graphs)
        self._seen: BoundedCache[Addresses, list[int]] = BoundedCache(most_seen)

    def next_action(self, addresses: Addresses) -> Action:
        """What to do with a call on these tensors."""
        outcome = self.verdict.outcome
        if outcome == "enqueue":
            return "enqueue"
        if self._graphs.get(addresses) is not None:
            return self.verdict.trial_action() if outcome == "undecided" else "replay"
        seen = self._seen.get(addresses)
        if seen is None:
            seen = [0]
            self._seen.put(addresses, seen)
        if seen[0] >= self.verdict.sightings_before_capture():
            return "capture"
        seen[0] += 1
        return "enqueue"

    def keep(self, addresses: Addresses, graph: V, capture_ms: float) -> None:
        """Note a captured graph and what its capture cost."""
        self._graphs.put(addresses, graph)
        self.verdict.capture_ms = capture_ms

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
