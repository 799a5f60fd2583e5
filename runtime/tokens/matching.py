"""Merging tokens: which go together, and back again (IBTM, ToMeSD, ToMA, ToPi App. E.2).

Every function decides for one sequence of N tokens, references alone or noisy and reference tokens
together, and returns what turns (B, N, d) into (B, K', d) and back. `kept` are the tokens that the
merged ones stand for: RoPE rows are taken there. References are never decoded, so they need no
unmerge. Of a joint sequence, how many kept tokens lie before a boundary differs between batch
entries: run those one at a time.

Where sums of many tokens are made, their order is fixed, so that equal inputs and generators give
equal results on any device.

What the papers leave open, and what is done here:

- ToMeSD and IBTM take a ratio r, here the kept count K' = N - r is given, since engines serve
  lengths. With fewer kept tokens than destinations, destinations are drawn from the destinations.
- ToMeSD's cells at the border of a grid that does not divide evenly are smaller here and have a
  destination too; the authors' code leaves the border without any.
- IBTM Eq. 2 has no reduction over channels: the mean of the absolute difference.
- ToPi App. E.2 does not say in what space a kept token is the nearest: the caller's choice.
- ToMA's formulas are those of its authors' released code; the paper is not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Grids, lengths_of, slices_of

Similarity = Literal["cosine", "distance"]

_CHUNK = 4096  # rows of a similarity matrix held at a time
_TIE = 1e-5  # gains in ToMA that differ by less are equal: two tokens left are often an exact tie


class TokenMerge(Protocol):
    """Interface of what every way of merging returns."""

    @property
    def kept(self) -> Tensor:
        """(B, K') int64, ascending: the tokens that the merged sequence stands for."""
        ...

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, K', d), in the dtype of `x`; summed in float32 or wider."""
        ...

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, K', d) -> (B, N, d), in the dtype of `y`."""
        ...

    def entries(self, rows: Tensor) -> TokenMerge:
        """The merge of some batch entries alone; `rows` is (n,) int64."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Every token goes to one kept token; groups are averaged and unmerged by copying.

    Attributes:
        kept: (B, K') int64, ascending.
        assignment: (B, N) int64, each token's position in `kept`.
        weights: (B, N) float32, each token's weight in its group's mean; 0 drops it.
    """

    kept: Tensor
    assignment: Tensor
    weights: Tensor

    def merge(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        num_kept = self.kept.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = self.weights.to(wide)
        offsets = torch.arange(batch, device=x.device)[:, None] * num_kept
        group = (self.assignment + offsets).flatten()
        # Tokens of a group side by side: a sum in a fixed order, unlike scattered additions.
        order = group.argsort(stable=True)
        sizes = torch.zeros(batch * num_kept, dtype=torch.int64, device=x.device)
        sizes.scatter_add_(0, group, torch.ones_like(group))
        rows = (x.to(wide) * weights[..., None]).view(batch * length, width)[order]
        sums = _segment_sums(rows, sizes).view(batch, num_kept, width)
        totals = _segment_sums(weights.view(-1, 1)[order], sizes).view(batch, num_kept, 1)
        return (sums / totals).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        return y.gather(1, self.assignment[..., None].expand(-1, -1, y.shape[2]))

    def entries(self, rows: Tensor) -> Merge:
        return Merge(self.kept[rows], self.assignment[rows], self.weights[rows])


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMerge:
    """Tokens of a tile are spread over the tile's kept tokens by attention weights (ToMA).

    T tiles of at most n tokens and m kept tokens each; unused places hold weight 0.

    Attributes:
        kept: (B, K') int64, ascending.
        members: (T, n) int64, the tokens of each tile; unused places repeat a token.
        slots: (B, T, m) int64, positions in `kept`; unused places hold K'.
        weights: (B, T, m, n) float32; each token's weights over its tile sum to 1.
        places: (N,) int64, each token's place in `members`, flattened.
    """

    kept: Tensor
    members: Tensor
    slots: Tensor
    weights: Tensor
    places: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Average by the weights, normalised over each kept token's share."""
        batch, _, width = x.shape
        num_kept = self.kept.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = self.weights.to(wide)
        totals = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(totals > 0, totals, 1.0)
        merged = weights @ x.to(wide)[:, self.members]  # (B, T, m, d)
        out = merged.new_empty(batch, num_kept + 1, width)  # the last row takes unused places
        slots = self.slots.view(batch, -1, 1).expand(-1, -1, width)
        out.scatter_(1, slots, merged.view(batch, -1, width))
        return out[:, :num_kept].to(x.dtype).contiguous()

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread merged tokens by the transposed weights."""
        batch, _, width = y.shape
        wide = torch.promote_types(y.dtype, torch.float32)
        padded = torch.cat([y.to(wide), y.new_zeros(batch, 1, width, dtype=wide)], dim=1)
        slots = self.slots.view(batch, -1, 1).expand(-1, -1, width)
        parts = padded.gather(1, slots).view(*self.slots.shape, width)  # (B, T, m, d)
        tokens = self.weights.to(wide).transpose(-1, -2) @ parts  # (B, T, n, d)
        return tokens.view(batch, -1, width)[:, self.places].to(y.dtype)

    def entries(self, rows: Tensor) -> AttentionMerge:
        return replace(
            self, kept=self.kept[rows], slots=self.slots[rows], weights=self.weights[rows]
        )


def merge_into_kept(metric: Tensor, kept: Tensor, *, similarity: Similarity = "cosine") -> Merge:
    """Dropped tokens averaged into the nearest kept one (ToPi App. E.2).

    Args:
        metric: (B, N, d) features, or `grid_positions(...)[None].expand(B, ...)` to merge by place.
        kept: (B, K') int64, ascending.
        similarity: "cosine", or "distance" for the least Euclidean distance.
    """
    return match_tokens(metric, kept, kept.shape[1], similarity=similarity)


def tomesd(
    metric: Tensor,
    grids: Grids,
    num_kept: int,
    generator: torch.Generator,
    *,
    similarity: Similarity = "cosine",
    prune: bool = False,
) -> Merge:
    """ToMeSD: one random destination in each 2 x 2 cell, the most similar of the others merge.

    Args:
        metric: (B, N, d).
        grids: (height, width) of each picture in the sequence, in order.
        num_kept: K'.
        generator: on the CPU; draws the destinations, the same for the whole batch.
        similarity: see `match_tokens`.
        prune: drop merged tokens instead of averaging them (IBTM App. B, early steps).
    """
    _check(metric, num_kept, grids)
    chosen = cell_destinations(grids, generator)
    if len(chosen) > num_kept:
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:num_kept]]
    destinations = chosen.to(metric.device).expand(metric.shape[0], -1)
    return match_tokens(metric, destinations, num_kept, similarity=similarity, prune=prune)


def ibtm(
    metric: Tensor,
    importance: Tensor,
    num_kept: int,
    generator: torch.Generator,
    *,
    p: float = 0.4,
    k: float = 0.25,
    similarity: Similarity = "cosine",
    prune: bool = False,
) -> Merge:
    """Importance-based token merging (IBTM Sec. 3).

    The int(K' (1 + p)) most important tokens are the pool. Destinations are drawn from it at
    random, int(N k) of them and at most K'; those of the rest of the pool that are least like their
    destination stay alone, until K' are kept; every other token merges into the destination that it
    resembles most. So tokens outside the pool merge first.

    In the paper's first steps (6 of 50 for pictures) `tomesd(..., prune=True)` stands in: guidance
    says little about importance there, and dropping keeps the layout (App. B).

    Args:
        metric: (B, N, d).
        importance: (B, N), `guidance_importance` or any other; ties go to the lower index.
        num_kept: K' = N (1 - r).
        generator: on the CPU; draws the destinations' ranks in the pool.
        p, k: the paper's; 0.4 for pictures and 25 % as in ToMeSD.
        similarity: "distance" with token positions as the metric is what the paper used for PixArt.
        prune: drop merged tokens instead of averaging them.
    """
    _check(metric, num_kept)
    batch, length, _ = metric.shape
    if importance.shape != (batch, length):
        raise UsageError(
            f"importance has shape {tuple(importance.shape)}, the tokens need {(batch, length)}"
        )
    if not p >= 0 or not 0 < k <= 1:
        raise UsageError(f"p must not be negative and k in (0, 1], got p={p!r} and k={k!r}")
    pool_size = min(length, int(num_kept * (1 + p)))
    num_destinations = max(1, min(num_kept, int(length * k)))
    pool = importance.sort(dim=1, descending=True, stable=True).indices[:, :pool_size]
    ranks = torch.stack(
        [torch.randperm(pool_size, generator=generator)[:num_destinations] for _ in range(batch)]
    )
    candidates = torch.zeros(batch, length, dtype=torch.bool, device=metric.device)
    candidates.scatter_(1, pool, True)
    return match_tokens(
        metric,
        pool.gather(1, ranks.to(pool.device)),
        num_kept,
        candidates=candidates,
        similarity=similarity,
        prune=prune,
    )


def toma(
    metric: Tensor,
    grids: Grids,
    num_kept: int,
    *,
    tile: int = 8,
    sharpness: float = 1000.0,
) -> AttentionMerge:
    """ToMA: destinations by greedy facility location, merging by attention weights, in tiles.

    In each tile, destinations are taken one after the other, the one that adds most to the sum over
    tokens of the similarity to their nearest destination. A token's weights are the softmax over
    destinations of `sharpness` times the cosine similarity; destinations average by them, and the
    transpose brings results back. Nothing is random; of equal gains, the first token is taken.

    Args:
        metric: (B, N, d).
        grids: (height, width) of each picture in the sequence, in order.
        num_kept: K', shared out among tiles by their size, at least one each.
        tile: side of a tile in tokens; doubled while there are more tiles than kept tokens.
        sharpness: the authors' default for FLUX.
    """
    _check(metric, num_kept, grids)
    batch = metric.shape[0]
    plan = _tiles(tuple(grids), tile, num_kept)
    members, is_member = plan.members.to(metric.device), plan.is_member.to(metric.device)
    is_used, used = plan.is_used.to(metric.device), plan.used.to(metric.device)
    num_tiles, size = members.shape
    most = is_used.shape[1]
    unit = _unit(metric)[:, members]  # (B, T, n, d)
    similar = unit @ unit.transpose(-1, -2)
    similar = similar.masked_fill(~is_member[:, None, :], 0.0)
    is_free = is_member.expand(batch, -1, -1).clone()
    places = torch.zeros(batch, num_tiles, most, dtype=torch.int64, device=metric.device)
    best = None
    for index in range(most):
        gain = similar if best is None else (similar - best[:, :, None, :]).relu()
        total = gain.sum(dim=-1).masked_fill(~is_free, -torch.inf)
        is_best = total >= total.amax(dim=-1, keepdim=True) - _TIE
        place = is_best.int().argmax(dim=-1, keepdim=True)  # (B, T, 1)
        places[..., index : index + 1] = place
        is_free.scatter_(2, place, False)
        row = similar.gather(2, place[..., None].expand(-1, -1, -1, size)).squeeze(2)
        best = row if best is None else torch.maximum(best, row)

    logits = similar.gather(2, places[..., None].expand(-1, -1, -1, size)) * sharpness
    logits = logits.masked_fill(~is_used[..., None], -torch.inf)
    weights = torch.softmax(logits, dim=2) * is_member[:, None, :]
    tokens = members.expand(batch, -1, -1).gather(2, places)  # (B, T, m)
    kept, order = tokens.view(batch, -1)[:, used].sort(dim=1)  # (B, K')
    slots = torch.full_like(tokens, num_kept).view(batch, -1)
    slots[:, used] = order.argsort(dim=1)
    places = plan.places.to(metric.device)
    return AttentionMerge(kept, members, slots.view_as(tokens), weights.float(), places)


def match_tokens(
    metric: Tensor,
    destinations: Tensor,
    num_kept: int,
    *,
    candidates: Tensor | None = None,
    similarity: Similarity = "cosine",
    prune: bool = False,
) -> Merge:
    """Bipartite soft matching: everything but the destinations looks for the most similar one.

    Args:
        metric: (B, N, d).
        destinations: (B, D) int64, D <= K'.
        num_kept: K'; the K' - D tokens least like their destination stay alone. Ties go to the
            lower index: it is the first to merge.
        candidates: (B, N) bool, which tokens may stay alone; none means all.
        similarity: "cosine", or "distance" for the least Euclidean distance.
        prune: drop merged tokens instead of averaging them.
    """
    batch, length, _ = metric.shape
    num_destinations = destinations.shape[1]
    num_sources = length - num_destinations
    device = metric.device
    is_source = torch.ones(batch, length, dtype=torch.int64, device=device)
    is_source.scatter_(1, destinations, 0)
    sources = is_source.sort(dim=1, descending=True, stable=True).indices[:, :num_sources]
    nearest, likeness = _nearest(metric, sources, destinations, similarity)
    alone_from = num_sources - (num_kept - num_destinations)
    if candidates is not None:
        likeness = likeness.masked_fill(~candidates.gather(1, sources), torch.inf)
    ranked = likeness.sort(dim=1, descending=True, stable=True).indices
    alone = sources.gather(1, ranked[:, alone_from:])
    kept = torch.cat([destinations, alone], dim=1).sort(dim=1).values
    target = torch.arange(length, device=device).repeat(batch, 1)
    target.scatter_(1, sources, destinations.gather(1, nearest))
    target.scatter_(1, alone, alone)
    position = torch.zeros(batch, length, dtype=torch.int64, device=device)
    position.scatter_(1, kept, torch.arange(num_kept, device=device).repeat(batch, 1))
    weights = torch.ones(batch, length, dtype=torch.float32, device=device)
    if prune:
        weights = torch.zeros_like(weights).scatter_(1, kept, 1.0)
    return Merge(kept, position.gather(1, target), weights)


def cell_destinations(grids: Grids, generator: torch.Generator, *, cell: int = 2) -> Tensor:
    """One random token in each cell of cell x cell tokens: (D,) int64, in order of cells.

    Cells at the border of a grid that does not divide evenly are smaller.
    """
    owners = []
    cells = slices_of([-(-height // cell) * -(-width // cell) for height, width in grids])
    for (height, width), part in zip(grids, cells, strict=True):
        rows, columns = torch.arange(height) // cell, torch.arange(width) // cell
        owners.append((rows[:, None] * -(-width // cell) + columns).flatten() + part.start)
    owner = torch.cat(owners)
    draws = torch.rand(len(owner), generator=generator, dtype=torch.float64)
    order = (owner + draws).argsort(stable=True)
    firsts = torch.searchsorted(owner[order].contiguous(), torch.arange(cells[-1].stop))
    return order[firsts]


def guidance_importance(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """How much guidance changes each token (IBTM Eq. 2): two (B, N, c) -> (B, N) float32."""
    return (conditional.float() - unconditional.float()).abs().mean(dim=-1)


def grid_positions(grids: Grids) -> Tensor:
    """Places of all tokens, (N, 3) float32: picture, row, column.

    Pictures are farther apart than any two tokens of one picture are.
    """
    apart = 1 + sum(height + width for height, width in grids)
    parts = []
    for index, (height, width) in enumerate(grids):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        picture = torch.full_like(rows, index * apart)
        parts.append(torch.stack([picture, rows, columns], dim=-1).view(-1, 3))
    return torch.cat(parts).float()


def _nearest(
    metric: Tensor, sources: Tensor, destinations: Tensor, similarity: Similarity
) -> tuple[Tensor, Tensor]:
    """Each source's most similar destination, (B, N - D) positions, and that similarity."""
    if similarity not in ("cosine", "distance"):
        raise UsageError(f"similarity must be cosine or distance, got {similarity!r}")
    features = metric.to(torch.promote_types(metric.dtype, torch.float32))
    if similarity == "cosine":
        features = _unit(features)
    width = features.shape[2]
    targets = features.gather(1, destinations[..., None].expand(-1, -1, width))
    nearest, likeness = torch.empty_like(sources), features.new_empty(sources.shape)
    for start in range(0, sources.shape[1], _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = features.gather(1, sources[:, rows, None].expand(-1, -1, width))
        scores = part @ targets.transpose(1, 2)  # (B, chunk, D)
        if similarity == "distance":
            scores = 2 * scores - targets.square().sum(dim=-1)[:, None, :]
            scores -= part.square().sum(dim=-1, keepdim=True)
        found = scores.argmax(dim=2, keepdim=True)  # the first of equals
        nearest[:, rows], likeness[:, rows] = found[..., 0], scores.gather(2, found)[..., 0]
    return nearest, likeness


def _unit(metric: Tensor) -> Tensor:
    wide = metric.to(torch.promote_types(metric.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1)


def _segment_sums(rows: Tensor, sizes: Tensor) -> Tensor:
    """(M, d) rows that lie side by side summed into (S, d)."""
    return torch.segment_reduce(rows, "sum", lengths=sizes, axis=0, unsafe=True)


@dataclass(frozen=True, slots=True, eq=False)
class _TilePlan:
    """Cut of a sequence into tiles, as `AttentionMerge` merges them."""

    members: Tensor
    is_member: Tensor  # (T, n)
    is_used: Tensor  # (T, m), the first so many places of each tile are kept tokens
    used: Tensor  # (K',), those places, flattened
    places: Tensor


@lru_cache(maxsize=32)
def _tiles(grids: Grids, side: int, num_kept: int) -> _TilePlan:
    """Cut grids into tiles and share the kept tokens out among them."""
    total = sum(lengths_of(grids))
    tiles = _cut(grids, side)
    while len(tiles) > num_kept and side < max(max(grid) for grid in grids):
        side *= 2
        tiles = _cut(grids, side)
    if len(tiles) > num_kept:  # fewer kept tokens than pictures
        tiles = [torch.arange(total)]
    exact = [len(tile) * num_kept / total for tile in tiles]
    counts = [max(1, int(share)) for share in exact]
    # The largest remainders get what is left; with many counts raised to 1 there may be too many.
    by_remainder = sorted(range(len(tiles)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < num_kept:
        for index in by_remainder:
            if sum(counts) < num_kept and counts[index] < len(tiles[index]):
                counts[index] += 1
    while sum(counts) > num_kept:
        for index in reversed(by_remainder):
            if sum(counts) > num_kept and counts[index] > 1:
                counts[index] -= 1
    size = max(len(tile) for tile in tiles)
    members = torch.stack([torch.cat([t, t[:1].expand(size - len(t))]) for t in tiles])
    is_member = torch.arange(size) < torch.tensor([len(tile) for tile in tiles])[:, None]
    is_used = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    filled = is_member.flatten().nonzero().flatten()
    places = torch.empty(total, dtype=torch.int64)
    places[members.flatten()[filled]] = filled
    return _TilePlan(members, is_member, is_used, is_used.flatten().nonzero().flatten(), places)


def _cut(grids: Grids, side: int) -> list[Tensor]:
    """Tiles of side x side tokens, smaller at the borders: the tokens of each."""
    tiles = []
    for (height, width), part in zip(grids, slices_of(lengths_of(grids)), strict=True):
        tokens = torch.arange(part.start, part.stop).view(height, width)
        tiles += [
            tokens[y : y + side, x : x + side].flatten()
            for y in range(0, height, side)
            for x in range(0, width, side)
        ]
    return tiles


def _check(metric: Tensor, num_kept: int, grids: Grids | None = None) -> None:
    length = metric.shape[1]
    if not 1 <= num_kept <= length:
        raise UsageError(f"cannot keep {num_kept} of {length} tokens; keep 1 to {length}")
    if grids is not None and sum(lengths_of(grids)) != length:
        raise UsageError(f"grids {grids} do not hold {length} tokens")
