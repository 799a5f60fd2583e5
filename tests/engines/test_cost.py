"""Operations and bytes of the engines against torch's counter, plain sums and ToPi's Table 6."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILY_NAMES, make_call, rope_of, tiny_transformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditrim.engines.cost.cost import Cost, ModelCost, Peak, topi_block_flops
from ditrim.engines.cost.flops import CallSize
from ditrim.engines.sets.engine_set import load_engine_set
from ditrim.export.split import BackGraph, FrontGraph, SplitPoint, processors_installed
from ditrim.plugins.errors import UsageError
from ditrim.runtime.profiling.measure import model_cost_of

CPU = torch.device("cpu")
SCORED = (2, 3)

# ToPi Table 6, d = 4096: component -> printed GFLOPs (baseline, ToPi) and reduction in %.
TABLE_6: dict[str, dict[str, tuple[float, float, float]]] = {
    "flux-double": {
        "attention": (1241.25, 725.85, -41.5),
        "image": (3298.53, 2473.90, -25.0),
        "text": (206.16, 206.16, 0.0),
        "total": (4745.94, 3405.91, -28.2),
    },
    "flux-single": {
        "attention": (1241.25, 725.85, -41.5),
        "image": (3504.69, 2680.06, -23.5),
        "total": (4745.94, 3405.91, -28.2),
    },
    "qwen-double": {
        "attention": (1241.25, 725.85, -41.5),
        "image": (4398.05, 3298.53, -25.0),
        "text": (274.88, 274.88, 0.0),
        "total": (5914.17, 4299.26, -27.3),
    },
}


@pytest.mark.parametrize("kind", TABLE_6)
def test_table_6_to_the_printed_digit(kind: str) -> None:
    full = topi_block_flops(kind, num_image=8192, num_prompt=512, width=4096)
    reduced = topi_block_flops(kind, num_image=6144, num_prompt=512, width=4096)
    for component, (baseline, topi, reduction) in TABLE_6[kind].items():
        before, after = getattr(full, component) / 1e9, getattr(reduced, component) / 1e9
        assert (round(before, 2), round(after, 2)) == (baseline, topi), component
        assert round(100 * (after / before - 1), 1) == reduction, component


def test_equations_13_to_17_as_printed() -> None:
    image, prompt, d = 700, 90, 256
    joint = 4 * (image + prompt) ** 2 * d  # Eq. 13, 16
    double = topi_block_flops("flux-double", num_image=image, num_prompt=prompt, width=d)
    assert double.total - joint == 24 * (image + prompt) * d**2  # Eq. 14
    qwen = topi_block_flops("qwen-double", num_image=image, num_prompt=prompt, width=d)
    assert qwen.total - joint == 32 * (image + prompt) * d**2  # Eq. 15
    single = topi_block_flops("flux-single", num_image=image, num_prompt=prompt, width=d)
    assert single.total - joint == (6 + 8 + 10) * (image + prompt) * d**2  # Eq. 17
    with pytest.raises(UsageError, match="unknown kind of block 'sd3'; known: flux-double"):
        topi_block_flops("sd3", num_image=1, num_prompt=1, width=1)


class Split:
    """FRONT and BACK of a tiny transformer in torch, run one after the other."""

    def __init__(self, family: str, batch: int) -> None:
        self.transformer = tiny_transformer(family)
        self.call = make_call(family, batch=batch, references=((12, 9),), noisy=(8, 8), num_text=30)
        self.point = SplitPoint(front_depth=1, num_layers=4, representative_layers=SCORED)
        self.architecture = "flux" if family == "flux-kontext" else "qwen"
        self.front = FrontGraph(self.transformer, self.point)
        self.back = BackGraph(self.transformer, self.point)

    def count(self, num_kept: int, num_rows: int, *, is_early: bool = False) -> tuple[int, int]:
        """Operations of FRONT and of BACK, as torch counts them.

        Args:
            num_kept: reference tokens of BACK, and of FRONT too where they are dropped early.
            num_rows: noisy rows that are scored.
            is_early: see `num_kept`.
        """
        kwargs = self.call.kwargs
        batch, tables = kwargs["hidden_states"].shape[0], rope_of(self.transformer, self.call)
        shared = [*tables.noisy, *tables.text]
        reference_rope = [table.expand(batch, -1, -1) for table in tables.reference]
        length = 64 + num_kept if is_early else None
        with (
            processors_installed(self.transformer, dict.fromkeys(SCORED, "score")),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the counter does not know the CPU's fused attention
        ):
            with FlopCounterMode(display=False) as front:
                noisy, reference, text, temb, *reference_temb = self.front(
                    kwargs["hidden_states"][:, :64],
                    kwargs["hidden_states"][:, 64:length],
                    kwargs["encoder_hidden_states"],
                    kwargs["timestep"],
                    kwargs.get("guidance"),
                    kwargs.get("pooled_projections"),
                    *shared,
                    *(table[:, : num_kept if is_early else None] for table in reference_rope),
                )
            with FlopCounterMode(display=False) as back:
                self.back(
                    noisy,
                    reference[:, :num_kept],
                    text,
                    temb,
                    reference_temb[0] if reference_temb else None,
                    *shared,
                    *(table[:, :num_kept] for table in reference_rope),
                    torch.arange(num_rows) if num_rows else None,
                )
        return front.get_total_flops(), back.get_total_flops()


def cost_of(split: Split, precision: str = "fp32") -> ModelCost:
    return ModelCost(
        config=split.transformer.config,
        architecture=split.architecture,
        front_depth=1,
        num_layers=4,
        num_scored=len(SCORED),
        precision=precision,
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_operations_equal_torchs_counter(family: str, batch: int) -> None:
    split = Split(family, batch)
    cost = cost_of(split)
    for num_kept, num_rows in ((108, 0), (108, 64), (40, 1), (7, 21)):
        front, back = split.count(num_kept, num_rows)
        full = CallSize(num_noisy=64, num_reference=108, num_text=30, batch=batch)
        size = CallSize(num_noisy=64, num_reference=num_kept, num_text=30, batch=batch)
        assert cost.front(full).flops == front
        assert cost.back(size, num_rows=num_rows).flops == back


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_operations_without_some_or_all_references_equal_torchs_counter(family: str) -> None:
    """As a policy leaves them that drops before FRONT."""
    split = Split(family, 2)
    cost = cost_of(split)
    for num_kept in (40, 0):
        size = CallSize(num_noisy=64, num_reference=num_kept, num_text=30, batch=2)
        found = split.count(num_kept, 0, is_early=True)
        assert (cost.front(size).flops, cost.back(size).flops) == found


def run_counted(file: Path, lengths: dict[str, int]) -> int:
    """Operations of the matrix products that ONNX Runtime runs, from the shapes in its profile."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(file.parent / "kernels")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for item in session.get_inputs():
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in item.shape]
        is_index = "int64" in item.type
        feeds[item.name] = np.arange(shape[0]) if is_index else np.ones(shape, np.float32)
    session.run(None, feeds)
    report = Path(session.end_profiling())
    total = 0
    for event in json.loads(report.read_text()):
        kind = event.get("args", {}).get("op_name", "")
        if not event["name"].endswith("_kernel_time"):
            continue
        inputs, outputs = (
            [next(iter(entry.values())) for entry in event["args"][f"{way}_type_shape"]]
            for way in ("input", "output")
        )
        if kind in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm"):
            total += 2 * math.prod(outputs[0]) * inputs[0][-1]
        elif kind == "MultiHeadAttention":  # (B, L, d), (B, N, d)
            queries, keys = inputs[:2]
            total += 4 * math.prod(queries) * keys[1]
        else:
            assert "Attention" not in kind
            assert "Conv" not in kind
    report.unlink()
    return total


