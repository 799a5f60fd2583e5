"""Token merging against plain loops over tokens, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrim.plugins.errors import UsageError
from ditrim.runtime.tokens.matching import (
    Merge,
    TokenMerge,
    cell_destinations,
    grid_positions,
    guidance_importance,
    ibtm,
    match_tokens,
    merge_into_kept,
    toma,
    tomesd,
)

Array = npt.NDArray[np.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(batch: int, length: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=generator(seed), dtype=torch.float64)


def cosine(first: Array, second: Array) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def plain_matching(
    metric: Array,
    destinations: list[int],
    num_kept: int,
    candidates: list[int] | None = None,
    by_distance: bool = False,
) -> tuple[list[int], list[int]]:
    """Kept tokens of one sample and the kept token that each token goes to."""

    def likeness(i: int, j: int) -> float:
        if by_distance:
            return -float(((metric[i] - metric[j]) ** 2).sum())
        return cosine(metric[i], metric[j])

    best: dict[int, tuple[float, int]] = {}
    for i in range(len(metric)):
        if i not in destinations:
            scores = [likeness(i, j) for j in destinations]
            at = int(np.argmax(scores))
            best[i] = scores[at], destinations[at]
    may_stay = [i for i in best if candidates is None or i in candidates]
    # Those least alike stay; of equals, the higher index.
    ranked = sorted(may_stay, key=lambda i: (best[i][0], -i))
    alone = ranked[: num_kept - len(destinations)]
    kept = sorted([*destinations, *alone])
    return kept, [i if i in kept else best[i][1] for i in range(len(metric))]


def plain_mean(x: Array, kept: list[int], target: list[int], prune: bool = False) -> Array:
    if prune:
        return x[kept]
    return np.stack([x[[i for i in range(len(x)) if target[i] == j]].mean(axis=0) for j in kept])


def assert_same(
    found: Merge,
    metric: torch.Tensor,
    plain: list[tuple[list[int], list[int]]],
    prune: bool = False,
) -> None:
    """Kept tokens, means and copies of every batch entry."""
    x = features(*metric.shape[:2], width=3, seed=9)
    merged, copied = found.merge(x), found.unmerge(found.merge(x))
    for entry, (kept, target) in enumerate(plain):
        assert found.kept[entry].tolist() == kept
        expected = plain_mean(x[entry].numpy(), kept, target, prune)
        np.testing.assert_allclose(merged[entry].numpy(), expected, rtol=1e-12, atol=1e-12)
        rows = [kept.index(j) for j in target]
        np.testing.assert_allclose(copied[entry].numpy(), expected[rows], rtol=1e-12, atol=1e-12)


def plain_toma(  # noqa: C901 - the algorithm in one piece
    metric: Array, grids: tuple[tuple[int, int], ...], num_kept: int, tile: int, sharpness: float
) -> tuple[list[int], Array]:
    """Kept tokens of one sample, and A (K', N) whose columns sum to 1."""
    tiles, start = [], 0
    for height, width in grids:
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                rows, columns = range(top, min(top + tile, height)), range(left, left + tile)
                tiles.append([start + y * width + x for y in rows for x in columns if x < width])
        start += height * width
    assert len(tiles) <= num_kept, "the caller chooses tiles that need no doubling"
    exact = [num_kept * len(members) / start for members in tiles]
    counts = [max(1, int(share)) for share in exact]
    for index in sorted(range(len(tiles)), key=lambda i: (counts[i] - exact[i], i)):
        if sum(counts) < num_kept:
            counts[index] += 1
    assert sum(counts) == num_kept, "the caller chooses counts without other corrections"
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    columns_of: dict[int, dict[int, float]] = {}
    for members, count in zip(tiles, counts, strict=True):
        chosen: list[int] = []
        for _ in range(count):
            gains = []
            for k in members:
                have = [max((unit[j] @ unit[i] for j in chosen), default=None) for i in members]
                gain = sum(
                    unit[k] @ unit[i] if h is None else max(0.0, unit[k] @ unit[i] - h)
                    for i, h in zip(members, have, strict=True)
                )
                gains.append(-np.inf if k in chosen else gain)
            is_best = [gain >= max(gains) - 1e-5 for gain in gains]  # ties: the first
            chosen.append(members[is_best.index(True)])
        for i in members:
            logits = np.array([sharpness * (unit[j] @ unit[i]) for j in chosen])
            shares = np.exp(logits - logits.max())
            columns_of[i] = dict(zip(chosen, shares / shares.sum(), strict=True))
    kept = sorted({j for shares in columns_of.values() for j in shares})
    matrix = np.zeros((len(kept), len(metric)))
    for i, shares in columns_of.items():
        for j, share in shares.items():
            matrix[kept.index(j), i] = share
    return kept, matrix


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matching_equals_the_plain_statement(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 14))
    num_destinations = data.draw(st.integers(1, length))
    num_kept = data.draw(st.integers(num_destinations, length))
    batch = data.draw(st.integers(1, 2))
    by_distance, prune = data.draw(st.booleans()), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 999))
    metric = features(batch, length, seed=seed)
    destinations = torch.stack(
        [torch.randperm(length, generator=generator(seed))[:num_destinations] for _ in range(batch)]
    )
    found = match_tokens(
        metric,
        destinations,
        num_kept,
        similarity="distance" if by_distance else "cosine",
        prune=prune,
    )
    plain = [
        plain_matching(metric[b].numpy(), destinations[b].tolist(), num_kept, None, by_distance)
        for b in range(batch)
    ]
    assert_same(found, metric, plain, prune)


