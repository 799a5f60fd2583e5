"""`edit-images`: killed at any instant and run again, every result is that of a single edit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditrim
from ditrim.commands.edit_images import main
from ditrim.runtime.editing.pictures import open_picture
from ditrim.runtime.editing.pipelines import EditRequest, prepare_request, run_edit
from ditrim.runtime.policy_text import policy_from_text
from ditrim.runtime.small_editor import load_small_pipeline, samples_folder

ENGINE = ("--engine", "torch", "--pipeline", "small", "--device", "cpu")
PROGRAM = "import sys; from ditrim.commands.edit_images import main; sys.exit(main(sys.argv[1:]))"
PROMPTS = ("take away the black ring", "make the picture grey")
POLICIES = ("topi tau=0.7 interval=2", "full")
MOST_KILLS = 4


def write_edits(folder: Path, count: int) -> Path:
    """A file of edits whose pictures, prompts, seeds and policies take turns."""
    sources = sorted(samples_folder().glob("*-source.png"))
    lines: list[dict[str, Any]] = [
        {
            "image": str(sources[index % len(sources)]),
            "prompt": PROMPTS[index % 2],
            "seed": index,
            "policy": POLICIES[index % 2],
        }
        for index in range(count)
    ]
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def expected_pictures(edits: Path, steps: int) -> list[np.ndarray[Any, Any]]:
    """The same edits one by one through `attach`."""
    pipe = load_small_pipeline()
    found = []
    for line in map(json.loads, edits.read_text().splitlines()):
        request = EditRequest(
            images=(open_picture(line["image"]),),
            prompt=line["prompt"],
            seed=line["seed"],
            steps=steps,
        )
        with ditrim.attach(pipe, policy=policy_from_text(line["policy"]).policy) as attachment:
            engine_set = attachment.transformer.denoiser.engines.engine_set
            found.append(np.asarray(run_edit(pipe, prepare_request(pipe, engine_set, request))))
    return found


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    code = main([*ENGINE, *map(str, arguments), "--steps", "2", "--json"])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.mark.slow
def test_batch_that_is_killed_goes_on_and_equals_single_edits(tmp_path: Path) -> None:
    edits, output = write_edits(tmp_path, 12), tmp_path / "results"
    command = [sys.executable, "-c", PROGRAM, str(edits), *ENGINE, "--steps", "2", "--workers", "2"]
    command += ["--output", str(output), "--json"]
    rng, kills, before = random.Random(0), 0, -1
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while kills < MOST_KILLS and process.poll() is None:
            done = len(list(output.glob("*.png"))) if output.exists() else 0
            if done > before + rng.randrange(3):
                time.sleep(rng.random() / 5)
                os.kill(process.pid, signal.SIGKILL)
                kills, before = kills + 1, done
                break
            time.sleep(0.01)
        out, _ = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0
    assert kills > 0
    answer = json.loads(out.splitlines()[-1])
    assert len(answer["made"]) + len(answer["kept"]) == 12
    assert len(answer["kept"]) > 0
    for index, picture in enumerate(expected_pictures(edits, steps=2)):
        found = np.asarray(Image.open(output / f"edit-{index:04d}.png"))
        assert np.array_equal(found, picture), index


def test_what_fails_is_told_and_leaves_the_others_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "results"
    folder.mkdir()
    source = samples_folder() / "remove-source.png"
    (folder / "good.png").write_bytes(source.read_bytes())
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "moving.gif").write_bytes(b"no ending that is read")
    arguments = [folder, "--prompt", PROMPTS[0], "--output", output]
    code, answer, told = run(capfd, *arguments)
    assert code == 1
    assert "1 of 2 edits failed (bad: picture" in answer["error"]
    assert "why it failed" in told
    assert "left out, by their endings no pictures: moving.gif" in told
    assert json.loads((output / "failures.jsonl").read_text())["name"] == "bad"
    stamp = (output / "good.png").stat().st_mtime_ns
    (folder / "bad.png").write_bytes(source.read_bytes())
    code, answer, _ = run(capfd, *arguments)
    assert (code, answer["made"], answer["kept"]) == (0, ["bad"], ["good"])
    assert (output / "good.png").stat().st_mtime_ns == stamp
    assert not (output / "failures.jsonl").exists()
    code, answer, _ = run(capfd, *arguments, "--seed", "1")
    assert code == 2
    assert "is there, and of another edit" in answer["error"]


def test_results_of_other_weights_are_not_taken_for_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe, folder = load_small_pipeline(), tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes((samples_folder() / "remove-source.png").read_bytes())
    pipe.save_pretrained(tmp_path / "model")
    given = [folder, "--prompt", PROMPTS[0], "--output", tmp_path / "results"]
    given += ["--pipeline", tmp_path / "model"]
    assert run(capfd, *given)[0] == 0
    assert run(capfd, *given)[1]["kept"] == ["a"]
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.01)
    pipe.save_pretrained(tmp_path / "model")
    code, answer, _ = run(capfd, *given)
    assert code == 2
    assert "is there, and of another edit" in answer["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no edits"),
        ("[" * 100_000, "line 1: it is truncated or not JSON"),
        ('{"image": 3}', "line 1: key 'image"),
        ('{"image": "a.png", "size": 3}', "line 1: key 'size' is unknown"),
        ('{"image": "a.png"}', "line 1 has no prompt: give it one, or --prompt for all"),
        ('{"image": "a.png", "prompt": "x", "name": "../y"}', "a name that is no plain file name"),
        ('{"image": "a", "prompt": "x", "name": "y"}\n' * 2, "two edits are called 'y'"),
    ],
)
def test_malformed_batches_are_refused_before_anything_runs(
    text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edits.jsonl").write_text(text)
    code, answer, _ = run(capfd, tmp_path / "edits.jsonl", "--output", tmp_path / "results")
    assert code == 2
    assert message in answer["error"]
    assert not (tmp_path / "results").exists()
