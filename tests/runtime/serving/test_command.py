"""`serve-edits` as a process: it drains on SIGTERM, and says why it cannot start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditrim.commands.serve_edits import main

PROGRAM = "from ditrim.commands.serve_edits import main; raise SystemExit(main())"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_sigterm_finishes_what_was_accepted(png: bytes) -> None:
    port = free_port()
    options = ["--engine", "torch", "--pipeline", "small", "--device", "cpu", "--no-warm-up"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options, "--port", str(port), "--workers", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while _status(url) != 200:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)

        def edit(seed: int) -> Any:
            fields = {"prompt": "secret words", "seed": str(seed), "num_inference_steps": "20"}
            return httpx.post(
                f"{url}/v1/images/edits", data=fields, files={"image": png}, timeout=240
            )

        with ThreadPoolExecutor(3) as threads:
            waits = [threads.submit(edit, seed) for seed in range(3)]
            while _accepted(url) < 3:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert [wait.result().status_code for wait in waits] == [200] * 3
        _, logged = process.communicate(timeout=120)
        assert process.returncode == 0, logged
        assert "secret" not in logged
        lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
        edits = [line for line in lines if line.get("path") == "/v1/images/edits"]
        assert {line["seed"] for line in edits} == {0, 1, 2}
        assert all(line["status"] == 200 and line["request_id"] for line in edits)
    finally:
        process.kill()
        process.wait()


def _status(url: str) -> int:
    try:
        return httpx.get(f"{url}/health").status_code
    except httpx.TransportError:
        return 0


def _accepted(url: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("ditrim_edits_accepted_total ")]
    return int(float(line.rsplit(" ", 1)[1]))


def test_a_set_that_cannot_be_loaded_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--engine", str(tmp_path / "none"), "--port", str(free_port()), "--json"])
    assert code == 1
    assert "does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--engine", "a", "--engine", "b"], "given twice"),
        (["--engine", "a", "--preset", "quick"], "write NAME=VALUE"),
        (["--engine", "a", "--policy", "nothing"], "nothing"),
        (["--engine", "a", "--warm-size", "x"], "neither WxH"),
        (["--engine", "a", "--queue", "-1"], "must lie in"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--json"]) == 2
    assert word in capsys.readouterr().out
