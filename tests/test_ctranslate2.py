"""The file format and the names, on files that a small writer makes; `test_model.py` has the real converter's."""

import dataclasses
import re
import struct

import numpy as np
import pytest

from convert import ctranslate2
from whisperlet.errors import ModelError

DIMS = ctranslate2.Dims(
    vocab_size=20,
    num_mel_bins=8,
    d_model=12,
    max_source_positions=10,
    max_target_positions=5,
    encoder_layers=2,
    encoder_attention_heads=3,
    encoder_ffn_dim=16,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=14,
)
DTYPES = ["float32", "int8", "int16", "int32", "float16"]
ATTRIBUTES = {
    "decoder/activation": np.int8(3),
    "decoder/alignment_layer": np.int16(-1),
    "decoder/num_heads": np.int16(4),
    "decoder/pre_norm": np.int8(1),
    "encoder/num_heads": np.int16(3),
}
TIED = {"decoder/projection/weight": "decoder/embeddings/weight"}


def make_tensors(dtype="float16"):
    """Every tensor of a Whisper of `DIMS`; their shapes are written out here, not taken from the reader."""
    d = DIMS.d_model
    shapes = {
        "encoder/conv1/weight": (d, 8, 3),
        "encoder/conv1/bias": (d,),
        "encoder/conv2/weight": (d, d, 3),
        "encoder/conv2/bias": (d,),
        "encoder/position_encodings/encodings": (10, d),
        "decoder/position_encodings/encodings": (5, d),
        "decoder/embeddings/weight": (20, d),
    }
    norms = ["encoder/layer_norm", "decoder/layer_norm"]
    for layer, n_ffn in (("encoder/layer_0", 16), ("encoder/layer_1", 16), ("decoder/layer_0", 14)):
        norms += [f"{layer}/self_attention/layer_norm", f"{layer}/ffn/layer_norm"]
        linears = {"self_attention/linear_0": (3 * d, d), "self_attention/linear_1": (d, d)}
        linears |= {"ffn/linear_0": (n_ffn, d), "ffn/linear_1": (d, n_ffn)}
        if layer.startswith("decoder"):
            norms.append(f"{layer}/attention/layer_norm")
            linears |= {"attention/linear_0": (d, d), "attention/linear_1": (2 * d, d), "attention/linear_2": (d, d)}
        for name, shape in linears.items():
            shapes |= {f"{layer}/{name}/weight": shape, f"{layer}/{name}/bias": shape[:1]}
    shapes |= {f"{norm}/{part}": (d,) for norm in norms for part in ("gamma", "beta")}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def encode(tensors, aliases=TIED, *, version=6, spec="WhisperSpec", revision=3):
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", revision, len(tensors))]
    for name, value in tensors.items():
        array = np.asarray(value)
        parts += [text(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", DTYPES.index(array.dtype.name), array.nbytes), array.tobytes()]
    parts += [struct.pack("<I", len(aliases)), *(text(name) for pair in aliases.items() for name in pair)]
    return b"".join(parts)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "toy" / "model.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def load(path):
    file = ctranslate2.read(path)
    return ctranslate2.to_checkpoint(file, ctranslate2.infer_dims(file))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dims_and_names(write, dtype):
    tensors = make_tensors(dtype)
    file = ctranslate2.read(write(encode(ATTRIBUTES | tensors)))
    assert ctranslate2.infer_dims(file) == DIMS
    checkpoint = ctranslate2.to_checkpoint(file, DIMS)
    stacked = tensors["decoder/layer_0/attention/linear_1/weight"]
    attention = "model.decoder.layers.0.encoder_attn"
    np.testing.assert_array_equal(checkpoint[f"{attention}.k_proj.weight"], stacked[:12])
    np.testing.assert_array_equal(checkpoint[f"{attention}.v_proj.weight"], stacked[12:])
    stacked = tensors["encoder/layer_1/self_attention/linear_0/bias"]
    np.testing.assert_array_equal(checkpoint["model.encoder.layers.1.self_attn.v_proj.bias"], stacked[24:])
    assert not any(name.endswith("k_proj.bias") for name in checkpoint)
    assert {tensor.dtype.name for tensor in checkpoint.values()} == {dtype}


def test_aliases_stand_for_equal_tensors(write):
    tensors = make_tensors()
    del tensors["encoder/layer_norm/beta"]
    aliases = TIED | {"encoder/layer_norm/beta": "decoder/layer_norm/beta"}
    checkpoint = load(write(encode(ATTRIBUTES | tensors, aliases)))
    expected = tensors["decoder/layer_norm/beta"]
    np.testing.assert_array_equal(checkpoint["model.encoder.layer_norm.bias"], expected)


def test_heads_default_to_64_wide(write):
    file = ctranslate2.read(write(encode(make_tensors())))
    with pytest.raises(ModelError, match="encoder of width 12 cannot have 0 heads"):
        ctranslate2.infer_dims(file)
    wide = dataclasses.replace(file, tensors={**file.tensors, "decoder/embeddings/weight": np.zeros((20, 128), "f4")})
    assert ctranslate2.infer_dims(wide).decoder_attention_heads == 2


def test_faults_of_names_are_told_in_one_sentence(write):
    tensors = make_tensors()
    del tensors["encoder/conv1/bias"]
    tensors["decoder/layer_norm/gamma"] = np.zeros(7, np.float16)
    tensors["decoder/rotary"] = np.zeros(7, np.float16)
    message = (
        "model.bin lacks encoder/conv1/bias; holds the unknown decoder/rotary; "
        "has misshapen decoder/layer_norm/gamma (7,) instead of (12,)"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        load(write(encode(ATTRIBUTES | tensors)))


def test_many_faults_are_cut_short():
    expected = {f"tensor_{i}": (1,) for i in range(9)}
    with pytest.raises(ModelError, match=r"^toy lacks tensor_0, tensor_1, tensor_2, tensor_3 and more$"):
        ctranslate2.check_tensors("toy", expected, {})


def test_a_gap_in_the_layers_is_seen(write):
    tensors = {name: tensor for name, tensor in make_tensors().items() if "encoder/layer_0/self" not in name}
    with pytest.raises(ModelError, match="lacks encoder/layer_0/self_attention/layer_norm/beta"):
        load(write(encode(ATTRIBUTES | tensors)))


@pytest.mark.parametrize(
    "name", ["decoder/embeddings/weight", "encoder/conv1/weight", "decoder/layer_0/ffn/linear_0/weight"]
)
def test_dims_cannot_be_inferred(write, name):
    tensors = make_tensors()
    del tensors[name]
    with pytest.raises(ModelError, match=f"lacks {name}"):
        load(write(encode(ATTRIBUTES | tensors, {})))


def test_projection_of_its_own_is_unknown(write):
    tensors = make_tensors() | {"decoder/projection/weight": np.zeros((20, 12), np.float16)}
    with pytest.raises(ModelError, match="unknown decoder/projection/weight"):
        load(write(encode(ATTRIBUTES | tensors, {})))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"decoder/pre_norm": np.int8(0)}, "decoder/pre_norm is 0 instead of 1"),
        ({"decoder/activation": np.int8(0)}, "decoder/activation is 0 instead of 3"),
        ({"decoder/rotary_dim": np.int32(64)}, "unknown attribute decoder/rotary_dim"),
        ({"encoder/num_heads": np.int16(5)}, "encoder of width 12 cannot have 5 heads"),
    ],
)
def test_attributes_of_another_architecture(write, attribute, message):
    with pytest.raises(ModelError, match=message):
        load(write(encode(ATTRIBUTES | make_tensors() | attribute)))


