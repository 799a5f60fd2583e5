import numpy as np
import pytest

from ditrim.runtime.photo_editor.drawing import COLOURS, SHAPES, Item, Scene, sprite, wall
from ditrim.runtime.photo_editor.scenes import (
    KINDS,
    held_out_edits,
    held_out_photographs,
    sample_edit,
    training_generator,
)
from ditrim.runtime.photo_editor.tones import SEASONS, TONES
from ditrim.runtime.photo_editor.vocabulary import WORDS
from ditrim.runtime.small_editor.vocabulary import UNKNOWN, WordTokenizer

ALL_KINDS = [kind for kinds in KINDS.values() for kind in kinds]


def edit_of(kind, seed=0, **options):
    reference = "large" if kind == "shift" else "same"
    rng = np.random.default_rng(seed)
    return sample_edit(rng, kind, held_out_photographs(), **{"reference": reference, **options})


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_edit_differs_from_its_source_exactly_inside_the_mask(kind):
    for seed in range(4):
        edit = edit_of(kind, seed)
        differs = (edit.source != edit.target).any(axis=-1)
        assert np.array_equal(differs, edit.edit_mask)
        assert differs.any()


@pytest.mark.parametrize("kind", KINDS["local"])
def test_a_local_edit_leaves_more_than_half_of_the_picture_alone(kind):
    shares = [edit_of(kind, seed).edit_mask.mean() for seed in range(6)]
    assert max(shares) < 0.5


def test_a_large_reference_holds_the_picture_in_its_middle():
    edit = edit_of("recolour", reference="large")
    assert edit.references[0].shape == (512, 512, 3)
    assert np.array_equal(edit.references[0][128:384, 128:384], edit.source)


def test_a_shift_shows_what_lies_beside_the_picture():
    edit = next(e for e in (edit_of("shift", seed) for seed in range(40)) if "right" in e.prompt)
    assert np.array_equal(edit.target, edit.references[0][128:384, 192:448])


def test_zooming_out_shows_the_whole_large_reference():
    edits = (edit_of("zoom", seed, reference="large") for seed in range(40))
    edit = next(e for e in edits if e.prompt in ("zoom out", "show more of the scene"))
    blocks = edit.references[0].astype(float).reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(blocks - edit.target).max() <= 1


@pytest.mark.parametrize("kind", KINDS["transfer"])
def test_the_second_picture_holds_the_object_that_the_edit_brings(kind):
    edit = edit_of(kind)
    assert len(edit.references) == 2
    assert edit.references[1].shape == (256, 256, 3)
    assert "second picture" in edit.prompt


def test_smaller_pictures_are_the_same_scene_in_proportion():
    small = edit_of("remove", picture_size=128)
    assert small.source.shape == small.target.shape == (128, 128, 3)
    assert edit_of("remove").prompt == small.prompt


def test_held_out_edits_are_the_same_whatever_their_number():
    few, many = held_out_edits(3), held_out_edits(5)
    for first, second in zip(few, many[:3], strict=True):
        assert first.prompt == second.prompt
        assert np.array_equal(first.target, second.target)


def test_training_edits_differ_by_their_number():
    draws = [training_generator(0, number).random(4).tolist() for number in range(3)]
    assert draws[0] != draws[1] != draws[2]


def test_every_word_of_an_instruction_is_known():
    tokenizer = WordTokenizer(WORDS)
    unknown = tokenizer.tokens.index(UNKNOWN)
    for seed in range(12):
        for kind in ALL_KINDS:
            prompt = edit_of(kind, seed, picture_size=64).prompt
            assert unknown not in tokenizer.encode(prompt), prompt


def test_wrong_kinds_and_shifts_without_surroundings_are_refused():
    with pytest.raises(ValueError, match="kind 'melt' is unknown; allowed: recolour"):
        edit_of("melt")
    with pytest.raises(ValueError, match="reference='large'"):
        edit_of("shift", reference="same")


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_round_in_light_and_soft_at_the_edge(shape):
    drawn = sprite(shape, "red", 40)
    partly = (drawn.coverage > 0) & (drawn.coverage < 1)
    inside = drawn.colour[drawn.coverage == 1]
    assert partly.any()
    assert inside.std(axis=0).max() > 0.03  # lit from one side, with a highlight
    assert 0.1 < drawn.shadow.max() <= 0.5
    assert drawn.coverage[0].max() == drawn.coverage[:, 0].max() == 0


def test_objects_outside_the_canvas_are_cut_off():
    background = wall("blue", 64)
    item = Item(shape="ball", colour="red", x=300, y=0, radius=20)
    assert np.array_equal(Scene(background=background, items=(item,)).render(), background)
    half = Scene(background=background, items=(Item(**(ITEM | {"x": 32})),)).render()
    assert not np.array_equal(half, background)


ITEM = {"shape": "ball", "colour": "red", "x": 0, "y": 0, "radius": 20}


@pytest.mark.parametrize("name", [*TONES, *SEASONS])
def test_tones_change_photographs_and_keep_their_type(name):
    picture = held_out_photographs()[0][:64, :64]
    changed = (TONES | SEASONS)[name](picture)
    assert changed.dtype == np.uint8
    assert changed.shape == picture.shape
    assert np.abs(changed.astype(int) - picture).mean() > 4


def test_black_and_white_has_no_colour():
    changed = TONES["black and white"](held_out_photographs()[1])
    assert (changed.max(axis=-1) == changed.min(axis=-1)).all()


def test_colours_are_distinct():
    values = np.array(list(COLOURS.values()))
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert distances[~np.eye(len(values), dtype=bool)].min() > 0.3
