import numpy as np
import pytest

from ditrim.runtime.small_editor.drawing import COLOURS, SHAPES, Background, Item, Scene
from ditrim.runtime.small_editor.scenes import (
    CATEGORIES,
    HELD_OUT_PAIRS,
    KINDS,
    PAIRS,
    TRAIN_PAIRS,
    EditExample,
    held_out_edits,
    sample_edit,
    training_generator,
)
from ditrim.runtime.small_editor.vocabulary import UNKNOWN, WordTokenizer

ALL_KINDS = [kind for kinds in KINDS.values() for kind in kinds]


def same(first: EditExample, second: EditExample) -> bool:
    return (
        first.prompt == second.prompt
        and len(first.references) == len(second.references)
        and all(map(np.array_equal, first.references, second.references))
        and np.array_equal(first.target, second.target)
    )


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("reference", ["same", "large"])
def test_true_edit_differs_from_the_source_exactly_inside_the_mask(kind, reference):
    if (kind, reference) == ("shift", "same"):
        pytest.skip("a shift needs a large reference")
    for seed in range(8):
        edit = sample_edit(np.random.default_rng(seed), reference=reference, kind=kind)
        differs = (edit.source != edit.target).any(axis=-1)
        assert np.array_equal(differs, edit.edit_mask)
        assert differs.any()


@pytest.mark.parametrize("kind", ["recolour", "remove", "add", "replace", "insert", "swap"])
def test_edit_of_one_shape_stays_near_one_cell(kind):
    for seed in range(20):
        edit = sample_edit(np.random.default_rng(seed), kind=kind)
        rows, columns = np.nonzero(edit.edit_mask)
        assert np.ptp(rows) <= 25
        assert np.ptp(columns) <= 25


def test_shapes_of_references_source_and_target():
    for index, edit in enumerate(held_out_edits(44)):
        side = edit.references[0].shape[0]
        assert side in (48, 72)
        margin = (side - 48) // 2
        middle = edit.references[0][margin : margin + 48, margin : margin + 48]
        assert np.array_equal(middle, edit.source)
        assert len(edit.references) == (2 if edit.category == "transfer" else 1)
        assert edit.target.shape == edit.source.shape == (48, 48, 3)
        assert edit.target.dtype == edit.source.dtype == np.uint8
        assert edit.category == next(c for c, kinds in KINDS.items() if edit.kind in kinds)
        assert edit.kind == ALL_KINDS[index % len(ALL_KINDS)]


def test_held_out_item_does_not_depend_on_count():
    assert all(map(same, held_out_edits(13), held_out_edits(30)[:13]))
    assert all(map(same, held_out_edits(5, category="camera"), held_out_edits(9, 0, "camera")))


def test_sampling_is_deterministic_and_the_seed_matters():
    first, again = (sample_edit(training_generator(3, 7)) for _ in range(2))
    assert same(first, again)
    assert not same(first, sample_edit(training_generator(4, 7)))
    assert not same(first, sample_edit(training_generator(3, 8)))


def test_training_never_shows_or_names_a_held_out_pair():
    names = {f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS}
    for step in range(250):
        edit = sample_edit(training_generator(0, step))
        assert not set(edit.pairs) & set(HELD_OUT_PAIRS)
        assert not any(name in edit.prompt for name in names)


def test_every_held_out_edit_has_a_held_out_pair():
    for edit in held_out_edits(110):
        if edit.kind in ("recolour", "add", "replace"):
            # The pair may come with the edit, so the instruction and the picture tell together.
            words = edit.prompt.split()
            known = set(edit.pairs) | {
                (colour, shape) for colour, shape in PAIRS if colour in words and shape in words
            }
        else:
            known = set(edit.pairs)
        assert known & set(HELD_OUT_PAIRS), edit.prompt


def test_held_out_scenes_are_not_training_scenes():
    train = {sample_edit(training_generator(0, s)).source.tobytes() for s in range(250)}
    assert not train & {edit.source.tobytes() for edit in held_out_edits(110)}


def test_pairs_are_split_and_every_colour_and_shape_is_trained():
    assert set(HELD_OUT_PAIRS) | set(TRAIN_PAIRS) == set(PAIRS)
    assert not set(HELD_OUT_PAIRS) & set(TRAIN_PAIRS)
    assert {colour for colour, _ in TRAIN_PAIRS} == set(COLOURS)
    assert {shape for _, shape in TRAIN_PAIRS} == set(SHAPES)


def test_every_instruction_is_in_the_vocabulary():
    tokenizer = WordTokenizer()
    unknown = tokenizer.encode(UNKNOWN.strip("<>"))
    for step in range(300):
        prompt = sample_edit(training_generator(1, step)).prompt
        assert unknown[0] not in tokenizer.encode(prompt), prompt


def test_local_edits_leave_much_to_do():
    errors = [
        10 * np.log10(255**2 / np.mean((e.source.astype(float) - e.target) ** 2))
        for e in held_out_edits(80, category="local")
    ]
    assert np.mean(errors) < 18.5


@pytest.mark.parametrize("category", CATEGORIES)
def test_sample_edit_keeps_to_the_category(category):
    assert sample_edit(np.random.default_rng(0), category).category == category


def test_wrong_names_are_told_with_what_is_allowed():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"'lokal'.*allowed: local, global"):
        sample_edit(rng, "lokal")
    with pytest.raises(ValueError, match=r"'paint'.*allowed: recolour"):
        sample_edit(rng, kind="paint")
    with pytest.raises(ValueError, match=r"'test'.*allowed: train, held-out"):
        sample_edit(rng, split="test")
    with pytest.raises(ValueError, match=r"reference='large'"):
        sample_edit(rng, kind="shift", reference="same")
    with pytest.raises(ValueError, match=r"'lokal'"):
        held_out_edits(1, category="lokal")
    with pytest.raises(ValueError, match=r"'mist'.*allowed: plain"):
        Scene(background=Background(kind="mist", first=(0, 0, 0), second=(1, 1, 1))).render()


@pytest.mark.parametrize("kind", ["plain", "graded", "stripes", "bars", "checks", "dots"])
def test_camera_shift_is_a_window_into_the_large_view(kind):
    background = Background(kind=kind, first=(0.2, 0.3, 0.4), second=(0.6, 0.5, 0.4), period=12.0)
    item = Item(shape="ring", colour="red", x=3.0, y=-5.0, radius=9.0)
    scene = Scene(background=background, items=(item,))
    large = scene.render(72).astype(int)
    shifted = scene.render(48, centre=(12.0, 0.0)).astype(int)
    assert np.abs(large[12:60, 24:72] - shifted).max() <= 1


def test_zoom_shows_the_middle_enlarged():
    background = Background(kind="plain", first=(0.5, 0.5, 0.5), second=(0.5, 0.5, 0.5))
    scene = Scene(
        background=background, items=(Item(shape="square", colour="red", x=0, y=0, radius=8),)
    )
    wide, close = scene.render(48), scene.render(48, scale=2.0)
    halved = close.reshape(24, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(wide[12:36, 12:36] - halved).max() <= 32  # edges, drawn at another resolution
    assert np.abs(wide[12:36, 12:36] - halved).mean() < 1


def test_background_of_a_scene_that_shows_every_colour_can_change():
    rng = np.random.default_rng(146)
    edit = sample_edit(rng, split="train", reference="large", kind="background")
    assert len({colour for colour, _ in edit.pairs}) == len(COLOURS)
    assert edit.edit_mask.any()
