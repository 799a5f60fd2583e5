"""What a run of many steps costs, from a profile: `steps=40 interval=10 kept=0.6`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditrim.engines.cost.flops import CallSize
from ditrim.engines.json_file import read_file
from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.schedule import Schedule
from ditrim.runtime.profiling.profile import Profile, quantile
from ditrim.runtime.report import WrittenReport

_MOST_STEPS, _MOST_BRANCHES = 10_000, 4
# The best interval is the shortest that comes this close to scoring but once.
_CLOSE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSchedule:
    """A run whose cost is asked for.

    Attributes:
        steps: of the run.
        interval: from one anchor to the next; none means the policies' own placement (see
            `Schedule`).
        warmup: full steps before the first anchor.
        kept: share of the reference tokens that reduced steps run on.
        branches: model calls a step, 2 with true classifier-free guidance.
        tau: of the policy, for the record: it decides no time.
        kept_is_bound: `kept` is the most that tau lets a step keep, whatever the picture, so that
            the run is no slower than its estimate.
    """

    steps: int
    interval: int | None = None
    warmup: int = 0
    kept: float
    branches: int = 1
    tau: float | None = None
    kept_is_bound: bool = False

    def __post_init__(self) -> None:
        for name, most in (("steps", _MOST_STEPS), ("branches", _MOST_BRANCHES)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UsageError(f"{name} must lie in [1, {most}], got {value}")
        for name in ("tau", "kept"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} must lie in [0, 1], got {value}")
        self._schedule()
        if self.warmup >= self.steps:
            raise UsageError(
                f"warmup must be less than steps ({self.steps}), got {self.warmup}: no anchor is "
                "left"
            )

    def roles(self) -> dict[str, int]:
        """Return the number of calls by role."""
        schedule = self._schedule()
        counts = {"full": 0, "anchor": 0, "reduced": 0}
        for step in range(self.steps):
            counts[schedule.role(step)] += self.branches
        return counts

    def anchors_in_words(self) -> str:
        """Return the places of the anchors in words, as "interval 10"."""
        return "default anchors" if self.interval is None else f"interval {self.interval}"

    def _schedule(self) -> Schedule:
        return Schedule(interval=self.interval, warmup=self.warmup, num_steps=self.steps)


_KINDS: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "interval": int,
    "warmup": int,
    "branches": int,
    "kept": float,
    "tau": float,
}


def parse_schedule(text: str, kept: float | None = None) -> RunSchedule:
    """Read `steps=40 interval=10 tau=0.85 kept=0.6`.

    Without a kept share, tau bounds it: among tokens ranked by influence, the first share tau of
    them holds at least a share tau of the influence.

    Args:
        text: pairs apart by spaces: steps, interval, warmup, branches, kept, tau.
        kept: where the text has none, before tau's bound.

    Raises:
        UsageError: it does not parse; names the word and what is allowed.
    """
    given = _numbers_in(text)
    if "steps" not in given:
        raise UsageError(f"--schedule {text!r}: say how many steps, as steps=40")
    if "kept" not in given:
        if kept is not None:
            given["kept"] = kept
        elif "tau" in given:
            given |= {"kept": given["tau"], "kept_is_bound": True}
        else:
            raise UsageError(
                f"--schedule {text!r}: say which share of the reference tokens is kept, as "
                "kept=0.6, or at most, as tau=0.85, or give --report, a report of edit-image"
            )
    try:
        return RunSchedule(**given)
    except UsageError as error:
        raise UsageError(f"--schedule {text!r}: {error}") from error


def _numbers_in(text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or key not in _KINDS:
            raise UsageError(
                f"--schedule {text!r}: {word!r} is not one of "
                f"{', '.join(f'{name}=' for name in _KINDS)} with a number"
            )
        if key in given:
            raise UsageError(f"--schedule {text!r}: {key} is given twice")
        try:
            given[key] = _KINDS[key](value)
        except ValueError:
            kind = "a whole number" if _KINDS[key] is int else "a number"
            raise UsageError(f"--schedule {text!r}: {key} must be {kind}, got {value!r}") from None
        if _KINDS[key] is float and not math.isfinite(given[key]):
            raise UsageError(f"--schedule {text!r}: {key} must be finite, got {value!r}")
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """Calls of a run, from a report of `edit-image`.

    Attributes:
        calls: (role, reference tokens, kept tokens) of every call.
        geometry: (batch, noisy, text, reference) of the first.
        total_ms: what they took.
        identity, model: of the engine set.
        schedule: that the roles follow; none where they follow none.
    """

    calls: tuple[tuple[str, int, int], ...]
    geometry: tuple[int, int, int, int]
    total_ms: float
    identity: str
    model: str
    schedule: RunSchedule | None = None

    @property
    def kept(self) -> float:
        """Mean share that reduced calls ran on; 1 if there were none."""
        shares = [kept / of for role, of, kept in self.calls if role == "reduced"]
        return sum(shares) / len(shares) if shares else 1.0


def load_report(path: str | os.PathLike[str]) -> RecordedRun:
    """Read the file that `edit-image --report` wrote.

    Raises:
        UsageError: it is not there, or no such report.
    """
    remedy = "give a file that edit-image --report wrote"
    return read_file(path, _recorded_in, what="--report", remedy=remedy)


def _recorded_in(text: str) -> RecordedRun:
    report = WrittenReport.from_json(text)
    steps, roles = report.run.steps, dict[str, list[str]]()
    for step in steps:
        roles.setdefault(step.branch, []).append(step.role)
    first = steps[0]
    recorded = RecordedRun(
        calls=tuple((step.role, step.num_reference, step.num_kept) for step in steps),
        geometry=(first.batch, first.num_noisy, first.num_text, first.num_reference),
        total_ms=report.run.total_ms,
        identity=report.engine.identity,
        model=report.engine.model,
    )
    return replace(recorded, schedule=_schedule_of(list(roles.values()), recorded.kept))


def _schedule_of(branches: list[list[str]], kept: float) -> RunSchedule | None:
    """The schedule that the roles of every branch follow, step by step."""
    roles = branches[0]
    anchors = [step for step, role in enumerate(roles) if role == "anchor"]
    if not anchors or any(other != roles for other in branches[1:]):
        return None
    warmup, steps = anchors[0], len(roles)
    if steps > _MOST_STEPS or len(branches) > _MOST_BRANCHES:
        return None
    spaced = anchors[1] - anchors[0] if len(anchors) > 1 else max(1, steps - warmup)
    for interval in (spaced, None):
        schedule = Schedule(interval=interval, warmup=warmup, num_steps=steps)
        if all(schedule.role(step) == role for step, role in enumerate(roles)):
            return RunSchedule(
                steps=steps, interval=interval, warmup=warmup, kept=kept, branches=len(branches)
            )
    return None


class StepTimes:
    """Milliseconds of the parts of a step at one size: medians, or an end of their intervals."""

    def __init__(
        self, profile: Profile, geometry: tuple[int, int, int, int], which: str = "median"
    ) -> None:
        """Take a profile's rows.

        Args:
            profile: with rows of this geometry.
            geometry: (batch, noisy, text, reference).
            which: "median", "low" or "high" of `Statistics`.
        """
        self._profile, self.geometry, self._which = profile, geometry, which
        self.num_reference = geometry[3]
        self._cost = profile.model_cost
        backs = profile.backs(geometry)
        self._backs = [(self._flops(r.num_kept), getattr(r.statistics, which)) for r in backs]
        gathers = [
            getattr(row.statistics, which) / row.num_kept
            for row in profile.rows
            if row.part == "gather" and row.geometry == geometry
        ]
        self._gather_ms_a_token = quantile(sorted(gathers), 0.5) if gathers else 0.0
        self.front = self._of("front")
        self.selection = self._of("selection") + self._of("rope")
        self.scheduler = self._of("scheduler")
        self.overhead = self._of("overhead")
        self.anchor_back = self._of("anchor")
        self.full_back = self.back(self.num_reference)

    def _of(self, part: str) -> float:
        row = self._profile.find(part, self.geometry)
        return 0.0 if row is None else float(getattr(row.statistics, self._which))

    def _flops(self, kept: float) -> float:
        """BACK's operations at a length, which may lie between two tokens."""
        batch, noisy, text, _ = self.geometry
        below = math.floor(kept)

        def at(length: int) -> int:
            size = CallSize(num_noisy=noisy, num_reference=length, num_text=text, batch=batch)
            return self._cost.back(size, num_rows=1).flops

        return at(below) + (kept - below) * (at(below + 1) - at(below))

    def back(self, kept: float) -> float:
        """BACK at any length: linear in operations between measured ones.

        Below the shortest it falls with the operations, above the longest it grows with them.
        """
        flops, points = self._flops(kept), self._backs
        if flops <= points[0][0] or len(points) == 1:
            return points[0][1] * flops / points[0][0]
        for (before, at_before), (after, at_after) in itertools.pairwise(points):
            if flops <= after:
                return at_before + (flops - before) / (after - before) * (at_after - at_before)
        return points[-1][1] * flops / points[-1][0]

    def call(self, role: str, kept: float) -> float:
        """One model call with its share of everything but the scheduler."""
        if role == "anchor":
            return self.front + self.anchor_back + self.selection + self.overhead
        if role == "reuse":
            return self.front + self.overhead
        if role == "full" or kept >= self.num_reference:
            return self.front + self.full_back + self.overhead
        return self.front + self._gather_ms_a_token * kept + self.back(kept) + self.overhead

    def run(self, schedule: RunSchedule) -> float:
        """Return the time of a whole run, milliseconds."""
        kept = schedule.kept * self.num_reference
        calls = sum(count * self.call(role, kept) for role, count in schedule.roles().items())
        return calls + schedule.steps * self.scheduler

    def full_run(self, schedule: RunSchedule) -> float:
        """The same steps over the full context."""
        calls = schedule.steps * schedule.branches
        full = self.call("full", self.num_reference)
        return calls * full + schedule.steps * self.scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleEstimate:
    """Predicted time of a schedule.

    Attributes:
        schedule: asked for.
        geometry: (batch, noisy, text, reference).
        roles: calls of each role.
        run_ms, full_ms: with the schedule and over the full context; each [low, median, high], the
            ends with every part at the end of its interval.
        speedup: full_ms / run_ms, likewise [low, median, high].
        flops_speedup: by operations alone.
        break_even_kept: share of kept tokens under which the schedule is faster than the full
            context; none where it never is.
        best_interval: the shortest interval whose run is within 2 % of one with a single anchor, at
            this share of kept tokens.
        intervals: interval -> speed-up.
        curve: (kept share, speed-up, speed-up by operations).
        anchor_share: of the run, what scoring and selection add.
    """

    schedule: RunSchedule
    geometry: tuple[int, int, int, int]
    roles: Mapping[str, int]
    run_ms: tuple[float, float, float]
    full_ms: tuple[float, float, float]
    speedup: tuple[float, float, float]
    flops_speedup: float
    break_even_kept: float | None
    best_interval: int
    intervals: Mapping[int, float]
    curve: tuple[tuple[float, float, float], ...]
    anchor_share: float


