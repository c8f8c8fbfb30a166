"""Both runtimes on the toy bundle: the same numbers, however the tokens are divided into passes."""

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import decoding, engine
from agent.engine import InterpreterEngine, LiteRtEngine
from agent.follower import Bound
from agent.state import DecoderState, cross_mask, self_mask
from whisperlet.audio import to_float32
from whisperlet.bundle import Bundle
from whisperlet.errors import BundleError
from whisperlet.logmel import log_mel

TOKENS = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS, 10, 20, 30, 40, 50]
TOLERANCE = 1e-4  # sums in another order
MEL = {n: log_mel(to_float32(toy.babble(1.2)), 2 * n) for n in toy.ENCODE_FRAMES}


@pytest.fixture(params=["litert", "interpreter"])
def either(request):
    return request.getfixturevalue(request.param)


def one_by_one(runtime, state, tokens):
    return np.concatenate([runtime.decode(state, [token]) for token in tokens])


@pytest.mark.parametrize("n_frames", toy.ENCODE_FRAMES)
def test_many_tokens_in_a_pass_equal_one_by_one(either, n_frames):
    state = either.new_state()
    either.encode(state, MEL[n_frames])
    singly = one_by_one(either, state, TOKENS)
    assert state.position == len(TOKENS)
    either.encode(state, MEL[n_frames])
    assert state.position == 0
    together = either.decode(state, TOKENS)
    assert together.shape == (len(TOKENS), 280)
    np.testing.assert_allclose(together, singly, atol=TOLERANCE)
    assert np.ptp(together) > 1


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_any_division_into_passes(litert, cuts):
    state = litert.new_state()
    litert.encode(state, MEL[128])
    expected = litert.decode(state, TOKENS)
    state.position = start = 0
    for n in cuts:
        if part := TOKENS[start : start + n]:
            np.testing.assert_allclose(litert.decode(state, part), expected[start : start + n], atol=TOLERANCE)
            start += n


def test_runtimes_agree(litert, interpreter):
    for n_frames, mel in MEL.items():
        logits = []
        for runtime in (litert, interpreter):
            state = runtime.new_state()
            runtime.encode(state, mel)
            logits.append(runtime.decode(state, TOKENS))
        np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE, err_msg=str(n_frames))


def test_going_back_forgets(either):
    state = either.new_state()
    either.encode(state, MEL[128])
    expected = either.decode(state, TOKENS)
    state.position = 4
    either.decode(state, [99, 98, 97, 96, 95, 94, 93])
    state.position = 4
    np.testing.assert_allclose(either.decode(state, TOKENS[4:]), expected[4:], atol=TOLERANCE)


def test_audio_matters_and_does_not_linger(either):
    state = either.new_state()
    either.encode(state, MEL[128])
    first = either.decode(state, TOKENS)
    for other in (MEL[1500], log_mel(to_float32(toy.babble(1.2, seed=5)), 256)):
        either.encode(state, other)
        assert np.abs(either.decode(state, TOKENS) - first).max() > 0.1
    either.encode(state, MEL[128])
    np.testing.assert_allclose(either.decode(state, TOKENS), first, atol=TOLERANCE)


def test_states_are_apart(litert):
    one, two = litert.new_state(), litert.new_state()
    litert.encode(one, MEL[1500])
    expected = litert.decode(one, TOKENS[:5])
    litert.encode(two, MEL[1500] * 0.5)
    litert.decode(two, [3] * 7)
    one.position = 4
    np.testing.assert_allclose(litert.decode(one, TOKENS[4:5]), expected[4:], atol=TOLERANCE)


def test_padding_of_the_window_is_hidden(litert):
    """128 encoded frames stand in a cross length of 256: what follows them must not be looked at."""
    state = litert.new_state()
    litert.encode(state, MEL[128])
    expected = litert.decode(state, TOKENS)
    for name, buffer in state.cross[256].items():
        shape = (toy.DIMS.n_head, 256, toy.DIMS.d_head) if "_k_" in name else (toy.DIMS.n_head, toy.DIMS.d_head, 256)
        kept = buffer.read(int(np.prod(shape)), np.float32).reshape(shape)
        padding = kept[:, 128:] if "_k_" in name else kept[:, :, 128:]
        assert not padding.any()
        padding[:] = 1000.0
        buffer.write(kept)
    state.position = 0
    np.testing.assert_allclose(litert.decode(state, TOKENS), expected, atol=TOLERANCE)


