"""Engine sets of tiny models, built once a session; traces that the workers share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Started in the background of a shell without job control, this process ignores SIGINT, and so
# would the commands whose interruption is tested.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal graphs are traced once a run, by whichever worker is first."""
    if "torch" not in sys.modules:  # no test that is here builds in this process
        yield
        return
    from shared_traces import share_traces

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "traces"
    folder.mkdir(exist_ok=True)
    yield from share_traces(folder)


@pytest.fixture(scope="session")
def tiny_engine_sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny engine set of a family: K = 1, L = (2, 3), from a checkpoint on disk.

    The weights are those of `tiny.tiny_transformer`, so results can be compared.
    """
    root = tmp_path_factory.mktemp("tiny-sets")

    def build(family: str) -> Path:
        from tiny import tiny_transformer

        from ditrim.engines.build.build import build_engine_set
        from ditrim.engines.build.options import BuildOptions

        folder = root / family
        if not folder.exists():
            checkpoint = root / f"{family}-checkpoint"
            tiny_transformer(family).save_pretrained(checkpoint)
            build_engine_set(
                BuildOptions(
                    model=family,
                    weights=str(checkpoint),
                    front_depth=1,
                    layers=(2, 3),
                    max_reference_tokens=64,
                    max_noisy_tokens=64,
                    max_text_tokens=32,
                    output=str(folder),
                )
            )
        return folder

    return build
