"""The graphs of a bundle, one small module a kind of signature, and the shapes of what they pass to each other.

Keys and values are one tensor a layer, since slicing a stacked tensor would copy it at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from whisperlet.bundle import Dims, GraphSpec, StreamSpec, TensorSpec, kv_shapes

from .fold import FoldedWhisper, normalise
from .recipe import Export

MAX_WAVELENGTH = 10_000.0
MASKED = -1e9  # a score that leaves no weight


def inverse_timescales(d_model: int) -> Tensor:
    """Angular speeds of Whisper's sinusoidal positions. shape = (d_model // 2,)"""
    n = d_model // 2
    return torch.exp(-math.log(MAX_WAVELENGTH) / (n - 1) * torch.arange(n))


def positions(frames: Tensor, speeds: Tensor) -> Tensor:
    """Whisper's sinusoids. shape = (n_frames, d_model)"""
    angles = frames[:, None] * speeds[None]
    return torch.cat([angles.sin(), angles.cos()], -1)


class Encode(nn.Module):
    """Log-mel of one window -> keys and values of the cross-attention, padded with zeros to the next cross length.

    Apart from decoding so that nothing of the encoder is touched at a decoder step. `offset` (in frames) exists for
    windows that do not begin at the start of the audio, and keeps the converter from folding the positions into a
    table per window length.
    """

    speeds: Tensor  # shape = (d_model // 2,)
    frames: Tensor  # shape = (n_frames,)

    def __init__(self, whisper: FoldedWhisper, dims: Dims, n_frames: int, n_cross: int) -> None:
        super().__init__()
        self.whisper, self.n_frames, self.n_cross = whisper, n_frames, n_cross
        self.register_buffer("speeds", inverse_timescales(dims.d_model), persistent=False)
        self.register_buffer("frames", torch.arange(n_frames, dtype=torch.float32), persistent=False)
        self.dims = dims

    def forward(self, mel: Tensor, offset: Tensor) -> dict[str, Tensor]:
        """Log-mel (1, 2n, n_mels) and offset (1,) float32 -> cross_k_i, cross_v_i as in `cross_state`."""
        x = self.whisper.stem(mel) + positions(self.frames + offset, self.speeds)
        for layer in self.whisper.encoder_layers:
            x = layer(x)
        x, padding, state = normalise(x), self.n_cross - self.n_frames, {}
        for i, layer in enumerate(self.whisper.decoder_layers):
            k, v = layer.cross.keys_values(x)
            state[f"cross_k_{i}"] = F.pad(k, (0, 0, 0, padding))
            state[f"cross_v_{i}"] = F.pad(v, (0, padding))
        return state

    def examples(self) -> dict[str, Tensor]:
        """Inputs to trace with."""
        return {"mel": torch.randn(1, 2 * self.n_frames, self.dims.n_mels), "offset": torch.zeros(1)}