@pytest.mark.parametrize(
    "family", ["qwen-edit", "flux-kontext", pytest.param("qwen-edit-2511", marks=pytest.mark.slow)]
)
def test_operations_equal_what_onnx_runtime_runs(
    family: str, tiny_engine_sets: Callable[[str], Path]
) -> None:
    """On the graphs of an engine set, which score in one pass."""
    folder = tiny_engine_sets(family)
    cost = model_cost_of(load_engine_set(folder).manifest)
    for reference, rows in ((33, 20), (33, 1), (7, 1), (64, 13)):
        lengths = {"batch": 2, "noisy": 20, "reference": reference, "text": 7, "rows": rows}
        size = CallSize(num_noisy=20, num_reference=reference, num_text=7, batch=2)
        assert run_counted(folder / "back.onnx", lengths) == cost.back(size, num_rows=rows).flops
        assert run_counted(folder / "front.onnx", lengths) == cost.front(size).flops


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_weight_bytes_equal_the_modules_parameters(family: str) -> None:
    split = Split(family, 1)

    def parameters(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    unused = 0
    if split.architecture == "qwen":
        block: Any = split.transformer.transformer_blocks[-1]
        attn = block.attn
        unused = sum(map(parameters, (attn.add_q_proj, attn.norm_added_q, attn.to_add_out)))
        unused += parameters(block.txt_mlp)
    size = CallSize(num_noisy=64, num_reference=108, num_text=30)
    assert cost_of(split).front(size).weight_bytes == 4 * parameters(split.front)
    assert cost_of(split, "bf16").back(size).weight_bytes == 2 * (parameters(split.back) - unused)


def test_activation_bytes_of_a_single_stream_block_by_hand() -> None:
    config = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2}
    cost = ModelCost(
        config=config,
        architecture="flux",
        front_depth=1,
        num_layers=4,
        num_scored=0,
        precision="fp16",
    )
    size = CallSize(num_noisy=5, num_reference=6, num_text=4, batch=2)
    d, tokens = 48, 2 * (5 + 6 + 4)
    elements = (
        tokens * (3 * (d + d) + (d + 4 * d) + (5 * d + d))  # q, k, v; MLP up; fused output
        + 2 * (d + 3 * d)  # modulation
        + tokens * 4 * d  # attention: q, k, v in, output out
    )
    found = cost.block(2, size)
    assert found.activation_bytes == 2 * elements
    assert found.weight_bytes == 2 * (3 * d * d + 4 * d * d + 5 * d * d + 3 * d * d)
    noisy = 2 * 5
    elements = (
        tokens * 2 * (d + d)  # k, v
        + noisy * ((d + d) + (d + 4 * d) + (5 * d + d))  # q; MLP up; fused output
        + 2 * (d + 3 * d)
        + tokens * 2 * d  # attention: k, v in
        + noisy * 2 * d  # q in, output out
    )
    last = cost.block(2, size, is_last=True)
    assert last.activation_bytes == 2 * elements
    assert last.weight_bytes == found.weight_bytes


