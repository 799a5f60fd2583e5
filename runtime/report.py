"""What a run did, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ditrim.engines.json_file import Count, NotEmpty, Positive, Whole, parse_json, value_from

if TYPE_CHECKING:
    import torch


ROLES = ("full", "anchor", "reduced", "reuse")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One call of the transformer.

    Attributes:
        step: from 0, counted a branch.
        branch: "cond" or "uncond".
        role: "full", "anchor", "reduced", or "reuse" where a step cache spared BACK.
        timestep: as the transformer was given it.
        batch, num_noisy, num_text, num_reference: sizes of the call.
        num_kept: reference tokens that BACK ran on, of those of `num_reference`; on a reused step
            those that it would have run on.
        num_noisy_kept: noisy tokens that BACK ran on.
        rung: the ladder's rung that served them.
        front_ms, gather_ms, back_ms, select_ms, other_ms: wall-clock milliseconds; on a GPU those
            of submitting the work unless the session was made with `timing=True`.
        kept_indices: (B, K') tokens that the steps after an anchor run on, or that a reduced step
            chose for itself; else none.
    """

    step: int
    branch: str
    role: str
    timestep: float
    batch: int
    num_noisy: int
    num_text: int
    num_reference: int
    num_kept: int
    num_noisy_kept: int
    rung: int
    front_ms: float
    gather_ms: float
    back_ms: float
    select_ms: float
    other_ms: float
    kept_indices: torch.Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def total_ms(self) -> float:
        """Time of the whole call, milliseconds."""
        return self.front_ms + self.gather_ms + self.back_ms + self.select_ms + self.other_ms


@dataclass(slots=True)
class RunReport:
    """All calls of one request, in order.

    Attributes:
        steps: the calls.
        notes: what the policy has to say of the request.
        grids: (height, width) in tokens of the noisy picture and of each reference; none before
            the first call, and where they are no whole grids.
    """

    steps: list[StepRecord] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] | None = None

    def of_role(self, role: str) -> list[StepRecord]:
        """The records of one role."""
        return [record for record in self.steps if record.role == role]

    @property
    def kept_ratio(self) -> float:
        """Mean fraction of reference tokens that reduced steps ran on; 1 if there were none."""
        return _mean((r.num_kept / max(r.num_reference, 1) for r in self.of_role("reduced")), 1.0)

    @property
    def back_calls(self) -> int:
        """Number of calls that ran BACK."""
        return len(self.steps) - len(self.of_role("reuse"))

    @property
    def total_ms(self) -> float:
        """Milliseconds in the transformer, all calls."""
        return sum(record.total_ms for record in self.steps)

    def as_dict(self, *, with_steps: bool = True) -> dict[str, Any]:
        """Plain values for JSON; kept indices are left out."""
        roles = {role: self.of_role(role) for role in ROLES}
        summary: dict[str, Any] = {
            "calls": len(self.steps),
            "back_calls": self.back_calls,
            "calls_by_role": {role: len(records) for role, records in roles.items()},
            "kept_ratio": round(self.kept_ratio, 4),
            "total_ms": round(self.total_ms, 3),
            "mean_ms_by_role": {
                role: round(_mean((r.total_ms for r in records), 0.0), 3)
                for role, records in roles.items()
                if records
            },
        }
        if self.notes:
            summary["policy_notes"] = dict(self.notes)
        if with_steps:
            summary["steps"] = [
                {
                    key: round(value, 4) if isinstance(value, float) else value
                    for key, value in asdict(record).items()
                    if key != "kept_indices"
                }
                for record in (_without_tensor(r) for r in self.steps)
            ]
        return summary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    role: Literal["full", "anchor", "reduced", "reuse"]
    branch: str
    batch: Count
    num_noisy: Whole
    num_text: Whole
    num_reference: Count
    num_kept: Count

    def __post_init__(self) -> None:
        if self.num_kept > self.num_reference:
            raise ValueError(f"a step kept {self.num_kept} of {self.num_reference} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    steps: Annotated[tuple[_Step, ...], NotEmpty]
    total_ms: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    identity: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """The parts of an `edit-image --report` file that other commands read."""

    run: _Run
    engine: _Engine

    @classmethod
    def from_json(cls, text: str) -> WrittenReport:
        """Parse and check the file's text.

        Raises:
            UsageError: it is no report; names the key.
        """
        return value_from(cls, parse_json(text), extra="ignore")


def _without_tensor(record: StepRecord) -> StepRecord:
    from dataclasses import replace

    return replace(record, kept_indices=None)


def _mean(values: Iterable[float], default: float) -> float:
    items = list(values)
    return sum(items) / len(items) if items else default
