"""`profile-latency`: statistics, estimates, files and comparisons by hand."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up_profile import (
    ANCHOR,
    BACKS,
    CONFIG,
    FRONT,
    GATHER_A_TOKEN,
    GEOMETRY,
    OVERHEAD,
    ROPE,
    SCHEDULER,
    SELECTION,
    made_up,
    row,
)

from ditrim.engines.cost.cost import Peak
from ditrim.engines.cost.devices import DEVICES
from ditrim.engines.cost.flops import CallSize
from ditrim.plugins.errors import UsageError
from ditrim.runtime.profiling.file import load_profile
from ditrim.runtime.profiling.measure import grid_of
from ditrim.runtime.profiling.page import step_parts
from ditrim.runtime.profiling.profile import (
    PRODUCT,
    Row,
    describe_row,
    median_interval,
    noise_complaint,
    paired_ratio,
    statistics_of,
)
from ditrim.runtime.profiling.projection import compare, project, target_from
from ditrim.runtime.profiling.run_cost import (
    RecordedRun,
    RunSchedule,
    StepTimes,
    estimate_schedule,
    load_report,
    parse_schedule,
    replay,
)
from ditrim.runtime.profiling.text import (
    COLUMNS,
    FIRST_COLUMNS,
    comparison_table,
    number,
    profile_table,
    projection_table,
    schedule_lines,
    table_rows,
)
from ditrim.runtime.tokens.selection import count_by_influence

# Statistics


@pytest.mark.parametrize(
    ("count", "place", "coverage"),
    [(3, 1, 0.75), (5, 1, 0.9375), (6, 1, 0.96875), (10, 2, 0.97852), (20, 6, 0.95861)],
)
def test_interval_of_the_median_is_of_order_statistics(
    count: int, place: int, coverage: float
) -> None:
    """Textbook places of the sign test's interval."""
    ordered = [float(value) for value in range(1, count + 1)]
    low, high, found = median_interval(ordered)
    assert (low, high) == (place, count + 1 - place)
    assert found == pytest.approx(coverage, abs=5e-5)


def test_interval_covers_a_known_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = np.sort(rng.lognormal(0.0, 1.0, (4000, 11)), axis=1)  # median 1
    low, high, coverage = zip(*(median_interval(list(line)) for line in draws), strict=True)
    held = np.mean((np.array(low) <= 1) & (np.array(high) >= 1))
    assert held == pytest.approx(coverage[0], abs=0.015)


def test_statistics_against_plain_statements() -> None:
    found = statistics_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.least, found.most, found.count) == (3.0, 1.0, 5.0, 5)
    assert found.p90 == pytest.approx(4.6)
    assert found.p99 == pytest.approx(4.96)
    assert found.spread == pytest.approx((4.6 - 1.4) / 3)
    assert found.noise == pytest.approx((5 - 1) / 2 / 3)


def test_paired_ratios_cancel_what_slows_a_round() -> None:
    """Every second round is ten times slower; the ratio is the same in each."""
    slow = [1.0, 10.0] * 6
    back, anchor = row("back", 64, *slow), row("anchor", 64, *(1.05 * ms for ms in slow))
    ratio = paired_ratio(anchor, back)
    assert ratio.median == pytest.approx(1.05)
    assert ratio.noise == pytest.approx(0, abs=1e-9)
    assert back.statistics.noise > 0.5


def test_achieved_rates_are_cost_over_time() -> None:
    profile = made_up()
    back = profile.backs(GEOMETRY)[-1]
    entry = describe_row(profile, back)
    assert entry["tflops"] == pytest.approx(back.flops / 60.0 / 1e9, rel=1e-5)
    assert entry["tflops_share"] == pytest.approx(entry["tflops"] / 0.1, rel=1e-5)
    assert entry["gb_s"] == pytest.approx(back.num_bytes / 60.0 / 1e6, rel=1e-5)
    bounds = back.flops / 0.1 / 1e9, back.num_bytes / 10.0 / 1e6
    assert entry["roofline_ms"] == pytest.approx(max(bounds), rel=1e-5)


# Schedules


