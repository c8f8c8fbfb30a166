"""Whisper checkpoints in CTranslate2's format (faster-whisper's): reading `model.bin`, naming its tensors.

`model.bin` is little-endian: binary version, spec name, spec revision, number of tensors; for each tensor its
name, rank, dimensions, dtype, byte count and bytes; then aliases, one name for the tensor of another. A text is
its length with the closing zero (uint16), its bytes, zero.

Projections that read the same input are stacked, so one of its tensors may be two or three of the checkpoint's.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from whisperlet.errors import ModelError

BINARY_VERSION = 6
SPEC = ("WhisperSpec", 3)  # name, revision

_DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # by the number stored in the file
_READABLE = ("float32", "float16")
_TIED = ("decoder/projection/weight", "decoder/embeddings/weight")  # one tensor in every Whisper
_ATTRIBUTES = {  # the value that Whisper's arithmetic asks for; None where any will do
    "decoder/activation": 3,  # GELU, the exact one
    "decoder/alibi": 0,
    "decoder/alibi_use_positive_positions": None,
    "decoder/alignment_heads": None,
    "decoder/alignment_layer": None,
    "decoder/num_heads": None,
    "decoder/pre_norm": 1,
    "decoder/scale_alibi": None,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "encoder/num_heads": None,
}

Floats: TypeAlias = NDArray[np.floating[Any]]  # float16 or float32
Shape: TypeAlias = tuple[int, ...]
_Slot: TypeAlias = tuple[Shape, tuple[str, ...]]  # shape of a tensor; names that its rows go to, in equal shares


@dataclass(frozen=True)
class ModelFile:
    """What a `model.bin` holds: numbers about the model, and tensors that still lie in the mapped file."""

    attributes: dict[str, int]
    tensors: dict[str, Floats]  # aliases resolved


@dataclass(frozen=True)
class Dims:
    """Dimensions of a Whisper, each named as in `transformers.WhisperConfig`."""

    vocab_size: int
    num_mel_bins: int
    d_model: int
    max_source_positions: int
    max_target_positions: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int


class _Cursor:
    """Goes forward through the bytes of a file and never past their end."""

    def __init__(self, data: memoryview, name: str) -> None:
        self._data = data
        self._name = name
        self._at = 0

    def take(self, n_bytes: int) -> memoryview:
        start, self._at = self._at, self._at + n_bytes
        if self._at > len(self._data):
            raise ModelError(f"{self._name} is cut short: it ends at byte {len(self._data)} of at least {self._at}")
        return self._data[start : self._at]

    def number(self, layout: str) -> int:
        return int(struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))[0])

    def text(self) -> str:
        return bytes(self.take(self.number("H"))).removesuffix(b"\0").decode(errors="replace")


def read(path: Path) -> ModelFile:
    """Read a `model.bin` without copying its tensors.

    Raises
    ------
    ModelError
        The file is cut short or damaged, holds no Whisper, or its tensors are quantised.
    """
    name = f"{path.parent.name}/{path.name}"
    if path.stat().st_size == 0:
        raise ModelError(f"{name} is cut short: it is empty")
    with path.open("rb") as file:
        cursor = _Cursor(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), name)
    _check_header(cursor, name)
    attributes: dict[str, int] = {}
    tensors: dict[str, Floats] = {}
    for _ in range(cursor.number("I")):
        tensor_name, value = _read_tensor(cursor, name)
        if value.ndim == 0:
            attributes[tensor_name] = int(value)
        else:
            tensors[tensor_name] = value
    _resolve_aliases(cursor, tensors, name)
    return ModelFile(attributes, tensors)


def _check_header(cursor: _Cursor, name: str) -> None:
    version = cursor.number("I")
    if version != BINARY_VERSION:
        raise ModelError(f"{name} is no CTranslate2 model of binary version {BINARY_VERSION} (it says {version})")
    spec = (cursor.text(), cursor.number("I"))
    if spec != SPEC:
        raise ModelError(f"{name} holds a {spec[0]!r} of revision {spec[1]}, not a {SPEC[0]} of revision {SPEC[1]}")


def _read_tensor(cursor: _Cursor, file_name: str) -> tuple[str, NDArray[Any]]:
    name = cursor.text()
    shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
    dtype = cursor.number("B")
    raw = cursor.take(cursor.number("I"))
    if dtype >= len(_DTYPES):
        raise ModelError(f"{file_name} is damaged: {name} has the unknown dtype {dtype}")
    if shape and _DTYPES[dtype] not in _READABLE:
        raise ModelError(
            f"{file_name} is quantised ({name} is {_DTYPES[dtype]}), which would be quantised twice; "
            "convert the original model again with --quantization float16"
        )
    stored = np.dtype(_DTYPES[dtype]).newbyteorder("<")
    if len(raw) != math.prod(shape) * stored.itemsize:
        raise ModelError(f"{file_name} is damaged: {name} {shape} does not take {len(raw)} bytes")
    return name, np.frombuffer(raw, stored).reshape(shape)


def _resolve_aliases(cursor: _Cursor, tensors: dict[str, Floats], file_name: str) -> None:
    for _ in range(cursor.number("I")):
        alias, name = cursor.text(), cursor.text()
        if name not in tensors:
            raise ModelError(f"{file_name} is damaged: {alias} stands for {name}, which is not there")
        if (alias, name) != _TIED:
            tensors[alias] = tensors[name]


def infer_dims(file: ModelFile) -> Dims:
    """Read the dimensions off the tensors; `to_checkpoint` checks all of them against these."""
    tensors = file.tensors
    vocab_size, d_model = _shape(tensors, "decoder/embeddings/weight", 2)
    return Dims(
        vocab_size=vocab_size,
        num_mel_bins=_shape(tensors, "encoder/conv1/weight", 3)[1],
        d_model=d_model,
        max_source_positions=_shape(tensors, "encoder/position_encodings/encodings", 2)[0],
        max_target_positions=_shape(tensors, "decoder/position_encodings/encodings", 2)[0],
        encoder_layers=_n_layers(tensors, "encoder"),
        encoder_attention_heads=_n_heads(file, "encoder", d_model),
        encoder_ffn_dim=_shape(tensors, "encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_layers=_n_layers(tensors, "decoder"),
        decoder_attention_heads=_n_heads(file, "decoder", d_model),
        decoder_ffn_dim=_shape(tensors, "decoder/layer_0/ffn/linear_0/weight", 2)[0],
    )


def _shape(tensors: Mapping[str, Floats], name: str, rank: int) -> Shape:
    if name not in tensors or tensors[name].ndim != rank:
        raise ModelError(f"model.bin lacks {name} or its {rank} dimensions")
    return tensors[name].shape


def _n_layers(tensors: Iterable[str], part: str) -> int:
    found = (re.match(rf"{part}/layer_(\d+)/", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _n_heads(file: ModelFile, part: str, d_model: int) -> int:
    # Files of old converters do not say; every published Whisper has heads of 64.
    n_heads = file.attributes.get(f"{part}/num_heads", d_model // 64)
    if n_heads < 1 or d_model % n_heads:
        raise ModelError(f"model.bin: {part} of width {d_model} cannot have {n_heads} heads")
    return n_heads


def to_checkpoint(file: ModelFile, dims: Dims) -> dict[str, Floats]:
    """Name the tensors as `transformers` does, the stacked ones cut into theirs.

    Returns
    -------
    dict
        Views into the mapped file, float16 or float32, without `proj_out.weight`: it is the token embedding.

    Raises
    ------
    ModelError
        An attribute is not Whisper's, or a tensor as `check_tensors` says.
    """
    _check_attributes(file.attributes)
    layout = _layout(dims)
    check_tensors(
        "model.bin",
        {name: shape for name, (shape, _) in layout.items()},
        {name: tensor.shape for name, tensor in file.tensors.items()},
    )
    checkpoint: dict[str, Floats] = {}
    for name, (_, targets) in layout.items():
        checkpoint.update(zip(targets, np.split(file.tensors[name], len(targets)), strict=True))
    # Whisper has none, the stack has zeros; and no value would change a softmax over the keys.
    return {name: tensor for name, tensor in checkpoint.items() if not name.endswith("k_proj.bias")}


def _check_attributes(attributes: Mapping[str, int]) -> None:
    for name, value in attributes.items():
        if name not in _ATTRIBUTES:
            raise ModelError(f"model.bin holds the unknown attribute {name} = {value}")
        if _ATTRIBUTES[name] not in (None, value):
            raise ModelError(f"model.bin is not a Whisper's: {name} is {value} instead of {_ATTRIBUTES[name]}")


def check_tensors(where: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise a `ModelError` that names what is missing, unknown or misshapen, a few of each."""
    misshapen = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    faults = {
        "lacks": sorted(expected.keys() - found.keys()),
        "holds the unknown": sorted(found.keys() - expected.keys()),
        "has misshapen": [f"{name} {found[name]} instead of {expected[name]}" for name in misshapen],
    }
    if any(faults.values()):
        raise ModelError(f"{where} " + "; ".join(f"{what} {_few(names)}" for what, names in faults.items() if names))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")


