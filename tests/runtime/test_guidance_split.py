"""True guidance's branches on two processes over gloo give what one process gives."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import request, small_pictures, tiny_pipeline

import ditrim.runtime as ditrim
from ditrim.plugins.errors import UsageError

KINDS = ("qwen-edit", "flux-kontext")


def edit(
    family: str, group: Any, engine_set: str | None = None, *, guided: bool = True
) -> tuple[torch.Tensor, list[Any]]:
    """A guided edit, and its steps' branches and roles."""
    pipe = tiny_pipeline(family)
    policy = ditrim.ToPi(tau=0.5, interval=3)
    with (
        small_pictures(64),
        torch.no_grad(),
        ditrim.attach(pipe, engine_set, policy, guidance_group=group) as attachment,
    ):
        image = pipe(**request(family, steps=4, guided=guided)).images
        steps = [(step.branch, step.role, step.num_kept) for step in attachment.report.steps]
    return image, steps


def work(rank: int, folder: str, paths: list[str], engine_set: str) -> None:
    sys.path[:0] = paths
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    group = torch.distributed.group.WORLD
    found = {family: edit(family, group) for family in KINDS}
    found["engine set"] = edit("qwen-edit", group, engine_set)
    refusals = {}
    pipe = tiny_pipeline("qwen-edit")
    for name, act in {
        "unguided": lambda: edit("qwen-edit", group, guided=False),
        "policy": lambda: ditrim.attach(pipe, policy=ditrim.Auto(), guidance_group=group),
        "cache": lambda: ditrim.attach(
            pipe, cache=ditrim.StepCache(threshold=0.1), guidance_group=group
        ),
    }.items():
        try:
            act()
        except UsageError as error:
            refusals[name] = str(error)
    torch.save((found, refusals), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(
    tmp_path: Path, tiny_engine_sets: Callable[[str], Path]
) -> None:
    engine_set = str(tiny_engine_sets("qwen-edit"))
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=work, args=(rank, str(tmp_path), sys.path, engine_set))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0, 0]
    made = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    alone = {family: edit(family, None) for family in KINDS}
    alone["engine set"] = edit("qwen-edit", None, engine_set)
    for family, (expected, steps) in alone.items():
        assert bool(expected.isfinite().all())
        for rank, branch in enumerate(("cond", "uncond")):
            image, own = made[rank][0][family]
            assert torch.equal(image, made[0][0][family][0])
            assert float((image - expected).abs().max() / expected.abs().max()) < 1e-5
            assert own == [step for step in steps if step[0] == branch]
        assert [step[1] for step in steps if step[0] == "cond"].count("reduced") == 2
    for _, refusals in made:
        assert "give a negative prompt" in refusals["unguided"]
        assert "Auto was not tested" in refusals["policy"]
        assert "a step cache was not tested" in refusals["cache"]


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(UsageError, match="call init_process_group first"):
        ditrim.attach(tiny_pipeline("qwen-edit"), guidance_group=object())
