#!/usr/bin/env python3
"""How time and memory of ONNX Runtime's engines grow on a CPU, against what the cost model says.

A random Qwen-Image-Edit of d = 1024 with 3 blocks (front depth 1, the second one scored), up to
2048 x 2048 pixels: 16,384 noisy and 16,384 reference tokens. Axes:

    both, noisy, reference, text, batch   G = C; G, C, T and B alone
    shared, added                         1 to 4 references of one total length, or of one length
    width                                 d = 3072 (the real width), 2 blocks, G = C
    runtime                               selection, gather, position tables, checks; no engines
    steps, requests                       runs of 5 to 80 steps; memory along 1000 steps, and along
                                          300 requests of changing size
    rungs                                 sets of 1 to 16 rungs

Every point is measured in a process of its own, so that its peak memory is its own; the time of a
plain matrix product in the same process is the unit that points are compared in. Results are added
to the JSON file, so that axes can be measured one by one. Linux only.

Examples:
    python scripts/bench_growth.py --output growth.json
    python scripts/bench_growth.py --axes both,text --output growth.json
    python scripts/bench_growth.py --axes operators --operators-at 1024,4096 --output growth.json
    python scripts/bench_growth.py --document growth.json --figure docs/images/growth.png
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.growth_tables import FORMAT, VERSION, draw, sections, summary
from benchmarks.tables import machine_text, markdown, size_text

FULL: dict[str, Any] = {
    "config": {"num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 512},
    "wide_config": {"joint_attention_dim": 512},
    "longest": 16384,
    "short": 1024,
    "text": 128,
    "lengths": (256, 1024, 4096, 16384),
    "texts": (64, 256, 1024, 2048),
    "wide_lengths": (1024, 4096),
    "shared": 3072,
    "run_length": 256,
    "longest_run": 512,
    "steps": (5, 10, 20, 40, 80),
    "many_steps": 1000,
    "marks": (20, 100, 200, 400, 600, 800, 1000),
    "requests": (20, 50, 100, 150, 200, 250, 300),
    "rungs": (1, 2, 4, 8, 16),
    "counts": (1, 2, 3, 4),
    "width": 3072,
}
# Everything that is done, on a model and at lengths that say nothing about growth.
_TINY_CONFIG = {
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": [4, 6, 6],
}
QUICK: dict[str, Any] = {
    "config": _TINY_CONFIG,
    "wide_config": {**_TINY_CONFIG, "num_attention_heads": 6},
    "longest": 64,
    "short": 16,
    "text": 8,
    "lengths": (16, 64),
    "texts": (4, 16),
    "wide_lengths": (16,),
    "shared": 48,
    "run_length": 16,
    "longest_run": 64,
    "steps": (5,),
    "many_steps": 40,
    "marks": (20, 40),
    "requests": (4, 8),
    "rungs": (1, 4),
    "counts": (1, 2, 3, 4),
    "width": 48,
}
# Axis -> the values that it runs over, and the lengths of a call that take them.
CALL_AXES: dict[str, tuple[str, tuple[str, ...]]] = {
    "both": ("lengths", ("noisy", "reference")),
    "noisy": ("lengths", ("noisy",)),
    "reference": ("lengths", ("reference",)),
    "text": ("texts", ("text",)),
    "batch": ("counts", ("batch",)),
    "shared": ("counts", ("references",)),
    "added": ("counts", ("references",)),
    "width": ("wide_lengths", ("noisy", "reference")),
}
OTHER_AXES = ("runtime", "steps", "requests", "rungs", "operators")
DEFAULT_AXES = (*CALL_AXES, *OTHER_AXES[:-1])
# (value on the axis, name of the engine set, what is measured and how)
Point = tuple[int, str, dict[str, Any]]


def calls_of(axis: str, sizes: dict[str, Any]) -> Iterator[tuple[int, dict[str, int]]]:
    """(value on the axis, size of the call)."""
    short, (values, lengths) = sizes["short"], CALL_AXES[axis]
    plain = {"noisy": short, "reference": short, "text": sizes["text"], "batch": 1, "references": 1}
    for value in sizes[values]:
        size = plain | dict.fromkeys(lengths, value)
        yield value, size | ({"reference": sizes["shared"] // value} if axis == "shared" else {})


def points_of(axis: str, sizes: dict[str, Any], arguments: argparse.Namespace) -> Iterator[Point]:
    """The points of an axis, in order."""
    repeats, longest = arguments.repeats, sizes["longest_run"]
    size = {"noisy": longest, "reference": longest, "text": sizes["text"], "batch": 1,
            "references": 1}  # fmt: skip
    if axis in CALL_AXES:
        for value, call in calls_of(axis, sizes):
            task = {"kind": "call", "size": call, "repeats": repeats, "budget_s": arguments.budget}
            yield value, "wide" if axis == "width" else "narrow", task
    elif axis == "runtime":
        task = {name: sizes[name] for name in ("lengths", "text", "width")}
        yield sizes["width"], "narrow", {**task, "kind": axis, "repeats": 3 * repeats}
    elif axis == "operators":
        for length in arguments.operators_at or sizes["lengths"][:2]:
            call = {**size, "noisy": length, "reference": length}
            yield length, "narrow", {"kind": axis, "size": call}
    elif axis == "requests":
        marks = sizes["requests"]
        yield max(marks), "cheap", {"kind": axis, "size": size, "marks": marks}
    elif axis == "rungs":
        for rungs in sizes["rungs"]:
            yield rungs, f"rungs-{rungs}", {"kind": axis, "size": size, "repeats": repeats}
    else:
        short = dict.fromkeys(("noisy", "reference"), sizes["run_length"])
        call = {**size, **short, "text": sizes["texts"][0]}
        for steps in (*sizes["steps"], sizes["many_steps"]):
            marks = sizes["marks"] if steps == sizes["many_steps"] else ()
            yield steps, "cheap", {"kind": axis, "size": call, "steps": steps, "marks": marks}


def build_options(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the set of this name is built with, besides its folder."""
    # Four references of the short length are the longest of the axis "added".
    longest = max(sizes["longest"], sizes["shared"], 4 * sizes["short"])
    options = {
        "model": "qwen-edit",
        "weights": "random",
        "num_layers": 3,
        "front_depth": 1,
        "layers": (1,),
        "config": sizes["config"],
        "max_text_tokens": max(sizes["texts"]),
        "max_batch": 4,
    }
    if name == "wide":
        options |= {"config": sizes["wide_config"], "num_layers": 2}
    elif name != "narrow":
        longest = sizes["longest_run"]
        options["config"] = {**sizes["config"], "num_attention_heads": 2}
    if name.startswith("rungs-"):
        options["rungs"] = int(name.removeprefix("rungs-"))
    return options | {"max_reference_tokens": longest, "max_noisy_tokens": longest}