def estimate_schedule(
    profile: Profile, geometry: tuple[int, int, int, int], schedule: RunSchedule
) -> ScheduleEstimate:
    """Predict the run time of a schedule from a profile's medians and their intervals."""
    low, middle, high = (StepTimes(profile, geometry, end) for end in ("low", "median", "high"))
    run = tuple(times.run(schedule) for times in (low, middle, high))
    full = tuple(times.full_run(schedule) for times in (low, middle, high))
    speedups = {
        interval: full[1] / middle.run(replace(schedule, interval=interval))
        for interval in _intervals(schedule)
    }
    once = speedups[max(speedups)]
    best = min(i for i, speedup in speedups.items() if speedup >= (1 - _CLOSE) * once)
    anchors = schedule.roles()["anchor"]
    scoring = anchors * max(0.0, middle.anchor_back - middle.full_back + middle.selection)
    shares = [step / 40 for step in range(1, 41)]
    return ScheduleEstimate(
        schedule=schedule,
        geometry=geometry,
        roles=schedule.roles(),
        run_ms=(run[0], run[1], run[2]),
        full_ms=(full[0], full[1], full[2]),
        speedup=(full[0] / run[2], full[1] / run[1], full[2] / run[0]),
        flops_speedup=_flops_speedup(profile, geometry, schedule),
        break_even_kept=_break_even(middle, schedule),
        best_interval=best,
        intervals=speedups,
        curve=tuple(
            (
                share,
                full[1] / middle.run(replace(schedule, kept=share)),
                _flops_speedup(profile, geometry, replace(schedule, kept=share)),
            )
            for share in shares
        ),
        anchor_share=scoring / run[1],
    )


