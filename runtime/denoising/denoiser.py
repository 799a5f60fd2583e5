"""What the requests of one attachment or session share: engines, and how they are reduced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ditrim.engines.backend import Engines
from ditrim.engines.forking import check_not_forked
from ditrim.plugins.errors import UsageError
from ditrim.runtime.caches.step_cache import Cache
from ditrim.runtime.denoising.calls import EngineCalls
from ditrim.runtime.denoising.request import Request
from ditrim.runtime.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Sequence


class Denoiser:
    """Begins requests on loaded engines. Holds nothing of a request; threads may share it."""

    def __init__(
        self,
        engines: Engines,
        policy: Policy,
        *,
        cache: Cache | None = None,
        region: Tensor | None = None,
        timing: bool = False,
    ) -> None:
        """Make a denoiser.

        Args:
            engines: from `load_engines`; can be shared.
            policy: which tokens steps run on.
            cache: when steps reuse the last velocity; none means never.
            region: (height, width) bool, pixels of the first reference at any scale: reference
                tokens under it are always kept.
            timing: wait for the device after every part, so that a report's times are exact.
        """
        self.engines = engines
        self.policy = policy
        self.cache = cache
        self.region = region
        self.timing = timing
        self.calls = EngineCalls(engines)
        plain = policy.begin()
        self.acts_on_steps = plain.acts_on_steps
        if region is not None and not plain.takes_region:
            raise UsageError(
                f"{type(policy).__name__} takes no region; use a policy that keeps reference "
                "tokens as they are (ToPi, CoverageToPi, RandomDrop, TokenDrop)"
            )

    def begin(self, times: Sequence[float] | None = None) -> Request:
        """Begin a request.

        Args:
            times: the timestep of each step, in [0, 1]; none where they are not known beforehand.

        Raises:
            BackendError: this process was forked from one that had run engines.
        """
        check_not_forked()
        return Request(self, times)
