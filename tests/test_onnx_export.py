"""The graphs as ONNX files: onnxruntime computes what the modules compute."""

import numpy as np
import pytest
import torch
import toy

from convert import onnx_export, parity, recipe
from convert.fold import FoldedWhisper
from convert.graphs import Decode
from convert.onnx_export import Placed, Shapes
from whisperlet.errors import ConfigError, ModelError

PROMPT = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]


@pytest.fixture(scope="module")
def probe():
    whisper = FoldedWhisper(toy.make_model(), toy.ALIGNMENT_HEADS)
    return parity.Probe(whisper, toy.DIMS, recipe.Export(n_text_ctx=toy.N_TEXT_CTX), PROMPT)


@pytest.fixture(scope="module")
def written(probe, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx")
    return onnx_export.export(probe.whisper, probe, Shapes(n_frames=128, n_tokens=4), out)


def test_both_halves_agree_with_their_modules(written):
    paths, rows = written
    assert [path.name for path in paths] == ["encode_128.onnx", "decode_4_128.onnx"]
    assert [row.graph for row in rows] == ["encode_128", "decode_4_128"]
    assert 0 < max(row.error for row in rows) < 1e-4


def test_the_files_take_what_the_signatures_take(written, probe):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(written[0][1]), providers=["CPUExecutionProvider"])
    examples = Decode(probe.whisper, toy.DIMS, 4, 128, {}).examples()
    assert {one.name: tuple(one.shape) for one in session.get_inputs()} == {
        k: tuple(v.shape) for k, v in examples.items()
    }


@pytest.mark.parametrize("position", [0, 5, toy.N_TEXT_CTX - 4])
@pytest.mark.parametrize("axis", [1, 2])
def test_state_is_written_where_the_runtime_writes_it(position, axis):
    generator = torch.Generator().manual_seed(position)
    shape = [4, toy.N_TEXT_CTX, 16] if axis == 1 else [4, 16, toy.N_TEXT_CTX]
    state = torch.randn(shape, generator=generator)
    new = torch.randn([n if i != axis else 4 for i, n in enumerate(shape)], generator=generator)
    place = torch.tensor([position], dtype=torch.int32)
    torch.testing.assert_close(Placed.update(state, new, axis, place), Decode.update(state, new, axis, place))


def test_a_graph_that_computes_something_else_is_refused():
    expected = {"logits": np.ones((1, 3), np.float32)}
    assert onnx_export.compared("g", "r", expected, expected).error == 0
    with pytest.raises(ModelError, match=r"g does not compute on r .*: logits is off by 0\.01"):
        onnx_export.compared("g", "r", expected, {"logits": expected["logits"] + 0.01})
    with pytest.raises(ModelError, match="does not compute"):
        onnx_export.compared("g", "r", expected, {"logits": expected["logits"] * np.nan})
    with pytest.raises(ModelError, match="puts out nothing, not logits"):
        onnx_export.compared("g", "r", expected, {"nothing": expected["logits"]})


@pytest.mark.parametrize(("sizes", "reason"), [({"n_frames": 0}, "1 to 1500"), ({"n_tokens": 33}, "n_text_ctx, 32")])
def test_sizes_that_cannot_be(sizes, reason):
    with pytest.raises(ConfigError, match=reason):
        Shapes(**sizes).check(recipe.Export(n_text_ctx=toy.N_TEXT_CTX))
