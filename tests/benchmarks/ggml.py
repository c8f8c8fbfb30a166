"""Writes a checkpoint in whisper.cpp's own file format, so that the peer runs the very same weights.

A file is little-endian int32 throughout: magic, eleven hyperparameters (the last is the type of the matrices), mel
filters, the vocabulary's byte strings, then one tensor after the other until the end: number of dimensions, length of
the name, type, sizes with the innermost first, name, data. One-dimensional tensors, the biases of the convolutions and
positional embeddings are float32, the convolutions' kernels float16, other matrices float16 or q5_1.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from convert.model import Checkpoint
from whisperlet.audio import Float32
from whisperlet.logmel import mel_filters

MAGIC = 0x67676D6C
F32, F16, Q5_1 = 0, 1, 7  # types of a tensor
MOSTLY_F16, MOSTLY_Q5_1 = 1, 2009  # types of a file; quantised ones count by their format's version, 2
BLOCK = 32  # values that share a scale and an offset
N_LEVELS = 31  # of five bits, above zero

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
_IN_LAYER = {
    **{f"self_attn.{theirs}": f"attn.{name}" for theirs, name in _ATTENTION.items()},
    **{f"encoder_attn.{theirs}": f"cross_attn.{name}" for theirs, name in _ATTENTION.items()},
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
_OUTSIDE = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "encoder.layer_norm.weight": "encoder.ln_post.weight",
    "encoder.layer_norm.bias": "encoder.ln_post.bias",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.embed_tokens.weight": "decoder.token_embedding.weight",
    "decoder.layer_norm.weight": "decoder.ln.weight",
    "decoder.layer_norm.bias": "decoder.ln.bias",
}


def write(path: Path, checkpoint: Checkpoint, *, quantised: bool) -> None:
    """Write the file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        config = checkpoint.model.config
        file.write(header(config, MOSTLY_Q5_1 if quantised else MOSTLY_F16))
        filters = np.ascontiguousarray(mel_filters(config.num_mel_bins).T)
        file.write(struct.pack("<ii", *filters.shape) + filters.astype("<f4").tobytes())
        _write_vocabulary(file, vocabulary(checkpoint.tokenizer_json, checkpoint.generation.eot))
        for name, values in tensors(checkpoint):
            file.write(tensor(name, values, quantised=quantised))
    partial.replace(path)


def header(config: Any, file_type: int) -> bytes:
    """Magic and hyperparameters, in the order of openai-whisper's dimensions."""
    audio = config.max_source_positions, config.d_model, config.encoder_attention_heads, config.encoder_layers
    text = config.max_target_positions, config.d_model, config.decoder_attention_heads, config.decoder_layers
    return struct.pack("<12i", MAGIC, config.vocab_size, *audio, *text, config.num_mel_bins, file_type)


def vocabulary(tokenizer_json: bytes, n_plain: int) -> list[bytes]:
    """Bytes of each plain token, in the order of their ids; a tokenizer spells bytes as printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    spelled = {i: text for text, i in json.loads(tokenizer_json)["model"]["vocab"].items() if i < n_plain}
    return [bytes(byte_of[character] for character in spelled.get(i, "")) for i in range(n_plain)]


def _write_vocabulary(file: BinaryIO, words: list[bytes]) -> None:
    file.write(struct.pack("<i", len(words)))
    file.writelines(struct.pack("<i", len(word)) + word for word in words)


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Float32]]:
    """Every tensor under its name there; the last projection is the token embedding."""
    for name, values in checkpoint.model.state_dict().items():
        if name != "proj_out.weight":
            yield renamed(name.removeprefix("model.")), values.numpy()


def renamed(name: str) -> str:
    """The name of a transformers tensor in openai-whisper's model."""
    side, kind, *rest = name.split(".")
    if kind != "layers":
        return _OUTSIDE.get(name, name)
    number, *module, leaf = rest
    return f"{side}.blocks.{number}.{_IN_LAYER['.'.join(module)]}.{leaf}"


def tensor(name: str, values: Float32, *, quantised: bool) -> bytes:
    """One tensor with its header."""
    if name.endswith((".conv1.bias", ".conv2.bias")):
        values = values[:, None]
    kind = kind_of(name, values, quantised=quantised)
    sizes = values.shape[::-1]
    start = struct.pack(f"<{3 + len(sizes)}i", len(sizes), len(name.encode()), kind, *sizes) + name.encode()
    if kind == Q5_1:
        return start + quantise(values).tobytes()
    return start + values.astype("<f4" if kind == F32 else "<f2").tobytes()


def kind_of(name: str, values: Float32, *, quantised: bool) -> int:
    """How a tensor is stored."""
    if values.ndim < 2 or name.endswith((".bias", ".positional_embedding")):
        return F32
    return Q5_1 if quantised and values.ndim == 2 else F16


def quantise(values: Float32) -> NDArray[np.uint8]:
    """q5_1: blocks of 32 as scale and minimum (float16), 32 fifth bits, 32 low nibbles. shape = (n_blocks, 24)

    Value i of a block is `minimum + scale * q[i]`; byte i of the nibbles holds values i and i + 16.
    """
    blocks = values.astype(np.float32).reshape(-1, BLOCK)
    lowest = blocks.min(1, keepdims=True)
    scale = (blocks.max(1, keepdims=True) - lowest) / np.float32(N_LEVELS)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.clip((blocks - lowest) * inverse + np.float32(0.5), 0, N_LEVELS).astype(np.uint8)
    ends = np.concatenate([scale, lowest], 1).astype("<f2").view(np.uint8)
    fifth = np.packbits(q >> 4, axis=1, bitorder="little")
    half = BLOCK // 2
    nibbles = (q[:, :half] & 15) | ((q[:, half:] & 15) << 4)
    return np.concatenate([ends, fifth, nibbles], 1)
