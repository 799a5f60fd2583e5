"""True guidance's two branches on two processes: each runs one, and they exchange velocities.

Replaces: two model calls a step one after the other. Both processes make the same pipeline call
(same arguments, same seed). The first branch's call returns at once on the process that does not
run it, with a tensor that the exchange fills while the second branch's call returns. Limits: calls
with true guidance, one at a time, and policies that treat each branch by itself. A tensor that was
not filled holds NaN, so that nothing can go on from it unseen.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditrim.plugins.errors import UsageError
from ditrim.runtime.policies.topi import ToPi
from ditrim.runtime.policy import FullContext

if TYPE_CHECKING:
    from ditrim.runtime.denoising.denoiser import Denoiser

# In the order of the group's ranks.
BRANCHES = ("cond", "uncond")
_POLICIES = (ToPi, FullContext)


class GuidanceSplit:
    """The branch of this process, and the exchange with the other one."""

    def __init__(self, group: Any, denoiser: Denoiser) -> None:
        """Take a process group.

        Args:
            group: of `torch.distributed`, two processes; rank 0 runs "cond", rank 1 "uncond".
            denoiser: whose requests are split.

        Raises:
            UsageError: the group is not one of two processes, or the policy or a step cache looks
                at more than one branch.
        """
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            raise UsageError(
                "guidance_group needs torch.distributed: call init_process_group first"
            )
        size, self._rank = distributed.get_world_size(group), distributed.get_rank(group)
        if size != len(BRANCHES) or self._rank < 0:
            raise UsageError(
                f"guidance_group has {size} processes; give a group of two that this one is in, "
                "one for each branch of true guidance"
            )
        if type(denoiser.policy) not in _POLICIES or denoiser.cache is not None:
            what = type(denoiser.policy).__name__ if denoiser.cache is None else "a step cache"
            raise UsageError(
                f"guidance_group runs each branch in a process of its own, which {what} was not "
                "tested with: use ToPi or FullContext without a cache, or leave the group out"
            )
        self._group = group

    def runs(self, branch: str) -> bool:
        """Whether this process runs a branch.

        Raises:
            UsageError: it is neither of the two.
        """
        if branch not in BRANCHES:
            raise UsageError(
                f"the branch {branch!r} is neither of true guidance's two ({', '.join(BRANCHES)}): "
                "attach without guidance_group"
            )
        return BRANCHES[self._rank] == branch

    def give(self, branch: str, velocity: Tensor, given: MutableMapping[str, Tensor]) -> None:
        """Note what a call returns; the second of a step exchanges both, in place.

        Args:
            branch: of the call.
            velocity: (B, G, c_out), which the caller gets.
            given: of this step, by branch; emptied by the exchange.
        """
        given[branch] = velocity
        if len(given) < len(BRANCHES):
            return
        own = given[BRANCHES[self._rank]].contiguous()
        both = [torch.empty_like(own) for _ in BRANCHES]
        torch.distributed.all_gather(both, own, group=self._group)
        for name, found in zip(BRANCHES, both, strict=True):
            given[name].copy_(found)
        given.clear()


def check_exchanged(given: MutableMapping[str, Tensor]) -> None:
    """Check that a step that ends had both of its branches.

    Raises:
        UsageError: it had one.
    """
    if given:
        given.clear()
        raise UsageError(
            "guidance_group splits true guidance's two branches, and this call has one: give a "
            "negative prompt and true_cfg_scale above 1, or attach without guidance_group"
        )
