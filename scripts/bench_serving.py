"""Load on a server of edits: clients, disconnects, hostile requests, drains; prints JSON.

Starts `serve-edits` as a process of its own with the shipped small editor, and asks it over the
loopback with httpx. Every picture is compared with that of a single run with the same seed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from ditrim.runtime.small_editor import load_small_pipeline, samples_folder

PROMPT = "take away the black ring"
PROGRAM = "from ditrim.commands.serve_edits import main; raise SystemExit(main())"
SEEDS = 8


class Server:
    """A server process and requests to it."""

    def __init__(self, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = [
            "--engine",
            "torch",
            "--pipeline",
            "small",
            "--device",
            "cpu",
            "--max-steps",
            "1000",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *given, "--port", str(port), *options],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=600)

    def wait_ready(self) -> None:
        """Wait until the warm-up is over."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server ended before it was ready")
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def edit(self, png: bytes, seed: int, steps: int, **more: Any) -> httpx.Response:
        """Ask for one edit."""
        fields = {"prompt": PROMPT, "seed": str(seed), "num_inference_steps": str(steps)} | more
        return self.client.post("/v1/images/edits", data=fields, files={"image": png})

    def metric(self, name: str) -> float:
        """One number of /metrics, 0 where it is not there yet."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith(f"{name} ")), 0.0)

    @property
    def resident(self) -> int:
        """Resident memory, bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """A server that is ready, and ended afterwards."""
    started = Server(*options)
    try:
        started.wait_ready()
        yield started
    finally:
        started.client.close()
        started.process.kill()
        started.process.wait()


def pixels(response: httpx.Response) -> Any:
    """The picture of an answer."""
    file = io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))
    return np.asarray(Image.open(file).convert("RGB"))


def expected_pictures(png: bytes, steps: int) -> list[Any]:
    """Single runs of every seed, each after the other."""
    import ditrim
    from ditrim.runtime.editing.pipelines import EditRequest, run_edit

    image, pipe = Image.open(io.BytesIO(png)).convert("RGB"), load_small_pipeline()
    with ditrim.attach(pipe):
        return [
            np.asarray(
                run_edit(pipe, EditRequest(images=(image,), prompt=PROMPT, steps=steps, seed=seed))
            )
            for seed in range(SEEDS)
        ]


