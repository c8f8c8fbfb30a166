"""What a fine-tuning learns from: labels, mistakes, spelling, replay, batches, and how a batch is heard."""

import random
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import toy
from test_manifests import write_set

from convert import correction, greedy, manifests, model, reference, spelling, streaming
from convert.augment import Augmentation
from convert.lessons import IGNORED, ByLength, Lessons, Plan
from convert.manifests import Data
from whisperlet.audio import to_float32
from whisperlet.logmel import SILENCE

PLAN = Plan(
    augment=Augmentation(), replay_share=0.25, corrections=True, mistakes=0.5, silence=10, batch=2, seed=0
)  # fmt: skip
PROMPT = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
START_OF_PREVIOUS = 263


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whisper-toy"
    toy.save_checkpoint(folder)
    return model.load(str(folder))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Nine recordings to train on, four of general speech."""
    root = tmp_path_factory.mktemp("sets")
    train, general = (
        manifests.read(Data(str(write_set(root / name, n)))) for name, n in (("train", 9), ("general", 4))
    )
    return train, [msgspec.structs.replace(one, is_general=True) for one in general]


@pytest.fixture
def make(checkpoint, sets):
    def make(**changes):
        return Lessons(checkpoint, msgspec.structs.replace(PLAN, **changes), *sets)

    return make


# labels


def test_the_text_is_what_is_to_be_said_after_the_prompt(make):
    batch = make(corrections=False).collate([make(corrections=False)[number] for number in (0, 3)])
    text = list(b" word 0")
    assert batch["said_ids"][0].tolist() == [*(PROMPT + [toy_id(byte) for byte in text])]
    assert batch["said_labels"][0].tolist() == [IGNORED] * 3 + [toy_id(byte) for byte in text] + [toy.EOT]


def toy_id(byte):
    from test_model import make_tokenizer

    tokenizer = make_tokenizer()
    return tokenizer.encode(" " if byte == 32 else chr(byte)).ids[0]


def test_a_shorter_text_is_filled_up_with_what_teaches_nothing(make):
    some = make(corrections=False)
    some._train = [msgspec.structs.replace(some._train[0], text="ab"), some._train[1]]
    batch = some.collate([some[0], some[1]])
    assert batch["said_labels"][0, 7:].tolist() == [IGNORED] * 4
    assert batch["said_labels"].shape == batch["said_ids"].shape


def test_a_text_with_mistakes_stands_before_the_right_one(make):
    some = make()
    ids, labels = (some.collate([some[0]])[f"corrected_{name}"][0].tolist() for name in ("ids", "labels"))
    start = ids.index(toy.SOT)
    assert ids[0] == START_OF_PREVIOUS
    assert ids[start : start + 4] == PROMPT
    assert labels[: start + 3] == [IGNORED] * (start + 3)
    assert labels[start + 3 :] == [toy_id(byte) for byte in b" word 0"] + [toy.EOT]


def test_audio_is_filled_up_with_silence(make):
    some = make()
    short, long = some[0]["power"], some[4]["power"]
    power = some.collate([some[0], some[4]])["power"]
    assert power.shape == (2, 2 * (len(long) // 2 + PLAN.silence), 80)
    assert (power[0, len(short) :] == float(SILENCE)).all()
    assert (power[1, : 2 * (len(long) // 2)] == long[: 2 * (len(long) // 2)]).all()


# what is drawn


def test_each_epoch_sounds_different_and_always_the_same(make):
    settings = Augmentation(speed=0.2, speed_share=1.0)
    some, again = make(augment=settings), make(augment=settings)
    first, second = some[2]["power"], some[2 + len(some)]["power"]
    assert first.shape != second.shape
    assert torch.equal(again[2]["power"], first)


def test_general_speech_is_replayed_as_it_is(make):
    some = make(augment=Augmentation(speed=0.2, speed_share=1.0))
    assert (some.n_general, len(some)) == (3, 12)
    drawn = [[some.utterance(epoch * 12 + place).id for place in range(9, 12)] for epoch in range(4)]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert all(id_.startswith("general") for ids in drawn for id_ in ids)
    one = some.utterance(9)
    plain = streaming.log_power(to_float32(toy.babble(0.6 + int(one.id[-1]) / 10, int(one.id[-1]))), 80)
    assert torch.allclose(some[9]["power"], plain[: len(some[9]["power"])], atol=1e-3)


def test_batches_are_of_like_length_and_every_recording_comes_once(make):
    some = make(batch=3)
    sampler = ByLength(some)
    orders = []
    for sampler.epoch in range(2):
        numbers = list(sampler)
        assert sorted(numbers) == list(range(12 * sampler.epoch, 12 * sampler.epoch + 12))
        spreads = [np.ptp([some.length(n) for n in numbers[i : i + 3]]) for i in range(0, 12, 3)]
        assert np.mean(spreads) < 0.21
        orders.append([number % 12 for number in numbers])
    assert orders[0] != orders[1]
    assert list(ByLength(some)) == orders[0]


def test_an_incomplete_batch_comes_last(make):
    some = make(batch=5)
    longest = sorted((some.length(n) for n in range(12)), reverse=True)[:2]
    assert sorted((some.length(n) for n in list(ByLength(some))[10:]), reverse=True) == longest


# mistakes


def test_mistakes_are_as_many_as_asked_for():
    words = [f"word{i}" for i in range(1000)]
    text, rng = " ".join(words), random.Random(0)
    assert correction.corrupt(text, words, rng, 0.0) == text
    kept = set(words) & set(correction.corrupt(text, words, rng, 0.2).split())
    assert 750 < len(kept) < 900
    assert len(set(words) & set(correction.corrupt(text, words, rng, 1.0).split())) < 700


def test_words_are_replaced_by_such_that_look_alike():
    words = ["station", "nation", "boat", "x"]
    assert correction._alike("ration", words, random.Random(0)) == "nation"


# spelling


@pytest.mark.parametrize(
    ("reference", "heard", "spelt"),
    [
        ("MISTER QUILTER IS HERE", "Mr. Quilter is here.", "Mr. Quilter is here."),
        ("HE SAW QUILTER HERE", "He saw Kilter here.", "He saw quilter here."),
        ("OH YES HE SAID", "yes, he said.", "Oh yes, he said."),
        ("HE SAID NO", "He said. Oh no!", "He said. No!"),
        ("CHAPTER SEVEN", "", "Chapter seven"),
    ],
)
def test_a_checkpoint_lends_its_spelling(reference, heard, spelt):
    assert spelling.lend(reference, heard, "en") == spelt


def test_what_has_a_style():
    assert [spelling.has_style(text) for text in ("HE SAID", "he said", "He said")] == [False, False, True]


# hearing


def test_a_batch_is_heard_as_each_recording_alone(checkpoint):
    """Against transformers' own encoder over the full window, without a cache of keys and values."""
    clips = [(streaming.log_power(to_float32(toy.babble(s, i)), 80), "en") for i, s in enumerate((0.5, 0.8, 1.1))]
    n_frames = max(len(power) for power, _ in clips) // 2
    heard = greedy.transcribe(checkpoint.model, checkpoint.generation, clips, 1500 - n_frames, torch.float32)
    expected = [alone(checkpoint, power) for power, _ in clips]
    assert heard == expected
    assert len({tuple(ids) for ids in heard}) == 3