class Bench:
    """Runs points in processes of their own and keeps what they say."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.sizes = dict(QUICK if arguments.quick else FULL)
        for name in ("lengths", "wide_lengths"):
            self.sizes[name] = getattr(arguments, name) or self.sizes[name]
        self.threads = arguments.threads or os.cpu_count() or 1
        self.built: set[str] = set()
        output, settings = arguments.output, {"threads": self.threads, "quick": arguments.quick}
        new = {"format": FORMAT, "version": VERSION, "settings": settings}
        self.result: dict[str, Any] = json.loads(output.read_text()) if output.exists() else new
        found = {name: self.result.get(name) for name in new}
        if found != new:
            raise SystemExit(
                f"{output} was measured with {found}, this is {new}: give another --output"
            )

    def run(self, task: dict[str, Any], memory_limit: int) -> dict[str, Any]:
        """One task in a process of its own."""
        text = json.dumps({**task, "threads": self.threads, "memory_limit_bytes": memory_limit})
        command = [*shlex.split(self.arguments.under), sys.executable, __file__, "--task", text]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"the process that measured {text} ended with {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "stopped_at_bytes" in result and task["kind"] != "call":
            raise SystemExit(
                f"{task['kind']} was given up at {size_text(result['stopped_at_bytes'])}; raise "
                f"--memory-limit ({self.arguments.memory_limit:g}) or measure on a larger machine"
            )
        return result

    def measure(self, axis: str) -> None:
        """Measure all points of an axis."""
        found = []
        for value, name, task in points_of(axis, self.sizes, self.arguments):
            print(f"[{time.strftime('%H:%M:%S')}] {axis} = {value}", file=sys.stderr, flush=True)
            folder = str(self.arguments.engine / name)
            if name not in self.built:
                options = {**build_options(name, self.sizes), "output": folder}
                self.run({"kind": "build", "options": options}, 0)
                self.built.add(name)
            limit = round(self.arguments.memory_limit * (1 << 30))
            found.append({"value": value, **self.run({**task, "engine": folder}, limit)})
            self.keep(axis, found)

    def keep(self, key: str, value: Any) -> None:
        """Put it into the result, and the result into the file."""
        self.result[key] = value
        target = self.arguments.output
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".partial")
        beside.write_text(json.dumps(self.result) + "\n")
        os.replace(beside, target)


def document(result: dict[str, Any]) -> str:
    """All tables as Markdown, with what they were measured on."""
    return f"{machine_text(result['machine'])}\n\n{markdown(sections(result), level=2)}"


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--axes",
        default=",".join(DEFAULT_AXES),
        help=f"of {', '.join((*CALL_AXES, *OTHER_AXES))} (default: all but operators)",
    )
    parser.add_argument("--output", type=Path, default=Path("engines-out/growth.json"),
                        help="the JSON file")  # fmt: skip
    parser.add_argument("--engine", type=Path, default=Path("engines-out/bench-growth"),
                        help="where the sets are built")  # fmt: skip
    parser.add_argument("--lengths", type=_whole_numbers, help="G and C, in place of the default")
    parser.add_argument("--wide-lengths", type=_whole_numbers, help="the same of the axis width")
    parser.add_argument("--operators-at", type=_whole_numbers, help="G = C of the axis operators")
    parser.add_argument(
        "--repeats",
        type=int,
        default=6,
        help="rounds of a point, one of them a warm-up (default 6)",
    )
    parser.add_argument("--budget", type=float, default=30.0,
                        help="seconds after which a point gets no further round")  # fmt: skip
    parser.add_argument("--memory-limit", type=float, default=16.0,
                        help="GiB at which a point is given up (default 16)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is one a core")
    parser.add_argument("--under", default="", metavar="COMMAND",
                        help="what each process is run under, as 'taskset -c 0,1'")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a tiny model and short lengths: whether all of it works")  # fmt: skip
    parser.add_argument("--document", type=Path, metavar="JSON",
                        help="measure nothing; print the Markdown tables of a result")  # fmt: skip
    parser.add_argument("--figure", type=Path, help="with --document: draw it there as well")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats = 2
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.task:
        from benchmarks.growth import run_task

        print(json.dumps(run_task(arguments.task)), flush=True)
        return 0
    if arguments.document:
        result = json.loads(arguments.document.read_text())
        print(document(result))
        if arguments.figure:
            draw(result, arguments.figure)
        return 0
    axes = arguments.axes.split(",")
    known = (*CALL_AXES, *OTHER_AXES)
    if unknown := [axis for axis in axes if axis not in known]:
        print(
            f"error: no axis {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr
        )
        return 2
    bench = Bench(arguments)
    from ditrim.runtime.profiling.machine import describe_machine

    bench.keep("machine", describe_machine(None, bench.threads))
    for axis in axes:
        bench.measure(axis)
    print(document({key: bench.result[key] for key in ("machine", *axes)}))
    print(json.dumps(summary(bench.result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
