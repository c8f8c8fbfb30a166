"""The folded modules compute what transformers computes, with every gain and bias random."""

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.alignment import Looks
from convert import fold, reference
from convert.fold import FoldedWhisper, after_norm, normalise
from convert.graphs import Decode, Encode, by_layer, inverse_timescales
from convert.model import load_directory

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return toy.make_model().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def folded(model):
    return FoldedWhisper(model, toy.ALIGNMENT_HEADS)


@pytest.fixture(scope="module")
def mel():
    return torch.randn(1, 3000, 80, generator=torch.Generator().manual_seed(1))


def logits(folded, mel, tokens, n_frames=1500, n_cross=1500):
    cross = Encode(folded, toy.DIMS, n_frames, n_cross)(mel, torch.zeros(1))
    return decoded(folded, cross, tokens, n_frames, n_cross)["logits"]


def decoded(folded, cross, tokens, n_frames=1500, n_cross=1500):
    decode = Decode(folded, toy.DIMS, len(tokens), n_cross, by_layer(folded.alignment_heads))
    inputs = decode.examples() | cross
    inputs["tokens"] = torch.tensor([tokens], dtype=torch.int32)
    inputs["self_mask"] = torch.full((len(tokens), toy.N_TEXT_CTX), -1e9).triu(1)
    inputs["cross_mask"] = torch.where(torch.arange(n_cross)[None] < n_frames, 0.0, -1e9)
    return decode(**inputs)


def test_nothing_in_the_toy_is_trivial(model):
    """Folding gains of one and biases of zero would prove nothing."""
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.1, name
    assert not any(p.requires_grad for p in FoldedWhisper(model, toy.ALIGNMENT_HEADS).parameters())


def test_logits_equal_transformers(model, folded, mel):
    tokens = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS, 20, 30, 31, 200, 5]
    expected = model(input_features=mel.transpose(1, 2), decoder_input_ids=torch.tensor([tokens])).logits
    found = logits(folded, mel, tokens)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def encoded(model, folded, mel):
    """What both encoders make of the same sound: for transformers' decoder, and for ours."""
    return model.model.encoder(mel.transpose(1, 2)), Encode(folded, toy.DIMS, 1500, 1500)(mel, torch.zeros(1))


@settings(max_examples=10, deadline=None)
@given(tokens=st.lists(st.integers(0, 279), min_size=1, max_size=toy.N_TEXT_CTX))
def test_any_tokens(model, folded, encoded, tokens):
    theirs, ours = encoded
    expected = model(encoder_outputs=theirs, decoder_input_ids=torch.tensor([tokens])).logits
    assert (decoded(folded, ours, tokens)["logits"] - expected).abs().max() < TOLERANCE


def test_attention_is_that_of_the_alignment_heads(model, folded, encoded):
    tokens = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS, 20, 30]
    theirs, ours = encoded
    model.set_attn_implementation("eager")
    found = model(encoder_outputs=theirs, decoder_input_ids=torch.tensor([tokens]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    weights = sum(found.cross_attentions[layer][:, head] for layer, head in toy.ALIGNMENT_HEADS)
    attention = decoded(folded, ours, tokens)["attention"]
    assert attention.shape == (1, len(tokens), 1500)
    assert (attention - weights).abs().max() < TOLERANCE
    assert (attention.sum(-1) - len(toy.ALIGNMENT_HEADS)).abs().max() < TOLERANCE
    assert len(set(attention.argmax(-1)[0].tolist())) > 1


def test_heads_by_layer():
    assert by_layer([(1, 2), (0, 1), (1, 0)]) == {1: [2, 0], 0: [1]}


def test_a_short_window_equals_transformers_on_as_many_frames(model, folded, mel):
    """Whisper's encoder has no other use for the window's length than its positions."""
    tokens, short = [toy.SOT, 7, 9], mel[:, :200]
    encoder = model.model.encoder
    x = folded.stem(short) + encoder.embed_positions.weight[:100]
    for layer in encoder.layers:
        x = layer(x, None)
    expected = model(encoder_outputs=(encoder.layer_norm(x),), decoder_input_ids=torch.tensor([tokens])).logits
    for n_cross in (100, 256):
        assert (logits(folded, short, tokens, 100, n_cross) - expected).abs().max() < TOLERANCE


def test_offset_moves_the_positions(model, folded):
    encode = Encode(folded, toy.DIMS, 10, 10)
    positions = model.model.encoder.embed_positions.weight
    angles = (encode.frames + 30)[:, None] * inverse_timescales(toy.DIMS.d_model)
    assert (torch.cat([angles.sin(), angles.cos()], -1) - positions[30:40]).abs().max() < 1e-5
    mel = torch.randn(1, 20, 80)
    here, there = (encode(mel, torch.tensor([offset]))["cross_k_0"] for offset in (0.0, 30.0))
    assert (here - there).abs().max() > 0.1


def test_scores_in_parts_equal_scores_at_once(folded, mel, monkeypatch):
    encode = Encode(folded, toy.DIMS, 300, 300)
    whole = encode(mel[:, :600], torch.zeros(1))
    calls = []
    plain = fold.Attention._attend
    counted = staticmethod(lambda *args: calls.append(args[0].shape) or plain(*args))
    monkeypatch.setattr(fold.Attention, "_attend", counted)
    encode(mel[:, :600], torch.zeros(1))
    n_whole = len(calls)
    monkeypatch.setattr(fold, "MAX_SCORES", 100)
    parts = encode(mel[:, :600], torch.zeros(1))
    assert len(calls) - n_whole == 2 * n_whole  # two heads of four at a time
    for name, expected in whole.items():
        assert (parts[name] - expected).abs().max() < 1e-5, name


def test_after_norm():
    norm, layer, x = torch.nn.LayerNorm(6), torch.nn.Linear(6, 4), torch.randn(3, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = layer(norm(x))
    assert (after_norm(norm, layer)(normalise(x)) - expected).abs().max() < 1e-5
    assert (after_norm(norm, layer, scale=0.5)(normalise(x)) - 0.5 * expected).abs().max() < 1e-5
    constant = expected - after_norm(norm, layer, bias=False)(normalise(x))
    assert (constant - constant[0]).abs().max() < 1e-5
    assert constant.abs().max() > 0.1


def test_the_model_is_not_changed(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FoldedWhisper(model, toy.ALIGNMENT_HEADS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_reference_looks_where_the_graphs_do(folder, mel):
    tokens = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS, 20, 30, 31, 200, 5]
    checkpoint = load_directory(folder, "toy")
    heads = checkpoint.generation.alignment_heads
    folded = FoldedWhisper(checkpoint.model, heads)
    cross = Encode(folded, toy.DIMS, 1500, 1500)(mel, torch.zeros(1))
    expected = Looks.of(decoded(folded, cross, tokens)["attention"][0].numpy(), 1500)
    engine = reference.TorchEngine(checkpoint.model, reference.manifest(checkpoint, "toy"))
    state = engine.new_state()
    engine.encode(state, mel.numpy())
    for part, first in ((tokens[:5], 0), (tokens[5:], 5)):
        engine.decode(state, part)
        assert state.looks.frames.tolist() == expected.frames[first : first + len(part)].tolist()
    assert len(set(expected.frames.tolist())) > 1
    assert checkpoint.model.config._attn_implementation == "sdpa"  # as it was