def load(png: bytes, args: argparse.Namespace) -> dict[str, Any]:
    """Clients that ask one after the other, for some time."""
    expected = expected_pictures(png, args.steps)
    statuses: Counter[str] = Counter()
    memory: list[int] = []
    wrong = 0
    lock = threading.Lock()
    with server("--workers", "2", "--queue", "8") as running:
        end = time.monotonic() + args.seconds

        def client(number: int) -> None:
            nonlocal wrong
            draw = random.Random(number)
            while time.monotonic() < end:
                seed = draw.randrange(SEEDS)
                response = running.edit(png, seed, args.steps)
                is_wrong = response.status_code == 200 and not np.array_equal(
                    pixels(response), expected[seed]
                )
                with lock:
                    statuses[str(response.status_code)] += 1
                    wrong += is_wrong
                if response.status_code == 429:
                    time.sleep(draw.uniform(0.1, 0.5))

        with ThreadPoolExecutor(args.clients) as threads:
            waits = [threads.submit(client, number) for number in range(args.clients)]
            while not all(wait.done() for wait in waits):
                memory.append(running.resident)
                time.sleep(min(1.0, args.seconds / 20))
            for wait in waits:
                wait.result()
    half = memory[len(memory) // 2 :]
    return {
        "statuses": dict(statuses),
        "pictures_that_differ": wrong,
        "memory_mb": [round(size / 1e6, 1) for size in (half[0], half[-1])],
        "memory_change_second_half": round(half[-1] / half[0] - 1, 4),
    }


def overhead(png: bytes, args: argparse.Namespace) -> dict[str, float]:
    """What the server adds to an edit when nothing else asks."""
    with server() as running:
        shares, seconds = [], []
        for seed in range(args.repeats + 1):
            start = time.perf_counter()
            told = running.edit(png, seed, 40).json()
            whole = time.perf_counter() - start
            if seed:
                shares.append(whole / told["seconds"] - 1)
                seconds.append(whole)
    return {
        "edit_seconds": round(statistics.median(seconds), 4),
        "overhead_share": round(statistics.median(shares), 4),
    }


def disconnects(png: bytes, args: argparse.Namespace) -> dict[str, Any]:
    """Clients that leave at random instants; steps that run after each."""
    draw, waits = random.Random(0), []
    with server("--queue", "1") as running:
        step = running.edit(png, 0, 40).json()["seconds"] / 40
        for _ in range(args.disconnects):
            fields = {"prompt": PROMPT, "num_inference_steps": "1000"}
            with suppress(httpx.TransportError):
                httpx.post(
                    f"{running.url}/v1/images/edits",
                    data=fields,
                    files={"image": png},
                    timeout=draw.uniform(0.02, 0.3),
                )
            start = time.perf_counter()
            while running.metric("ditrim_running"):
                pass
            waits.append(time.perf_counter() - start)
        status = running.edit(png, 0, 4).status_code
    return {
        "count": args.disconnects,
        "free_after_s": {"median": statistics.median(waits), "max": max(waits)},
        "step_s": step,
        "next_status": status,
    }


def hostile(png: bytes, args: argparse.Namespace) -> dict[str, Any]:
    """Mutated requests."""
    form = httpx.Request(
        "POST", "http://x", data={"prompt": PROMPT, "n": "9"}, files={"image": png}
    )
    whole, kind, draw = form.read(), form.headers["content-type"], random.Random(1)
    statuses: Counter[str] = Counter()
    with server() as running:
        for _ in range(args.hostile):
            body = bytearray(whole)
            for _ in range(draw.randrange(1, 40)):
                body[draw.randrange(len(body))] = draw.randrange(256)
            kinds = draw.choice([kind, kind, "application/json", kind[:-2]])
            answer = running.client.post(
                "/v1/images/edits", content=bytes(body), headers={"content-type": kinds}
            )
            statuses[str(answer.status_code)] += 1
        alive = running.edit(png, 0, 4).status_code
    return {"count": args.hostile, "statuses": dict(statuses), "next_status": alive}


def drains(png: bytes, args: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM while edits run and wait: every accepted one is answered."""
    statuses: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    for number in range(args.drains):
        with server("--no-warm-up", "--workers", "2") as running:
            with ThreadPoolExecutor(4) as threads:
                waits = [threads.submit(running.edit, png, seed, 10) for seed in range(4)]
                while running.metric("ditrim_edits_accepted_total") < len(waits):
                    time.sleep(0.005)
                time.sleep(random.Random(number).uniform(0, 0.05))
                running.process.send_signal(signal.SIGTERM)
                statuses.update(str(wait.result().status_code) for wait in waits)
            exits[str(running.process.wait(120))] += 1
    return {"count": args.drains, "statuses": dict(statuses), "exit_codes": dict(exits)}


def main() -> None:
    """Run every part and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: scripts/bench_serving.py --seconds 60 --drains 5"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=8, help="of an edit under load")
    parser.add_argument("--repeats", type=int, default=20, help="edits for the overhead")
    parser.add_argument("--disconnects", type=int, default=200)
    parser.add_argument("--hostile", type=int, default=1000)
    parser.add_argument("--drains", type=int, default=50)
    args = parser.parse_args()
    png = (samples_folder() / "remove-source.png").read_bytes()
    result: dict[str, Any] = {"options": vars(args)}
    for part in (load, overhead, disconnects, hostile, drains):
        print(part.__name__, file=sys.stderr, flush=True)
        result[part.__name__] = part(png, args)
        print(json.dumps(result[part.__name__]), file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
