"""A profile that no machine made: its medians are the constants here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ditrim.engines.cost.cost import Peak
from ditrim.engines.cost.flops import CallSize
from ditrim.runtime.profiling.profile import Profile, Row

GEOMETRY = (1, 64, 16, 64)  # batch, noisy, text, reference
CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
}
# Milliseconds of each part of a made-up profile; BACK by kept tokens.
FRONT, ANCHOR, SELECTION, ROPE, SCHEDULER, OVERHEAD = 10.0, 62.0, 1.0, 0.5, 0.25, 0.75
BACKS = {16: 30.0, 32: 40.0, 64: 60.0}
GATHER_A_TOKEN = 0.01


def row(part: str, kept: int, *samples: float) -> Row:
    batch, noisy, text, reference = GEOMETRY
    return Row(
        part=part,
        batch=batch,
        num_noisy=noisy,
        num_text=text,
        num_reference=reference,
        num_kept=kept,
        samples_ms=samples,
    )


def made_up(spread: float = 0.0, scale: float = 1.0) -> Profile:
    """A profile whose medians are the constants above; samples lie around them."""

    def around(median: float) -> tuple[float, ...]:
        return tuple(scale * median * (1 + spread * step / 5) for step in range(-5, 6))

    entries = [("front", 64, FRONT), ("anchor", 64, ANCHOR)]
    entries += [("back", kept, ms) for kept, ms in BACKS.items()]
    entries += [("gather", kept, GATHER_A_TOKEN * kept) for kept in (16, 32)]
    entries += [("selection", 64, SELECTION), ("rope", 32, ROPE)]
    entries += [("scheduler", 64, SCHEDULER), ("overhead", 64, OVERHEAD)]
    profile = Profile(
        engine={
            "model": "qwen-edit",
            "architecture": "qwen",
            "config": CONFIG,
            "front_depth": 1,
            "num_layers": 4,
            "num_scored": 2,
            "precision": "fp32",
            "backend": "onnxruntime",
            "backend_version": "1",
            "identity": "made up",
            "rungs": list(BACKS),
            "granularity": 1,
            "limits": {"batch": 4, "noisy": 64, "text": 16},
        },
        machine={
            "name": "a machine",
            "device": "cpu",
            "cores": 2,
            "threads": 2,
            "timer": "made up",
            "memory": "made up",
            "versions": {},
            "clocks": {},
            "load": {"before": 3.5},
        },
        peak=Peak(tflops=0.1, gb_s=10.0, source="made up"),
        settings={
            "repeats": 11,
            "warmup": 1,
            "tau": 0.85,
            "max_noise": 0.1,
            "resolutions": {},
        },
        created="2026-01-01T00:00:00Z",
        rows=tuple(row(part, kept, *around(ms)) for part, kept, ms in entries),
    )
    model = profile.model_cost
    size = CallSize(num_noisy=64, num_reference=64, num_text=16)

    def priced(item: Row) -> Row:
        at = replace(size, num_reference=item.num_kept)
        costs = {
            "front": model.front(size),
            "back": model.back(at, num_rows=1),
            "anchor": model.back(size, num_rows=64),
            "gather": model.gather(at),
        }
        if item.part not in costs:
            return item
        cost = costs[item.part]
        return replace(item, flops=cost.flops, num_bytes=cost.num_bytes)

    return replace(profile, rows=tuple(map(priced, profile.rows)))
