"""Ids to text and the prompts that ask for it."""

import msgspec
import pytest
from test_model import make_tokenizer
from toy import EN, EOT, HAW, NO_TIMESTAMPS, SOT, TRANSCRIBE, VOCABULARY

from whisperlet.tokenizer import Tokenizer

ENGLISH_ONLY = msgspec.structs.replace(VOCABULARY, transcribe=None, languages={})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(make_tokenizer().to_str().encode(), VOCABULARY)


@pytest.mark.parametrize("text", ["one two", "Häuschen, 42!", "不听老人言", "👩‍🚒", "a\ufffdb"])
def test_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.text(ids) == text


def test_space_around_the_text_goes(tokenizer):
    assert tokenizer.text(tokenizer.encode("  one  two ")) == "one  two"


def test_special_tokens_are_left_out(tokenizer):
    one, two = tokenizer.encode("one"), tokenizer.encode(" two")
    assert tokenizer.text([SOT, EN, TRANSCRIBE, NO_TIMESTAMPS, *one, EOT, *two, EOT]) == "one two"
    assert tokenizer.text([]) == tokenizer.text([SOT, EOT]) == ""


def test_time_stamps_are_left_out():
    """In Whisper's own tokenizer they are added tokens, but not special ones."""
    made = make_tokenizer()
    made.add_tokens(["<|0.00|>"])
    tokenizer = Tokenizer(made.to_str().encode(), VOCABULARY)
    stamp = made.token_to_id("<|0.00|>")
    assert made.decode([stamp]) == "<|0.00|>"
    assert tokenizer.text([stamp, *tokenizer.encode("one"), stamp]) == "one"


@pytest.mark.parametrize(("text", "whole"), [("né", "n"), ("老人", "老"), ("a 👩", "a")])
def test_half_a_character_is_held_back(tokenizer, text, whole):
    ids = tokenizer.encode(text)
    assert tokenizer.text(ids[:-1]) == whole
    assert tokenizer.text([*ids[:-1], EOT]) == whole


def test_every_prefix_begins_the_text(tokenizer):
    text = "Ça, 听说 👩 ñ."
    ids = tokenizer.encode(text)
    for n in range(len(ids) + 1):
        assert text.startswith(tokenizer.text(ids[:n]))


def test_prompts(tokenizer):
    assert tokenizer.prompt("en") == [SOT, EN, TRANSCRIBE, NO_TIMESTAMPS]
    assert tokenizer.prompt("haw") == [SOT, HAW, TRANSCRIBE, NO_TIMESTAMPS]
    with pytest.raises(KeyError):
        tokenizer.prompt("de")
    english_only = Tokenizer(make_tokenizer().to_str().encode(), ENGLISH_ONLY)
    assert english_only.prompt("en") == [SOT, NO_TIMESTAMPS]


@pytest.mark.bundle
def test_the_real_one(real_bundle):
    real = Tokenizer(real_bundle.tokenizer_json, real_bundle.manifest.vocabulary)
    text = "He hoped there would be stew for dinner, 老人言."
    ids = real.encode(text)
    assert real.text([*real.prompt("en"), *ids, real.vocabulary.eot]) == text
    assert len(ids) < len(text)
