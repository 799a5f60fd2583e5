"""Counted operations against the paper's formulas and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILY_NAMES, make_call, tiny_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditrim.engines.cost.flops import CallSize, block_products, call_flops

PAPER = {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 19}


def test_attention_core_and_linears_equal_the_papers_table_6() -> None:
    """ToPi Table 6, FLUX, d = 4096: 4096 noisy, 4096 -> 2048 reference, 512 text tokens."""
    for num_reference, attention, image, text in (
        (4096, 1241.25, 3298.53, 206.16),
        (2048, 725.85, 2473.90, 206.16),
    ):
        size = CallSize(num_noisy=4096, num_reference=num_reference, num_text=512)
        products = block_products(PAPER, "flux", 0, size)
        assert round(sum(p.flops for p in products[:2]) / 1e9, 2) == attention
        # The modulation (last of each stream) is not in the paper's count.
        assert round(sum(p.flops for p in products[2:5]) / 1e9, 2) == image
        assert round(sum(p.flops for p in products[6:9]) / 1e9, 2) == text
        single = block_products(PAPER, "flux", 19, size)
        linear = sum(p.flops for p in single[2:5]) / 1e9
        assert linear == pytest.approx(image + text, abs=0.01)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_whole_call_agrees_with_torchs_counter(family: str) -> None:
    transformer = tiny_transformer(family)
    call = make_call(family, references=((12, 9),), noisy=(8, 8), num_text=30)
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**call.kwargs)
    architecture = "flux" if family == "flux-kontext" else "qwen"
    size = CallSize(num_noisy=64, num_reference=108, num_text=30)
    counted = sum(call_flops(transformer.config, architecture, 1, 4, size, 108))
    # diffusers computes all rows of the last block, for nobody.
    whole, last = (
        sum(p.flops for p in block_products(transformer.config, architecture, 3, size, is_last=end))
        for end in (False, True)
    )
    counted += whole - last
    # torch also counts the time embedding, the modulation at t = 0 and the output of references.
    assert counted <= counter.get_total_flops() < 1.05 * counted
