"""TokenDrop against Algorithms 1 and 2 stated plainly in numpy, and scikit-image's threshold."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_triangle

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.runtime.tokens.residual import (
    ResidualMask,
    adaptive_mask,
    blur_on_grid,
    clean_estimate,
    consistent_step,
    embed,
    is_non_local,
    kept_mask,
    residual_map,
    residual_spread,
    select_by_residual,
    triangle_threshold,
)

Array = npt.NDArray[np.float64]
GRIDS = [(1, 1), (1, 2), (1, 9), (2, 3), (5, 4), (7, 12), (16, 16)]


def ladder(longest: int, granularity: int = 1) -> Ladder:
    return Ladder(rungs=(longest,), granularity=granularity)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_blur(values: Array) -> Array:
    """11 x 11 Gaussian, deviation 1, written out, on a (h, w) picture mirrored at its borders."""
    height, width = values.shape
    padded = np.pad(values, 5, mode="reflect")
    kernel = np.array([[np.exp(-(y * y + x * x) / 2) for x in range(-5, 6)] for y in range(-5, 6)])
    kernel /= kernel.sum()
    return np.array(
        [
            [(padded[y : y + 11, x : x + 11] * kernel).sum() for x in range(width)]
            for y in range(height)
        ]
    )


def plain_mask(estimate: Array, source: Array, grid: tuple[int, int], omega: float) -> Array:
    """Algorithm 2 for one sample, (L,) of 0 and 1."""
    difference = np.abs(estimate - source).mean(axis=1).astype(np.float32).astype(np.float64)
    blurred = plain_blur(difference.reshape(grid))
    if blurred.max() == blurred.min():
        return np.ones(blurred.size)
    scaled = (blurred - blurred.min()) / (blurred.max() - blurred.min())
    deviation = np.sqrt((scaled**2).mean() - scaled.mean() ** 2)
    threshold = threshold_triangle(scaled) - omega * deviation
    return (scaled > threshold).astype(np.float64).ravel()


def plain_step(
    z: Array, v: Array, t: float, dt: float, source: Array, mask: Array, eta: float
) -> Array:
    """Eq. 4, 5, 10, 11, 12 as they are printed; the mask is (L, 1)."""
    clean = z - t * v
    noisy = z + (1 - t) * v
    pulled = 1 / (1 + eta) * clean + eta / (1 + eta) * source
    mixed = mask * clean + (1 - mask) * pulled
    result: Array = (1 - t - dt) * mixed + (t + dt) * noisy
    return result


def random_values(rng: np.random.Generator, index: int) -> Array:
    length = int(rng.integers(2, 3000))
    kinds = (
        lambda: rng.gamma(rng.uniform(0.3, 5), 1.0, length),
        lambda: rng.beta(rng.uniform(0.3, 5), rng.uniform(0.3, 5), length),
        lambda: rng.normal(0, 1, length),
        lambda: rng.random(length),
        lambda: np.where(
            rng.random(length) < 0.2, rng.normal(6, 1, length), rng.normal(0, 1, length)
        ),
        lambda: rng.integers(0, rng.integers(2, 40), length).astype(np.float64),
        lambda: -rng.exponential(2.0, length),
        lambda: rng.standard_cauchy(length),
    )
    values: Array = kinds[index % len(kinds)]()
    if index % 3 == 0 and values.max() > values.min():
        values = (values - values.min()) / (values.max() - values.min())
    return values


def test_triangle_threshold_is_scikit_images_on_1000_histograms() -> None:
    rng = np.random.default_rng(0)
    found, expected = [], []
    for index in range(1000):
        values = random_values(rng, index)
        found.append(float(triangle_threshold(torch.from_numpy(values)[None])))
        expected.append(float(threshold_triangle(values)))
    assert found == expected
    assert len(set(expected)) > 500  # not the same few again and again


def test_triangle_threshold_takes_rows_by_themselves() -> None:
    rng = np.random.default_rng(1)
    rows = [rng.gamma(1.0, 1.0, 300), 1 - rng.gamma(1.0, 1.0, 300), np.full(300, 0.25)]
    found = triangle_threshold(torch.from_numpy(np.stack(rows)))
    assert found.tolist() == [threshold_triangle(row) for row in rows]
    assert found[2] == 0.25
    assert triangle_threshold(torch.tensor([[3.0]])).tolist() == [3.0]


@pytest.mark.parametrize("grid", GRIDS)
def test_blur_equals_the_plain_convolution(grid: tuple[int, int]) -> None:
    values = noise(2, grid[0] * grid[1])
    found = blur_on_grid(values, grid)
    for b in range(2):
        expected = plain_blur(values[b].numpy().reshape(grid)).ravel()
        np.testing.assert_allclose(found[b].numpy(), expected, rtol=0, atol=1e-12)


def test_residual_is_the_mean_absolute_difference_of_the_clean_estimate() -> None:
    z, v, source = noise(2, 6, 4), noise(2, 6, 4, seed=1), noise(2, 6, 4, seed=2)
    found = residual_map(z, v, torch.tensor([0.9, 0.3]), source)
    for b, t in enumerate((0.9, 0.3)):
        expected = np.abs(z[b].numpy() - t * v[b].numpy() - source[b].numpy()).mean(axis=1)
        np.testing.assert_allclose(found[b].numpy(), expected, rtol=1e-6)
    assert torch.equal(clean_estimate(z, v, 0.0), z)


@pytest.mark.parametrize("omega", [-0.5, 0.0, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_mask_equals_algorithm_2(grid: tuple[int, int], omega: float) -> None:
    length = grid[0] * grid[1]
    z, v = noise(2, length, 3), noise(2, length, 3, seed=1)
    source = clean_estimate(z, v, 0.7) + 0.05 * noise(2, length, 3, seed=2)
    source[0, : length // 4] += 1.5  # an edited part
    found = adaptive_mask(residual_map(z, v, 0.7, source), grid, omega)
    for b in range(2):
        estimate = z[b].numpy() - 0.7 * v[b].numpy()
        expected = plain_mask(estimate, source[b].numpy(), grid, omega)
        # The map is kept in float32: a token may sit on the threshold to within its rounding.
        is_near = (found.scores[b].double() - found.threshold[b]).abs() < 1e-5
        differs = found.mask[b].numpy() != expected.astype(bool)
        assert not (differs & ~is_near.numpy()).any()
    torch.testing.assert_close(found.kept_ratio, found.mask.double().mean(dim=1))


def test_a_picture_without_contrast_keeps_all_tokens() -> None:
    found = adaptive_mask(torch.tensor([[0.5] * 12, [0.0] * 12]), (3, 4), 0.1)
    assert found.mask.all()
    assert torch.isfinite(found.scores).all()
    assert select_by_residual(found, ladder(12)).tolist() == [list(range(12))] * 2
    assert found.spread.tolist() == [1.0, 0.0]


def test_larger_omega_keeps_more() -> None:
    residual = noise(1, 144).abs().square().float()
    ratios = [
        float(adaptive_mask(residual, (12, 12), omega).kept_ratio)
        for omega in (-2.0, 0.0, 0.5, 1.0, 9.0)
    ]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[2] < ratios[-1] == 1.0


def mask_of(scores: torch.Tensor, threshold: float) -> ResidualMask:
    batch = scores.shape[0]
    thresholds = torch.full((batch,), threshold, dtype=torch.float64)
    return ResidualMask(scores, thresholds, scores > threshold, torch.zeros(batch))


def test_the_batchs_largest_count_decides_and_rounding_keeps_the_next_ranked() -> None:
    scores = torch.tensor([[0.0, 0.9, 0.2, 1.0, 0.3, 0.1], [0.8, 0.7, 1.0, 0.9, 0.0, 0.1]])
    found = mask_of(scores, 0.5)
    assert select_by_residual(found, ladder(6)).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    first = ResidualMask(found.scores[:1], found.threshold[:1], found.mask[:1], found.spread[:1])
    assert select_by_residual(first, ladder(6)).tolist() == [[1, 3]]
    assert select_by_residual(first, ladder(6, granularity=3)).tolist() == [[1, 3, 4]]
    assert select_by_residual(first, ladder(6), min_kept=5).shape == (1, 5)
    kept = select_by_residual(first, ladder(6))
    assert kept_mask(kept, 6).tolist() == [[False, True, False, True, False, False]]


def test_an_empty_mask_keeps_the_most_different_token() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5]])
    assert select_by_residual(mask_of(scores, 2.0), ladder(3)).tolist() == [[1]]


def test_other_references_are_kept_whole() -> None:
    found = mask_of(torch.tensor([[0.0, 1.0, 0.4, 0.9]]), 0.5)
    whole = embed(found, torch.tensor([2, 3, 4, 5]), 8)
    assert whole.mask.tolist() == [[True, True, False, True, False, True, True, True]]
    assert select_by_residual(whole, ladder(8)).tolist() == [[0, 1, 3, 5, 6, 7]]
    assert torch.equal(whole.spread, found.spread)


def test_spread_tells_a_local_edit_from_one_of_the_whole_picture() -> None:
    local, whole = torch.full((1, 144), 0.01), torch.rand(1, 144) * 0.2 + 0.8
    local[:, :20] = 1.0
    assert residual_spread(local).item() == pytest.approx(0.01)
    assert residual_spread(whole).item() > 0.8
    assert residual_spread(torch.zeros(1, 1)).item() == 0.0
    assert residual_spread(torch.ones(1, 1)).item() == 1.0


def test_non_local_edits_are_found_by_kept_ratio_or_spread() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 0] = mask[1] = True
    spread = torch.tensor([0.1, 0.1, 0.9])
    found = ResidualMask(torch.zeros(3, 4), torch.zeros(3).double(), mask, spread)
    assert is_non_local(found).tolist() == [False, True, True]
    assert is_non_local(found, max_kept_ratio=1.0, max_spread=1.0).tolist() == [False] * 3


def test_update_equals_equation_12_along_a_hand_made_flow() -> None:
    """A model whose velocity depends on the picture, guided, on Alg. 1's own schedule."""
    sigmas = [1.0, 0.93, 0.8, 0.61, 0.37, 0.12, 0.0]
    source, target = noise(2, 6, 4, seed=3), noise(2, 6, 4, seed=4)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]]).bool()

    def velocity(z: Array, t: float, weight: float) -> Array:
        return (z - weight * target.numpy() - 0.2 * np.tanh(z)) / max(t, 0.05)

    def guided(z: Array, t: float) -> Array:
        """True classifier-free guidance with diffusers' rescaling."""
        with_text, without = velocity(z, t, 1.0), velocity(z, t, 0.7)
        mixed = without + 4.0 * (with_text - without)
        norms = np.linalg.norm(with_text, axis=-1, keepdims=True)
        scaled: Array = mixed * norms / np.linalg.norm(mixed, axis=-1, keepdims=True)
        return scaled

    expected = noise(2, 6, 4, seed=5).numpy()
    found = torch.from_numpy(expected.copy())
    plain_mask_of = mask.numpy()[..., None].astype(np.float64)
    for t, then in itertools.pairwise(sigmas):
        found = consistent_step(
            found, torch.from_numpy(guided(found.numpy(), t)), t, then, source, mask
        )
        v = guided(expected, t)
        expected = plain_step(expected, v, t, then - t, source.numpy(), plain_mask_of, t)
        assert np.abs(found.numpy() - expected).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.one_of(st.none(), st.floats(0, 3)),
    st.integers(0, 999),
)
def test_update_equals_equation_12(
    batch: int, length: int, t: float, then: float, eta: float | None, seed: int
) -> None:
    z, v, source = (noise(batch, length, 3, seed=seed + i, dtype=torch.float32) for i in range(3))
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = consistent_step(z, v, t, then, source, mask, eta)
    expected = plain_step(
        z.double().numpy(),
        v.double().numpy(),
        t,
        then - t,
        source.double().numpy(),
        mask.numpy()[..., None].astype(np.float64),
        t if eta is None else eta,
    )
    assert np.abs(found.numpy() - expected).max() < 2e-6
    assert found.dtype == torch.float32


