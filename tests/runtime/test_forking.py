"""A forked child has the memory of engines and none of their threads: it is refused at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Torch's own threads are what a child lacks; one thread alone would do without.
_SCRIPT = """
import os, select, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(2)
from tiny_pipelines import request, tiny_pipeline
import ditrim.runtime as ditrim
from ditrim.engines.build.build import build_engine_set
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.load import load_engines

def child(name, act):
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            act()
            said = "ran"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    came = select.select([reader], [], [], 40)[0]
    print(name, os.read(reader, 4000).decode() if came else "hangs", flush=True)
    if not came:
        os.kill(number, 9)
    os.waitpid(number, 0)

pipe = tiny_pipeline("flux-kontext")
engines = load_engines(sys.argv[2], device="cpu") if sys.argv[2] else None
with ditrim.attach(pipe, engines) as attachment:
    pipe(**request("flux-kontext"))
    child("call", lambda: pipe(**request("flux-kontext")))
    child("request", lambda: attachment.request().__enter__())
other = tiny_pipeline("flux-kontext")
child("attach", lambda: ditrim.attach(other))
child("engines", lambda: ditrim.attach(other, engines or ditrim.torch_engines(other)))
child("build", lambda: build_engine_set(BuildOptions(model="flux-kontext", weights="random")))
"""


@pytest.mark.parametrize("kind", [pytest.param("set", marks=pytest.mark.slow), "torch"])
def test_what_a_forked_child_cannot_do_says_so_and_never_hangs(
    kind: str, tiny_engine_sets: Any
) -> None:
    support = Path(__file__).parents[1] / "support"
    folder = str(tiny_engine_sets("flux-kontext")) if kind == "set" else ""
    command = [sys.executable, "-c", _SCRIPT, str(support), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(said) == ["call", "request", "attach", "engines", "build"]
    for text in said.values():
        assert text.startswith("BackendError: this process was forked from process")
        assert "spawn" in text
