"""A Whisper as a row of sublayers, each of which adds something to the stream: what pruning takes apart.

What a sublayer adds is its inner values times one matrix, `closing`: attention's are those of its heads one after the
other, the feed-forward's those of its channels. A part (head or channel) that goes takes its inner values with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import streaming

SELF, CROSS, FFN = "self", "cross", "ffn"
Gates = Mapping[str, Tensor]  # by name of the sublayer, multiplied to its inner values


class Sublayer(NamedTuple):
    """One of a transformer layer's two (encoder) or three (decoder)."""

    half: str  # "encoder" or "decoder"
    number: int  # of the layer
    kind: str
    layer: Any  # transformers' own

    @property
    def name(self) -> str:
        """Such as `encoder.3.ffn`."""
        return f"{self.half}.{self.number}.{self.kind}"

    @property
    def closing(self) -> Any:
        """The linear that turns inner values into what is added."""
        return self.layer.fc2 if self.kind == FFN else self._attention.out_proj

    @property
    def n_parts(self) -> int:
        """Heads or channels."""
        count: int = self.layer.fc2.in_features if self.kind == FFN else self._attention.num_heads
        return count

    @property
    def part_width(self) -> int:
        """Inner values of a part."""
        width: int = 1 if self.kind == FFN else self._attention.head_dim
        return width

    @property
    def part_weights(self) -> int:
        """Weights that go with a part."""
        d_model: int = self.closing.out_features
        return (2 if self.kind == FFN else 4) * d_model * self.part_width

    @property
    def _attention(self) -> Any:
        return self.layer.encoder_attn if self.kind == CROSS else self.layer.self_attn

    def inner(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        """Inner values. x shape = (batch, n, d_model), encoded (batch, n_frames, d_model), result (batch, n, width)"""
        if self.kind == FFN:
            return F.gelu(self.layer.fc1(self.layer.final_layer_norm(x)))
        is_causal = self.half == "decoder" and self.kind == SELF
        found: Tensor = F.scaled_dot_product_attention(*self._projected(x, encoded), is_causal=is_causal)
        return found.transpose(1, 2).flatten(2)

    def attention(self, x: Tensor, encoded: Tensor) -> Tensor:
        """Weights of cross-attention. Shapes as in `inner`, result (batch, n_head, n, n_frames)"""
        q, k, _ = self._projected(x, encoded)
        weights: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights

    def _projected(self, x: Tensor, encoded: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values. shape of each = (batch, n_head, n or n_frames, head_dim)"""
        norm = self.layer.encoder_attn_layer_norm if self.kind == CROSS else self.layer.self_attn_layer_norm
        y, attention = norm(x), self._attention
        source = y if encoded is None or self.kind == SELF else encoded
        heads = attention.num_heads, attention.head_dim
        q, k, v = (
            linear(z).unflatten(-1, heads).transpose(1, 2)
            for linear, z in ((attention.q_proj, y), (attention.k_proj, source), (attention.v_proj, source))
        )
        return q, k, v

    def add(self, x: Tensor, encoded: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """The stream after the sublayer. Shapes as in `inner`."""
        inner = self.inner(x, encoded)
        added: Tensor = x + self.closing(inner if gate is None else inner * gate)
        return added


def of(model: Any, half: str) -> list[Sublayer]:
    """In the order in which they add to the stream."""
    kinds = (SELF, FFN) if half == "encoder" else (SELF, CROSS, FFN)
    layers = getattr(model.model, half).layers
    return [Sublayer(half, number, kind, layer) for number, layer in enumerate(layers) for kind in kinds]


def every(model: Any) -> list[Sublayer]:
    """The encoder's, then the decoder's."""
    return [*of(model, "encoder"), *of(model, "decoder")]


def heard(encoder: Any, power: Tensor) -> Tensor:
    """Log-mel power (batch, 2n, n_mels) -> the stream before the first layer, (batch, n, d_model)."""
    mel = streaming.clamp(power, power.amax((1, 2), keepdim=True))
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel.transpose(1, 2))))).transpose(1, 2)
    placed: Tensor = x + encoder.embed_positions.weight[: x.shape[1]]
    return placed


def read(decoder: Any, tokens: Tensor) -> Tensor:
    """Tokens (batch, n) -> the stream before the first layer, (batch, n, d_model)."""
    placed: Tensor = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[: tokens.shape[1]]
    return placed


def encode(model: Any, power: Tensor, gates: Gates | None = None) -> Tensor:
    """Frames of the encoder. power shape = (batch, 2n, n_mels), result (batch, n, d_model)"""
    encoder, x = model.model.encoder, heard(model.model.encoder, power)
    for sublayer in of(model, "encoder"):
        x = sublayer.add(x, gate=(gates or {}).get(sublayer.name))
    normed: Tensor = encoder.layer_norm(x)
    return normed


def decode(model: Any, tokens: Tensor, encoded: Tensor, gates: Gates | None = None) -> Tensor:
    """The decoder's last hidden states. shapes: tokens (batch, n), encoded (batch, m, d_model), result (batch, n, d_model)"""
    decoder, x = model.model.decoder, read(model.model.decoder, tokens)
    for sublayer in of(model, "decoder"):
        x = sublayer.add(x, encoded, (gates or {}).get(sublayer.name))
    normed: Tensor = decoder.layer_norm(x)
    return normed


def walk(model: Any, power: Tensor, tokens: Tensor) -> Iterator[tuple[Sublayer, Tensor, Tensor | None]]:
    """Each sublayer with the stream before it and, in the decoder, the encoded audio."""
    x = heard(model.model.encoder, power)
    for sublayer in of(model, "encoder"):
        yield sublayer, x, None
        x = sublayer.add(x)
    encoded, x = model.model.encoder.layer_norm(x), read(model.model.decoder, tokens)
    for sublayer in of(model, "decoder"):
        yield sublayer, x, encoded
        x = sublayer.add(x, encoded)
