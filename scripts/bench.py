#!/usr/bin/env python3
"""How fast edits are, side by side in one run: ditrim against what else runs such a model on a CPU.

Two models, the trained small editor (with a reference of the picture's size and with a large one)
and a random Qwen-Image-Edit of d = 1024, each run by

- diffusers as it is (eager), under `torch.compile`, and with its own First-Block-Cache;
- ONNX Runtime with its default options on one graph of the whole transformer (`torch.onnx.export`);
- ditrim: full context, ToPi and CoverageToPi with an anchor every 10 steps, ToPi with a step cache.

Single steps and whole edits, on the same threads, in float32, without gradients. Rounds run every
way once, in an order drawn anew, each after a pause in which idle threads stop spinning; figures
are medians, ratios are paired round by round. Beside the speed of an edit stands how near it is to
what diffusers makes of the same noise. Then the bounds that ditrim is held to, with what was
measured. Takes some 15 minutes and 8 GB of memory. Ends in one line of JSON; with --document, makes
tables of an earlier run's instead.

Example:
    python scripts/bench.py --output docs/measured/performance-cpu.json
    python scripts/bench.py --document docs/measured/performance-cpu.json \\
        --into docs/measured/performance.md
    python scripts/bench.py --quick --only wide
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import SCENE_REFERENCES, Case, our_schedules, small_case, wide_case
from benchmarks.measure import (
    COMPILED,
    EAGER,
    ONE_GRAPH,
    SETTLE_SECONDS,
    Progress,
    measure_edits,
    measure_steps,
)
from benchmarks.others import OTHERS, other_ways
from benchmarks.speed_tables import document_text, tables
from benchmarks.tables import replace_section, show
from ditrim.engines.cost.flops import CallSize
from ditrim.runtime.profiling.machine import clocks, describe_machine, load_average

FORMAT, VERSION = "ditrim-bench", 1
WIDE = {
    "config": {"num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 512},
    "num_layers": 8,
    "layers": (4, 5, 6),
    "size": CallSize(num_noisy=1024, num_reference=1024, num_text=64),
}
TINY = {
    "config": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "joint_attention_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    },
    "num_layers": 3,
    "layers": (1,),
    "size": CallSize(num_noisy=64, num_reference=64, num_text=8),
}


def measure_case(case: Case, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure one model at one size in every way."""
    progress.begin(f"{case.name}: making the other ways to run it")
    is_small = case.is_picture
    with tempfile.TemporaryDirectory(prefix="ditrim-bench-") as folder:
        ways = other_ways(case, arguments.ways, Path(folder), arguments.threads)
        ours = our_schedules(case)
        edits = measure_edits(
            case,
            [*ways, *ours],
            arguments.edits if is_small else arguments.wide_edits,
            arguments.edit_steps if is_small else arguments.wide_edit_steps,
            progress,
        )
        rounds = arguments.rounds if is_small else arguments.wide_rounds
        steps = measure_steps(case, ways, rounds, progress)
    size, manifest = case.size, case.manifest
    return {
        "title": case.title,
        "model": manifest.model,
        "config": dict(manifest.transformer_config),
        "front_depth": manifest.front_depth,
        "num_layers": manifest.num_layers,
        "layers": list(manifest.representative_layers),
        "identity": manifest.identity,
        "size": {name: getattr(size, name) for name in ("num_noisy", "num_reference", "num_text")},
        "build_s": None if case.build_s is None else round(case.build_s, 1),
        "prepare_s": {w.name: round(w.prepare_s, 1) for w in ways if w.prepare_s is not None},
        **steps,
        "edits": edits,
    }


