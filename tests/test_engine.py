"""Both runtimes on the toy bundle: the same numbers, however the tokens are divided into passes."""

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import decoding, engine
from agent.engine import InterpreterEngine, LiteRtEngine
from agent.transcriber import _Bound
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


def test_room(either):
    state = either.new_state()
    either.encode(state, MEL[128])
    logits = either.decode(state, [5] * toy.N_TEXT_CTX)
    assert logits.shape[0] == state.position == toy.N_TEXT_CTX
    with pytest.raises(ValueError, match="context is full"):
        either.decode(state, [5])
    state.position = toy.N_TEXT_CTX - 3  # a pass of four does not fit any more
    np.testing.assert_allclose(either.decode(state, [5, 5, 5]), logits[-3:], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("n_tokens", "room", "size"), [(1, 32, 1), (2, 32, 4), (4, 4, 4), (4, 3, 1), (9, 32, 16), (17, 32, 16), (9, 15, 4)]
)
def test_pass_size(n_tokens, room, size):
    assert engine.pass_size(toy.make_manifest(decode_tokens=[1, 4, 16]), n_tokens, room) == size


def test_no_pass_without_room():
    with pytest.raises(ValueError, match="context is full"):
        engine.pass_size(toy.make_manifest(), 1, 0)


def test_masks():
    seen = engine.self_mask(2, 3, 8) == 0
    assert seen.astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert (engine.cross_mask(3, 5) == 0).astype(int).tolist() == [[1, 1, 1, 0, 0]]
    for mask in (engine.self_mask(2, 3, 8), engine.cross_mask(3, 5)):
        assert mask.dtype == np.float32
        assert np.exp(mask.min()) == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block=st.sampled_from([1, 2, 4, 7]), n_frames=st.sampled_from(toy.ENCODE_FRAMES))
def test_a_draft_changes_nothing(litert, data, block, n_frames):
    state = litert.new_state()

    def hear(draft, block):
        litert.encode(state, MEL[n_frames])
        return decoding.greedy(_Bound(litert, state), toy.VOCABULARY, TOKENS[:4], draft, limit=20, block=block)

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
