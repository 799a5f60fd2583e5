"""Where tokens lie: the picture in the making and its references, as grids of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ditrim.plugins.errors import UsageError

# (height, width) of a picture in tokens.
TokenGrid = tuple[int, int]
Grids = tuple[TokenGrid, ...]


def lengths_of(grids: Sequence[TokenGrid], length: int | None = None) -> list[int]:
    """Tokens of each picture; raises `UsageError` where they are not `length` together."""
    lengths = [height * width for height, width in grids]
    if length is not None and sum(lengths) != length:
        raise UsageError(
            f"grids {list(grids)} hold {sum(lengths)} tokens, the references have {length}"
        )
    return lengths


def slices_of(lengths: Sequence[int]) -> tuple[slice, ...]:
    """Where each picture's tokens are among all of them."""
    ends = itertools.accumulate(lengths)
    return tuple(slice(end - length, end) for end, length in zip(ends, lengths, strict=True))


@dataclass(frozen=True, slots=True)
class Layout:
    """Pictures of one call, in the order of their tokens.

    Attributes:
        noisy: grid of the picture in the making.
        references: grid of each reference.
        frames: of each picture, the one in the making first; a grid has the rows of one frame below
            those of the other. None given means that each has one.
    """

    noisy: TokenGrid
    references: tuple[TokenGrid, ...] = ()
    frames: tuple[int, ...] = ()

    @classmethod
    def of_grids(cls, grids: Sequence[TokenGrid]) -> Layout:
        """The layout of some grids, the first of the picture in the making."""
        return cls(grids[0], tuple(grids[1:]))

    @classmethod
    def of_frames(cls, pictures: Sequence[tuple[int, int, int]]) -> Layout:
        """The layout of pictures given as (frames, height, width), that in the making first."""
        grids = [(frames * height, width) for frames, height, width in pictures]
        return cls(grids[0], tuple(grids[1:]), tuple(picture[0] for picture in pictures))

    @property
    def grids(self) -> tuple[TokenGrid, ...]:
        """Token grids of all pictures, the noisy one first."""
        return (self.noisy, *self.references)

    @property
    def pictures(self) -> tuple[tuple[int, int, int], ...]:
        """(frames, height, width) of all, the height of one frame."""
        frames = self.frames or (1,) * len(self.grids)
        rows = zip(frames, self.grids, strict=True)
        return tuple((count, height // count, width) for count, (height, width) in rows)

    @property
    def num_noisy(self) -> int:
        """Number of noisy tokens, G."""
        return self.noisy[0] * self.noisy[1]

    @property
    def num_reference(self) -> int:
        """Number of reference tokens of all references together, C."""
        return sum(lengths_of(self.references))