def _layout(dims: Dims) -> dict[str, _Slot]:
    """Say for every CTranslate2 tensor what its shape is and what it becomes."""
    d = dims.d_model
    layout: dict[str, _Slot] = {
        "decoder/embeddings/weight": ((dims.vocab_size, d), ("model.decoder.embed_tokens.weight",)),
        **_slots("encoder/conv1", ["model.encoder.conv1"], (d, dims.num_mel_bins, 3)),
        **_slots("encoder/conv2", ["model.encoder.conv2"], (d, d, 3)),
    }
    for part, n_layers, n_ffn, n_positions in (
        ("encoder", dims.encoder_layers, dims.encoder_ffn_dim, dims.max_source_positions),
        ("decoder", dims.decoder_layers, dims.decoder_ffn_dim, dims.max_target_positions),
    ):
        layout[f"{part}/position_encodings/encodings"] = (n_positions, d), (f"model.{part}.embed_positions.weight",)
        layout |= _norm(f"{part}/layer_norm", f"model.{part}.layer_norm", d)
        for i in range(n_layers):
            layout |= _layer(f"{part}/layer_{i}", f"model.{part}.layers.{i}", d, n_ffn)
            if part == "decoder":
                layout |= _cross_attention(f"{part}/layer_{i}/attention", f"model.{part}.layers.{i}.encoder_attn", d)
    return layout


