"""The streaming encoder: its graph, its state from step to step, and the runtimes that carry it on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import state
from agent.engine import _Passes
from agent.follower import Bound, Follower
from agent.state import StreamState
from convert import streaming
from convert.fold import FoldedWhisper
from convert.graphs import Encode, Stream
from convert.parity import cosine
from whisperlet.audio import WINDOW_FRAMES, to_float32
from whisperlet.bundle import StreamSpec, kv_names
from whisperlet.logmel import LogMel

TOLERANCE = 1e-4  # sums in another order
MIN_COSINE = 0.98  # int8 and what it does to the steps after
CROSS, PAST = kv_names("cross", 2), kv_names("past", 2)
SPECS = [
    *toy.STREAMS,
    StreamSpec(chunk=7, overlap=3, padding=5, context=14),
    StreamSpec(chunk=20, overlap=1, padding=0, context=20),
    StreamSpec(chunk=4, overlap=9, padding=2, context=300),
]


@pytest.fixture(scope="module")
def model():
    return toy.make_model().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def folded(model):
    return FoldedWhisper(model, toy.ALIGNMENT_HEADS)


def logmel_of(samples):
    made = LogMel(toy.DIMS.n_mels)
    made.feed(samples)
    return made


def listened(engine, spec, samples):
    """The stream after all of `samples`."""
    follower = Follower(Bound(engine), engine.manifest, spec)
    follower.listen(logmel_of(samples))
    return follower._stream


# The graph


@settings(max_examples=15, deadline=None)
@given(n_frames=st.integers(1, 150), context=st.integers(1, 20), seed=st.integers(0, 99))
def test_one_step_that_covers_everything_equals_the_full_encoder(folded, n_frames, context, seed):
    spec = StreamSpec(chunk=n_frames, overlap=0, padding=0, context=context)
    generator = torch.Generator().manual_seed(seed)
    mel = torch.randn(1, 2 * n_frames, toy.DIMS.n_mels, generator=generator)
    step = Stream(folded, toy.DIMS, spec)
    inputs = {name: torch.randn(x.shape, generator=generator) for name, x in step.examples().items()}
    inputs["mel"] = torch.nn.functional.pad(mel, (0, 0, 2, 1))  # the zeros that the convolutions pad with
    inputs["offset"] = torch.zeros(1)
    inputs["mask"] = torch.from_numpy(state.stream_mask(spec, 0, n_frames))
    found = step(**inputs)
    expected = Encode(folded, toy.DIMS, n_frames, n_frames)(mel, torch.zeros(1))
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < TOLERANCE, name


class TorchEngine(_Passes):
    """The graphs as they are before they are exported, behind the runtimes' own bookkeeping."""

    manifest = toy.make_manifest()

    def __init__(self, whisper):
        self.whisper = whisper

    def new_state(self):
        return SimpleNamespace(position=0)

    @torch.inference_mode()
    def _run_stream(self, stream, mel, mask):
        inputs = {"mel": mel, "offset": np.array([stream.committed], np.float32), "mask": mask, **stream.past}
        module = Stream(self.whisper, toy.DIMS, stream.spec)
        outputs = module(**{name: torch.from_numpy(value.copy()) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}


def expected_cross(model, folded, spec, samples, n_frames):
    """Keys and values of the cross-attention for all frames and the padding, by the form that trains the adapter.

    `n_frames` of audio, at the end of a step.
    """
    encoder, power = model.model.encoder, streaming.log_power(samples, toy.DIMS.n_mels)[None]
    if n_frames < spec.reach:
        frames = streaming.streamed(encoder, power, n_frames, 0, spec.context, spec.padding)[0, 0]
    else:
        n_steps = (n_frames - spec.overlap) // spec.chunk
        steps = streaming.streamed(encoder, power, spec.chunk, spec.overlap, spec.context, spec.padding)[0, :n_steps]
        frames = torch.cat([steps[:-1, : spec.chunk].flatten(0, 1), steps[-1]])
    plain = ((frames - encoder.layer_norm.bias) / encoder.layer_norm.weight)[None]
    tensors = [tensor for layer in folded.decoder_layers for tensor in layer.cross.keys_values(plain)]
    return dict(zip(CROSS, tensors, strict=True))


def held(stream, name):
    """What the decoder gets to see."""
    n = stream.n_frames + stream.spec.padding
    return stream.cross[name][:, :n] if "_k_" in name else stream.cross[name][:, :, :n]


@settings(max_examples=30, deadline=None)
@given(spec=st.sampled_from(SPECS), n=st.integers(500, 7 * 16_000), seed=st.integers(0, 9))
def test_step_by_step_equals_all_steps_at_once(model, folded, spec, n, seed):
    samples = to_float32(toy.babble(7.0, seed))[:n]
    stream = listened(TorchEngine(folded), spec, samples)
    if not stream.n_frames:
        return
    assert stream.committed == max(0, stream.n_frames - spec.overlap) // spec.chunk * spec.chunk
    expected = expected_cross(model, folded, spec, samples, stream.n_frames)
    for name, value in expected.items():
        np.testing.assert_allclose(held(stream, name), value.numpy(), atol=10 * TOLERANCE, err_msg=name)


# The runtimes


@pytest.fixture(params=["litert", "interpreter"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("spec", toy.STREAMS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("duration_s", [0.6, 1.3, 2.3, 7.0])  # 7 s: the ring of 1.2 s comes round, cross grows
def test_runtimes_compute_what_the_modules_compute(either, model, folded, spec, duration_s):
    samples = to_float32(toy.babble(duration_s, 3))
    stream = listened(either, spec, samples)
    assert stream.n_frames > 50 * duration_s - spec.chunk - 5
    expected = expected_cross(model, folded, spec, samples, stream.n_frames)
    for name, value in expected.items():
        assert cosine(held(stream, name), value.numpy()) > MIN_COSINE, name


def test_runtimes_agree(litert, interpreter):
    samples = to_float32(toy.babble(6.5, 1))
    streams = [listened(engine, toy.STREAMS[0], samples) for engine in (litert, interpreter)]
    for name in CROSS:
        assert cosine(*(held(stream, name) for stream in streams)) > 0.9999, name
    logits = []
    for engine, stream in zip((litert, interpreter), streams, strict=True):
        decoder = Bound(engine)
        engine.attend(decoder.state, stream)
        logits.append(decoder.decode([toy.SOT, toy.EN, 10, 20, 30]))
    assert cosine(*logits) > 0.999


def committed(stream):
    """Copies of all that will not be computed again."""
    n = stream.committed
    cross = {name: x[:, :n] if "_k_" in name else x[:, :, :n] for name, x in stream.cross.items()}
    return {name: x.copy() for name, x in {**stream.past, **cross}.items()}


@pytest.mark.parametrize("spec", toy.STREAMS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("n_before", [1, 3, 6, 15])
def test_later_audio_never_changes_what_is_committed(litert, spec, n_before):
    rng = np.random.default_rng(n_before)
    width = 2 * spec.width + 3
    mels = rng.normal(size=(n_before, 1, width, toy.DIMS.n_mels)).astype(np.float32)
    streams = [litert.new_stream(spec) for _ in range(2)]
    for mel in mels:
        for stream in streams:
            litert.listen(stream, mel, spec.reach)
    before = committed(streams[0])
    assert streams[0].committed == n_before * spec.chunk
    for stream, gain in zip(streams, (0.1, 5.0), strict=True):  # what is not full commits nothing
        litert.listen(stream, gain * mels[0], spec.reach - 1)
        assert_equal(committed(stream), before)
    for stream, gain in zip(streams, (0.1, 5.0), strict=True):
        for _ in range(4):
            litert.listen(stream, gain * mels[0], spec.reach)
    cross = [{name: first(stream.cross[name], n_before * spec.chunk) for name in CROSS} for stream in streams]
    for found in cross:
        assert_equal(found, {name: before[name] for name in CROSS})
    assert np.abs(streams[0].cross["cross_k_0"] - streams[1].cross["cross_k_0"]).max() > 0.1


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def first(x, n):
    """Keys (n_head, n, d_head) or values (n_head, d_head, n) of the first frames."""
    return x[:, :n] if x.shape[2] == toy.DIMS.d_head else x[:, :, :n]


# The state


def test_the_ring_holds_the_newest_frames():
    spec = StreamSpec(chunk=3, overlap=2, padding=1, context=9)
    stream = StreamState(toy.DIMS, spec, 64)
    for step in range(1, 9):
        frames = np.arange(stream.committed, stream.committed + spec.width, dtype=np.float32)
        stream.take_in(outputs(frames, spec.chunk), spec.reach)
        assert (stream.committed, stream.n_frames) == (3 * step, 3 * step + 2)
        newest = range(max(0, 3 * step - spec.context), 3 * step)
        filled = state.stream_mask(spec, stream.committed, spec.reach)[0, : spec.context] == 0
        assert sorted(stream.past["past_k_1"][2, filled, 5]) == list(newest)
        assert sorted(stream.past["past_v_0"][1, 3, filled]) == list(newest)
        assert stream.cross["cross_k_0"][0, : 3 * step + 3, 7].tolist() == list(range(3 * step + 3))
        assert stream.cross["cross_v_1"][0, 7, : 3 * step + 3].tolist() == list(range(3 * step + 3))


def outputs(frames, n_new):
    """What a step would put out that found nothing but each frame's number."""
    shape = (toy.DIMS.n_head, len(frames), toy.DIMS.d_head)
    keys = np.broadcast_to(frames[None, :, None], shape)
    values = keys.transpose(0, 2, 1)
    found = {name: keys if "_k_" in name else values for name in CROSS}
    news = kv_names("new", toy.DIMS.n_audio_layer)
    return found | {name: keys[:, :n_new] if "_k_" in name else values[:, :, :n_new] for name in news}


def test_a_step_that_is_not_full_commits_nothing():
    spec = StreamSpec(chunk=3, overlap=2, padding=1, context=9)
    stream = StreamState(toy.DIMS, spec, 16)
    stream.take_in(outputs(np.arange(6.0), 3), 4)
    assert (stream.committed, stream.n_frames) == (0, 4)
    assert not any(tensor.any() for tensor in stream.past.values())
    assert stream.cross["cross_k_0"][0, :6, 0].tolist() == [0, 1, 2, 3, 4, 0]  # four frames and the padding


def test_growing_keeps_what_is_there():
    spec = StreamSpec(chunk=3, overlap=2, padding=1, context=9)
    stream = StreamState(toy.DIMS, spec, 8)
    stream.take_in(outputs(np.arange(6.0), 3), 5)
    stream.grow(20)
    assert stream.n_cross == 20
    for name in CROSS:
        assert first(stream.cross[name], 99).shape in {(4, 20, 16), (4, 16, 20)}
    assert stream.cross["cross_k_0"][1, :, 2].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 14
    assert stream.cross["cross_v_0"][1, 2].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 14
    stream.begin()
    assert (stream.committed, stream.n_frames, stream.n_cross) == (0, 0, 8)  # small again
    assert {tensor.shape for tensor in stream.cross.values()} == {(4, 8, 16), (4, 16, 8)}
    stream.grow(20)
    assert stream.cross["cross_k_0"].shape == (4, 20, 16)


def test_stream_mask():
    spec = StreamSpec(chunk=2, overlap=1, padding=1, context=4)
    for committed_frames, n_frames, expected in (
        (0, 3, [0, 0, 0, 0, 1, 1, 1, 1]),
        (2, 3, [1, 1, 0, 0, 1, 1, 1, 1]),
        (8, 3, [1, 1, 1, 1, 1, 1, 1, 1]),
        (0, 1, [0, 0, 0, 0, 1, 1, 0, 0]),
    ):
        mask = state.stream_mask(spec, committed_frames, n_frames)
        assert mask.dtype == np.float32
        assert (mask == 0).astype(int).tolist() == [expected]
        assert mask.min() in (0, state.MASKED)


def test_a_stream_has_room_for_a_whole_window(litert):
    stream = listened(litert, toy.STREAMS[0], np.zeros(30 * 16_000, np.float32))
    assert WINDOW_FRAMES - toy.STREAMS[0].chunk < stream.n_frames + toy.STREAMS[0].padding <= WINDOW_FRAMES