def _intervals(schedule: RunSchedule) -> Sequence[int]:
    """Return the intervals to report: up to ten, halves and thirds of the run, and one anchor."""
    steps = max(1, schedule.steps - schedule.warmup)
    parts = {-(-steps // part) for part in range(1, 9)}
    own = () if schedule.interval is None else (schedule.interval,)
    return sorted({i for i in (*range(1, 11), *parts, *own) if i <= steps} | {steps})


def _flops_speedup(
    profile: Profile, geometry: tuple[int, int, int, int], schedule: RunSchedule
) -> float:
    batch, noisy, text, reference = geometry
    cost = profile.model_cost
    size = CallSize(num_noisy=noisy, num_reference=reference, num_text=text, batch=batch)
    kept = max(1, round(schedule.kept * reference))
    front = cost.front(size).flops
    flops = {
        "full": front + cost.back(size).flops,
        "anchor": front + cost.back(size, num_rows=noisy).flops,
        "reduced": front + cost.back(replace(size, num_reference=kept)).flops,
    }
    run = sum(count * flops[role] for role, count in schedule.roles().items())
    return schedule.steps * schedule.branches * flops["full"] / run


def _break_even(times: StepTimes, schedule: RunSchedule) -> float | None:
    """Bisect for the share of kept tokens at which the schedule costs what the full context does.

    The time is taken to grow with the tokens.
    """

    def gain(kept: float) -> float:
        return times.full_run(schedule) - times.run(replace(schedule, kept=kept))

    least, most = 1 / times.num_reference, 1.0 - 1e-9
    if gain(least) <= 0:
        return None
    if gain(most) > 0:
        return 1.0
    for _ in range(40):
        middle = (least + most) / 2
        least, most = (middle, most) if gain(middle) > 0 else (least, middle)
    return least


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedRun:
    """A recorded run, priced call by call.

    Attributes:
        estimated_ms: its calls by the profile, without the scheduler, as the report has none.
        recorded_ms: what they took.
        full_ms: the same calls over the full context.
        kept: mean share of reduced calls.
        differs: what of the profile's engine set and sizes is not the report's.
    """

    estimated_ms: float
    recorded_ms: float
    full_ms: float
    kept: float
    differs: tuple[str, ...]


def check_report_model(recorded: RecordedRun, model: str) -> None:
    """Refuse a report of another model."""
    if recorded.model != model:
        raise UsageError(
            f"--report is of {recorded.model}, what is profiled is {model}: give a report of the "
            "same model"
        )


def replay(
    profile: Profile, geometry: tuple[int, int, int, int], recorded: RecordedRun
) -> ReplayedRun:
    """Price the calls of a recorded run.

    Raises:
        UsageError: it is of another model.
    """
    check_report_model(recorded, profile.engine["model"])
    times = StepTimes(profile, geometry)
    differs = []
    if recorded.identity != profile.engine["identity"]:
        differs.append("another engine set")
    if recorded.geometry != geometry:
        differs.append(
            "(batch, noisy, text, reference) tokens "
            f"{recorded.geometry} there, {geometry} in the profile"
        )
    scale = geometry[3]
    calls = [times.call(role, kept / of * scale) for role, of, kept in recorded.calls]
    return ReplayedRun(
        estimated_ms=sum(calls),
        recorded_ms=recorded.total_ms,
        full_ms=len(calls) * times.call("full", scale),
        kept=recorded.kept,
        differs=tuple(differs),
    )