def test_of_equally_similar_tokens_the_first_merge_into_the_first_destination() -> None:
    metric = torch.tensor([[1.0, 0.0]]).repeat(7, 1)[None]
    found = match_tokens(metric, torch.tensor([[4, 2]]), 4)
    assert found.kept.tolist() == [[2, 4, 5, 6]]
    assert found.assignment.tolist() == [[1, 1, 0, 1, 1, 2, 3]]
    plain = plain_matching(metric[0].double().numpy(), [4, 2], 4)
    assert_same(found, metric, [plain])


def test_equal_distances_merge_in_order() -> None:
    grids = ((1, 5),)
    metric = grid_positions(grids)[None]
    found = match_tokens(metric, torch.tensor([[2]]), 3, similarity="distance")
    assert found.kept.tolist() == [[0, 2, 4]]
    assert found.assignment.tolist() == [[0, 1, 1, 1, 2]]


def test_keeping_everything_changes_nothing() -> None:
    x = features(2, 11)
    for found in (
        tomesd(x, ((11, 1),), 11, generator()),
        ibtm(x, x[..., 0], 11, generator()),
        merge_into_kept(x, torch.arange(11).expand(2, -1)),
    ):
        assert torch.equal(found.merge(x), x)
        assert torch.equal(found.unmerge(found.merge(x)), x)


def test_keeping_one_token_averages_all() -> None:
    x = features(2, 12)
    mean = x.mean(dim=1, keepdim=True)
    for found in (tomesd(x, ((3, 4),), 1, generator()), ibtm(x, x[..., 0], 1, generator())):
        assert found.kept.shape == (2, 1)
        torch.testing.assert_close(found.merge(x), mean)
        torch.testing.assert_close(found.unmerge(found.merge(x)), mean.expand(-1, 12, -1))


def test_a_single_token_stays() -> None:
    x = features(2, 1)
    merges: list[TokenMerge] = [
        tomesd(x, ((1, 1),), 1, generator()),
        ibtm(x, x[..., 0], 1, generator()),
        toma(x, ((1, 1),), 1),
    ]
    for found in merges:
        assert torch.equal(found.merge(x), x)
        assert torch.equal(found.unmerge(x), x)


@pytest.mark.parametrize("grids", [((2, 2),), ((4, 6),), ((5, 7),), ((1, 5),), ((3, 3), (2, 5))])
def test_every_cell_has_one_destination(grids: tuple[tuple[int, int], ...]) -> None:
    seen: set[int] = set()
    for seed in range(40):
        chosen = cell_destinations(grids, generator(seed)).tolist()
        seen.update(chosen)
        start = at = 0
        for height, width in grids:
            for top in range(0, height, 2):
                for left in range(0, width, 2):
                    y, x = divmod(chosen[at] - start, width)
                    assert y // 2 == top // 2
                    assert x // 2 == left // 2
                    at += 1
            start += height * width
        assert at == len(chosen)
    assert len(seen) == start  # every token is chosen by some seed