class Stream(nn.Module):
    """A step of the streaming encoder: new frames and overlap -> their cross-attention state, and what to commit.

    The committed keys and values lie in a ring whose order does not matter to attention; `mask` says which places are
    filled, and which of the step's own frames are there.
    """

    speeds: Tensor  # shape = (d_model // 2,)
    frames: Tensor  # shape = (width,)

    def __init__(self, whisper: FoldedWhisper, dims: Dims, spec: StreamSpec) -> None:
        super().__init__()
        self.whisper, self.dims, self.spec = whisper, dims, spec
        self.register_buffer("speeds", inverse_timescales(dims.d_model), persistent=False)
        self.register_buffer("frames", torch.arange(spec.width, dtype=torch.float32), persistent=False)

    def forward(self, mel: Tensor, offset: Tensor, mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        """Shapes are those of `stream_inputs` and `stream_outputs`."""
        x = self.whisper.stem_between(mel, torch.clamp(offset, max=1.0))
        x = x + positions(self.frames + offset, self.speeds)
        out: dict[str, Tensor] = {}
        for i, layer in enumerate(self.whisper.streaming_layers):
            x, k, v = layer.stream(x, past[f"past_k_{i}"], past[f"past_v_{i}"], mask)
            out[f"new_k_{i}"], out[f"new_v_{i}"] = k[:, : self.spec.chunk], v[:, :, : self.spec.chunk]
        x = normalise(x)
        for i, layer in enumerate(self.whisper.decoder_layers):
            out[f"cross_k_{i}"], out[f"cross_v_{i}"] = layer.cross.keys_values(x)
        return out

    def examples(self) -> dict[str, Tensor]:
        """Inputs to trace with."""
        return {s.name: torch.zeros(s.shape) for s in stream_inputs(self.dims, self.spec)}


class Decode(nn.Module):
    """Some tokens at consecutive positions -> logits after each, and the self-attention state with them in it.

    One signature a number of tokens: going on token by token and verifying many in one pass read the same weights.
    `watched` are the heads, by layer, whose attention follows the audio.
    """

    def __init__(
        self, whisper: FoldedWhisper, dims: Dims, n_tokens: int, n_cross: int, watched: Mapping[int, Sequence[int]]
    ) -> None:
        super().__init__()
        self.whisper, self.dims, self.n_tokens, self.n_cross = whisper, dims, n_tokens, n_cross
        self.watched = watched
        self.positions = nn.Parameter(whisper.positions[: dims.n_text_ctx].clone(), requires_grad=False)

    def forward(
        self, tokens: Tensor, position: Tensor, self_mask: Tensor, cross_mask: Tensor, **state: Tensor
    ) -> dict[str, Tensor]:
        """Shapes are those of `decode_inputs` and `decode_outputs`."""
        places = position + torch.arange(self.n_tokens, dtype=torch.int32)
        x = self.whisper.token_embedding(tokens) + F.embedding(places, self.positions)[None]
        out: dict[str, Tensor] = {}
        looks = []
        for i, layer in enumerate(self.whisper.decoder_layers):
            y = normalise(x)
            k, v = layer.attention.keys_values(y)
            k = out[f"self_k_{i}"] = self.update(state[f"self_k_{i}"], k, 1, position)
            v = out[f"self_v_{i}"] = self.update(state[f"self_v_{i}"], v, 2, position)
            x = x + layer.attention(y, k, v, self_mask)
            cross = normalise(x), state[f"cross_k_{i}"], state[f"cross_v_{i}"], cross_mask
            if heads := self.watched.get(i):
                found, look = layer.cross.watch(*cross, heads)
                looks.append(look)
            else:
                found = layer.cross(*cross)
            x = x + found
            x = x + layer.mlp(x)
        return {"logits": self.whisper.logits(x), "attention": sum(looks), **out}

    @staticmethod
    def update(state: Tensor, new: Tensor, axis: int, position: Tensor) -> Tensor:
        """`state` with `new` written at `position` along `axis`: one op of the runtime, not a masked sum."""
        from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

        start = [torch.tensor(0, dtype=torch.int32)] * 3
        start[axis] = position[0]
        return dynamic_update_slice(state, new, start)  # type: ignore[no-any-return]

    def examples(self) -> dict[str, Tensor]:
        """Inputs to trace with."""
        specs = decode_inputs(self.dims, self.n_tokens, self.n_cross)
        return {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in specs}


Module = Encode | Stream | Decode


def cross_state(dims: Dims, n_cross: int) -> list[TensorSpec]:
    """Keys and values of the encoded audio, what `encode_*` puts out and `decode_*` takes in."""
    return _state(dims, "cross", n_cross)


def self_state(dims: Dims) -> list[TensorSpec]:
    """Keys and values of the tokens so far, which `decode_*` take in and put out."""
    return _state(dims, "self", dims.n_text_ctx)


def _state(dims: Dims, kind: str, n: int) -> list[TensorSpec]:
    return [TensorSpec(name, shape) for name, shape in kv_shapes(dims, kind, n).items()]


def decode_inputs(dims: Dims, n_tokens: int, n_cross: int) -> list[TensorSpec]:
    """What `decode_<n_tokens>_<n_cross>` takes in."""
    return [
        TensorSpec("tokens", (1, n_tokens), "int32"),
        TensorSpec("position", (1,), "int32"),  # of the first token
        TensorSpec("self_mask", (n_tokens, dims.n_text_ctx)),  # added to the scores
        TensorSpec("cross_mask", (1, n_cross)),  # added to the scores
        *self_state(dims),
        *cross_state(dims, n_cross),
    ]


def decode_outputs(dims: Dims, n_tokens: int, n_cross: int) -> list[TensorSpec]:
    """What `decode_<n_tokens>_<n_cross>` puts out; `attention` is the sum over the watched heads."""
    logits, attention = (1, n_tokens, dims.n_vocab), (1, n_tokens, n_cross)
    return [TensorSpec("logits", logits), TensorSpec("attention", attention), *self_state(dims)]


def stream_inputs(dims: Dims, spec: StreamSpec) -> list[TensorSpec]:
    """What `stream_<chunk>_<overlap>` takes in."""
    return [
        TensorSpec("mel", (1, 2 * spec.width + 3, dims.n_mels)),  # two frames before the first one's own, one after
        TensorSpec("offset", (1,)),  # of the first frame
        TensorSpec("mask", (1, spec.context + spec.width)),  # added to the scores
        *_state(dims, "past", spec.context),
    ]


def stream_outputs(dims: Dims, spec: StreamSpec) -> list[TensorSpec]:
    """What `stream_<chunk>_<overlap>` puts out."""
    return [*_state(dims, "cross", spec.width), *_state(dims, "new", spec.chunk)]


def streams(export: Export) -> list[StreamSpec]:
    """The ways of streaming that a bundle will have."""
    return [
        StreamSpec(export.stream_chunk, overlap, export.stream_padding, export.stream_context)
        for overlap in export.stream_overlaps
    ]


def by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Heads as (layer, head) by layer."""
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).append(head)
    return layers


def signatures(whisper: FoldedWhisper, dims: Dims, export: Export) -> Iterator[tuple[GraphSpec, Module]]:
    """Every signature of a bundle with the module that it is traced from."""
    for n_frames in export.encode_frames:
        n_cross = next(n for n in export.cross_frames if n >= n_frames)
        inputs = [TensorSpec("mel", (1, 2 * n_frames, dims.n_mels)), TensorSpec("offset", (1,))]
        spec = GraphSpec(f"encode_{n_frames}", inputs, cross_state(dims, n_cross))
        yield spec, Encode(whisper, dims, n_frames, n_cross)
    for stream in streams(export):
        yield (
            GraphSpec(stream.name, stream_inputs(dims, stream), stream_outputs(dims, stream)),
            Stream(whisper, dims, stream),
        )
    watched = by_layer(whisper.alignment_heads)
    for n_cross in export.cross_frames:
        for n_tokens in export.decode_tokens:
            inputs, outputs = decode_inputs(dims, n_tokens, n_cross), decode_outputs(dims, n_tokens, n_cross)
            spec = GraphSpec(f"decode_{n_tokens}_{n_cross}", inputs, outputs)
            yield spec, Decode(whisper, dims, n_tokens, n_cross, watched)
