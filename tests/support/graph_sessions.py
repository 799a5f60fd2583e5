"""FRONT and BACK in ONNX Runtime, called as a transformer is."""

from __future__ import annotations

from typing import Any

import torch
from tiny import Call, rope_of

GEOMETRIES: list[dict[str, Any]] = [
    {"batch": 1, "noisy": (4, 5), "references": ((5, 4),), "num_text": 6},
    {"batch": 2, "noisy": (3, 3), "references": ((6, 2), (1, 5)), "num_text": 1},
    {"batch": 1, "noisy": (1, 1), "references": ((1, 1),), "num_text": 9},
    {"batch": 3, "noisy": (7, 2), "references": ((9, 9),), "num_text": 30},
]


def run_sessions(
    sessions: dict[str, Any], transformer: Any, call: Call, kept: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """FRONT, gather, BACK."""
    kwargs, rope = call.kwargs, rope_of(transformer, call)
    batch = kwargs["hidden_states"].shape[0]
    values = {
        "noisy_latents": kwargs["hidden_states"][:, : call.num_noisy],
        "reference_latents": kwargs["hidden_states"][:, call.num_noisy :],
        "text_embeds": kwargs["encoder_hidden_states"],
        "timestep": kwargs["timestep"],
        "guidance": kwargs.get("guidance"),
        "pooled_text": kwargs.get("pooled_projections"),
        "score_rows": torch.arange(call.num_noisy),
    }
    for name in ("noisy", "text", "reference"):
        for part, table in zip(("cos", "sin"), getattr(rope, name), strict=True):
            shaped = table.expand(batch, -1, -1) if name == "reference" else table
            values[f"{name}_rope_{part}"] = shaped
    for role in ("front", "back"):
        session = sessions[role]
        if role == "back" and kept is not None:
            for name in ("reference", "reference_rope_cos", "reference_rope_sin"):
                values[name] = values[name][:, kept]
        feeds = {i.name: values[i.name].contiguous().numpy() for i in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        found = session.run(None, feeds)
        values |= {n: torch.from_numpy(x) for n, x in zip(names, found, strict=True)}
    return values


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