@pytest.mark.parametrize("num_kept", [4, 9, 17, 34])
@pytest.mark.parametrize("prune", [False, True])
def test_tomesd_merges_into_one_token_of_each_cell(num_kept: int, prune: bool) -> None:
    grids = ((5, 7),)
    metric = features(2, 35)
    found = tomesd(metric, grids, num_kept, generator(3), prune=prune)
    chosen = cell_destinations(grids, generator(3)).tolist()
    assert len(chosen) == 12
    if num_kept < len(chosen):
        assert set(found.kept[0].tolist()) <= set(chosen)
        assert found.kept[0].tolist() == found.kept[1].tolist()
        chosen = found.kept[0].tolist()
    plain = [plain_matching(metric[b].numpy(), chosen, num_kept) for b in range(2)]
    assert_same(found, metric, plain, prune)


@pytest.mark.parametrize(("num_kept", "p"), [(3, 0.4), (10, 0.4), (10, 0.0), (20, 0.8), (29, 0.4)])
def test_ibtm_merges_tokens_outside_the_pool_first(num_kept: int, p: float) -> None:
    length, k = 29, 0.25
    metric = features(2, length, seed=1)
    importance = torch.rand(2, length, generator=generator(2))
    found = ibtm(metric, importance, num_kept, generator(5), p=p, k=k)
    draws = generator(5)
    for b in range(2):
        scores = importance[b].tolist()
        size = min(length, int(num_kept * (1 + p)))
        pool = sorted(range(length), key=lambda i: (-scores[i], i))[:size]
        ranks = torch.randperm(size, generator=draws)[: min(num_kept, int(length * k))]
        chosen = [pool[i] for i in ranks.tolist()]
        kept, target = plain_matching(metric[b].numpy(), chosen, num_kept, pool)
        assert found.kept[b].tolist() == kept
        assert set(kept) <= set(pool)
        assert [kept[i] for i in found.assignment[b].tolist()] == target


def test_ibtm_of_equal_importance_pools_the_first_tokens() -> None:
    found = ibtm(features(1, 20), torch.ones(1, 20), 5, generator(), p=0.4)
    assert max(found.kept[0].tolist()) < 7


def test_equal_generators_give_equal_merges() -> None:
    x = features(1, 40)
    for make in (
        lambda g: tomesd(x, ((5, 8),), 13, g),
        lambda g: ibtm(x, x[..., 0], 13, g),
    ):
        first, second, other = make(generator(1)), make(generator(1)), make(generator(2))
        assert torch.equal(first.kept, second.kept)
        assert torch.equal(first.merge(x), second.merge(x))
        assert not torch.equal(first.kept, other.kept)


def test_merging_into_kept_tokens_by_place_and_by_feature() -> None:
    grids = ((3, 4), (2, 3))
    positions = grid_positions(grids)[None].expand(2, -1, -1)
    kept = torch.tensor([[0, 6, 13], [3, 11, 17]])
    metric = features(2, 18)
    for chosen, similarity in ((positions, "distance"), (metric, "cosine")):
        found = merge_into_kept(chosen, kept, similarity=similarity)  # type: ignore[arg-type]
        plain = [
            plain_matching(
                chosen[b].double().numpy(), kept[b].tolist(), 3, None, similarity == "distance"
            )
            for b in range(2)
        ]
        assert_same(found, chosen, plain)
    by_place = merge_into_kept(positions, kept, similarity="distance").assignment
    assert by_place[:, 12:].eq(2).all()  # the second picture's token is nearest to its own
    assert by_place[:, :12].ne(2).all()


