#!/usr/bin/env python3
"""Prove this repository on an NVIDIA GPU, and say in one JSON document what was seen.

Every part runs in a process of its own and stands alone: one that cannot run says why, one that
fails or hangs does not stop the others, and what it had measured until then is kept. A part is "ok"
only when its checks ran and held. Without a GPU everything but the environment is skipped, and the
exit code is 0; a failed part makes it 1. It needs torch and this checkout; the scoring kernel's
parts need Triton, the others diffusers. All of it is done within 5 minutes: what is worth most
comes first.

Parts:
  environment                 GPU, driver and libraries that are there
  kernel-accuracy             the Triton scoring kernel against float64
  stack                       Qwen-Image-Edit at full width and depth on the torch backend: full,
                              anchor and reduced steps at each rung, eager and with CUDA graphs,
                              next to unmodified diffusers; a whole schedule, computed and run
  small-editor                the small editor's pictures in bf16, against float32 on the CPU
  kernel-speed                the kernel's time against what the GPU's products and memory allow
  compiled                    the stack's steps with compiled blocks, next to diffusers' compiled
  onnxruntime-cuda            the small editor on ONNX Runtime's CUDA provider
  tensorrt-rtx, tensorrt      the small editor as plans; CUDA graphs; memory over 200 shape changes
  block-stack-tensorrt-rtx, block-stack-tensorrt
                              full-width blocks as plans: each rung, and what scoring adds

Examples:
    python scripts/gpu_check.py --output docs/gpu/h200-2026-11-21.json
    python scripts/gpu_check.py --quick --only kernel-accuracy --only stack
    python scripts/gpu_check.py --rehearse
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.part import NO_GPU, Context, Part, Record, run_part
from gpu.process import commit, make_importable, run_apart, without_paths
from gpu.table import tables_of

# All of it; parts get what is left.
BUDGET_SECONDS = 300
# A rehearsal is not short of time: each part may take so long.
REHEARSAL_SECONDS = 600
# Module, function, its first argument if it has one, and seconds at most.
PARTS: dict[str, tuple[str, str, str | None, int]] = {
    "environment": ("environment", "environment", None, 45),
    "kernel-accuracy": ("kernel", "kernel_accuracy", None, 35),
    "stack": ("stack", "stack", None, 125),
    "small-editor": ("small", "small_torch", None, 40),
    "kernel-speed": ("kernel", "kernel_speed", None, 25),
    "compiled": ("stack", "compiled", None, 150),
    "onnxruntime-cuda": ("small", "onnxruntime_cuda", None, 150),
    "tensorrt-rtx": ("plans", "small_plans", "tensorrt-rtx", 240),
    "tensorrt": ("plans", "small_plans", "tensorrt", 240),
    "block-stack-tensorrt-rtx": ("plans", "stack_of_plans", "tensorrt-rtx", 240),
    "block-stack-tensorrt": ("plans", "stack_of_plans", "tensorrt", 240),
}


def part_named(name: str) -> Part:
    """The function of a part; its module imports what it needs, so it is imported here."""
    module, function, argument, _ = PARTS[name]
    try:
        part = getattr(importlib.import_module(f"gpu.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from gpu.part import need_gpu

        return need_gpu
    return part if argument is None else functools.partial(part, argument)


def run_here(arguments: argparse.Namespace) -> None:
    """Run one part in this process, which `run_apart` started."""
    if arguments.rehearse:
        begin_rehearsal()
    with (arguments.folder / f"{arguments.part}.jsonl").open("w") as file:
        context = Context(
            folder=arguments.folder,
            record=Record(file),
            is_quick=arguments.quick,
            is_rehearsal=arguments.rehearse,
            seconds=arguments.seconds,
        )
        run_part(part_named(arguments.part), context)


def begin_rehearsal() -> None:
    """Let Triton interpret, and torch compile without generating code, which takes minutes."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = functools.partialmethod(plain, backend="eager")  # type: ignore


def why_not(part: str, left: float, parts: Mapping[str, Any], is_rehearsal: bool) -> str | None:
    """Why a part is not even started."""
    gpus = parts.get("environment", {}).get("measured", {}).get("gpus")
    if gpus == [] and not is_rehearsal:
        return NO_GPU
    return "the time was used up" if left < 1 else None


def run_parts(arguments: argparse.Namespace, start: float) -> dict[str, Any]:
    """Run what was asked for."""
    options = ["--quick"] if arguments.quick else []
    options += ["--rehearse"] if arguments.rehearse else []
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        make_importable(folder)
        # The environment comes in any case: figures say nothing without it.
        for part in dict.fromkeys(["environment", *(arguments.only or PARTS)]):
            left = BUDGET_SECONDS - (time.monotonic() - start)
            left = REHEARSAL_SECONDS if arguments.rehearse else left
            reason = why_not(part, left, parts, arguments.rehearse)
            if reason is not None:
                parts[part] = {"status": "skipped", "reason": reason}
            else:
                seconds = left if arguments.rehearse else min(PARTS[part][-1], left)
                parts[part] = run_apart(part, seconds, options, folder)
            outcome = parts[part]
            print(f"{part}: {outcome['status']} {outcome.get('reason', '')}", file=sys.stderr)
            if arguments.output:  # should this process be stopped, what is done is there
                write(arguments.output, document_of(arguments, parts, start))
    return parts


def document_of(
    arguments: argparse.Namespace, parts: Mapping[str, Any], start: float
) -> dict[str, Any]:
    """Everything that was seen."""
    gpus = parts.get("environment", {}).get("measured", {}).get("gpus", [])
    options = [f"--only {part}" for part in arguments.only or ()]
    options += [f"--{name}" for name in ("quick", "rehearse") if getattr(arguments, name)]
    document: dict[str, Any] = without_paths(
        {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "command": " ".join(["python scripts/gpu_check.py", *options]),
            "commit": commit(),
            "gpu": gpus[0]["name"] if gpus else None,
            "seconds": round(time.monotonic() - start, 1),
            "summary": {
                status: [name for name, part in parts.items() if part["status"] == status]
                for status in ("ok", "failed", "skipped")
            },
            "parts": parts,
        }
    )
    if arguments.rehearse:
        document = {"rehearsal": "on the CPU and at toy size: its times mean nothing"} | document
    return document


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(beside, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), metavar="PART", help="can be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run every part's code on the CPU at toy size, before a GPU's minutes are spent",
    )
    parser.add_argument("--output", type=Path, help="write the JSON document there as well")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.part:
        run_here(arguments)
        return 0
    start = time.monotonic()
    parts = run_parts(arguments, start)
    document = document_of(arguments, parts, start)
    if arguments.output:
        write(arguments.output, document)
    skipped = document["summary"]["skipped"]
    if skipped:
        print(f"skipped {len(skipped)} of {len(parts)} parts", file=sys.stderr)
    print(json.dumps(document), flush=True)
    # Last, and apart from the document: what a log's end shows.
    print(f"\n{tables_of(document['parts'])}", file=sys.stderr)
    return 1 if document["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