class Buffers:
    """A model that only gives buffers, and remembers of which signatures."""

    def __init__(self):
        self.made = []

    def create_input_buffer_by_name(self, signature, name):
        self.made.append(signature)
        return signature, name


def test_buffers_of_the_longest_cross_attention_are_kept_by_themselves():
    """Those of shorter ones stay side by side: a stream and its final take turns at every pause."""
    runtime = LiteRtEngine.__new__(LiteRtEngine)
    runtime.manifest = toy.make_manifest(cross_frames=[256, 512, 1500])
    runtime._model = Buffers()
    state = DecoderState({}, ({}, {}))
    kept = []
    for n_cross in (256, 512, 256, 1500, 1500, 512, 256):
        runtime._cross_buffers(state, n_cross)
        kept.append(sorted(state.cross))
    assert kept == [[256], [256, 512], [256, 512], [1500], [1500], [512], [256, 512]]
    asked = list(dict.fromkeys(runtime._model.made))
    assert asked == ["decode_1_256", "decode_1_512", "decode_1_1500"]


def test_room(either):
    state = either.new_state()
    either.encode(state, MEL[128])
    logits = either.decode(state, [5] * toy.N_TEXT_CTX)
    assert logits.shape[0] == state.position == toy.N_TEXT_CTX
    with pytest.raises(ValueError, match="context is full"):
        either.decode(state, [5])
    state.position = toy.N_TEXT_CTX - 3  # a pass of four does not fit any more
    np.testing.assert_allclose(either.decode(state, [5, 5, 5]), logits[-3:], atol=TOLERANCE)


def streamed(runtime, n_steps, seed=0):
    """A stream after some full steps over noise."""
    spec = toy.STREAMS[0]
    stream, rng = runtime.new_stream(spec), np.random.default_rng(seed)
    for _ in range(n_steps):
        mel = rng.normal(size=(1, 2 * spec.width + 3, toy.DIMS.n_mels)).astype(np.float32)
        runtime.listen(stream, mel, spec.reach)
    return stream


def test_the_decoder_looks_at_what_a_stream_holds_and_its_padding(either):
    state, stream = either.new_state(), streamed(either, 3)
    either.attend(state, stream)
    expected, looks = either.decode(state, TOKENS), state.looks
    n = stream.n_frames + stream.spec.padding
    for name, tensor in stream.cross.items():
        (tensor[:, n:] if "_k_" in name else tensor[:, :, n:])[:] = 1000.0
    either.attend(state, stream)
    assert state.position == len(TOKENS)  # what was said is kept
    state.position = 0
    np.testing.assert_allclose(either.decode(state, TOKENS), expected, atol=TOLERANCE)
    np.testing.assert_array_equal(state.looks.frames, looks.frames)
    stream.cross["cross_v_0"][:, :, n - 1] += 5.0
    either.attend(state, stream)
    state.position = 0
    assert np.abs(either.decode(state, TOKENS) - expected).max() > 0.01


def test_what_was_said_is_not_heard_again_as_audio_comes(either):
    state = either.new_state()
    either.attend(state, streamed(either, 2))
    either.decode(state, TOKENS[:5])
    either.attend(state, streamed(either, 4))
    going_on = either.decode(state, TOKENS[5:])
    state.position = 0
    anew = either.decode(state, TOKENS)[5:]
    assert TOLERANCE < np.abs(going_on - anew).max() < 5


def test_the_length_of_cross_attention_does_not_matter(either):
    state, stream = either.new_state(), streamed(either, 5)
    logits, looks = [], []
    for n_cross in toy.CROSS_FRAMES:
        if n_cross > stream.n_cross:
            stream.grow(n_cross)
        either.attend(state, stream)
        assert state.n_cross == n_cross
        state.position = 0
        logits.append(either.decode(state, TOKENS))
        looks.append(state.looks)
    np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE)
    np.testing.assert_array_equal(looks[0].frames, looks[1].frames)
    np.testing.assert_allclose(looks[0].beyond, looks[1].beyond, atol=TOLERANCE)


