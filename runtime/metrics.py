"""How alike two pictures are, and how sure a mean over edits is.

PSNR, SSIM (Wang et al. 2004, scikit-image's 7 x 7 windows) and LPIPS (Zhang et al. 2018, AlexNet),
over a whole picture or a region of it. Intervals are percentile bootstraps over edits.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # (H, W, 3)
Mask = npt.NDArray[np.bool_]  # (H, W)
Values = npt.NDArray[np.float64]

CAP_DB = 100.0
RESAMPLES = 10_000
_DOWNLOAD_TIMEOUT_S = 30.0


def psnr_db(
    first: npt.NDArray[Any],
    second: npt.NDArray[Any],
    *,
    peak: float = 255.0,
) -> float:
    """Peak signal-to-noise ratio in dB, 100 at the most."""
    squares = (first.astype(np.float64) - second.astype(np.float64)) ** 2
    error = float(squares.mean()) / peak**2
    return CAP_DB if error == 0 else min(CAP_DB, -10 * float(np.log10(error)))


def ssim_and_map(first: Picture, second: Picture) -> tuple[float, Values]:
    """Structural similarity, and its map (H, W), channels averaged.

    The mean leaves out the border of 3 pixels whose windows reach over the edge; the map has it.
    """
    from skimage.metrics import structural_similarity

    mean, per_channel = structural_similarity(
        first, second, channel_axis=-1, data_range=255, full=True
    )
    return float(mean), np.asarray(per_channel, dtype=np.float64).mean(axis=-1)


def region_mean(values: Values, region: Mask) -> float | None:
    """The mean of a map (H, W) over a region; none for an empty one."""
    return float(values[region].mean()) if region.any() else None


@dataclass(frozen=True, slots=True)
class Lpips:
    """LPIPS with its network loaded."""

    network: Any

    def distance(self, first: Picture, second: Picture) -> float:
        """The distance of two pictures."""
        return float(self._measured(first, second, is_map=False).mean())

    def distances(self, first: Picture, second: Picture) -> Values:
        """The distance at every pixel, (H, W); its mean differs a little from `distance`."""
        return self._measured(first, second, is_map=True)[0, 0]

    def _measured(self, first: Picture, second: Picture, *, is_map: bool) -> Values:
        import torch

        def scaled(picture: Picture) -> Any:
            pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
            return pixels.permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]

        self.network.spatial = is_map
        with torch.no_grad():
            found = self.network(scaled(first), scaled(second))
        return np.asarray(found.numpy(), dtype=np.float64)


def load_lpips() -> tuple[Lpips | None, str]:
    """LPIPS, or none where its package or weights are not there; and why, in a sentence."""
    try:
        import lpips
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision for another torch raises
        return None, f"LPIPS is left out: {error}; it needs lpips, and torchvision for this torch"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        network = lpips.LPIPS(net="alex", verbose=False)
    except (OSError, RuntimeError, EOFError) as error:  # not downloaded, or damaged
        return None, f"LPIPS is left out: the weights of its network cannot be loaded ({error})"
    finally:
        socket.setdefaulttimeout(before)
    return Lpips(network.eval().requires_grad_(False)), "LPIPS with AlexNet"


def compare_pictures(
    found: Picture,
    reference: Picture,
    *,
    region: Mask | None = None,
    target: Picture | None = None,
    lpips: Lpips | None = None,
) -> dict[str, float | None]:
    """All metrics of a picture against the reference one.

    Args:
        found, reference: (H, W, 3) uint8.
        region: (H, W), where the edit belongs; metrics inside (`edited`) and outside (`unedited`)
            are then there too.
        target: the true edit; PSNR and SSIM against it are then there too.
        lpips: from `load_lpips`.

    Returns:
        name -> value; none for a region without pixels. PSNR is in dB.
    """
    similarity, similarities = ssim_and_map(found, reference)
    values: dict[str, float | None] = {"psnr_db": psnr_db(found, reference), "ssim": similarity}
    distances = None
    if lpips is not None:
        values["lpips"] = lpips.distance(found, reference)
        distances = None if region is None else lpips.distances(found, reference)
    if region is not None:
        for name, part in (("edited", region), ("unedited", ~region)):
            values[f"psnr_{name}_db"] = (
                psnr_db(found[part], reference[part]) if part.any() else None
            )
            values[f"ssim_{name}"] = region_mean(similarities, part)
            if distances is not None:
                values[f"lpips_{name}"] = region_mean(distances, part)
    if target is not None:
        values["psnr_target_db"] = psnr_db(found, target)
        values["ssim_target"] = ssim_and_map(found, target)[0]
    return values


@functools.lru_cache(maxsize=8)
def resample_weights(count: int, seed: int = 0) -> Values:
    """How often each of `count` items is in each bootstrap resample, over `count`: (R, count)."""
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    rows = np.repeat(np.arange(RESAMPLES), count)
    counts = np.bincount(rows * count + picks.ravel(), minlength=RESAMPLES * count)
    return counts.reshape(RESAMPLES, count) / count


def mean_intervals(values: Values) -> tuple[Values, Values]:
    """95 % percentile bootstrap intervals of the mean.

    Args:
        values: (edits, k): k quantities of the same edits, resampled together.

    Returns:
        low, high: (k,) each.
    """
    means = resample_weights(len(values)) @ values  # (R, k)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def mean_interval(values: Sequence[float] | Values) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of one quantity."""
    low, high = mean_intervals(np.asarray(values, dtype=np.float64)[:, None])
    return float(low[0]), float(high[0])


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other is as cheap as and better, or cheaper and as good.

    By rising cost; of equal points the first stands for all.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i], i))
    front: list[int] = []
    for index in order:
        if not front or qualities[index] > qualities[front[-1]]:
            front.append(index)
    return front