def test_schedule_estimate_by_hand() -> None:
    estimate = estimate_schedule(
        made_up(), GEOMETRY, RunSchedule(steps=12, interval=5, warmup=2, kept=0.5, branches=2)
    )
    # Steps 0 and 1 are full, 2 and 7 anchors, the other 8 reduced; two branches each.
    assert estimate.roles == {"full": 4, "anchor": 4, "reduced": 16}
    full = FRONT + BACKS[64] + OVERHEAD
    anchor = FRONT + ANCHOR + SELECTION + ROPE + OVERHEAD
    reduced = FRONT + 32 * GATHER_A_TOKEN + BACKS[32] + OVERHEAD
    run = 4 * full + 4 * anchor + 16 * reduced + 12 * SCHEDULER
    whole = 24 * full + 12 * SCHEDULER
    assert estimate.run_ms[1] == pytest.approx(run)
    assert estimate.full_ms[1] == pytest.approx(whole)
    assert estimate.speedup[1] == pytest.approx(whole / run)
    scoring = 4 * (ANCHOR - BACKS[64] + SELECTION + ROPE)
    assert estimate.anchor_share == pytest.approx(scoring / run)


def test_operations_alone_give_the_speedup_that_the_cost_model_does() -> None:
    profile = made_up()
    estimate = estimate_schedule(profile, GEOMETRY, RunSchedule(steps=4, interval=4, kept=0.25))
    model = profile.model_cost
    size = CallSize(num_noisy=64, num_reference=64, num_text=16)
    front, full = model.front(size).flops, model.back(size).flops
    anchor = model.back(size, num_rows=64).flops
    reduced = model.back(replace(size, num_reference=16)).flops
    expected = 4 * (front + full) / (4 * front + anchor + 3 * reduced)
    assert estimate.flops_speedup == pytest.approx(expected)


def test_back_between_rungs_follows_operations() -> None:
    times = StepTimes(made_up(), GEOMETRY)
    for kept, ms in BACKS.items():
        assert times.back(kept) == pytest.approx(ms)
    between = [times.back(kept) for kept in (16, 20, 24, 32, 48, 64)]
    assert between == sorted(between)
    size = CallSize(num_noisy=64, num_reference=8, num_text=16)
    model = made_up().model_cost
    below = model.back(size, num_rows=1).flops
    least = model.back(replace(size, num_reference=16), num_rows=1).flops
    assert times.back(8) == pytest.approx(BACKS[16] * below / least)


def test_break_even_is_where_the_run_costs_what_the_full_context_does() -> None:
    profile, schedule = made_up(), RunSchedule(steps=10, interval=10, kept=0.5)
    even = estimate_schedule(profile, GEOMETRY, schedule).break_even_kept
    assert even is not None
    times = StepTimes(profile, GEOMETRY)
    at = times.run(replace(schedule, kept=even))
    assert at == pytest.approx(times.full_run(schedule), rel=1e-6)
    assert times.run(replace(schedule, kept=even - 0.05)) < times.full_run(schedule)
    assert times.run(replace(schedule, kept=even + 0.02)) > times.full_run(schedule)


def test_a_run_of_anchors_is_never_faster() -> None:
    estimate = estimate_schedule(made_up(), GEOMETRY, RunSchedule(steps=10, interval=1, kept=0.1))
    assert estimate.break_even_kept is None
    assert estimate.speedup[1] < 1


def test_a_schedule_without_an_interval_has_the_policies_own_anchors() -> None:
    many = estimate_schedule(made_up(), GEOMETRY, RunSchedule(steps=40, kept=0.25))
    spaced = estimate_schedule(made_up(), GEOMETRY, RunSchedule(steps=40, interval=10, kept=0.25))
    assert (many.run_ms, many.intervals) == (spaced.run_ms, spaced.intervals)
    few = estimate_schedule(made_up(), GEOMETRY, RunSchedule(steps=8, kept=0.25))
    assert few.roles == {"full": 0, "anchor": 2, "reduced": 6}


def test_best_interval_is_the_shortest_close_to_a_single_anchor() -> None:
    estimate = estimate_schedule(made_up(), GEOMETRY, RunSchedule(steps=40, interval=10, kept=0.25))
    once = estimate.intervals[40]
    assert once == max(estimate.intervals.values())
    best = estimate.best_interval
    assert estimate.intervals[best] >= 0.98 * once
    assert all(s < 0.98 * once for i, s in estimate.intervals.items() if i < best)


