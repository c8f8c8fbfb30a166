"""The streaming encoder all at once equals the step-by-step one, and a single step equals Whisper's own encoder."""

import numpy as np
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from convert import streaming
from whisperlet.audio import HOP_LENGTH, to_float32
from whisperlet.logmel import DYNAMIC_RANGE, SILENCE, log_mel

TOLERANCE = 1e-4
LOUDEST = DYNAMIC_RANGE - 4.0  # with a point as loud as this, silence is scaled to the zero that convolutions pad with


@pytest.fixture(scope="module")
def encoder():
    return toy.make_model().requires_grad_(requires_grad=False).model.encoder


def noise(n_frames, seed, batch=1):
    """log10 mel power over all that can be heard. shape = (batch, 2 * n_frames, 80)"""
    return torch.rand(batch, 2 * n_frames, 80, generator=torch.Generator().manual_seed(seed)) * 13.0 - 10.0


# Step by step, as a device does it: one step after another, with a cache of what was committed.


def step_by_step(encoder, power, chunk, overlap, context, padding):
    """Frames of each step. power shape = (2n, n_mels), result = list of (chunk + overlap + padding, d_model)"""
    caches = [[] for _ in encoder.layers]  # (key, value) of a committed frame each, of every head
    loudest, out = -torch.inf, []
    for begin in range(0, len(power) // 2, chunk):
        heard = power[: 2 * (begin + chunk + overlap) + 1]
        loudest = max(loudest, float(heard.max()))
        x = stem(encoder, heard, loudest, begin, chunk + overlap + padding)
        for layer, cache in zip(encoder.layers, caches, strict=True):
            x = run_layer(layer, x, cache, chunk, context)
        out.append(encoder.layer_norm(x))
    return out


def stem(encoder, heard, loudest, begin, width):
    """Frames from `begin` on, by convolutions over all the audio so far and silence."""
    silence = torch.full((2 * (begin + width) + 1 - len(heard), heard.shape[1]), float(SILENCE))
    mel = (torch.cat([heard, silence]).clamp(min=loudest - DYNAMIC_RANGE) + 4.0) / 4.0
    x = F.gelu(encoder.conv1(mel.T[None]))[..., :-1]  # the last row has seen padding
    x = F.gelu(encoder.conv2(x))[0].T
    return x[begin:] + encoder.embed_positions.weight[begin : begin + width]


def run_layer(layer, x, cache, chunk, context):
    attention, y = layer.self_attn, layer.self_attn_layer_norm(x)
    heads = (attention.num_heads, attention.head_dim)
    q, k, v = (f(y).view(-1, *heads) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    past = cache[-context:]
    keys = torch.stack([key for key, _ in past] + list(k))
    values = torch.stack([value for _, value in past] + list(v))
    weights = torch.einsum("qhd,khd->hqk", q, keys).mul(attention.head_dim**-0.5).softmax(-1)
    x = x + attention.out_proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
    cache += zip(k[:chunk], v[:chunk], strict=True)
    return x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))


