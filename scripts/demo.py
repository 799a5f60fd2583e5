"""The Python part of `scripts/demo`: two commands, shown as they are run.

Example:
    python scripts/demo.py recolour --output demo-out
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ditrim.runtime.small_editor import samples_folder

# The modules behind the commands: the environment's bin/ need not be on the PATH.
_MODULES = {
    "build-engine": "ditrim.commands.build_engine",
    "edit-image": "ditrim.commands.edit_image",
}


def load_samples() -> dict[str, dict[str, Any]]:
    """The shipped edits by kind, in order."""
    lines = (samples_folder() / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {sample["kind"]: sample for sample in map(json.loads, lines)}


def run_command(name: str, *arguments: str) -> None:
    """Show a command and run it; leaves with its exit code if it fails."""
    print(f"\n$ {shlex.join([name, *arguments])}", flush=True)
    program = f"import sys; from {_MODULES[name]} import main; sys.exit(main())"
    code = subprocess.run([sys.executable, "-c", program, *arguments], check=False).returncode
    if code != 0:
        sys.exit(code)


def main() -> None:
    """Build an engine set, edit a sample and compare it with the full context."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample", nargs="?", default="recolour")
    parser.add_argument("--output", type=Path, default=Path("demo-out"))
    args = parser.parse_args()
    samples = load_samples()
    if args.sample not in samples:
        parser.error(f"no sample {args.sample!r}; there are: {', '.join(samples)}")
    sample, output = samples[args.sample], args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"the output folder {output} cannot be made: {error.strerror}")

    start = time.perf_counter()
    run_command("build-engine", "--preset", "small", "--output", str(output / "engine"))
    images = [str(samples_folder() / name) for name in sample["images"]]
    run_command(
        "edit-image",
        *("--engine", str(output / "engine")),
        *(argument for image in images for argument in ("--image", image)),
        *("--prompt", sample["prompt"]),
        *("--output", str(output / "edited.png")),
        *("--policy", "topi", "--tau", "0.85", "--interval", "10"),
        "--compare-full",
        *("--strip", str(output / "strip.png")),
        *("--report", str(output / "report.json")),
    )
    print(f"\ndone in {time.perf_counter() - start:.0f} s; look at {output / 'strip.png'}")


if __name__ == "__main__":
    main()
