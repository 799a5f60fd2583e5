"""What a family says of its pipeline's sizes, against the installed diffusers' own functions.

A release that sizes pictures differently fails here, and not at a user's edit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import pytest
from complete_pipelines import make_pipeline, prompt_of
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image

from ditrim.engines.build.options import BuildOptions
from ditrim.export.family import FAMILIES

ASPECT = 8
Size = tuple[int, int]
QWEN = [name for name, family in FAMILIES.items() if family.architecture == "qwen"]


def ratios(area: int, unit: int) -> Iterator[float]:
    """A width over height in every interval between two roundings of a side to `unit`."""
    edges = {1 / ASPECT, float(ASPECT)}
    for step in range(1, math.ceil(math.sqrt(area * ASPECT) / unit) + 1):
        side = (step + 0.5) * unit
        edges |= {side * side / area, area / (side * side)}
    inside = sorted(edge for edge in edges if 1 / ASPECT <= edge <= ASPECT)
    yield from (inside[0], inside[-1])
    for low, high in itertools.pairwise(inside):
        yield math.sqrt(low * high)


def tokens(sizes: Iterable[Size]) -> set[int]:
    return {(width // 16) * (height // 16) for width, height in sizes}


def qwen_sizes(function: Callable[[int, float], tuple[int, ...]], area: int) -> set[Size]:
    return {(w, h) for ratio in ratios(area, 32) for w, h, *_ in [function(area, ratio)]}


def noisy_sizes(model: str) -> set[Size]:
    if model == "flux-kontext":  # the code of its __call__, at the default max_area
        area = 1024**2
        return {
            (round((area * ratio) ** 0.5), round((area / ratio) ** 0.5))
            for ratio in ratios(area, 16)
        } | {(side, round(area / side)) for side in range(362, 2897)}
    function = edit.calculate_dimensions if model == "qwen-edit" else plus.calculate_dimensions
    return qwen_sizes(function, 1024 * 1024)


def reference_sizes(model: str) -> set[Size]:
    if model == "flux-kontext":
        return set(PREFERRED_KONTEXT_RESOLUTIONS)
    if model == "qwen-edit":
        return qwen_sizes(edit.calculate_dimensions, 1024 * 1024)
    return qwen_sizes(plus.calculate_dimensions, plus.VAE_IMAGE_SIZE)


@pytest.mark.parametrize("model", FAMILIES)
def test_default_limits_are_what_the_pipeline_makes_of_every_shape(model: str) -> None:
    sizing, options = FAMILIES[model].sizing, BuildOptions(model=model)
    assert max(tokens(noisy_sizes(model))) == sizing.noisy_tokens == options.limits.noisy
    longest = max(tokens(reference_sizes(model)))
    assert longest == sizing.reference_tokens
    count = FAMILIES[model].max_references
    assert options.reference_ladder.longest == count * longest
    for number in range(1, count + 1):
        for length in tokens(reference_sizes(model)):
            assert options.reference_ladder.rung_for(number * length) >= number * length


def picture_tokens(sizes: Iterable[Size]) -> set[int]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    found = set()
    for width, height in sizes:
        rows, columns = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12845056)
        found.add(rows * columns // 28**2)
    return found


@pytest.mark.parametrize("model", QWEN)
def test_text_limits_are_what_the_prompt_encoder_makes(model: str) -> None:
    sizing = FAMILIES[model].sizing
    if model == "qwen-edit":
        sizes = qwen_sizes(edit.calculate_dimensions, 1024 * 1024)
        square, label = (1024, 1024), 2  # where vision starts and ends
    else:
        sizes = qwen_sizes(plus.calculate_dimensions, plus.CONDITION_IMAGE_SIZE)
        square, label = (384, 384), 7  # "Picture 1: " too
    assert max(picture_tokens(sizes)) + label == sizing.picture_text_tokens
    assert picture_tokens([square]) == {sizing.usual_picture_text_tokens - label}


@pytest.mark.parametrize("model", ["qwen-edit", "qwen-edit-plus"])
def test_the_embeddings_of_a_prompt_are_as_long_as_the_sizing_says(model: str) -> None:
    """Through the pipeline's own encoder, with the released template, tokens and processor."""
    pipe = make_pipeline(model)
    area = edit.calculate_dimensions(1024 * 1024, 1.0)[:2] if model == "qwen-edit" else (384, 384)
    sizing = FAMILIES[model].sizing
    for num_words, num_pictures in ((1, 1), (1024, 1), *([(40, 3)] if "plus" in model else [])):
        pictures = [Image.new("RGB", area)] * num_pictures
        embeds, _ = pipe.encode_prompt(
            prompt_of(num_words), image=pictures[0] if model == "qwen-edit" else pictures
        )
        expected = num_words + 5 + num_pictures * sizing.usual_picture_text_tokens
        # The first word of all has no blank before it, and may be two tokens.
        assert embeds.shape[1] - expected in (0, 1)
        assert expected <= sizing.text_tokens(num_pictures)


def test_flux_text_has_one_length() -> None:
    pipe = make_pipeline("flux-kontext")
    for num_words in (1, 400):
        embeds, _, _ = pipe.encode_prompt(prompt_of(num_words), None)
        assert embeds.shape[1] == FAMILIES["flux-kontext"].sizing.prompt_tokens == 512


@pytest.mark.parametrize("model", FAMILIES)
def test_the_resolution_of_results_leaves_references_as_the_pipeline_makes_them(
    model: str,
) -> None:
    usual = BuildOptions(model=model)
    small = BuildOptions(model=model, resolution=((512, 512),))
    assert small.limits.noisy == 32 * 32
    assert small.reference_ladder == usual.reference_ladder
    own = BuildOptions(model=model, reference_resolution=((512, 512),), num_references=1)
    assert own.reference_ladder.longest == 32 * 32
    assert own.limits.noisy == usual.limits.noisy