def test_estimates_carry_the_noise_of_their_parts() -> None:
    calm, rough = (
        estimate_schedule(made_up(spread), GEOMETRY, RunSchedule(steps=8, interval=4, kept=0.5))
        for spread in (0.0, 0.2)
    )
    assert calm.speedup[0] == calm.speedup[1] == calm.speedup[2]
    low, middle, high = rough.speedup
    assert middle == pytest.approx(calm.speedup[1])
    assert low < middle < high


def test_schedule_text_is_read() -> None:
    found = parse_schedule("steps=40 interval=10 tau=0.85 kept=0.6 branches=2 warmup=3")
    assert found == RunSchedule(steps=40, interval=10, tau=0.85, kept=0.6, branches=2, warmup=3)
    assert parse_schedule("steps=4", kept=0.25).kept == 0.25
    assert parse_schedule("steps=4 kept=0.5", kept=0.25).kept == 0.5
    assert parse_schedule("  steps=4\tkept=.5\nwarmup=3 ").warmup == 3


def test_without_a_kept_share_tau_bounds_it() -> None:
    found = parse_schedule("steps=40 interval=10 tau=0.85")
    assert found == RunSchedule(steps=40, interval=10, tau=0.85, kept=0.85, kept_is_bound=True)
    assert not parse_schedule("steps=40 tau=0.85", kept=0.3).kept_is_bound
    said = "\n".join(schedule_lines([estimate_schedule(made_up(), GEOMETRY, found)], made_up()))
    assert "at most 85 % kept (the bound of tau" in said
    assert "speed-up at least " in said