def judge(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """The bounds, and what was measured; a value of none was not measured."""
    return [
        {
            "case": name,
            "bound": text,
            "least": least,
            "most": most,
            "value": result and result["median"],
            "interval": result and [result["low"], result["high"]],
            "of": of,
            "is_met": result
            and (result["median"] <= most if least is None else result["median"] >= least),
        }
        for name, case in cases.items()
        for text, result, least, most, of in (_wide if name == "wide" else _small)(case)
    ]


# (what is bound, what was measured, the least, the most, of which worst case it is)
Bound = tuple[str, dict[str, Any] | None, float | None, float | None, str]


def _against(case: dict[str, Any], way: str, title: str, least: float) -> Bound:
    """The full step against another way."""
    by_way = {row["way"]: row["full_is_faster"] for row in case["steps"]}
    return f"full step against {title}", by_way.get(way), least, None, ""


def _outside(case: dict[str, Any], most: float) -> Bound:
    outside = case["outside_engines"]
    worst = max(outside, key=lambda way: outside[way]["median"])
    text = "time outside the engines, of a step"
    return text, outside[worst], None, most, f"the worst: {worst}"


def _small(case: dict[str, Any]) -> Iterator[Bound]:
    yield _against(case, ONE_GRAPH, "ONNX Runtime, one graph", 1.0)
    yield _against(case, EAGER, "diffusers eager", 1.5)
    yield _outside(case, 0.10)


def _wide(case: dict[str, Any]) -> Iterator[Bound]:
    yield _against(case, ONE_GRAPH, "ONNX Runtime, one graph", 1.0)
    row = min(case["rungs"], key=lambda row: row["of_predicted"]["median"])
    text = "speed-up of reduced steps, of the predicted"
    yield text, row["of_predicted"], 0.95, None, f"the worst: rung {row['rung']}"
    products = case["products"]
    text = "full step's rate, of plain matrix products of the same shapes"
    of = f"the faster library: {products['fastest']}"
    yield text, products["step_of_products"], 0.95, None, of
    yield _against(case, EAGER, "diffusers eager", 1.0)
    if "torch_backend" in case:  # results of earlier versions lack it
        live = case["torch_backend"]
        yield (
            "torch backend: full step against diffusers eager",
            live["against_eager"],
            0.98,
            None,
            "",
        )
        text = "torch backend: speed-up of half of the references, of the predicted"
        yield text, live["of_predicted"], 0.95, None, f"{live['kept']} tokens kept"
    yield _against(case, COMPILED, "torch.compile", 1.0)
    scoring = case["scoring"]
    rung, share = next(iter(scoring["shares"].items()))
    of_one_ms = share["scoring"] / scoring["scoring_ms"] if scoring["scoring_ms"] else 0.0
    low, high = (
        round(share["share"] + (bound - scoring["scoring_ms"]) * of_one_ms, 6)
        for bound in scoring["scoring_ms_interval"]
    )
    text = "scoring, selection and gather, of a run of 40 steps at interval 10"
    found = {"median": share["share"], "low": low, "high": high}
    yield text, found, None, 0.005, f"{rung} tokens kept"
    yield _outside(case, 0.01)


def openmp() -> dict[str, Any]:
    """Return the settings that decide how long torch's idle threads spin."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    info = torch.__config__.parallel_info().splitlines()
    return {
        "environment": {name: os.environ.get(name) for name in names},
        "torch": [line.strip() for line in info if "OpenMP" in line or "MKL" in line],
        "pause_before_each_s": SETTLE_SECONDS,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("small", "wide"), help="one of the two models")
    parser.add_argument(
        "--ways",
        default=",".join(OTHERS),
        help=f"what to compare with, of {','.join(OTHERS)} (default: all)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one a core")
    parser.add_argument("--rounds", type=int, default=60, help="of single steps, small editor (60)")
    parser.add_argument("--wide-rounds", type=int, default=5, help="the same at d = 1024 (5)")
    parser.add_argument("--edits", type=int, default=8, help="whole edits, small editor (8)")
    parser.add_argument("--edit-steps", type=int, default=40, help="steps of each (40)")
    parser.add_argument("--wide-edits", type=int, default=1, help="whole edits at d = 1024 (1)")
    parser.add_argument("--wide-edit-steps", type=int, default=10, help="steps of each (10)")
    parser.add_argument(
        "--engines", type=Path, default=Path("engines-out/bench"), help="where sets are built"
    )
    parser.add_argument("--output", "--json", type=Path, help="write the JSON result there as well")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds, edits of four steps, a tiny second model"
    )
    parser.add_argument("--document", type=Path, metavar="JSON", help="print tables of that result")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="with --document: replace the tables there"
    )
    arguments = parser.parse_args(argv)
    arguments.ways = tuple(word for word in arguments.ways.split(",") if word)
    unknown = [word for word in arguments.ways if word not in OTHERS]
    if unknown:
        parser.error(f"--ways: unknown {unknown[0]!r}; allowed: {', '.join(OTHERS)}")
    if arguments.into and not arguments.document:
        parser.error("--into needs --document")
    for name in ("rounds", "wide_rounds", "edits", "wide_edits"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("edit_steps", "wide_edit_steps"):
        if getattr(arguments, name) < 2:
            parser.error(f"--{name.replace('_', '-')} must be at least 2")
    if not 0 <= arguments.threads <= 1024:
        parser.error("--threads must be 0 to 1024")
    if arguments.quick:
        arguments.rounds = arguments.wide_rounds = 2
        arguments.edits = 1
        arguments.edit_steps = arguments.wide_edit_steps = 4
    arguments.threads = arguments.threads or os.cpu_count() or 1
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases, one after another."""
    torch.set_num_threads(arguments.threads)
    makers: dict[str, Callable[[], Case]] = {}
    if arguments.only != "wide":
        for name in SCENE_REFERENCES:
            makers[name] = partial(
                small_case, name, arguments.engines, arguments.threads, arguments.edits
            )
    if arguments.only != "small":
        wide: dict[str, Any] = TINY if arguments.quick else WIDE
        makers["wide"] = partial(
            wide_case, arguments.engines, arguments.threads, arguments.wide_edits, **wide
        )
    start, cases, machine = time.monotonic(), {}, None
    with Progress() as progress:
        for name, make in makers.items():
            progress.begin(f"{name}: building or reusing the engine set")
            case = make()
            machine = machine or describe_machine(case.engines, arguments.threads)
            cases[name] = measure_case(case, arguments, progress)
            del case
            torch._dynamo.reset()
            gc.collect()
    assert machine is not None
    machine["load"]["after"], machine["clocks"]["after"] = load_average(), clocks(False)
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": shlex.join(["python", "scripts/bench.py", *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - start),
        "is_quick": arguments.quick,
        "machine": machine,
        "openmp": openmp(),
        "cases": cases,
        "bounds": judge(cases),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or make a document; returns the exit code."""
    arguments = parse_arguments(argv)
    if arguments.document:
        try:
            result = json.loads(arguments.document.read_text())
        except (OSError, ValueError) as error:
            print(f"error: --document {arguments.document}: {error}", file=sys.stderr)
            return 2
        if (result.get("format"), result.get("version")) != (FORMAT, VERSION):
            print(f"error: {arguments.document} is no result of this script", file=sys.stderr)
            return 2
        text = document_text(result)
        if arguments.into:
            replace_section(arguments.into, text)
        else:
            print(text)
        return 0
    # An empty cache, so that compiling is timed as a first user sees it.
    with tempfile.TemporaryDirectory(prefix="ditrim-inductor-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        result = run(arguments)
    show(tables(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