def test_fewer_kept_tokens_cost_less_and_scoring_costs_more() -> None:
    cost = cost_of(Split("qwen-edit", 1))
    full = CallSize(num_noisy=64, num_reference=108, num_text=30)
    half = CallSize(num_noisy=64, num_reference=54, num_text=30)
    assert cost.back(half).flops < cost.back(full).flops
    assert cost.back(half).num_bytes < cost.back(full).num_bytes
    assert cost.back(half).weight_bytes == cost.back(full).weight_bytes
    scored = cost.back(full, num_rows=64)
    # Two products over all heads: (rows x all keys) and (references x rows), in two layers.
    assert scored.flops - cost.back(full).flops == 2 * 2 * 48 * 64 * (64 + 108 + 30 + 108)
    assert scored.num_bytes > cost.back(full).num_bytes
    one_pass = replace(cost, backend="onnxruntime")
    assert one_pass.back(full) == cost.back(full)
    assert one_pass.at("bf16").back(full, num_rows=64) == cost.at("bf16").back(full, num_rows=64)
    scored = one_pass.back(full, num_rows=64)
    assert scored.flops - cost.back(full).flops == 2 * 2 * 48 * 64 * (64 + 108 + 30)
    # Queries, all keys, the values of references; the sums of all keys and of references.
    moved = (64 + 202 + 108) * 48 * 4 + 4 * 3 * (202 + 108)
    assert scored.num_bytes - cost.back(full).num_bytes == 2 * moved
    assert cost.at("bf16").gather(half).num_bytes == 2 * 54 * 48 * 2


def test_the_roofline_is_the_larger_bound() -> None:
    peak = Peak(tflops=2.0, gb_s=10.0, source="test")
    work = Cost(flops=4 * 10**9, weight_bytes=10**7, activation_bytes=10**7)
    assert peak.roofline_ms(work) == pytest.approx(2.0)  # both bounds
    assert peak.roofline_ms(work + Cost(flops=4 * 10**9)) == pytest.approx(4.0)
    assert peak.roofline_ms(work + Cost(activation_bytes=10**7)) == pytest.approx(3.0)
    assert Peak(tflops=None, gb_s=10.0, source="").roofline_ms(work) is None
