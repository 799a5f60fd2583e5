from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrim.commands.build_engine import _parser, options_from
from ditrim.engines.build.options import BuildOptions
from ditrim.engines.sets.ladder import MOST_KEPT_COUNTS, Ladder
from ditrim.plugins.errors import UsageError

PLAN_BACKENDS = ["tensorrt", "tensorrt-rtx"]


def kept_counts(ladder: Ladder) -> list[int]:
    return sorted({ladder.round_up(count) for count in range(1, ladder.longest + 1)})


@pytest.mark.parametrize("backend", PLAN_BACKENDS)
@pytest.mark.parametrize(
    ("given", "granularity"),
    [
        ({}, 128),
        ({"model": "flux-kontext"}, 128),
        ({"model": "qwen-edit-plus"}, 256),
        ({"model": "qwen-edit-2511", "num_references": 1}, 128),
        ({"preset": "small"}, 8),
        ({"preset": "small", "max_reference_tokens": 144}, 4),
        ({"resolution": (512, 512)}, 128),
        ({"reference_resolution": (512, 512)}, 16),
        ({"max_reference_tokens": 64}, 1),
        ({"rungs": 100}, 32),  # no coarser than the rungs that were asked for
        ({"ladder": (512, 1024, 4096)}, 64),
        ({"ladder": (512, 1000, 4096)}, 8),  # 1000 is a multiple of 8
        ({"ladder": (511, 4096)}, 1),
        ({"ladder": (4095,)}, 64),
        ({"granularity": 1}, 1),
        ({"granularity": 512}, 512),
        ({"ladder": (512, 1000, 4096), "granularity": 64}, 64),
    ],
)
def test_plans_have_few_kept_counts_unless_told(
    backend: str, given: dict[str, Any], granularity: int
) -> None:
    assert BuildOptions(backend=backend, **given).reference_ladder.granularity == granularity


@pytest.mark.parametrize("given", [{}, {"preset": "small"}, {"ladder": (512, 4096)}])
def test_graphs_keep_every_count_apart(given: dict[str, Any]) -> None:
    assert BuildOptions(**given).reference_ladder.granularity == 1


@pytest.mark.parametrize("given", [{}, {"preset": "small"}, {"model": "qwen-edit-plus"}])
def test_default_lengths_of_plans_are_few(given: dict[str, Any]) -> None:
    ladder = BuildOptions(backend="tensorrt-rtx", **given).reference_ladder
    assert len(kept_counts(ladder)) <= MOST_KEPT_COUNTS


@settings(max_examples=60, deadline=None)
@given(
    longest=st.integers(1, 9000),
    num_rungs=st.integers(1, 200),
)
def test_default_granularity_keeps_the_rungs_apart(longest: int, num_rungs: int) -> None:
    options = {"max_reference_tokens": longest, "rungs": num_rungs}
    fine = BuildOptions(**options).reference_ladder  # type: ignore[arg-type]
    ladder = BuildOptions(backend="tensorrt", **options).reference_ladder  # type: ignore[arg-type]
    assert len(ladder.rungs) == len(fine.rungs)
    assert ladder.longest == longest
    assert all(rung % ladder.granularity == 0 for rung in ladder.rungs[:-1])


@settings(max_examples=60, deadline=None)
@given(rungs=st.sets(st.integers(1, 9000), min_size=1, max_size=12))
def test_default_granularity_never_rounds_past_a_given_rung(rungs: set[int]) -> None:
    ladder = BuildOptions(backend="tensorrt", ladder=tuple(sorted(rungs))).reference_ladder
    for count in range(1, ladder.longest + 1, 7):
        assert ladder.rung_for(ladder.round_up(count)) == ladder.rung_for(count)


def test_granularity_is_in_the_identity_and_in_the_command_where_it_was_given() -> None:
    plain, told = (BuildOptions(backend="tensorrt", granularity=g) for g in (None, 128))
    assert plain.shaping() == told.shaping()
    assert BuildOptions(backend="tensorrt", granularity=32).shaping() != plain.shaping()
    assert "--granularity" not in plain.command()
    assert "--granularity 128" in told.command()
    arguments = _parser().parse_args(["--backend", "tensorrt", "--granularity", "16"])
    assert options_from(arguments).reference_ladder.granularity == 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"ladder": (512, 1 << 40)},
            r"--ladder: the rung is 1099511627776 tokens; qwen-edit takes at most 262144, 1 "
            r"reference of 8192x8192 pixels; give shorter references",
        ),
        (
            {"model": "qwen-edit-plus", "ladder": (786_433,)},
            r"the rung is 786433 tokens; qwen-edit-plus takes at most 786432, 3 references of 8192",
        ),
        (
            {"model": "flux-kontext", "max_reference_tokens": 262_145},
            r"--max-reference-tokens is 262145 tokens; flux-kontext takes at most 262144, 1 refer",
        ),
        ({"ladder": (10**400,)}, r"the rung is a number of 1329 bits tokens; qwen-edit takes at"),
        (
            {"max_noisy_tokens": 262_145},
            r"--max-noisy-tokens is 262145; it must be at most 262144, a picture of 8192x8192 pix",
        ),
        ({"resolution": (16384, 8192)}, r"16384x8192 is 524288 tokens; a picture has at most 2621"),
        ({"resolution": (10**400, 16)}, r"the width is a number of 1329 bits; it must be at most"),
        (
            {"reference_resolution": (65536, 64), "max_text_tokens": 2049},
            r"qwen-edit has 4096 positions on each side of a picture's centre: half of its longer "
            r"side takes 2048 and the text 2049 of them; lower --resolution or --max-text-tokens",
        ),
        ({"max_text_tokens": 4096, "resolution": (1024, 1024)}, r"takes 32 and the text 4096 of"),
        ({"preset": "small", "max_text_tokens": 4097}, r"side takes 0 and the text 4097 of them"),
        (
            {"model": "flux-kontext", "max_text_tokens": 65_537},
            r"--max-text-tokens is 65537; it must be at most 65536, far more than a prompt has",
        ),
        ({"num_references": 10**20}, r"--num-references is 1\d{20}; qwen-edit takes at most 1"),
    ],
)
def test_lengths_beyond_the_model_name_value_limit_and_remedy(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        BuildOptions(**given)


def test_the_longest_that_a_model_takes_is_accepted() -> None:
    options = BuildOptions(
        model="qwen-edit-2511",
        reference_resolution=(65536, 1024),
        max_text_tokens=2048,
        backend="tensorrt",
    )
    assert options.reference_ladder.longest == 786_432
    assert options.reference_ladder.granularity == 16384


def test_positions_are_those_of_diffusers() -> None:
    """The limit that texts and pictures share is the length of the model's own table."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    from ditrim.plugins.architectures import ARCHITECTURES

    rope = QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    assert len(rope.pos_freqs) == len(rope.neg_freqs) == ARCHITECTURES["qwen"].positions_limit
    _, text = rope([[(1, 2, 8000)]], max_txt_seq_len=96)
    assert len(text) == 96
    _, text = rope([[(1, 2, 8000)]], max_txt_seq_len=97)
    assert len(text) < 97  # past the end of the table