def _layer(ours: str, theirs: str, d: int, n_ffn: int) -> dict[str, _Slot]:
    attention = f"{theirs}.self_attn"
    return {
        **_norm(f"{ours}/self_attention/layer_norm", f"{attention}_layer_norm", d),
        **_slots(f"{ours}/self_attention/linear_0", [f"{attention}.{x}_proj" for x in "qkv"], (d, d)),
        **_slots(f"{ours}/self_attention/linear_1", [f"{attention}.out_proj"], (d, d)),
        **_norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm", d),
        **_slots(f"{ours}/ffn/linear_0", [f"{theirs}.fc1"], (n_ffn, d)),
        **_slots(f"{ours}/ffn/linear_1", [f"{theirs}.fc2"], (d, n_ffn)),
    }


def _cross_attention(ours: str, theirs: str, d: int) -> dict[str, _Slot]:
    return {
        **_norm(f"{ours}/layer_norm", f"{theirs}_layer_norm", d),
        **_slots(f"{ours}/linear_0", [f"{theirs}.q_proj"], (d, d)),
        **_slots(f"{ours}/linear_1", [f"{theirs}.{x}_proj" for x in "kv"], (d, d)),
        **_slots(f"{ours}/linear_2", [f"{theirs}.out_proj"], (d, d)),
    }


def _norm(ours: str, theirs: str, d: int) -> dict[str, _Slot]:
    return _slots(ours, [theirs], (d,), names=("gamma", "beta"))


def _slots(ours: str, theirs: list[str], shape: Shape, names: tuple[str, str] = ("weight", "bias")) -> dict[str, _Slot]:
    """Weight and bias of a layer, or of several whose rows are stacked; `shape` is one weight's."""
    rows = shape[0] * len(theirs)
    return {
        f"{ours}/{names[0]}": ((rows, *shape[1:]), tuple(f"{name}.weight" for name in theirs)),
        f"{ours}/{names[1]}": ((rows,), tuple(f"{name}.bias" for name in theirs)),
    }