@given(
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=60),
    st.floats(0, 1, exclude_max=True),
)
def test_the_first_share_tau_of_ranked_tokens_holds_as_much_influence(
    influence: list[float], tau: float
) -> None:
    """What makes tau a bound: the selection of the runtime itself."""
    kept = count_by_influence(torch.tensor([influence]), tau)
    assert kept <= math.ceil(tau * len(influence)) + 1  # a sum's last digit may cost a token


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "say how many steps"),
        ("interval=10 kept=0.5", "say how many steps, as steps=40"),
        ("steps=40", "is kept, as kept=0.6, or at most, as tau=0.85, or give --report"),
        ("steps=40 tau=2", "tau must lie in [0, 1], got 2.0"),
        ("steps=40 tau=-0.1", "tau must lie in [0, 1], got -0.1"),
        ("steps=40 kept=-1", "kept must lie in [0, 1], got -1.0"),
        ("steps=40 kept=inf", "kept must be finite, got 'inf'"),
        ("steps=4 kept=0.5 warmup=4", "warmup must be less than steps (4), got 4"),
        ("steps=4 kept=0.5 warmup=-1", "warmup must be an integer of at least 0"),
        ("steps=4 kept=0.5 branches=5", "branches must lie in [1, 4], got 5"),
        ("steps= kept=0.5", "steps must be a whole number, got ''"),
        ("=40 kept=0.5", "'=40' is not one of steps="),
        ("steps=40=40 kept=0.5", "steps must be a whole number, got '40=40'"),
        ("steps=40,interval=10 kept=0.5", "steps must be a whole number, got '40,interval=10'"),
        ("стeps=40 kept=0.5", "'стeps=40' is not one of steps="),
        (f"steps={10**400} kept=0.5", "steps must lie in [1, 10000], got 1000"),
        (f"steps={'9' * 5000} kept=0.5", "steps must be a whole number"),
        ("   ", "say how many steps"),
        ("steps=forty kept=0.5", "steps must be a whole number, got 'forty'"),
        ("steps=4.5 kept=0.5", "steps must be a whole number, got '4.5'"),
        ("steps=40 kept=nan", "kept must be finite, got 'nan'"),
        ("steps=40 kept=1.5", "kept must lie in [0, 1], got 1.5"),
        ("steps=0 kept=0.5", "steps must lie in [1, 10000], got 0"),
        ("steps=40 interval=0 kept=0.5", "interval must be an integer of at least 1"),
        ("steps=40 steps=50 kept=0.5", "steps is given twice"),
        ("steps=40 cadence=10", "'cadence=10' is not one of steps=, interval="),
        ("40 steps", "'40' is not one of steps="),
    ],
)
def test_schedule_that_does_not_parse_names_the_word(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_schedule(text)


def test_recorded_calls_are_priced_one_by_one() -> None:
    calls = (("anchor", 64, 64), ("reduced", 64, 32), ("reuse", 64, 32), ("full", 64, 64))
    recorded = RecordedRun(
        calls=calls, geometry=GEOMETRY, total_ms=150.0, identity="made up", model="qwen-edit"
    )
    found = replay(made_up(), GEOMETRY, recorded)
    reduced = 32 * GATHER_A_TOKEN + BACKS[32]
    backs = ANCHOR + SELECTION + ROPE + reduced + BACKS[64]
    assert found.estimated_ms == pytest.approx(4 * (FRONT + OVERHEAD) + backs)
    assert found.full_ms == pytest.approx(4 * (FRONT + OVERHEAD + BACKS[64]))
    assert (found.kept, found.differs) == (0.5, ())
    other = replay(made_up(), GEOMETRY, replace(recorded, identity="x", geometry=(2, 64, 16, 64)))
    assert len(other.differs) == 2
    with pytest.raises(UsageError, match="--report is of flux-kontext, what is profiled is qwen"):
        replay(made_up(), GEOMETRY, replace(recorded, model="flux-kontext"))


def test_parts_of_a_step_add_up_to_it() -> None:
    profile = made_up()
    times, parts = StepTimes(profile, GEOMETRY), step_parts(profile, GEOMETRY)
    assert list(parts) == ["full context", "anchor", "reduced, 32", "reduced, 16"]
    for name, role, kept in (("full context", "full", 64), ("anchor", "anchor", 64)):
        expected = times.call(role, kept) + times.scheduler
        assert sum(parts[name].values()) == pytest.approx(expected)
    expected = times.call("reduced", 32) + times.scheduler
    assert sum(parts["reduced, 32"].values()) == pytest.approx(expected)


# Files


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = made_up(0.05)
    file = tmp_path / "profile.json"
    file.write_text(profile.to_json())
    assert load_profile(file) == profile


def _edited(change: Callable[[dict[str, Any]], Any]) -> str:
    content = json.loads(made_up().to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is truncated or not JSON"),
        (made_up().to_json()[:-200], "it is truncated or not JSON"),
        ("[]", "it is no profile of profile-latency"),
        ('{"format": "other"}', "it is no profile of profile-latency"),
        ("null", "it is no profile of profile-latency"),
        ('"profile"', "it is no profile of profile-latency"),
        ("[" * 5000, "it is truncated or not JSON"),
        (_edited(lambda c: c.update(version=1)), "of format version 1; this version of"),
        (_edited(lambda c: c.update(version=None)), "it is of format version None; this"),
        (_edited(lambda c: c.pop("engine")), "key 'engine' is missing"),
        (_edited(lambda c: c["rows"].clear()), "key 'rows' is []; Tuple should have at least 1"),
        (_edited(lambda c: c["rows"][0].update(part="tail")), "the part 'tail'"),
        (_edited(lambda c: c["rows"][0].update(batch=-1)), "batch is -1"),
        (_edited(lambda c: c["rows"][0].update(samples_ms=[0.0])), "no time above 0"),
        (_edited(lambda c: c["rows"][0].update(samples_ms=["1"])), "is '1'; it must be a valid"),
        (_edited(lambda c: c["rows"][0].update(extra=1)), "key 'rows[0].extra' is unknown"),
        (_edited(lambda c: c["rows"].pop(0)), "front of the size (1, 64, 16, 64) is missing"),
        (_edited(lambda c: c["rows"].pop(1)), "anchor of the size (1, 64, 16, 64) is missing"),
        (_edited(lambda c: c["rows"].pop(4)), "back over all references of the size"),
        (_edited(lambda c: c.update(rows={})), "key 'rows' is {}; it must be a valid array"),
        (_edited(lambda c: c["rows"].append(c["rows"][0])), "is there twice"),
        (_edited(lambda c: c["rows"].append(3)), "key 'rows[11]' is 3; it must be an object"),
        (_edited(lambda c: c["rows"][0]["samples_ms"].pop()), "has 10 samples of 11 rounds"),
        (_edited(lambda c: c["rows"][0]["samples_ms"].append(-1.0)), "no time above 0"),
        (_edited(lambda c: c["rows"][0].update(samples_ms=[math.nan] * 11)), "NaN is no number"),
        (_edited(lambda c: c["rows"][0].update(samples_ms=7)), "is 7; it must be a valid array"),
        (_edited(lambda c: c["rows"][0].update(num_kept=65)), "a row kept 65 of 64 tokens"),
        (_edited(lambda c: c["rows"][0].update(memory_bytes="much")), "is 'much'; it must"),
        (_edited(lambda c: c["rows"][0].update(warmup_ms=[0])), "no time above 0"),
        (_edited(lambda c: c["engine"].update(front_depth=4)), "engine.front_depth is 4 of 4"),
        (_edited(lambda c: c["engine"].update(num_layers=10**9)), "engine.front_depth is 1 of"),
        (_edited(lambda c: c["engine"].update(num_scored=4)), "engine.num_scored is 4, more than"),
        (_edited(lambda c: c["engine"].update(architecture="sd3")), "'sd3'; it must be qwen or"),
        (_edited(lambda c: c["machine"].update(cores=True)), "'machine.cores' is True; it must"),
        (_edited(lambda c: c["machine"].pop("versions")), "key 'machine.versions' is missing"),
        (_edited(lambda c: c["settings"].update(max_noise=math.inf)), "Infinity is no number"),
        (made_up().to_json().replace('"before": 3.5', '"before": 1e999'), "1e999 is no number"),
        (_edited(lambda c: c["settings"].update(max_noise=0)), "max_noise' is 0; it must"),
        (_edited(lambda c: c.update(settings=[])), "key 'settings' is []; it must be an object"),
        (_edited(lambda c: c["engine"].update(config=3)), "key 'engine.config' is 3; it must be"),
        (_edited(lambda c: c["peak"].pop("source")), "key 'peak.source' is missing"),
        (_edited(lambda c: c["peak"].update(gb_s="fast")), "gb_s' is 'fast'; it must be a valid"),
        (_edited(lambda c: c["machine"].update(load=3)), "key 'machine.load' is 3; it must be"),
        (_edited(lambda c: c["settings"].update(max_noise=-1)), "max_noise' is -1; it must"),
    ],
)  # fmt: skip
def test_damaged_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        load_profile(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_head_dim", 0, "is 0; it must be a whole number, 1 or more"),
        ("num_attention_heads", -1, "is -1; it must be a whole number, 1 or more"),
        ("num_layers", 1.5, "is 1.5; it must be a whole number, 0 or more"),
        ("patch_size", True, "is True; it must be a whole number, 1 or more"),
        ("in_channels", None, "is None; it must be a whole number, 1 or more"),
    ],
)
def test_a_size_of_the_transformer_that_cannot_be_is_named(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    file = tmp_path / "profile.json"
    file.write_text(_edited(lambda content: content["engine"]["config"].update({key: value})))
    with pytest.raises(UsageError, match=rf"profile\.json: key 'engine\.config': {key} {message}"):
        load_profile(file)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a file's content."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))


_MADE_UP = {**json.loads(made_up(0.01).to_json()), "statistics": []}
_PLACES = [path for path in _leaves(_MADE_UP) if path and path[0] != "statistics"]


@given(
    st.sampled_from(_PLACES),
    st.sampled_from([None, "x", -1, 0, 1.5, math.nan, math.inf, [], {}, True, 10**30, "gone"]),
)
@example(("engine", "config", "num_attention_heads"), -1)
@settings(max_examples=100, deadline=None)
def test_a_file_changed_anywhere_is_refused_or_worked_with(
    path: tuple[Any, ...], value: object
) -> None:
    content = copy.deepcopy(_MADE_UP)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value == "gone":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        file.write_text(json.dumps(content))
        try:
            profile = load_profile(file)
        except UsageError:
            return
    assert profile_table(profile)
    assert profile.to_csv()
    json.loads(profile.to_json())
    noise_complaint(profile)
    schedule = RunSchedule(steps=4, interval=2, kept=0.5)
    estimates = [estimate_schedule(profile, geometry, schedule) for geometry in profile.geometries]
    assert not any("nan" in line for line in schedule_lines(estimates, profile))
    if profile.geometries == [GEOMETRY]:
        assert comparison_table(compare(profile, made_up()))
    if profile.peak.tflops and profile.peak.gb_s:
        projection = project(profile, target_from("h20", profile.engine["precision"]))
        assert "nan" not in projection_table(projection)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--compare .*no\.json cannot be read: No such file"):
        load_profile(tmp_path / "no.json", "--compare")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_profile(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(UsageError, match=r"it is no text; give a profile\.json"):
        load_profile(tmp_path / "picture.png")
    with pytest.raises(UsageError, match="cannot be read: Not a directory"):
        load_profile(tmp_path / "picture.png" / "profile.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.6, "1,235"), (36.0, "36.0"), (0.3, "0.300"), (9.999, "10.0")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_table_fits_100_columns_and_shows_the_rest_when_asked() -> None:
    large = {"num_noisy": 16_384, "num_text": 1_024, "num_reference": 49_152, "num_kept": 24_576}
    profile = made_up(0.05, 1234.5)
    rows = (replace(row, **large, memory_bytes=95 * 10**9) for row in profile.rows)
    profile = replace(profile, rows=tuple(rows))
    lines = profile_table(profile).splitlines()
    assert max(map(len, lines)) <= 100
    header = next(line for line in lines if line.startswith("part"))
    assert header.split() == " ".join(FIRST_COLUMNS).split()
    assert next(line for line in lines if line.startswith("back")).split()[4:6] == [
        "24576/49152",
        "37,035",
    ]
    assert "--wide shows every column" in " ".join(lines)
    wide = profile_table(profile, is_wide=True).splitlines()
    header = next(line for line in wide if line.startswith("part"))
    assert header.split() == " ".join(COLUMNS).split()
    cells = " ".join(wide[wide.index(header) + 2].split())
    assert cells == " ".join(filter(None, table_rows(profile)[0])).replace("  ", " ")


# Comparisons and projections


def test_difference_beyond_noise_is_told_from_one_within() -> None:
    before = made_up(0.05)
    assert not any(d.exceeds_noise for d in compare(made_up(0.05, 1.01), before).differences)
    slower = compare(made_up(0.05, 1.2), before)
    assert all(d.exceeds_noise for d in slower.differences)
    assert slower.differences[0].ratio == pytest.approx(1.2)
    # 11 samples: the interval of the median spans the 2nd to the 10th.
    assert slower.differences[0].low == pytest.approx(1.2 * 0.96 / 1.04)


def test_what_the_machine_itself_explains_is_no_difference() -> None:
    pulse = Row(
        part=PRODUCT,
        batch=0,
        num_noisy=0,
        num_text=0,
        num_reference=0,
        num_kept=0,
        samples_ms=(1.0, 1.0, 1.0),
    )
    before, after = made_up(0.05), made_up(0.05, 1.2)
    before = replace(before, rows=(*before.rows, pulse))
    slow_pulse = replace(pulse, samples_ms=(1.2, 1.2, 1.2))
    after = replace(after, rows=(*after.rows, slow_pulse))
    found = compare(after, before)
    assert found.drift == pytest.approx(1.2)
    assert not any(d.exceeds_noise for d in found.differences)


def test_profiles_without_a_common_size_cannot_be_compared() -> None:
    other = made_up()
    moved = replace(other, rows=tuple(replace(r, num_text=9) for r in other.rows))
    with pytest.raises(UsageError, match="have no size in common"):
        compare(other, moved)


def test_projection_to_the_device_itself_is_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(made_up(0.05).to_json())
    found = project(made_up(0.05), target_from(str(file), "fp32"))
    assert found.worst_error == pytest.approx(0, abs=1e-12)
    assert len(found.rows) == 5


def test_projection_to_a_device_by_hand() -> None:
    profile, h20 = made_up(), DEVICES["h20"]
    found = project(profile, target_from("h20", "fp32"))
    size = CallSize(num_noisy=64, num_reference=32, num_text=16)
    here = profile.model_cost.back(size, num_rows=1)
    there = profile.model_cost.at("bf16").back(size, num_rows=1)
    bound_here = max(here.flops / 0.1e9, here.num_bytes / 10e6)
    assert h20.bandwidth_gb_s is not None
    bound_there = max(there.flops / 148e9, there.num_bytes / (h20.bandwidth_gb_s * 1e6))
    item = next(r for r in found.rows if (r.row.part, r.row.num_kept) == ("back", 32))
    assert item.projected_ms == pytest.approx(BACKS[32] * bound_there / bound_here)
    assert item.low_ms <= item.projected_ms * (1 + 1e-9)
    assert item.projected_ms <= item.high_ms * (1 + 1e-9)
    assert not found.is_checked
    assert found.assumptions[-1] == "not checked: no second device was measured"
    assert any("a CPU's" in text for text in found.assumptions)
    assert "no public data sheet" in found.target.peak.source
    longer = project(profile, target_from("h20-141", "fp32"))
    assert longer.target.peak.gb_s == 4800


def test_projection_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--project: unknown device 'h21'.*Did you mean 'h20'"):
        target_from("h21", "bf16")
    with pytest.raises(UsageError, match="no fp8 rate of NVIDIA A100 SXM4 40 GB is established"):
        target_from("a100-40", "bf16", "fp8")
    with pytest.raises(UsageError, match=r"--project .*no\.json cannot be read"):
        target_from(str(tmp_path / "no.json"), "bf16")
    with pytest.raises(UsageError, match="--project: unknown device ''"):
        target_from("", "bf16")
    unknown = replace(made_up(), peak=Peak(tflops=None, gb_s=10.0, source=""))
    with pytest.raises(UsageError, match="nothing to project from"):
        project(unknown, target_from("h100", "bf16"))
    other = made_up()
    file = tmp_path / "other.json"
    file.write_text(
        replace(other, engine={**other.engine, "config": {**CONFIG, "num_layers": 6}}).to_json()
    )
    with pytest.raises(UsageError, match="measured with another model"):
        project(made_up(), target_from(str(file), "fp32"))


@given(st.integers(1, 5000))
def test_a_grid_holds_its_tokens(count: int) -> None:
    height, width = grid_of(count)
    assert height * width == count
    assert height <= width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "rest"}, r"run\.steps\[0\]\.role' is 'rest'; it must be 'full', 'anchor'"),
        ({"num_kept": 0}, r"run\.steps\[0\]\.num_kept' is 0; it must be greater than"),
        ({"num_kept": 9}, "a step kept 9 of 8 tokens"),
        ({"num_reference": "many"}, "num_reference' is 'many'; it must be a valid integer"),
        ({"num_reference": math.inf}, "Infinity is no number"),
        ({"num_kept": None}, "num_kept' is None; it must be a valid integer"),
    ],
)
def test_report_with_an_impossible_step_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    sizes = {"batch": 1, "num_noisy": 4, "num_text": 2, "num_reference": 8, "num_kept": 8}
    content = {
        "engine": {"identity": "x", "model": "qwen-edit"},
        "run": {"total_ms": 1.0, "steps": [{"role": "full", "branch": "cond", **sizes}]},
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content))
    assert load_report(file).geometry == (1, 4, 2, 8)
    content["run"]["steps"][0] |= change  # type: ignore[index]
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        load_report(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"run": []}', '{"run": {"steps": []}}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"report\.json: .*; give a file that edit-image"):
        load_report(file)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_report(tmp_path)


def test_laps_between_events_add_up_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic alone: events whose times are given, in the place of CUDA's."""
    from ditrim.runtime.denoising.event_clock import EventClock

    times = iter([0.0, 3.0, 5.0, 9.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.is_finished = False

        def record(self, stream: object) -> None:
            self.time = next(times)

        def synchronize(self) -> None:
            self.is_finished = True

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    clock = EventClock(torch.device("cuda", 0))
    for part in ("gather", "back", "gather"):
        clock.lap(part)
    assert clock.parts == {}
    clock.finish()
    assert clock.parts == {"gather": 7.0, "back": 2.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_events_time_what_runs_on_the_stream() -> None:
    from ditrim.runtime.denoising.event_clock import EventClock

    matrix = torch.randn(2048, 2048, device="cuda")
    clock = EventClock(torch.device("cuda", 0))
    _ = matrix @ matrix
    clock.lap("product")
    clock.finish()
    assert clock.parts["product"] > 0
