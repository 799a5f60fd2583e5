"""A build that was decided on, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditrim.engines.backends.tensorrt.request import Target
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.build.source import Source, SplitChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildTask:
    """A build that was decided on.

    Attributes:
        options: what was asked for.
        source: where the weights are.
        split: K and L.
        prints: fingerprints of the weight files, by name.
        loras: what the manifest says of the LoRAs that are merged.
        identity: of the set.
        target: the folder, with links resolved.
        built_for: what plans are for; none where the graphs are run.
    """

    options: BuildOptions
    source: Source
    split: SplitChoice
    prints: Mapping[str, Mapping[str, Any]]
    loras: tuple[Mapping[str, Any], ...]
    identity: str
    target: Path
    built_for: Target | None

    @property
    def detailed_layers(self) -> tuple[int, ...]:
        """Layers whose scores BACK returns one by one."""
        is_wanted = self.options.score_details
        return tuple(range(self.split.front_depth, self.split.num_layers)) if is_wanted else ()

    @property
    def links_weights(self) -> bool:
        """Whether the graphs point into the checkpoint's own files."""
        options = self.options
        is_linked = options.graph_only or options.builds_plans
        return self.source.checkpoint is not None and is_linked
