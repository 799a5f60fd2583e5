"""Which layers look at the references: context sensitivity a layer (ToPi Eq. 4 and 5)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditrim.export.split import processors_installed
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.architectures.architecture import call_places
from ditrim.plugins.architectures.transformers import architecture_of, blocks_of
from ditrim.plugins.attention import JointContext
from ditrim.plugins.errors import UsageError


@dataclass(slots=True)
class SensitivityRecorder:
    """Sums of `A[h, i, j]` over heads, noisy rows and reference columns, call by call.

    `A` is the joint attention matrix over text, noisy and reference keys: a softmax over the
    reference keys alone would sum to 1 in every row, whatever the layer.

    Attributes:
        raw: an entry a call: one sum a layer (ToPi Eq. 4 before the expectation).
        mass: the same divided by heads and noisy rows: the mean share of a noisy token's
            attention that goes to the references, in [0, 1].
    """

    raw: list[list[float]] = field(default_factory=list)
    mass: list[list[float]] = field(default_factory=list)


@contextmanager
def sensitivity_recorded(transformer: Any) -> Iterator[SensitivityRecorder]:
    """Record the sensitivity of every layer in all calls of a diffusers transformer.

    The transformer goes on to give its own results; it is restored at the end.

    Raises:
        UsageError: (in a call) a batch with masked text, which cannot be measured.
    """
    recorder = SensitivityRecorder()
    architecture = ARCHITECTURES[architecture_of(transformer)]
    blocks = blocks_of(transformer)
    geometry: dict[str, int] = {}
    sensitivities: list[Tensor] = []
    handles = []

    def before_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise UsageError("the transformer must be called with keyword arguments")
        num_text = kwargs["encoder_hidden_states"].shape[1]
        places = call_places(architecture, kwargs, kwargs["hidden_states"].shape[1], num_text)
        geometry.update(num_noisy=places.num_noisy, num_text=num_text)
        sensitivities.clear()

    def before_block(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("encoder_hidden_states_mask")
        if mask is not None and not bool(mask.all()):
            raise UsageError(
                "a batch of prompts of different lengths cannot be measured; "
                "calibrate with one prompt at a time"
            )
        if "encoder_hidden_states_mask" in kwargs:
            kwargs["encoder_hidden_states_mask"] = None
        cos, sin = architecture.joint_rope(kwargs["image_rotary_emb"])
        batch = kwargs["hidden_states"].shape[0]
        kwargs["image_rotary_emb"] = JointContext(
            rope_cos=cos.expand(batch, -1, -1),
            rope_sin=sin.expand(batch, -1, -1),
            num_text=geometry["num_text"],
            num_noisy=geometry["num_noisy"],
            score_rows=torch.arange(geometry["num_noisy"], device=cos.device),
            sensitivities=sensitivities,
        )
        return args, kwargs

    def after_call(module: Any, *_: Any) -> None:
        sums = [float(value.mean()) for value in sensitivities]
        scale = module.config.num_attention_heads * geometry["num_noisy"]
        recorder.raw.append(sums)
        recorder.mass.append([value / scale for value in sums])

    roles = dict.fromkeys(range(len(blocks)), "measure")
    with processors_installed(transformer, roles, pairs_modulation=False):
        try:
            handles.append(transformer.register_forward_pre_hook(before_call, with_kwargs=True))
            handles.append(transformer.register_forward_hook(after_call))
            handles += [
                block.register_forward_pre_hook(before_block, with_kwargs=True) for block in blocks
            ]
            yield recorder
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        model: what was calibrated.
        front_depth: K; layers below it are in FRONT and cannot be chosen.
        representative_layers: L, the `Top-M` of BACK's layers (ToPi Eq. 5), ascending.
        sensitivity: S a layer (ToPi Eq. 4), the mean over samples and steps.
        mass: the same as a share of a noisy token's attention, in [0, 1].
        mass_by_category: the curve of each category of samples.
        num_samples, num_steps: how much was measured.
        seed: of the samples.
    """

    model: str
    front_depth: int
    representative_layers: tuple[int, ...]
    sensitivity: tuple[float, ...]
    mass: tuple[float, ...]
    mass_by_category: Mapping[str, tuple[float, ...]]
    num_samples: int
    num_steps: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the calibration as JSON-ready values."""
        return {
            "model": self.model,
            "front_depth": self.front_depth,
            "representative_layers": list(self.representative_layers),
            "sensitivity": [round(value, 4) for value in self.sensitivity],
            "mass": [round(value, 6) for value in self.mass],
            "mass_by_category": {
                name: [round(value, 6) for value in curve]
                for name, curve in self.mass_by_category.items()
            },
            "num_samples": self.num_samples,
            "num_steps": self.num_steps,
            "seed": self.seed,
        }


def top_layers(sensitivity: tuple[float, ...], front_depth: int, count: int) -> tuple[int, ...]:
    """The `count` most sensitive layers of BACK, ascending (ToPi Eq. 5).

    Raises:
        UsageError: BACK has fewer layers.
    """
    candidates = range(front_depth, len(sensitivity))
    if not 1 <= count <= len(candidates):
        raise UsageError(
            f"{count} representative layers cannot be chosen: with front depth {front_depth} BACK "
            f"has {len(candidates)} of the {len(sensitivity)} layers"
        )
    ranked = sorted(candidates, key=lambda layer: (-sensitivity[layer], layer))
    return tuple(sorted(ranked[:count]))


def mean_curve(curves: list[list[float]]) -> tuple[float, ...]:
    """Return each layer's mean over calls."""
    return tuple(sum(values) / len(values) for values in zip(*curves, strict=True))


def save_calibration(calibration: Calibration, folder: Path) -> tuple[Path, Path]:
    """Write `calibration.json` and the plot `calibration.png` into a folder.

    Returns:
        their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, plot = folder / "calibration.json", folder / "calibration.png"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration-") as beside:
        new_path, new_plot = Path(beside) / path.name, Path(beside) / plot.name
        new_path.write_text(json.dumps(calibration.as_dict(), indent=2) + "\n")
        _plot(calibration, new_plot)
        os.replace(new_plot, plot)
        os.replace(new_path, path)
    return path, plot


def _plot(calibration: Calibration, path: Path) -> None:
    from matplotlib.figure import Figure

    layers = range(len(calibration.mass))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    chosen = set(calibration.representative_layers)
    axes.bar(
        layers,
        calibration.mass,
        color=["#d95f02" if layer in chosen else "#b8c4d6" for layer in layers],
        label="_nolegend_",
    )
    for name, curve in calibration.mass_by_category.items():
        axes.plot(layers, curve, marker="o", markersize=3, linewidth=1, label=name)
    if calibration.front_depth > 0:
        axes.axvspan(-0.5, calibration.front_depth - 0.5, color="#000000", alpha=0.08)
        axes.text(
            calibration.front_depth / 2 - 0.5, 1.0, "FRONT", ha="center", va="top",
            transform=axes.get_xaxis_transform(), fontsize=8,
        )  # fmt: skip
    axes.set_xlim(-0.6, len(calibration.mass) - 0.4)
    axes.set_xlabel("layer")
    axes.set_ylabel("attention of noisy tokens\nthat goes to the references")
    axes.set_title(
        f"{calibration.model}: context sensitivity; chosen layers "
        f"{list(calibration.representative_layers)} ({calibration.num_samples} samples)",
        fontsize=10,
    )
    if calibration.mass_by_category:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
