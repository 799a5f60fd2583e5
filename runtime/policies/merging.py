"""What merging policies share: each part of a call is merged by itself, at one kept ratio.

BACK decodes noisy tokens only, so a noisy token that went into a reference token could not be
brought back: "noisy and reference tokens together" is a merge of the noisy tokens beside one of the
references, not one of their joint sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ditrim.plugins.errors import UsageError
from ditrim.plugins.layout import Grids
from ditrim.runtime.policy import CallView, Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from ditrim.runtime.tokens.matching import TokenMerge

SCOPES = ("reference", "both")
# (features (B, N, d), grids that hold N tokens, count) -> a merge into `count` tokens.
Grouping = Callable[["Tensor", Grids, int], "TokenMerge"]


def check_scope(scope: object) -> None:
    """Raise `UsageError` where a scope is none of `SCOPES`."""
    if scope not in SCOPES:
        raise UsageError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")


def reduce_by_merging(
    call: CallView, ratio: float, references: Grouping, noisy: Grouping | None = None
) -> Reduction:
    """A call's tokens merged into a share of them.

    Args:
        call: of a reducer that reads features.
        ratio: kept share of each part. References' counts are rounded up by the ladder.
        references: groups the references' tokens.
        noisy: groups the noisy tokens; none leaves them alone.

    Returns:
        the reduction; a part that keeps every token is not merged at all.
    """
    from ditrim.runtime.tokens.selection import bounded_count

    assert call.reference is not None
    assert call.noisy is not None
    merge = noisy_merge = None
    length = call.reference.shape[1]
    count = bounded_count(math.ceil(ratio * length), length, call.ladder)
    if count < length:
        merge = references(call.reference, call.reference_grids, count)
    if noisy is not None:
        length = call.noisy.shape[1]
        count = max(1, math.ceil(ratio * length))
        if count < length:
            noisy_merge = noisy(call.noisy, (call.noisy_grid,), count)
    return Reduction(
        kept=None if merge is None else merge.kept, merge=merge, noisy_merge=noisy_merge
    )
