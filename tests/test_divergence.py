"""What the decoder would say over a stream, against what it says over the whole."""

import random

import pytest
import torch
from test_corpus import write
from test_prune import save_toy

from convert import divergence, model, streaming, sublayers
from convert.corpus import Corpus
from convert.speechset import Source
from convert.utterances import Lessons

CHUNK, OVERLAP, PADDING, SILENCE = 5, 4, 3, 6


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whisper-toy"
    save_toy(folder)
    return model.load(str(folder))


@pytest.fixture(scope="module")
def lessons(whisper, tmp_path_factory):
    audio = write(tmp_path_factory.mktemp("audio") / "babble", *(0.6 + 0.02 * i for i in range(36)))
    return Lessons(Corpus([Source(audio)], 80), whisper)


@pytest.fixture(scope="module")
def batch(lessons):
    clips = lessons.batch(random.Random(1), 300, SILENCE).clips[:3]
    assert len(clips) == 3
    return lessons.together(clips, SILENCE)


@pytest.fixture(scope="module")
def target(whisper, batch):
    with torch.no_grad():
        return streaming.full(whisper.model.model.encoder, batch.power)


@pytest.fixture(scope="module")
def wanted(whisper, batch, target):
    return divergence.wanted(whisper.model, batch, SILENCE, target, whisper.generation.alignment_heads)


def as_stream(target):
    """A stream that is the teacher's frames all over."""
    n_steps = -(-target.shape[1] // CHUNK)
    width = CHUNK + OVERLAP + PADDING
    places = torch.arange(n_steps)[:, None] * CHUNK + torch.arange(width)
    return target[:, places.clamp(max=target.shape[1] - 1)].clone()


def heard_divergence(whisper, batch, wanted, frames, step):
    return divergence.at_step(whisper.model, batch, wanted, frames, step, CHUNK, PADDING)


def test_a_step_is_read_after_what_was_committed():
    frames = torch.arange(2 * 3 * 4.0).view(2, 3, 4, 1)  # two utterances, steps of 4 frames, of which 3 are committed
    assert divergence.seen(frames, 0, 3)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert divergence.seen(frames, 2, 3)[1, :, 0].tolist() == [12, 13, 14, 16, 17, 18, 20, 21, 22, 23]


def test_the_heads_that_are_watched_are_those_of_transformers(whisper, batch, target, wanted):
    decoder = whisper.model.model.decoder
    decoder.config._attn_implementation = "eager"
    with torch.no_grad():
        said = decoder(batch.read, encoder_hidden_states=target, output_attentions=True)
    heads = whisper.generation.alignment_heads
    weights = sum(said.cross_attentions[layer][:, head] for layer, head in heads)
    ends = weights.argmax(-1).cummax(-1).values[batch.is_said] + divergence.MARGIN
    assert torch.equal(wanted.ends, ends)
    assert torch.allclose(wanted.hidden, said.last_hidden_state[batch.is_said], atol=1e-4)
    n_clips = batch.is_said.sum(1)
    own = torch.cat([torch.tensor([len(clip) // 2] * int(n)) for clip, n in zip(batch.clips, n_clips, strict=True)])
    assert torch.equal(wanted.clip_ends, own)


def test_a_stream_that_is_the_teachers_frames_diverges_not(whisper, batch, target, wanted):
    frames = as_stream(target)
    seen = divergence.seen(frames, frames.shape[1] - 1, CHUNK)[:, : target.shape[1]]
    assert torch.equal(seen, target)
    alone = seen[:, None]  # all in one step, nothing after it
    error = divergence.at_step(whisper.model, batch, wanted, alone, 0, target.shape[1], 0)
    assert abs(float(error)) < 1e-5
    noisy = alone + 0.5 * torch.randn(alone.shape, generator=torch.manual_seed(1))
    assert float(divergence.at_step(whisper.model, batch, wanted, noisy, 0, target.shape[1], 0)) > 1e-3


def test_it_is_the_mean_over_tokens_that_were_heard(whisper, batch, target, wanted):
    step, frames = 3, as_stream(target) + 0.3
    n_heard = step * CHUNK + CHUNK + OVERLAP
    is_heard = torch.tensor([i % 2 == 0 for i in range(len(wanted.ends))])
    wanted = wanted._replace(
        ends=torch.where(is_heard, n_heard, n_heard + 1), clip_ends=torch.full_like(wanted.ends, n_heard + 1)
    )
    hidden = sublayers.decode(whisper.model, batch.read, divergence.seen(frames, step, CHUNK))[batch.is_said]
    with torch.no_grad():
        found, said = (whisper.model.proj_out(x).log_softmax(-1) for x in (hidden, wanted.hidden))
    each = (said.exp() * (said - found)).sum(-1)
    assert float(heard_divergence(whisper, batch, wanted, frames, step)) == pytest.approx(
        float(each[is_heard].mean()), rel=1e-4
    )
    later = wanted._replace(ends=wanted.clip_ends)
    assert float(heard_divergence(whisper, batch, later, frames, step)) == 0.0
    over = later._replace(clip_ends=torch.full_like(wanted.ends, n_heard))  # a whole utterance: its end counts too
    assert float(heard_divergence(whisper, batch, over, frames, step)) == pytest.approx(float(each.mean()), rel=1e-4)


def test_where_the_teacher_heard_nothing_there_is_nothing_to_learn(whisper, lessons, target):
    clips = [torch.full((60, 80), -10.0)] * 2
    lessons._tokens.update({id(clip): None for clip in clips})
    batch = lessons.together(clips, SILENCE)
    assert not batch.is_said.any()
    frames = as_stream(target[:2, :36]).requires_grad_()
    heads = whisper.generation.alignment_heads
    wanted = divergence.wanted(whisper.model, batch, SILENCE, target[:2, :36], heads)
    error = heard_divergence(whisper, batch, wanted, frames, 2)
    error.backward()
    assert float(error.detach()) == 0.0
    assert frames.grad.abs().max() == 0


def test_it_teaches_the_frames_alone(whisper, batch, target, wanted):
    frames = as_stream(target).requires_grad_()
    heard_divergence(whisper, batch, wanted, frames, 5).backward()
    read = torch.zeros_like(frames, dtype=torch.bool)
    read[:, :5, :CHUNK] = read[:, 5] = True
    assert frames.grad[read].abs().max() > 0
    assert frames.grad[~read].abs().max() == 0
    assert wanted.hidden.grad_fn is None


def test_the_last_step_is_always_read():
    drawn = [divergence.steps(random.Random(seed), 7, 3) for seed in range(50)]
    assert all(one[0] == 6 and len(one) == 3 for one in drawn)
    assert {step for one in drawn for step in one[1:]} == set(range(7))
