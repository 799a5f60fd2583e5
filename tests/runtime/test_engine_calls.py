"""What a denoiser does between the two graphs."""

from __future__ import annotations

import pytest
import torch

from ditrim.runtime.denoising.calls import gather_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_gathered_rows_are_those_of_each_entry(dtype: torch.dtype, batch: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(batch, 50, 8, generator=generator).to(dtype)
    kept = torch.stack([torch.randperm(50, generator=generator)[:count] for _ in range(batch)])
    expected = torch.stack([hidden[entry][kept[entry]] for entry in range(batch)])
    assert torch.equal(gather_rows(hidden, kept), expected)


@pytest.mark.parametrize("token", [-1, 50])
def test_a_token_that_is_not_there_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match=r"must be in \[0, 50\)"):
        gather_rows(torch.zeros(1, 50, 8), torch.tensor([[0, token]]))


def test_hidden_states_that_want_gradients_are_gathered() -> None:
    hidden = torch.ones(1, 5, 2, requires_grad=True)
    assert gather_rows(hidden, torch.tensor([[1, 3]])).shape == (1, 2, 2)