def test_quantised_tensors_are_refused(write):
    tensors = make_tensors() | {"decoder/embeddings/weight": np.zeros((20, 12), np.int8)}
    with pytest.raises(ModelError, match=r"is int8.*convert the original model again with --quantization float16"):
        ctranslate2.read(write(encode(ATTRIBUTES | tensors)))


def test_every_cut_is_seen(write):
    content = encode(ATTRIBUTES | make_tensors())
    cuts = np.random.default_rng(1).integers(0, len(content), 40)
    for n_bytes in (0, 1, len(content) - 1, *cuts):
        with pytest.raises(ModelError, match=r"toy/model.bin is cut short"):
            ctranslate2.read(write(content[:n_bytes]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode({}, {}, version=5), "no CTranslate2 model of binary version 6"),
        (b"PK\3\4" + bytes(100), "no CTranslate2 model"),
        (encode({}, {}, spec="TransformerSpec"), "holds a 'TransformerSpec'"),
        (encode({}, {}, revision=4), "of revision 4"),
        (encode({}, {"a": "b"}), "a stands for b, which is not there"),
        (
            encode({"a": np.zeros(3, "f4")}, {}).replace(struct.pack("<I", 3) + b"\0", struct.pack("<I", 4) + b"\0"),
            "bytes",
        ),
    ],
)
def test_other_and_damaged_files(write, content, message):
    with pytest.raises(ModelError, match=message):
        ctranslate2.read(write(content))


def test_unknown_dtype(write):
    content = encode({"a": np.zeros(3, "f4")}, {})
    at = content.index(struct.pack("<BI", 0, 12))
    with pytest.raises(ModelError, match="a has the unknown dtype 9"):
        ctranslate2.read(write(content[:at] + b"\x09" + content[at + 1 :]))
