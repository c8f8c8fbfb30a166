"""The pure parts of what the benchmarks need for others: their files, and how they agree with themselves."""

import itertools
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks import ggml, local_agreement
from benchmarks.local_agreement import LocalAgreement

# ---- whisper.cpp's files

CONFIG = SimpleNamespace(
    vocab_size=280,
    max_source_positions=1500,
    d_model=64,
    encoder_attention_heads=4,
    encoder_layers=2,
    max_target_positions=224,
    decoder_attention_heads=8,
    decoder_layers=3,
    num_mel_bins=80,
)
NAMES = {
    "model.encoder.conv1.weight": (64, 80, 3),
    "model.encoder.conv1.bias": (64,),
    "model.encoder.layers.1.self_attn.k_proj.weight": (64, 64),
    "model.decoder.layers.0.encoder_attn.out_proj.bias": (64,),
    "model.decoder.layers.0.fc1.weight": (96, 64),
    "model.decoder.embed_tokens.weight": (280, 64),
    "model.decoder.embed_positions.weight": (224, 64),
    "model.decoder.layer_norm.weight": (64,),
    "proj_out.weight": (280, 64),
}


class Tensor:
    """What a torch tensor is to `ggml.tensors`."""

    def __init__(self, shape):
        self.values = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)

    def numpy(self):
        return self.values


@pytest.fixture
def checkpoint():
    vocab = {"!": 0, "Ġhe": 1, "Ċ": 2, "é": 3, "<|end|>": 5}
    state = {name: Tensor(shape) for name, shape in NAMES.items()}
    return SimpleNamespace(
        model=SimpleNamespace(config=CONFIG, state_dict=lambda: state),
        tokenizer_json=json.dumps({"model": {"vocab": vocab}}).encode(),
        generation=SimpleNamespace(eot=5),
    )


class Reader:
    """Reads a file as whisper.cpp does."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def ints(self, n):
        self.at += 4 * n
        return struct.unpack_from(f"<{n}i", self.data, self.at - 4 * n)

    def bytes(self, n):
        self.at += n
        return self.data[self.at - n : self.at]

    def tensor(self):
        n_dims, n_name, kind = self.ints(3)
        shape = self.ints(n_dims)[::-1]
        name = self.bytes(n_name).decode()
        n = int(np.prod(shape))
        if kind == ggml.Q5_1:
            return name, kind, dequantised(self.bytes(n // 32 * 24)).reshape(shape)
        dtype = np.dtype("<f4" if kind == ggml.F32 else "<f2")
        return name, kind, np.frombuffer(self.bytes(n * dtype.itemsize), dtype).astype(np.float32).reshape(shape)


def dequantised(data):
    """Decode value by value, as ggml's reference code describes it."""
    values = []
    for block in np.frombuffer(data, np.uint8).reshape(-1, 24):
        scale, lowest = block[:4].view("<f2").astype(np.float32)
        fifth = int.from_bytes(block[4:8].tobytes(), "little")
        for half, i in itertools.product((0, 1), range(16)):
            low = int(block[8 + i]) >> 4 if half else int(block[8 + i]) & 15
            values.append(lowest + scale * (low | ((fifth >> (16 * half + i)) & 1) << 4))
    return np.array(values, np.float32)


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_written_can_be_read(tmp_path, checkpoint, quantised):
    path = tmp_path / "model.bin"
    ggml.write(path, checkpoint, quantised=quantised)
    reader = Reader(path.read_bytes())
    assert reader.ints(12) == (0x67676D6C, 280, 1500, 64, 4, 2, 224, 64, 8, 3, 80, 2009 if quantised else 1)
    assert reader.ints(2) == (80, 201)
    filters = np.frombuffer(reader.bytes(4 * 80 * 201), "<f4").reshape(80, 201)
    assert (np.diff(filters.argmax(1)) >= 0).all()
    (n_words,) = reader.ints(1)
    assert [reader.bytes(reader.ints(1)[0]) for _ in range(n_words)] == [b"!", b" he", b"\n", b"\xe9", b""]
    found = {}
    while reader.at < len(reader.data):
        name, kind, values = reader.tensor()
        found[name] = kind
        original = next(t.values for theirs, t in checkpoint.model.state_dict().items() if same(theirs, name))
        error = np.abs(values.reshape(original.shape) - original).max()
        assert error <= {ggml.F32: 0.0, ggml.F16: 2e-3, ggml.Q5_1: 0.13}[kind]
    matrix = ggml.Q5_1 if quantised else ggml.F16
    assert found == {
        "encoder.conv1.weight": ggml.F16,
        "encoder.conv1.bias": ggml.F32,
        "encoder.blocks.1.attn.key.weight": matrix,
        "decoder.blocks.0.cross_attn.out.bias": ggml.F32,
        "decoder.blocks.0.mlp.0.weight": matrix,
        "decoder.token_embedding.weight": matrix,
        "decoder.positional_embedding": ggml.F32,
        "decoder.ln.weight": ggml.F32,
    }


def same(theirs, name):
    return theirs.startswith("model.") and ggml.renamed(theirs.removeprefix("model.")) == name


def test_quantising_keeps_the_ends_of_a_block():
    block = np.linspace(-3.0, 5.0, 32, dtype=np.float32)
    values = dequantised(ggml.quantise(np.stack([block, np.full(32, 0.5, np.float32)])).tobytes())
    assert values[[0, 31]] == pytest.approx([-3.0, 5.0], abs=0.01)
    assert np.abs(values[:32] - block).max() < 8 / 31 / 2 + 0.01
    assert values[32:] == pytest.approx(0.5)


# ---- LocalAgreement


def test_what_two_hypotheses_begin_with_is_confirmed():
    agreement = LocalAgreement()
    shown = [agreement.hear(text.split()) for text in ("he sad", "He sat on", "he sat on the", "she sat")]
    assert [" ".join(words) for words in shown] == ["he sad", "He sat on", "He sat on the", "He sat on"]
    assert agreement.confirmed == ["He", "sat", "on"]


def test_streaming_hears_once_a_hop_and_once_at_the_end(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(local_agreement.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(local_agreement.time, "sleep", lambda s: setattr(clock, "now", clock.now + s))
    lengths = []

    def transcribe(audio):
        lengths.append(len(audio) / 16_000)
        clock.now += 1.5 if len(lengths) == 2 else 0.1
        return "one two three four"[: 4 * len(lengths)]

    messages = local_agreement.stream(np.zeros(80_000, np.float32), 4.6, 4.1, transcribe)
    assert lengths == pytest.approx([1.0, 2.0, 3.5, 4.5, 4.1])
    assert [at_s for at_s, _, _ in messages] == pytest.approx([1.1, 3.5, 3.6, 4.6, 4.7])
    assert [(text, stable) for _, text, stable in messages] == [
        ("one", 0),
        ("one two", 3),
        ("one two thre", 7),
        ("one two three fo", 7),
        ("one two three four", 18),
    ]