def test_with_all_tokens_the_update_is_the_schedulers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.25])
    z, v = (noise(2, 6, 4, seed=i, dtype=torch.float32) for i in range(2))
    source, mask = noise(2, 6, 4, seed=2, dtype=torch.float32), torch.ones(2, 6, dtype=torch.bool)
    for index, step in enumerate(scheduler.timesteps):
        now, then = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        found = consistent_step(z, v, now, then, source, mask)
        free = consistent_step(z, v, now, then, source, ~mask, eta=0.0)
        z = scheduler.step(v, step, z, return_dict=False)[0]
        assert torch.equal(found, z)
        torch.testing.assert_close(free, z)


def test_sigmas_of_a_batch_are_taken_entry_by_entry() -> None:
    z, v, source = (noise(2, 3, 2, seed=i) for i in range(3))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    now, then = torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.2])
    found = consistent_step(z, v, now, then, source, mask)
    for b in range(2):
        one = slice(b, b + 1)
        alone = consistent_step(
            z[one], v[one], float(now[b]), float(then[b]), source[one], mask[one]
        )
        torch.testing.assert_close(found[one], alone, rtol=1e-6, atol=1e-6)


def test_halves_are_computed_in_float32_and_keep_their_dtype() -> None:
    z, v, source = (noise(1, 4, 2, seed=i).bfloat16() for i in range(3))
    mask = torch.tensor([[True, False, True, False]])
    found = consistent_step(z, v, 0.9, 0.85, source, mask)
    wide = consistent_step(z.float(), v.float(), 0.9, 0.85, source.float(), mask)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    assert residual_map(z, v, 0.9, source).dtype == torch.float32


def test_mistakes_are_named() -> None:
    z = noise(1, 4, 2)
    with pytest.raises(UsageError, match="serve such a request with all tokens"):
        residual_map(z, z, 0.5, noise(1, 9, 2))
    with pytest.raises(UsageError, match="a grid of 2 x 3 does not hold 4 tokens"):
        blur_on_grid(noise(1, 4), (2, 3))
    with pytest.raises(UsageError, match="do not belong together"):
        consistent_step(z, z, 0.5, 0.4, z, torch.ones(1, 3, dtype=torch.bool))
