"""Context sensitivity against a plain statement of ToPi Eq. 4."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import FAMILY_NAMES, make_call, tiny_transformer

from ditrim.export.calibration import (
    Calibration,
    mean_curve,
    save_calibration,
    sensitivity_recorded,
    top_layers,
)
from ditrim.plugins.architectures.transformers import blocks_of
from ditrim.plugins.errors import UsageError


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sensitivity_is_the_attention_mass_on_references(family: str) -> None:
    transformer = tiny_transformer(family)
    call = make_call(family, references=((5, 4), (2, 2)))
    num_text = call.kwargs["encoder_hidden_states"].shape[1]
    start, end = num_text, num_text + call.num_noisy
    expected = []
    module = type(transformer).__module__
    original = __import__(module, fromlist=["x"]).dispatch_attention_fn

    def catch(query, key, value, **options):  # type: ignore[no-untyped-def]
        logits = np.einsum("bihd,bjhd->bhij", query.double(), key.double())
        weights = np.exp(logits / np.sqrt(query.shape[-1]))
        attention = weights / weights.sum(axis=-1, keepdims=True)
        expected.append(attention[:, :, start:end, end:].sum())
        return original(query, key, value, **options)

    with torch.no_grad():
        with mock.patch(module + ".dispatch_attention_fn", catch):
            plain = transformer(**call.kwargs)[0]
        with sensitivity_recorded(transformer) as recorder:
            recorded = transformer(**call.kwargs)[0]
        again = transformer(**call.kwargs)[0]
    np.testing.assert_allclose(recorder.raw, [expected], rtol=1e-5)
    np.testing.assert_allclose(np.array(recorder.mass) * 3 * call.num_noisy, [expected], rtol=1e-5)
    assert torch.allclose(recorded, plain, atol=1e-4)
    assert torch.equal(again, plain)  # restored
    assert not any(block._forward_pre_hooks for block in blocks_of(transformer))


def test_masked_text_cannot_be_measured() -> None:
    transformer = tiny_transformer("qwen-edit")
    call = make_call("qwen-edit", batch=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    call.kwargs["encoder_hidden_states_mask"] = mask
    with (
        sensitivity_recorded(transformer),
        pytest.raises(UsageError, match="one prompt at a time"),
    ):
        transformer(**call.kwargs)


def test_top_layers_are_backs_most_sensitive_ones() -> None:
    sensitivity = (9.0, 1.0, 5.0, 7.0, 5.0)
    assert top_layers(sensitivity, 0, 2) == (0, 3)
    assert top_layers(sensitivity, 1, 2) == (2, 3)  # a tie goes to the earlier layer
    assert top_layers(sensitivity, 4, 1) == (4,)
    with pytest.raises(UsageError, match="with front depth 3 BACK has 2 of the 5 layers"):
        top_layers(sensitivity, 3, 3)


def test_saved_calibration_has_curve_and_plot(tmp_path: Path) -> None:
    calibration = Calibration(
        model="tiny",
        front_depth=1,
        representative_layers=(2,),
        sensitivity=(3.0, 2.0, 4.0),
        mass=mean_curve([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]),
        mass_by_category={"local": (0.1, 0.2, 0.3)},
        num_samples=2,
        num_steps=4,
        seed=0,
    )
    path, plot = save_calibration(calibration, tmp_path / "new")
    saved = json.loads(path.read_text())
    assert saved["representative_layers"] == [2]
    assert saved["mass"] == [0.2, 0.2, 0.2]
    assert plot.read_bytes().startswith(b"\x89PNG")
