"""TokenDrop: which source tokens still differ from the picture in the making, and the update.

The clean estimate of a step is compared with the source: where they agree, the source's tokens are
dropped before the model runs, and the update pulls the picture towards the source there instead.

What the paper leaves open, and what is done here:

- It does not say how D_t, a difference of vectors, becomes one number a token: the mean of the
  absolute differences over channels.
- A map without any contrast has no threshold (its normalisation divides by zero): all tokens stay.
- Eq. 11 speaks of the tokens that *were* dropped, Alg. 1 uses the mask that it has just computed,
  which drops tokens of the *next* step. The functions take the mask from the caller; Alg. 1 is what
  the paper ran.
- Alg. 2 says nothing for t = t_d.

A source and the picture in the making must have the same grid: there is no residual otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ditrim.engines.sets.ladder import Ladder
from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import TokenGrid

BINS = 256
# A blurred plane differs from itself by the rounding of its sums, so many units in the last place.
_ROUNDING = 32
BLUR_SIZE = 11
BLUR_STD = 1.0

Scalar = Tensor | float


@dataclass(frozen=True, slots=True, eq=False)
class ResidualMask:
    """Alg. 2's result for a batch.

    Attributes:
        scores: (B, L) float32, the blurred residual brought to [0, 1]; for other references'
            tokens (see `embed`) infinite.
        threshold: (B,) float64, the triangle threshold with its bias (Eq. 15).
        mask: (B, L) bool, M_t; true tokens are kept.
        spread: (B,), how much of the source differs as much as its most different part; see
            `residual_spread`.
    """

    scores: Tensor
    threshold: Tensor
    mask: Tensor
    spread: Tensor

    @property
    def kept_ratio(self) -> Tensor:
        """(B,) float64: the share of tokens that the mask keeps, 1 - lambda_t."""
        return self.mask.double().mean(dim=1)


def clean_estimate(latents: Tensor, velocity: Tensor, sigma: Scalar) -> Tensor:
    """The clean picture that a step expects (TokenDrop Eq. 4).

    Args:
        latents: (B, L, c), z_t; velocity: of the same shape, guided where guidance is used.
        sigma: t, a number or (B,).
    """
    return latents - _column(sigma, latents) * velocity


def residual_map(latents: Tensor, velocity: Tensor, sigma: Scalar, source: Tensor) -> Tensor:
    """How far the clean estimate is from the source, a number a token (TokenDrop Alg. 2, D_t).

    Args:
        latents, velocity, sigma: see `clean_estimate`.
        source: (B, L, c), the source's latents on the same grid.

    Returns:
        (B, L) float32, the mean over channels of the absolute difference.
    """
    if source.shape != latents.shape:
        raise UsageError(
            f"the source has shape {tuple(source.shape)} and the latents {tuple(latents.shape)}: "
            "a residual needs both on one grid; serve such a request with all tokens"
        )
    wide = torch.promote_types(latents.dtype, torch.float32)
    estimate = clean_estimate(latents.to(wide), velocity.to(wide), sigma)
    return (estimate - source.to(wide)).abs().mean(dim=-1).float()


def blur_on_grid(values: Tensor, grid: TokenGrid) -> Tensor:
    """Gaussian blur on the token grid, 11 x 11 with a deviation of 1 (TokenDrop App. B).

    The grid is mirrored at its borders, without repeating them.

    Args:
        values: (B, L); grid: (height, width) with L = height * width.
    """
    height, width = grid
    if height * width != values.shape[1]:
        raise UsageError(f"a grid of {height} x {width} does not hold {values.shape[1]} tokens")
    rows = _blur_matrix(height).to(values)
    columns = _blur_matrix(width).to(values)
    blurred = rows @ values.view(-1, height, width) @ columns.T  # (B, h, w)
    return blurred.reshape(values.shape)


def triangle_threshold(values: Tensor, num_bins: int = BINS) -> Tensor:
    """Triangle threshold of each row (Zack et al. 1977; TokenDrop Sec. 3.3).

    The chord runs from the histogram's peak to the end of its longer tail; the centre of the bin
    farthest below it is the threshold. Computed without waiting for the device.

    Args:
        values: (B, L), finite.
        num_bins: of the histogram, between a row's smallest and largest value.

    Returns:
        (B,) float64; a constant row's value where there is no histogram to speak of.
    """
    values = values.double()
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    bins = torch.arange(num_bins, device=values.device)
    edges = torch.cat([bins * ((high - low) / num_bins) + low, high], dim=1)  # (B, bins + 1)
    index = torch.searchsorted(edges, values, right=True).sub_(1).clamp_(0, num_bins - 1)
    counts = torch.zeros(len(values), num_bins, dtype=torch.int64, device=values.device)
    counts.scatter_add_(1, index, torch.ones_like(index))

    peak = counts.argmax(dim=1, keepdim=True)
    is_filled = (counts > 0).int()
    first = is_filled.argmax(dim=1, keepdim=True)
    last = num_bins - 1 - is_filled.flip(1).argmax(dim=1, keepdim=True)
    flips = (peak - first) < (last - peak)  # the longer tail is brought to the left
    counts = torch.where(flips, counts.flip(1), counts)
    first = torch.where(flips, num_bins - 1 - last, first)
    peak = torch.where(flips, num_bins - 1 - peak, peak)

    height = counts.gather(1, peak).double()
    width = (peak - first).double()
    norm = (height.square() + width.square()).sqrt()
    distance = (height / norm) * (bins - first) - (width / norm) * counts
    distance = distance.masked_fill((bins < first) | (bins >= peak), -math.inf)
    level = distance.argmax(dim=1, keepdim=True)
    level = torch.where(flips, num_bins - 1 - level, level)
    centre = (edges.gather(1, level) + edges.gather(1, level + 1)) / 2
    return torch.where(high > low, centre, low).squeeze(1)


def residual_spread(blurred: Tensor) -> Tensor:
    """How much of a residual map is as high as its highest part, in [0, 1].

    The median over the mean of the highest twentieth. A local edit leaves most tokens near the
    floor, an edit of the whole picture leaves few there.

    Args:
        blurred: (B, L), not negative, not normalised.

    Returns:
        (B,); 0 where nothing differs at all.
    """
    length = blurred.shape[1]
    ranked = blurred.sort(dim=1, descending=True).values
    top = ranked[:, : max(1, length // 20)].mean(dim=1)
    middle = ranked[:, length // 2]
    return torch.where(top > 0, middle / top.clamp_min(torch.finfo(top.dtype).tiny), 0.0)


def adaptive_mask(
    residual: Tensor, grid: TokenGrid, omega: float, *, num_bins: int = BINS
) -> ResidualMask:
    """The tokens to keep after a step (TokenDrop Alg. 2, Eq. 15).

    Args:
        residual: (B, L), from `residual_map`.
        grid: (height, width) of the tokens.
        omega: the threshold is lowered by so many deviations of the normalised map.
        num_bins: of the histogram. The paper's pictures have 4096 tokens; most of 256 bins are
            empty with a few hundred, and the threshold then lies near the floor.
    """
    blurred = blur_on_grid(residual, grid)
    low, high = blurred.amin(dim=1, keepdim=True), blurred.amax(dim=1, keepdim=True)
    has_contrast = high - low > _ROUNDING * torch.finfo(blurred.dtype).eps * high
    scores = (blurred - low) / torch.where(has_contrast, high - low, 1.0)
    deviation = scores.double().std(dim=1, correction=0)
    threshold = triangle_threshold(scores, num_bins) - omega * deviation
    mask = (scores.double() > threshold[:, None]) | ~has_contrast
    return ResidualMask(scores, threshold, mask, residual_spread(blurred))


def embed(found: ResidualMask, tokens: Tensor, num_reference: int) -> ResidualMask:
    """A source's mask among the tokens of all references; every other token is kept.

    Args:
        found: of the source, L tokens.
        tokens: (L,) int64, where the source's tokens are among all references'.
        num_reference: C, of all references together.
    """
    batch = found.scores.shape[0]
    scores = found.scores.new_full((batch, num_reference), math.inf)
    mask = found.mask.new_ones((batch, num_reference))
    scores[:, tokens], mask[:, tokens] = found.scores, found.mask
    return ResidualMask(scores, found.threshold, mask, found.spread)


def select_by_residual(found: ResidualMask, ladder: Ladder, *, min_kept: int = 1) -> Tensor:
    """The kept tokens of a mask, as an engine takes them.

    The batch's largest count decides for all and is rounded up to the ladder's granularity, both by
    keeping the tokens of the next-highest residual. `kept_mask` says which those are: the update
    has to leave them alone as well.

    Returns:
        (B, K') int64, ascending in each row.
    """
    length = found.mask.shape[1]
    # A mask by threshold is a prefix of this order; one without contrast is everything.
    order = found.scores.sort(dim=1, descending=True, stable=True).indices
    count = max(int(found.mask.sum(dim=1).max()), min_kept)  # the one wait for the device
    count = min(ladder.round_up(min(count, length)), length)
    return order[:, :count].sort(dim=1).values


def kept_mask(kept: Tensor, length: int) -> Tensor:
    """(B, L) bool, true at the kept indices (B, K')."""
    mask = torch.zeros(kept.shape[0], length, dtype=torch.bool, device=kept.device)
    return mask.scatter_(1, kept, True)


def is_non_local(
    found: ResidualMask, *, max_kept_ratio: float = 0.9, max_spread: float = 0.15
) -> Tensor:
    """Edits that the mask does not fit, to be served with all tokens: (B,) bool.

    Where the whole picture changes, the threshold still drops what changes least, and the update
    then holds those tokens at the source (TokenDrop Sec. 5, App. D.4).

    Args:
        found: of the source alone, before `embed`.
        max_kept_ratio: more kept tokens than this share leave nothing to gain.
        max_spread: a larger `residual_spread` says that most of the picture changes. Chosen on
            training scenes of the small editor, where the spread separated local edits from
            others after two steps, and the kept ratio alone did not.
    """
    return (found.kept_ratio > max_kept_ratio) | (found.spread > max_spread)


def consistent_step(
    latents: Tensor,
    velocity: Tensor,
    sigma: Scalar,
    sigma_next: Scalar,
    source: Tensor,
    mask: Tensor,
    eta: Scalar | None = None,
) -> Tensor:
    """One step of the source-consistent flow (TokenDrop Eq. 10-12, Alg. 1).

    With the clean estimate's correction delta = (1 - M) eta / (1 + eta) (z_src - z_0|t), Eq. 12 is
    z_t + (sigma_next - sigma) v + (1 - sigma_next) delta. It is computed in that form: where M is
    1, it is Euler's step to the last bit.

    Args:
        latents: (B, L, c), z_t.
        velocity: of the same shape; with guidance, the guided one.
        sigma, sigma_next: t and t + dt, numbers or (B,).
        source: (B, L, c), z_src.
        mask: (B, L) bool, M_t: false tokens are pulled towards the source.
        eta: the pull's weight, by default sigma (Sec. 3.2); 0 leaves Euler's step.

    Returns:
        (B, L, c) in the latents' dtype; computed in float32 or wider.
    """
    if source.shape != latents.shape or mask.shape != latents.shape[:2]:
        raise UsageError(
            f"latents {tuple(latents.shape)}, source {tuple(source.shape)} and mask "
            f"{tuple(mask.shape)} do not belong together"
        )
    wide = torch.promote_types(latents.dtype, torch.float32)
    current, slope, target = latents.to(wide), velocity.to(wide), source.to(wide)
    now, then = _column(sigma, current), _column(sigma_next, current)
    weight = now if eta is None else _column(eta, current)
    correction = (weight / (1 + weight)) * (target - clean_estimate(current, slope, sigma))
    stepped = current + (then - now) * slope
    pulled = stepped + (1 - then) * correction
    return torch.where(mask[..., None], stepped, pulled).to(latents.dtype)


def _column(value: Scalar, like: Tensor) -> Tensor:
    """A number or (B,) as something that multiplies (B, L, c)."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return tensor.reshape(-1, 1, 1) if tensor.ndim else tensor


@lru_cache(maxsize=64)
def _blur_matrix(length: int) -> Tensor:
    """(length, length): the one-dimensional blur of a mirrored line."""
    offsets = torch.arange(BLUR_SIZE, dtype=torch.float64) - BLUR_SIZE // 2
    kernel = torch.exp(-offsets.square() / (2 * BLUR_STD**2))
    kernel = kernel / kernel.sum()
    period = max(1, 2 * (length - 1))
    at = (torch.arange(length)[:, None] + offsets.long()) % period  # (length, taps)
    at = torch.minimum(at, period - at).clamp_max(length - 1)
    weights = kernel.expand(length, -1)
    return torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, at, weights)