def test_half_precision_hears_the_same_beginning_and_leaves_the_model_as_it_was(checkpoint):
    clips = [(streaming.log_power(to_float32(toy.babble(1.0, seed)), 80), "en") for seed in range(4)]
    before = {name: p.clone() for name, p in checkpoint.model.named_parameters()}
    whole, half = (
        greedy.transcribe(checkpoint.model, checkpoint.generation, clips, 64, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert sum(a[:2] == b[:2] for a, b in zip(whole, half, strict=True)) >= 3
    for name, parameter in checkpoint.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


@torch.inference_mode()
def alone(checkpoint, power):
    padded = streaming.pad([power], 3000)
    mel = streaming.clamp(padded, padded.amax())
    encoded = checkpoint.model.model.encoder(mel.transpose(1, 2)).last_hidden_state
    ids, barred = list(PROMPT), list(checkpoint.generation.suppress_tokens)
    for _ in range(greedy._n_tokens(power)):
        hidden = checkpoint.model.model.decoder(torch.tensor([ids]), encoder_hidden_states=encoded).last_hidden_state
        logits = checkpoint.model.proj_out(hidden[0, -1])
        logits[[*barred, *range(toy.EOT + 1, 280)]] = -torch.inf
        if len(ids) == len(PROMPT):
            logits[list(checkpoint.generation.begin_suppress_tokens)] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == toy.EOT:
            return ids[len(PROMPT) : -1]
    return ids[len(PROMPT) :]


def test_an_english_checkpoint_is_not_told_the_language(checkpoint):
    assert greedy.prompt(checkpoint.generation, "en") == PROMPT
    english = SimpleNamespace(lang_ids={}, sot=1, no_timestamps=2)
    assert greedy.prompt(english, "en") == [1, 2]
    assert reference.vocabulary(checkpoint).languages["en"] == PROMPT[1]
