import json
import logging

import pytest

from ditrim.runtime.small_editor.vocabulary import EMPTY, PAD, UNKNOWN, WordTokenizer

TOKENIZER = WordTokenizer()


def words(numbers):
    return [TOKENIZER.tokens[number] for number in numbers]


def test_case_and_punctuation_do_not_matter():
    plain = TOKENIZER.encode("make the red circle blue")
    assert TOKENIZER.encode("  Make the RED circle, BLUE!\n") == plain
    assert words(plain) == ["make", "the", "red", "circle", "blue"]


@pytest.mark.parametrize("prompt", ["", "   ", "...!?", "\n\t"])
def test_prompt_without_words_is_the_empty_token(prompt):
    assert words(TOKENIZER.encode(prompt)) == [EMPTY]


def test_american_spellings_are_known():
    assert words(TOKENIZER.encode("gray color center")) == ["grey", "colour", "middle"]


def test_unknown_words_are_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        numbers = TOKENIZER.encode("make the émerald zeppelin blue")
    assert words(numbers) == ["make", "the", UNKNOWN, UNKNOWN, "blue"]
    assert "zeppelin" in caplog.text
    assert "émerald" in caplog.text


def test_known_words_do_not_warn(caplog):
    with caplog.at_level(logging.WARNING):
        TOKENIZER.encode("zoom out")
    assert caplog.text == ""


def test_ten_thousand_words_are_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        numbers = TOKENIZER.encode("blue " * 9_999 + "red")
    assert len(numbers) == TOKENIZER.model_max_length
    assert "10000 words" in caplog.text
    assert f"reads {TOKENIZER.model_max_length}" in caplog.text


def test_a_word_of_a_million_letters_does_not_flood_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        assert words(TOKENIZER.encode("a" * 1_000_000)) == [UNKNOWN]
    assert len(caplog.text) < 1000


def test_special_tokens_cannot_be_written_in_a_prompt():
    assert PAD not in words(TOKENIZER.encode("<pad> <empty>"))
    assert EMPTY not in words(TOKENIZER.encode("<pad> <empty>"))


def test_batch_is_padded_to_its_longest():
    numbers, mask = TOKENIZER(["zoom out", "", "make the picture grey"])
    assert [len(row) for row in numbers] == [4, 4, 4]
    assert mask == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert words(numbers[0][2:]) == [PAD, PAD]


def test_max_length_below_one_is_refused():
    with pytest.raises(ValueError, match="max_length is 0"):
        TOKENIZER.encode("blue", 0)


def test_a_word_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        WordTokenizer(["red", "red"])


def test_saved_vocabulary_loads_equal(tmp_path):
    WordTokenizer(["one", "two"], model_max_length=5).save_pretrained(tmp_path / "deep" / "er")
    loaded = WordTokenizer.from_pretrained(tmp_path / "deep" / "er")
    assert loaded.tokens == (PAD, UNKNOWN, EMPTY, "one", "two")
    assert loaded.model_max_length == 5
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["vocab.json"]


def test_other_json_is_refused_by_name(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"tokens": ["a"]}))
    with pytest.raises(ValueError, match=r"vocab\.json is no vocabulary"):
        WordTokenizer.from_pretrained(tmp_path)