def test_looks_of_many_tokens_in_a_pass_equal_those_one_by_one(either):
    state, stream = either.new_state(), streamed(either, 3, seed=1)
    either.attend(state, stream)
    either.decode(state, TOKENS)
    together = state.looks
    state.position, frames, beyond = 0, [], []
    for token in TOKENS:
        either.decode(state, [token])
        frames += state.looks.frames.tolist()
        beyond += state.looks.beyond.tolist()
    assert together.frames.tolist() == frames
    assert together.beyond.tolist() == pytest.approx(beyond, abs=TOLERANCE)
    assert max(frames) < stream.n_frames
    assert len(set(frames)) > 2
    assert 0 < min(beyond) < max(beyond) < 1
    either.encode(state, MEL[128])
    either.decode(state, TOKENS)
    assert max(state.looks.frames) < 128
    assert state.looks.beyond.tolist() == pytest.approx([0] * len(TOKENS), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("n_tokens", "room", "size"), [(1, 32, 1), (2, 32, 4), (4, 4, 4), (4, 3, 1), (9, 32, 16), (17, 32, 16), (9, 15, 4)]
)
def test_pass_size(n_tokens, room, size):
    assert engine.pass_size(toy.make_manifest(decode_tokens=[1, 4, 16]), n_tokens, room) == size


def test_no_pass_without_room():
    with pytest.raises(ValueError, match="context is full"):
        engine.pass_size(toy.make_manifest(), 1, 0)


def test_masks():
    seen = self_mask(2, 3, 8) == 0
    assert seen.astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert (cross_mask(3, 5) == 0).astype(int).tolist() == [[1, 1, 1, 0, 0]]
    for mask in (self_mask(2, 3, 8), cross_mask(3, 5)):
        assert mask.dtype == np.float32
        assert np.exp(mask.min()) == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block=st.sampled_from([1, 2, 4, 7]), n_frames=st.sampled_from(toy.ENCODE_FRAMES))
def test_a_draft_changes_nothing(litert, data, block, n_frames):
    decoder = Bound(litert)

    def hear(draft, block):
        litert.encode(decoder.state, MEL[n_frames])
        return decoding.greedy(decoder, toy.VOCABULARY, TOKENS[:4], draft, limit=20, block=block)

    expected = hear([], 1)
    noise = data.draw(st.lists(st.integers(0, 255), max_size=8))
    n_right = data.draw(st.integers(0, len(expected.tokens)))
    found = hear((expected.tokens[:n_right] + noise + expected.tokens[n_right + len(noise) :])[:20], block)
    assert found.tokens == expected.tokens
    assert found.looped == expected.looped
    assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
    assert found.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)


@pytest.mark.parametrize("make", [LiteRtEngine, InterpreterEngine])
def test_no_model(tmp_path, make, toy_bundle):
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "garbage.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3" + b"\xff" * 200)
    broken = Bundle(path, toy_bundle.manifest, toy_bundle.tokenizer_json, "0" * 64)
    with pytest.raises(BundleError, match=r"garbage\.tflite: the runtime refuses it"):
        make(broken, 1, tmp_path if make is LiteRtEngine else Interpreter)


def test_without_ai_edge_litert(toy_bundle, tmp_path, monkeypatch):
    """The second runtime is taken where the first is missing; with neither, an error says what to install."""
    import sys
    import types

    from ai_edge_litert.interpreter import Interpreter

    monkeypatch.setitem(sys.modules, "ai_edge_litert.compiled_model", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", None)
    with pytest.raises(BundleError, match="install ai-edge-litert, or tflite-runtime"):
        engine.load_engine(toy_bundle, 1, tmp_path)
    package = types.ModuleType("tflite_runtime")
    package.interpreter = types.ModuleType("tflite_runtime.interpreter")
    package.interpreter.Interpreter = Interpreter
    monkeypatch.setitem(sys.modules, "tflite_runtime", package)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", package.interpreter)
    assert isinstance(engine.load_engine(toy_bundle, 1, tmp_path), InterpreterEngine)


def test_the_weight_cache_is_made_and_used_again(toy_bundle, tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        runtime = LiteRtEngine(toy_bundle, 1, folder)
        state = runtime.new_state()
        runtime.encode(state, MEL[128])
        assert np.isfinite(runtime.decode(state, TOKENS)).all()
    files = list(folder.iterdir())
    assert files == [engine.weight_cache(toy_bundle, folder)]
    assert files[0].stat().st_size > 0
