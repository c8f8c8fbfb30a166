"""A pruned Whisper: what is cut computes what a masked one does, lies in a folder, and goes into a bundle."""

import json

import msgspec
import pytest
import torch
import toy

from agent.state import StreamState
from convert import export, model, parity, pruned
from convert.fold import FoldedWhisper
from convert.graphs import by_layer, signatures
from convert.pruned import Kept, KeptLayer
from convert.recipe import Export
from whisperlet.bundle import kv_shapes
from whisperlet.errors import ModelError

CHANNELS = tuple(range(3, 67, 2))
KEPT = Kept(  # of the toy: two layers of four heads each way, 96 and 80 channels
    encoder=(KeptLayer(0, (0, 2, 3), CHANNELS), KeptLayer(1, (1, 3), CHANNELS[:16])),
    decoder=(KeptLayer(1, (0, 1, 2), CHANNELS[8:], (0, 2)),),
)
SHORT = Export(
    n_text_ctx=32,
    encode_frames=(40,),
    cross_frames=(64,),
    decode_tokens=(2,),
    stream_chunk=5,
    stream_overlaps=(10,),
    stream_padding=4,
    stream_context=20,
)
TOKENS = [[toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS, 20, 30, 31, 200, 5]]


@pytest.fixture(scope="module")
def parent(folder):
    return model.load(str(folder))


@pytest.fixture(scope="module")
def small(parent):
    return pruned.cut(parent, KEPT)


def logits(whisper, seed=1):
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return whisper(input_features=mel, decoder_input_ids=torch.tensor(TOKENS)).logits


def silence(linear, kept):
    gone = torch.ones(linear.in_features, dtype=torch.bool)
    gone[kept] = False
    linear.weight[:, gone] = 0


@torch.no_grad()
def masked(whisper, kept):
    """All of the model; what goes adds nothing."""
    for half in pruned.HALVES:
        by_number = {layer.number: layer for layer in getattr(kept, half)}
        for number, layer in enumerate(getattr(whisper.model, half).layers):
            closing = {"self_attn.out_proj": layer.self_attn.out_proj, "fc2": layer.fc2}
            if half == "decoder":
                closing["encoder_attn.out_proj"] = layer.encoder_attn.out_proj
            for name, linear in closing.items():
                if number in by_number:
                    silence(linear, by_number[number].indices(name, 16))
                else:
                    linear.weight.zero_()
                    linear.bias.zero_()
    return whisper


def test_a_cut_model_equals_a_masked_one(folder, parent, small):
    expected = logits(masked(model.load(str(folder)).model, KEPT))
    assert (logits(small.model) - expected).abs().max() < 1e-4
    assert (logits(parent.model) - expected).abs().max() > 0.1
    assert pruned.sizes_of(small.model) == KEPT.sizes
    assert small.sha256 != parent.sha256


def test_keeping_everything_changes_nothing(parent):
    same = pruned.cut(parent, pruned.everything(pruned.sizes_of(parent.model)))
    assert same.sha256 == parent.sha256
    assert same.generation == parent.generation
    assert export.model_dims(same.model, 32) == export.model_dims(parent.model, 32)


def test_weights_are_counted(parent, small):
    for checkpoint in (parent, small):
        layers = (p for name, p in checkpoint.model.named_parameters() if ".layers." in name and p.ndim == 2)
        assert pruned.sizes_of(checkpoint.model).weights(64, 16) == sum(p.numel() for p in layers)


def test_alignment_heads_are_counted_anew(parent, small):
    assert parent.generation.alignment_heads == tuple(toy.ALIGNMENT_HEADS) == ((0, 1), (1, 0), (1, 2))
    assert small.generation.alignment_heads == ((0, 0), (0, 1))
    first = msgspec.structs.replace(KEPT, decoder=(KeptLayer(0, (0,), CHANNELS, (0, 2)),))  # without any of them
    assert pruned.cut(parent, first).generation.alignment_heads == ((0, 0), (0, 1))


@pytest.fixture
def written(small, tmp_path):
    target = tmp_path / "small-toy"
    target.mkdir()
    model.save_directory(small, target)
    return target


def test_a_folder_holds_it(small, written):
    again = model.load(str(written))
    assert again.sha256 == small.sha256
    assert again.generation == small.generation
    assert torch.equal(logits(again.model), logits(small.model))
    assert json.loads((written / "config.json").read_text())["pruned"]["decoder"] == [
        {"heads": 3, "ffn": 24, "cross_heads": 2}
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pruned": {"encoder": []}}, "pruned: Object missing required field `decoder`"),
        ({"encoder_layers": 3}, "pruned.encoder: has 2 layers, encoder_layers says 3"),
        ({"pruned": {"encoder": [{"heads": 0, "ffn": 3}] * 2, "decoder": []}, "decoder_layers": 0}, "no layer"),
        ({"pruned": {"encoder": [{"heads": 3, "ffn": 32}] * 2, "decoder": [{"heads": 3, "ffn": 24}]}}, "no layer"),
        ({"pruned": None}, "has misshapen model.decoder.layers.0"),
    ],
)
def test_a_wrong_table_is_refused(written, change, reason):
    path = written / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        model.load(str(written))


@pytest.fixture(scope="module")
def folded(small):
    return FoldedWhisper(small.model, small.generation.alignment_heads)


def test_folding_and_dims(small, folded):
    dims = export.model_dims(small.model, 32)
    assert dims.heads("past") == dims.heads("new") == (3, 2)
    assert (dims.heads("self"), dims.heads("cross"), dims.d_head) == ((3,), (2,), 16)
    assert msgspec.json.decode(msgspec.json.encode(dims), type=type(dims)) == dims
    assert parity.folding_error(small.model, parity.Probe(folded, dims, SHORT, TOKENS[0])) < 1e-3
    assert by_layer(folded.alignment_heads) == {0: [0, 1]}
    spec = SHORT
    for name, shape in kv_shapes(dims, "past", 20).items():
        assert StreamState(dims, _stream(spec), 64).past[name].shape == shape


def _stream(stage):
    from convert.graphs import streams

    return streams(stage)[0]


def test_its_graphs_compute_what_pytorch_does(small, folded, tmp_path):
    dims = export.model_dims(small.model, 32)
    graphs, paths, _ = export.export_float(folded, dims, SHORT, tmp_path)
    assert [graph.name for graph in graphs] == ["encode_40", "stream_5_10", "decode_2_64"]
    probe, runner = parity.Probe(folded, dims, SHORT, TOKENS[0]), parity.Runner(paths)
    for spec, module in signatures(folded, dims, SHORT):
        inputs = probe.inputs(module)
        with torch.inference_mode():
            expected = {key: value.numpy() for key, value in module(**inputs).items()}
        found = runner.run(spec.name, inputs)
        for tensor in spec.outputs:
            assert found[tensor.name].shape == tensor.shape
            assert abs(found[tensor.name] - expected[tensor.name]).max() < 2e-3, (spec.name, tensor.name)
