"""The pure parts of the benchmarks; what they measure is measured by `make bench`, not here."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import toy
from benchmarks import accuracy, alignment, audio_mix, base, floor, runs, words
from benchmarks.runs import Message
from benchmarks.words import Shown

from agent.messages import Transcript
from convert.speechset import Clip
from whisperlet.audio import to_float32
from whisperlet.bundle import GraphSpec, TensorSpec

# ---- forced alignment


def test_warping_follows_the_cheap_cells():
    cost = np.ones((4, 10))
    begins = [0, 3, 4, 8]
    for row, (first, last) in enumerate(zip(begins, [*begins[1:], 10], strict=True)):
        cost[row, first:last] = 0.0
    assert alignment.warp(cost).tolist() == begins


def test_a_warping_path_may_leave_a_frame_to_several_tokens():
    assert alignment.warp(np.zeros((3, 1))).tolist() == [0, 0, 0]
    assert alignment.warp(np.zeros((1, 3))).tolist() == [0]


def test_tokens_are_found_where_most_heads_look():
    rng = np.random.default_rng(0)
    attention = rng.uniform(0.0, 0.01, (4, 5, 100))
    begins = [0, 10, 30, 45, 60]
    for row, (first, last) in enumerate(zip(begins, [*begins[1:], 80], strict=True)):
        attention[:3, row, first:last] += 1.0
    attention[3, :, 50] += 1.0  # a head that looks elsewhere
    assert alignment.token_frames(attention, 80) == pytest.approx(begins, abs=2)


# ---- words on the screen


@pytest.mark.parametrize(
    ("a", "b", "open_end", "places"),
    [
        ("the cat", "the cat and the dog", True, [0, 1]),
        ("the", "the cat and the dog", True, [0]),
        ("a hat sat", "a cat sat down", True, [0, None, 2]),
        ("and the cat", "the cat", True, [None, 0, 1]),
        ("x y", "a b", True, [None, None]),
        ("", "a b", True, []),
        ("a b", "", True, [None, None]),
        ("sat down", "he sat quickly down", False, [1, 3]),
    ],
)
def test_aligned(a, b, open_end, places):
    assert words.aligned(a.split(), b.split(), open_end=open_end) == places


def test_words_are_compared_as_whispers_normaliser_leaves_them():
    assert words.words("Mr. O'Neil, won't you   COME?") == words.words("mister o'neil will not you come")
    assert words.timed_words([("WON'T", 1.5), ("COME", 2.0)]) == [("will", 1.5), ("not", 1.5), ("come", 2.0)]


def test_a_word_counts_from_where_it_stays():
    texts = ["he", "she sat", "he sat up", "he sat down", "he sat down"]
    assert words.first_kept([text.split() for text in texts]) == [2, 1, 3]


def test_emission():
    shown = [Shown(1.0, "he", 0), Shown(2.0, "he sat", 2), Shown(3.0, "he sat town", 6), Shown(4.0, "he sat down", 11)]
    late = words.emission(shown, [("HE", 0.5), ("SAT", 1.8), ("RIGHT", 2.5), ("DOWN", 3.5)])
    assert late.shown_ms == pytest.approx([500, 200, 500])
    assert late.stable_ms == pytest.approx([1500, 1200, 500])
    assert late.n_words == 4
    assert words.emission([], [("HE", 0.5)]) == words.Emission([], [], 1)


def test_flicker():
    shown = [
        Shown(1.0, "he sad", 2),
        Shown(2.0, "he sat on", 6),
        Shown(3.0, "he sat", 6),
        Shown(4.0, "He sat down.", 12, is_final=True),
    ]
    found = words.flicker(shown)
    assert (found.n_messages, found.n_shown, found.n_changed) == (4, 4, 2)  # "sad" and "on" of he, sad, sat, on
    assert (found.stable_violations, found.stable_chars_changed) == (3, 14)  # "He" is not "he"
    assert (found.stable_violations_by_partials, found.n_stable_words, found.stable_words_changed) == (0, 2, 0)
    assert words.flicker(shown[-1:]) == words.Flicker(1, 0, 0, 0, 0, 0, 0, 0)
    assert words.flicker([]) == words.Flicker(0, 0, 0, 0, 0, 0, 0, 0)


def test_stable_words_are_counted_a_segment_at_a_time():
    shown = [
        Shown(1.0, "he sat", 6),
        Shown(2.0, "he sat on", 9),
        Shown(3.0, "He sat in.", 10, is_final=True),
        Shown(4.0, "He sat in. the sun", 14),
        Shown(5.0, "He sat in. The rain.", 20, is_final=True),
        Shown(6.0, "He sat in. The rain. Yes.", 25, is_final=True),
    ]
    found = words.flicker(shown)
    assert (found.n_stable_words, found.stable_words_changed) == (4, 1)  # "on" of he, sat, on; none of "the"
    assert (found.stable_violations, found.stable_violations_by_partials) == (3, 0)


def test_stable_text_may_grow_but_not_change():
    grows = [Shown(1.0, "he sat", 2), Shown(2.0, "he sat down", 6), Shown(3.0, "he sat down.", 12)]
    assert words.flicker(grows).stable_violations == 0
    assert words.stable_changed([Shown(1.0, "he sat", 6), Shown(2.0, "he set", 6), Shown(3.0, "", 0)]) == 6


def transcript(utterance, text, *, is_final, stable=0):
    return Transcript(
        utterance, 0, 1, text, len(text) if is_final else stable, start=0, end=1, is_final=is_final, language="en"
    )


def test_the_screen_keeps_the_finals():
    messages = [
        Message(1.0, transcript(1, "he sa", is_final=False, stable=2)),
        Message(2.0, transcript(1, "He sat.", is_final=True)),
        Message(3.0, transcript(2, "down he", is_final=False, stable=4)),
        Message(4.0, transcript(2, "", is_final=True)),
        Message(5.0, transcript(3, "Down.", is_final=True)),
    ]
    assert words.screen(messages) == [
        Shown(1.0, "he sa", 2),
        Shown(2.0, "He sat.", 7, is_final=True),
        Shown(3.0, "He sat. down he", 12),
        Shown(4.0, "He sat.", 7, is_final=True),
        Shown(5.0, "He sat. Down.", 13, is_final=True),
    ]
    assert runs.joined(messages) == "He sat. Down."


# ---- clips and figures


def test_clips_are_taken_evenly():
    assert base.evenly(range(10), 4) == [0, 2, 5, 7]
    assert base.evenly(range(3), 9) == base.evenly(range(3), None) == [0, 1, 2]


def test_percentiles():
    assert base.spread([4.0, 1.0, 2.0, 3.0]) == {"n": 4, "mean": 2.5, "p50": 2.5, "p95": 3.85}
    assert base.spread([]) == {"n": 0, "mean": None, "p50": None, "p95": None}
    assert base.percent(1, 0) is None


def test_a_clip_in_blocks_loses_nothing():
    pcm = np.arange(1000, dtype=np.int16)
    for chunks in (list(runs.one_segment(pcm)), list(runs.one_segment(pcm, None))):
        assert np.concatenate([chunk.samples for chunk in chunks]).tolist() == pcm.tolist()
        assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].speech_end == 1000
    audio = list(runs.audio_chunks(pcm, 10.0, start=320))
    assert (audio[0].start, audio[-1].end, audio[-1].arrived_monotonic_s) == (320, 1320, 10.0 + 1320 / 16_000)


# ---- cost


def test_a_token_moves_every_weight_and_the_state():
    dims = toy.DIMS
    square = dims.d_model**2
    matrices = dims.n_text_layer * (6 * square + 2 * 4 * square) + dims.n_vocab * dims.d_model
    channels = dims.n_text_layer * (6 + 4 + 1) * dims.d_model + dims.n_vocab
    assert floor.decoder_weight_bytes(dims) == matrices + 4 * channels
    kv = TensorSpec("self_k_0", (4, 32, 16))
    inputs = [TensorSpec("tokens", (1, 1), "int32"), kv, TensorSpec("cross_v_0", (4, 16, 256), "float16")]
    graph = GraphSpec("decode_1_256", inputs, [TensorSpec("logits", (1, 1, 280)), kv])
    assert floor.state_bytes(graph) == (4 * 2048 + 2 * 16384, 4 * 2048)
    moved = floor.traffic(toy.make_manifest(graphs=[graph]), 256)
    assert moved.total == moved.weights + 49152


# ---- accuracy


def test_noise_is_mixed_at_the_ratio_that_was_asked_for():
    speech, noise = toy.babble(2.0, 1), toy.babble(0.7, 2)
    quiet = (speech // 4).astype(np.int16)
    sums = [audio_mix.mixed(quiet, noise, 10.0, name) for name in ("a", "a", "b")]
    assert np.array_equal(sums[0], sums[1])
    assert not np.array_equal(sums[0], sums[2])
    added = to_float32(sums[0]) - to_float32(quiet)
    ratio = audio_mix.power(to_float32(quiet)) / audio_mix.power(added)
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.05)


def test_a_mix_that_would_clip_is_turned_down():
    loud = np.full(2000, 30_000, np.int16)
    assert set(audio_mix.mixed(loud, loud, 0.0, "x").tolist()) <= {32_766, 32_767}


def test_levels_are_those_that_were_asked_for():
    levels = list(itertools.islice(audio_mix.levels_db("x", -20.0, 6.0), 500))
    assert min(levels) < -18
    assert max(levels) > 4
    assert levels == list(itertools.islice(audio_mix.levels_db("x", -20.0, 6.0), 500))
    assert audio_mix.louder(np.array([1000, -30_000], np.int16), 6.0206).tolist() == [2000, -32_768]


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("so " + "and then he went " * 3, True),
        ("and then he went and then he went", False),
        ("no " * 12, True),
        ("no " * 11, False),
        ("and then he went " * 3 + "home", False),
        ("", False),
    ],
)
def test_loops(text, loop):
    assert accuracy.is_loop(text) is loop


def test_errors_are_counted_in_words_or_characters():
    english = accuracy.scored(Clip("a", Path("a"), "HE SAT DOWN", "en"), "He sad down.", [])
    chinese = accuracy.scored(Clip("b", Path("b"), "今天很好", "zh"), "今天 不好", [])
    assert (english.n_errors, english.n_reference, chinese.n_errors, chinese.n_reference) == (1, 3, 1, 4)
    assert accuracy.rate([english, chinese]) == pytest.approx(100 * 2 / 7, abs=0.01)