@settings(max_examples=20, deadline=None)
@given(
    n_frames=st.integers(1, 24),
    chunk=st.integers(1, 9),
    overlap=st.integers(0, 12),
    context=st.integers(1, 30),
    padding=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_all_at_once_equals_step_by_step(encoder, n_frames, chunk, overlap, context, padding, seed):
    power = noise(n_frames, seed, batch=2)
    found = streaming.streamed(encoder, power, chunk, overlap, context, padding)
    assert found.shape == (2, streaming.n_steps(n_frames, chunk), chunk + overlap + padding, toy.DIMS.d_model)
    for clip, frames in zip(power, found, strict=True):
        expected = torch.stack(step_by_step(encoder, clip, chunk, overlap, context, padding))
        assert (frames - expected).abs().max() < TOLERANCE


def test_full_equals_transformers(encoder):
    power = noise(1500, 1)
    expected = encoder(streaming.clamp(power, power.max()).transpose(1, 2)).last_hidden_state
    assert (streaming.full(encoder, power) - expected).abs().max() < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(n_frames=st.integers(1, 60), more=st.integers(0, 9), seed=st.integers(0, 99))
def test_one_step_that_covers_everything_equals_full(encoder, n_frames, more, seed):
    """Exactly so where silence is scaled to the zero that a convolution pads with."""
    power = noise(n_frames, seed, batch=2)
    power[:, 0, 0] = LOUDEST
    with_silence = torch.cat([power, torch.full((2, 2 * more, 80), float(SILENCE))], 1)
    found = streaming.streamed(encoder, power, n_frames, more, 1)
    assert found.shape[1] == 1
    assert (found[:, 0] - streaming.full(encoder, with_silence)).abs().max() < TOLERANCE


def test_only_the_last_frame_sees_whether_padding_or_silence_comes_next(encoder):
    power = noise(20, 5)
    assert not torch.allclose(streaming.clamp(torch.tensor(float(SILENCE)), power.max()), torch.tensor(0.0))
    without_attention = streaming._stem(encoder, power, 20, 20)[0, 0]
    mel = streaming.clamp(power, power.max()).transpose(1, 2)
    padded = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel))))[0].T + encoder.embed_positions.weight[:20]
    assert (without_attention[:-1] - padded[:-1]).abs().max() < TOLERANCE
    assert (without_attention[-1] - padded[-1]).abs().max() > 100 * TOLERANCE


@settings(max_examples=15, deadline=None)
@given(
    chunk=st.integers(1, 6),
    overlap=st.integers(0, 9),
    step=st.integers(0, 3),
    padding=st.integers(0, 6),
    later=st.sampled_from([float(SILENCE), 3.0, 9.0]),
)
def test_later_audio_never_changes_what_a_step_gave(encoder, chunk, overlap, step, padding, later):
    power = noise(40, 2)
    changed = power.clone()
    first = 2 * (chunk * step + chunk + overlap) + 1  # the row after the last that the step needs
    changed[:, first:] = later
    before, after = (streaming.streamed(encoder, x, chunk, overlap, 20, padding) for x in (power, changed))
    assert torch.equal(before[:, : step + 1], after[:, : step + 1])
    changed[:, first - 1] = 9.0  # now the last row that it needs
    assert not torch.equal(before[:, step], streaming.streamed(encoder, changed, chunk, overlap, 20, padding)[:, step])


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(2, 6), overlap=st.integers(0, 6), context=st.integers(1, 12))
def test_what_was_long_ago_is_forgotten(encoder, chunk, overlap, context):
    """A frame of the second layer's context has a context of its own, as it was in its own step."""
    power = noise(60, 3)
    power[:, 0, 0] = power.max()  # the loudest is remembered for good
    step = streaming.n_steps(60, chunk) - 1
    oldest = chunk * step - context - (chunk - 1) - context
    changed = power.clone()
    changed[:, 1 : 2 * oldest - streaming.CONV_CONTEXT] = -3.0
    before, after = (streaming.streamed(encoder, x, chunk, overlap, context)[:, step] for x in (power, changed))
    assert torch.equal(before, after)
    near = power.clone()
    near[:, 2 * (chunk * step - 1)] = -3.0
    assert not torch.equal(before, streaming.streamed(encoder, near, chunk, overlap, context)[:, step])


def test_overlap_shows_a_frame_what_comes_after_it(encoder):
    power = noise(60, 4)
    whole = streaming.full(encoder, power)
    errors = [
        (streaming.streamed(encoder, power, 10, overlap, 60)[0, :4, :10].flatten(0, 1) - whole[0, :40]).square().mean()
        for overlap in (1, 8, 19)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_log_power_and_pad_are_what_the_device_hears():
    audio = to_float32(toy.babble(1.23))
    power = streaming.log_power(audio, 80)
    assert power.shape == (-(-len(audio) // HOP_LENGTH), 80)
    padded = streaming.pad([power, power[:50]], 256)
    assert padded.shape == (2, 256, 80)
    assert (padded[1, 50:] == float(SILENCE)).all()
    mel = streaming.clamp(padded[0], padded[0].max())
    assert np.abs(mel.numpy() - log_mel(audio, 256)[0])[: len(power) - 1].max() < 1e-5
    assert torch.equal(streaming.pad([power], 10)[0], power[:10])
