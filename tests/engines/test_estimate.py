"""A plan before the build: counts that are exact, memory as measured, verdicts and advice."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrim.commands import build_engine as cli
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.source import planned_config
from ditrim.engines.cost.devices import DEVICES
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.cost.memory import activation_bytes, scoring_code_bytes, seam_bytes
from ditrim.engines.cost.parameters import count_parameters
from ditrim.engines.estimate.estimate import Estimate, estimate, usable_bytes
from ditrim.engines.estimate.text import lines_of
from ditrim.engines.presets import small_editor_folder
from ditrim.export.family import FAMILIES, Family
from ditrim.plugins.architectures import ARCHITECTURES
from ditrim.plugins.errors import UsageError

QWEN = FAMILIES["qwen-edit"]


def plan_of(device: str = "h20", **values: Any) -> Estimate:
    options = BuildOptions(**values)
    return estimate(options, planned_config(options), device)


def transformer_class(family: Family) -> Any:
    import diffusers

    return getattr(diffusers, family.transformer_class)


# Parameters


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_parameters_are_those_of_the_diffusers_module(family: Family) -> None:
    with torch.device("meta"):
        module = transformer_class(family)(**family.config)
    there = sum(parameter.numel() for parameter in module.parameters())
    published = 20_430_401_088 if family.architecture == "qwen" else 11_901_408_320
    assert there == published
    for front_depth in (0, 10, 18, 19, 20, 56):
        counts = count_parameters(family.config, family.architecture, front_depth)
        assert counts.front + counts.back + counts.unused == counts.total == there


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_defaults_are_those_of_the_diffusers_class(family: Family) -> None:
    signature = inspect.signature(transformer_class(family).__init__)
    for key, value in ARCHITECTURES[family.architecture].class_defaults.items():
        assert signature.parameters[key].default == value, key


def test_published_plan_without_weights_is_that_of_the_released_models() -> None:
    for name, total in (("qwen-edit-2511", 20_430_401_088), ("flux-kontext", 11_901_408_320)):
        plan = plan_of(model=name, backend="tensorrt")
        assert plan.num_parameters == total
        assert [item.role for item in plan.plans] == ["front", "back"]


@pytest.mark.parametrize("family", ["qwen-edit", "flux-kontext"])
def test_graphs_hold_the_parameters_that_are_counted(
    family: str, tiny_engine_sets: Callable[[str], Path]
) -> None:
    """Constants of the tracer come on top: sinusoids, ones and scalars."""
    folder = tiny_engine_sets(family)
    config = json.loads((folder / "manifest.json").read_text())["transformer_config"]
    counts = count_parameters(config, FAMILIES[family].architecture, 1)
    for role, expected in (("front", counts.front), ("back", counts.back)):
        model = onnx.load(str(folder / f"{role}.onnx"), load_external_data=False)
        held = sum(
            math.prod(item.dims)
            for item in model.graph.initializer
            if item.data_type == onnx.TensorProto.FLOAT
        )
        assert 0 <= held - expected <= 400


def test_a_double_stream_block_at_the_end_leaves_its_text_output_out() -> None:
    config = {"num_layers": 2, "num_single_layers": 0}
    assert count_parameters(config, "flux", 1).unused > 0
    assert count_parameters({"num_layers": 2, "num_single_layers": 1}, "flux", 1).unused == 0


# Activations

# What TensorRT-RTX 1.7.1 stated for graphs of the real width (bf16): model, first and last layer,
# noisy, reference and text tokens, batch, scored rows, bytes.
MEASURED = [
    ("qwen-edit", (0, 1), 4096, 512, 512, 1, 0, 317_804_544),
    ("qwen-edit", (0, 1), 4096, 4096, 512, 1, 0, 538_005_504),
    ("qwen-edit", (0, 1), 4096, 4096, 1024, 4, 0, 2_290_434_048),
    ("qwen-edit", (1, 3), 4096, 512, 512, 1, 0, 316_061_696),
    ("qwen-edit", (1, 3), 4096, 4096, 512, 1, 0, 537_180_160),
    ("qwen-edit", (1, 3), 4096, 4096, 1024, 4, 0, 2_275_074_048),
    ("qwen-edit", (1, 3), 4096, 512, 512, 1, 4096, 521_000_000),
    ("qwen-edit", (1, 3), 4096, 4096, 512, 1, 4096, 828_000_000),
    ("qwen-edit-2511", (0, 1), 4096, 4096, 512, 1, 0, 588_413_440),
    ("qwen-edit-2511", (1, 2), 4096, 4096, 1024, 1, 0, 624_929_280),
    ("flux-kontext", (0, 1), 4096, 4096, 512, 1, 0, 538_042_368),
    ("flux-kontext", (18, 22), 4096, 512, 512, 1, 0, 553_820_160),
    ("flux-kontext", (18, 22), 4096, 4096, 1024, 1, 0, 1_000_513_536),
    ("flux-kontext", (19, 21), 4096, 512, 512, 1, 4096, 681_000_000),
    ("flux-kontext", (19, 21), 4096, 4096, 512, 1, 4096, 1_100_000_000),
]


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_activations_at_real_width_are_as_tensorrt_rtx_stated(case: Any) -> None:
    model, layers, noisy, reference, text, batch, rows, stated = case
    family = FAMILIES[model]
    estimated = activation_bytes(
        family.config,
        family.architecture,
        range(*layers),
        CallSize(num_noisy=noisy, num_reference=reference, num_text=text, batch=batch),
        backend="tensorrt-rtx",
        precision="bf16",
        num_rows=rows,
    )
    assert 0.99 * stated < estimated < 1.08 * stated


@pytest.mark.parametrize(
    ("model", "layers", "num_scored", "reference", "stated"),
    [
        ("flux-kontext", (19, 21), 2, 512, 766_975_488),
        ("flux-kontext", (19, 21), 2, 4096, 1_244_585_984),
    ],
)
def test_layers_are_scored_one_after_the_other_by_tensorrt_rtx(
    model: str, layers: tuple[int, int], num_scored: int, reference: int, stated: int
) -> None:
    """4096 noisy rows scored against references and 512 text tokens, d = 3072, bf16."""
    family = FAMILIES[model]
    estimated = activation_bytes(
        family.config,
        family.architecture,
        range(*layers),
        CallSize(num_noisy=4096, num_reference=reference, num_text=512),
        backend="tensorrt-rtx",
        precision="bf16",
        num_rows=4096,
        num_scored=num_scored,
    )
    assert 0.99 * stated < estimated < 1.08 * stated


# Peaks of ONNX Runtime 1.31.1's CPU provider, d = 1024, 8 heads, float32, two blocks; of BACK where
# rows are scored.
MEASURED_ON_CPU = [
    ("qwen-edit", 1024, 128, 128, 1, 0, 100_100_000),
    ("qwen-edit", 1024, 1024, 128, 1, 0, 173_700_000),
    ("qwen-edit", 1024, 512, 128, 2, 0, 290_140_160),
    ("qwen-edit", 1024, 128, 128, 1, 1024, 130_100_000),
    ("qwen-edit", 1024, 1024, 128, 1, 1024, 226_500_000),
    ("qwen-edit", 1024, 1024, 128, 1, 1, 182_100_000),
    ("flux-kontext", 1024, 1024, 128, 1, 0, 197_824_512),
    ("flux-kontext", 1024, 128, 128, 1, 0, 116_510_720),
]


@pytest.mark.parametrize("case", MEASURED_ON_CPU, ids=str)
def test_activations_on_a_cpu_are_as_onnx_runtime_took(case: Any) -> None:
    model, noisy, reference, text, batch, rows, taken = case
    estimated = activation_bytes(
        {"num_attention_heads": 8, "num_layers": 3, "num_single_layers": 1},
        FAMILIES[model].architecture,
        range(1, 3),
        CallSize(num_noisy=noisy, num_reference=reference, num_text=text, batch=batch),
        backend="onnxruntime",
        precision="fp32",
        num_rows=rows,
    )
    assert estimated == pytest.approx(taken, rel=0.12)


def test_blocks_of_tensorrt_rtx_are_those_of_its_graph() -> None:
    from ditrim.engines.cost import memory
    from ditrim.plugins.blocks import num_row_blocks

    for rows in [*range(1, 9000), 16384, 100_000]:
        blocks = num_row_blocks(rows)
        assert -(-rows // blocks) <= memory._rtx_block_rows(rows)
        code = scoring_code_bytes("tensorrt-rtx", rows)
        assert code == memory._SCORING_CODE + blocks * memory._BLOCK_CODE
    for rows in (256, 2048, 4096, 8192, 16384):
        assert rows // num_row_blocks(rows) == memory._rtx_block_rows(rows)


sizes = st.builds(
    CallSize,
    num_noisy=st.integers(1, 20000),
    num_reference=st.integers(1, 60000),
    num_text=st.integers(1, 2048),
    batch=st.integers(1, 16),
)


@settings(max_examples=60, deadline=None)
@given(
    size=sizes,
    field=st.sampled_from(["num_noisy", "num_reference", "num_text", "batch"]),
    more=st.integers(1, 4096),
    model=st.sampled_from(list(FAMILIES)),
    backend=st.sampled_from(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
    is_scored=st.booleans(),
)
def test_activations_and_seams_grow_with_every_length(
    size: CallSize, field: str, more: int, model: str, backend: str, is_scored: bool
) -> None:
    from dataclasses import replace

    family = FAMILIES[model]

    def taken(one: CallSize) -> tuple[int, int]:
        return (
            activation_bytes(
                family.config,
                family.architecture,
                range(10, 20),
                one,
                backend=backend,
                precision="fp16",
                num_rows=one.num_noisy * is_scored,
            ),
            seam_bytes(family.config, family.architecture, one, precision="fp16"),
        )

    small, large = taken(size), taken(replace(size, **{field: getattr(size, field) + more}))
    assert small[0] < large[0]
    assert small[1] < large[1]


@settings(max_examples=25, deadline=None)
@given(
    side=st.integers(16, 120),
    batch=st.integers(1, 8),
    rungs=st.integers(1, 12),
    model=st.sampled_from(["qwen-edit", "flux-kontext"]),
)
def test_a_set_needs_more_for_larger_pictures_batches_and_ladders(
    side: int, batch: int, rungs: int, model: str
) -> None:
    def need(side: int, batch: int, rungs: int) -> int:
        plan = plan_of(
            model=model,
            backend="tensorrt",
            max_noisy_tokens=side * side,
            max_reference_tokens=side * side,
            max_batch=batch,
            rungs=rungs,
        )
        return plan.need.total

    base = need(side, batch, rungs)
    # Below some size the VAE or the prompt is the highest moment, which then stays as it is.
    assert need(side + 8, batch, rungs) >= base
    assert need(side, batch + 1, rungs) >= base
    assert need(side, batch, rungs + 1) > base


# Fits or not


@pytest.mark.parametrize(
    ("model", "device"), [("qwen-edit", "h20"), ("flux-kontext", "a100-40")], ids=str
)
def test_a_second_copy_of_back_does_not_fit_the_papers_cards(model: str, device: str) -> None:
    one = plan_of(device, model=model, backend="tensorrt")
    two = plan_of(device, model=model, backend="tensorrt", separate_anchor=True)
    assert one.fits
    assert not two.fits
    assert [item.role for item in two.plans] == ["front", "back", "anchor"]
    assert two.plans[1].weights_bytes == two.plans[2].weights_bytes
    assert "--separate-anchor" in [change.option for change in two.changes if change.fits]
    assert "h200" in two.fits_on


def test_full_size_figures_of_qwen_edit_are_known() -> None:
    plan = plan_of(backend="tensorrt")
    front, back = plan.plans
    assert front.weights_bytes + back.weights_bytes == pytest.approx(2 * 20.43e9, rel=0.01)
    assert back.weights_bytes == pytest.approx(34e9, rel=0.01)
    assert plan.companions[0].weights_bytes == 2 * 8_292_166_656
    # "A further profile costs megabytes": eight of them, a few percent.
    assert 1.0 < plan.disk_bytes / (front.weights_bytes + back.weights_bytes) < 1.05
    assert plan.rungs[-1] == 4272
    assert plan.build_device_bytes > 2.1 * back.weights_bytes


def test_a_card_that_is_far_too_small_says_what_is_not_enough() -> None:
    plan = plan_of("rtx4090", backend="tensorrt")
    assert not plan.fits
    assert not plan.changes[-1].fits
    text = "\n".join(list(lines_of(plan)))
    assert "not enough are even all of" in text
    assert "as it is, it fits on: h20," in text
    needs = [change.needed_bytes for change in plan.changes]
    assert needs == sorted(needs, reverse=True)


def test_changes_add_up_until_it_fits() -> None:
    plan = plan_of("rtx5090", model="flux-kontext", backend="tensorrt-rtx", max_batch=8)
    assert not plan.fits
    assert len(plan.changes) > 1
    assert plan.changes[-1].fits
    assert not any(change.fits for change in plan.changes[:-1])
    assert plan.changes[-1].needed_bytes <= usable_bytes(plan.device)
    lines = list(lines_of(plan))
    assert "enough are all of" in lines


def test_following_the_advice_gives_what_it_promised() -> None:
    values: dict[str, Any] = {"backend": "tensorrt", "separate_anchor": True}
    [promised] = [
        change.needed_bytes
        for change in plan_of("h20", **values).changes
        if change.option == "--separate-anchor"
    ]
    assert plan_of("h20", backend="tensorrt").need.total == promised


def all_changes() -> set[str]:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("rtx4090", {"backend": "tensorrt", "separate_anchor": True}),
        ("rtx4090", {"model": "qwen-edit-plus", "backend": "tensorrt-rtx", "rungs": 12}),
        ("rtx4090", {"model": "qwen-edit-plus"}),
        ("rtx4090", {}),
    ]
    return {
        change.option
        for device, values in cases
        for change in plan_of(device, **values).changes
        if change.option is not None
    }


def test_advice_names_options_that_the_command_has() -> None:
    known = {name for action in cli._parser()._actions for name in action.option_strings}
    named = all_changes()
    assert named == {
        "--separate-anchor",
        "--precision",
        "--max-batch",
        "--num-references",
        "--resolution",
        "--rungs",
    }
    assert named <= known


def test_rtx_keeps_logits_of_a_block_of_rows_and_the_plugin_none() -> None:
    rtx, plugin = (plan_of(backend=name).plans[1] for name in ("tensorrt-rtx", "tensorrt"))
    all_logits = 4 * 24 * 4272 * (4272 + 4272 + 2459) * 4  # of a batch of 4, float32
    more = rtx.activation_bytes[-1] - plugin.activation_bytes[-1]
    assert all_logits / 16 < more < all_logits / 8
    front = plan_of(backend="tensorrt-rtx").plans[0]
    assert front.activation_bytes == plan_of(backend="tensorrt").plans[0].activation_bytes


def test_the_cost_of_serving_every_shape_is_named() -> None:
    plan = plan_of(backend="tensorrt")
    narrow = plan_of(
        backend="tensorrt",
        resolution=(1024, 1024),
        reference_resolution=(1024, 1024),
        max_text_tokens=1408,
    )
    assert plan.every_shape_bytes == plan.need.total - narrow.need.total > 0
    assert narrow.every_shape_bytes == 0
    [line] = [line for line in list(lines_of(plan)) if "every shape" in line]
    assert "against square pictures and short prompts alone" in line
    assert not any("every shape" in line for line in lines_of(narrow))
    assert plan.to_dict()["every_shape_bytes"] == plan.every_shape_bytes


def test_notes_name_what_cannot_run_or_was_not_measured() -> None:
    [note] = [n for n in plan_of("h100", backend="tensorrt-rtx").notes if "capability" in n]
    assert note == (
        "TensorRT-RTX 1.7 builds for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not for "
        "Hopper or B200; NVIDIA H100 SXM5 80 GB has 9.0: use --backend tensorrt"
    )
    assert not any("capability" in n for n in plan_of("rtx4090", backend="tensorrt-rtx").notes)
    assert set(plan_of("rtx5090", backend="tensorrt-rtx", max_batch=1).fits_on) == {"a100-80"}
    whole = plan_of("a100-80", backend="tensorrt", front_depth=0)
    [note] = [n for n in whole.notes if "#4214" in n]
    assert "--front-depth 30," in note
    assert "A100" in note
    half = plan_of("a100-80", backend="tensorrt", front_depth=30)
    assert not any("#4214" in n for n in half.notes)
    assert any("no plan of TensorRT" in n for n in plan_of(backend="tensorrt").notes)
    assert any("CPU provider" in n for n in plan_of().notes)


def test_rtx_capabilities_are_those_of_the_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from ditrim.engines.estimate.estimate import _RTX_CAPABILITIES

    if not trt.__version__.startswith("1.7."):
        pytest.skip(f"the note is about 1.7, this is {trt.__version__}")
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert {(int(name[:-1]), int(name[-1])) for name in names} == _RTX_CAPABILITIES


# Bad input


def test_unknown_device_is_a_usage_error_that_lists_the_names() -> None:
    with pytest.raises(UsageError, match=r"unknown device 'tpu'.*Known: h20, .*rtx5090"):
        plan_of("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_a_name_it_says_to_name_one() -> None:
    options = BuildOptions()
    with pytest.raises(UsageError, match=r"no CUDA device to plan for; name one with --device"):
        estimate(options, planned_config(options), None)


def test_a_split_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--front-depth is 60; allowed: 0 to 59"):
        plan_of(front_depth=60)


# What comes out


@pytest.mark.parametrize("name", [*FAMILIES, "small"])
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_json_is_complete_and_stable(name: str, backend: str) -> None:
    values = {"preset": "small"} if name == "small" else {"model": name}
    plan = plan_of("h200", backend=backend, **values)
    content = plan.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert json.dumps(content) == json.dumps(plan_of("h200", backend=backend, **values).to_dict())
    assert set(content) == set(Estimate.__dataclass_fields__)
    assert content["need"]["total"] == plan.need.total
    assert list(lines_of(plan))
    assert all(isinstance(line, str) for line in list(lines_of(plan)))


def test_preset_uses_its_own_measured_layers() -> None:
    plan = plan_of("rtx4090", preset="small")
    measured = json.loads((small_editor_folder() / "calibration.json").read_text())
    assert plan.front_depth == measured["front_depth"]
    assert list(plan.layers) == measured["representative_layers"]
    assert plan.companions == ()


def test_random_weights_are_estimated_at_the_depth_asked_for() -> None:
    plan = plan_of(weights="random", num_layers=3, backend="tensorrt-rtx")
    assert plan.num_layers == 3
    counts = count_parameters({"num_layers": 3}, "qwen", 1)
    assert [item.num_parameters for item in plan.plans] == [counts.front, counts.back]


def test_dry_run_needs_neither_torch_nor_the_network(tmp_path: Path) -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from ditrim.commands.build_engine import main\n"
        "code = main(['--model', 'qwen-edit', '--backend', 'tensorrt', '--dry-run', '--device',"
        " 'h20', '--json'])\n"
        "print([name for name in ('torch', 'diffusers', 'tensorrt') if name in sys.modules])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    assert done.returncode == 0, done.stderr
    answer, imported = done.stdout.splitlines()[-2:]
    assert imported == "[]"
    assert json.loads(answer)["estimate"]["device"]["name"] == "h20"
    assert list(tmp_path.iterdir()) == []


def test_companions_are_the_real_ones() -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage()
    companions = {name: value.companions for name, value in ARCHITECTURES.items()}
    assert companions["qwen"][-1].num_parameters == sum(p.numel() for p in vae.parameters())
    assert {item.part for item in companions["flux"]} == {"text_encoder", "text_encoder_2", "vae"}
    assert all(item.source for items in companions.values() for item in items)


def test_device_table_and_advice_agree() -> None:
    plan = plan_of("a100-40", backend="tensorrt")
    for name in plan.fits_on:
        assert plan_of(name, backend="tensorrt").fits
    for name in set(DEVICES) - set(plan.fits_on):
        assert not plan_of(name, backend="tensorrt").fits