@pytest.mark.parametrize(
    ("grids", "num_kept", "tile"),
    [
        (((4, 4),), 8, 4),
        (((5, 7),), 20, 3),
        (((3, 5), (4, 2)), 11, 2),
        (((5, 7),), 35, 3),
        (((4, 4),), 1, 4),
    ],
)
def test_toma_equals_the_plain_statement(
    grids: tuple[tuple[int, int], ...], num_kept: int, tile: int
) -> None:
    length = sum(h * w for h, w in grids)
    metric, x = features(2, length), features(2, length, width=3, seed=4)
    found = toma(metric, grids, num_kept, tile=tile, sharpness=6.0)
    merged, spread = found.merge(x).numpy(), found.unmerge(found.merge(x)).numpy()
    for b in range(2):
        kept, matrix = plain_toma(metric[b].numpy(), grids, num_kept, tile, 6.0)
        assert found.kept[b].tolist() == kept
        rows = matrix / matrix.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(merged[b], rows @ x[b].numpy(), rtol=1e-5, atol=1e-6)
        expected = matrix.T @ rows @ x[b].numpy()
        np.testing.assert_allclose(spread[b], expected, rtol=1e-5, atol=1e-6)


def test_toma_of_equal_tokens_keeps_different_ones() -> None:
    x = torch.ones(2, 20, 3)
    found = toma(x, ((4, 5),), 7, tile=3)
    for row in found.kept.tolist():
        assert len(set(row)) == 7
        assert row == sorted(row)
    torch.testing.assert_close(found.merge(x), torch.ones(2, 7, 3))
    torch.testing.assert_close(found.unmerge(torch.ones(2, 7, 3)), x)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_toma_keeps_as_many_tokens_as_asked(data: st.DataObject) -> None:
    grid = st.tuples(st.integers(1, 7), st.integers(1, 7))
    grids = tuple(data.draw(st.lists(grid, min_size=1, max_size=3)))
    length = sum(h * w for h, w in grids)
    num_kept = data.draw(st.integers(1, length))
    found = toma(features(2, length), grids, num_kept, tile=data.draw(st.integers(1, 8)))
    for row in found.kept.tolist():
        assert len(set(row)) == num_kept
        assert row == sorted(row)
    ones = torch.ones(2, length, 2)
    torch.testing.assert_close(found.merge(ones), ones[:, :num_kept])
    torch.testing.assert_close(found.unmerge(ones[:, :num_kept]), ones)


def test_merged_halves_are_summed_in_float32_and_keep_their_dtype() -> None:
    x = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    found = match_tokens(x, torch.tensor([[7]]), 1)
    merged = found.merge(x)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged[0, 0], x[0, 0])
    assert found.unmerge(merged).dtype == torch.bfloat16
    attended = toma(x, ((64, 64),), 100)
    assert attended.merge(x).dtype == attended.unmerge(merged.expand(1, 100, 1)).dtype
    assert attended.merge(x).dtype == torch.bfloat16


def test_guidance_importance_is_the_mean_absolute_difference() -> None:
    first, second = features(2, 6, seed=1), features(2, 6, seed=2)
    expected = np.abs(first.numpy() - second.numpy()).mean(axis=2)
    np.testing.assert_allclose(guidance_importance(first, second), expected, rtol=1e-5)


def test_long_sequences_are_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = features(2, 50)
    whole = tomesd(metric, ((5, 10),), 20, generator())
    monkeypatch.setattr("ditrim.runtime.tokens.matching._CHUNK", 7)
    parts = tomesd(metric, ((5, 10),), 20, generator())
    assert torch.equal(whole.kept, parts.kept)
    assert torch.equal(whole.assignment, parts.assignment)


def test_impossible_counts_and_grids_are_named() -> None:
    x = features(1, 6)
    with pytest.raises(UsageError, match="cannot keep 7 of 6 tokens; keep 1 to 6"):
        tomesd(x, ((2, 3),), 7, generator())
    with pytest.raises(UsageError, match="cannot keep 0 of 6"):
        toma(x, ((2, 3),), 0)
    with pytest.raises(UsageError, match=r"grids \(\(2, 2\),\) do not hold 6 tokens"):
        toma(x, ((2, 2),), 3)
    with pytest.raises(UsageError, match="importance has shape"):
        ibtm(x, torch.ones(1, 5), 3, generator())
    with pytest.raises(UsageError, match="p must not be negative"):
        ibtm(x, torch.ones(1, 6), 3, generator(), p=-0.1)
    with pytest.raises(UsageError, match="similarity must be cosine or distance"):
        match_tokens(x, torch.tensor([[0]]), 1, similarity="dot")  # type: ignore[arg-type]
