"""Whisper rewritten so that every graph needs the same few matrices: gains and constant biases folded away.

Three identities, none of which changes the function:

- A LayerNorm's gain and bias act on what follows linearly, so they move into the following linears. What is left,
  `normalise`, has no weights.
- A bias on the keys adds the same number to every score of a query, which softmax ignores: it is dropped. The
  folded LayerNorm bias of the key projections is such a bias too.
- Attention weights sum to one, so a bias on the values reaches the output whole: it moves into the output
  projection's bias. The factor 1/sqrt(head size) moves into the queries.

The last LayerNorm of the decoder keeps its gain: the matrix after it is the tied embedding, stored once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

LAYER_NORM_EPS = 1e-5
MAX_SCORES = 4_600_000  # computed at once, over heads, queries and keys: a whole 30 s window has 18 million, 72 MB


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without gain and bias. shape = (..., d_model)"""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + LAYER_NORM_EPS)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen linear layer. weight shape = (n_out, n_in), bias shape = (n_out,)"""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def after_norm(norm: nn.LayerNorm, layer: Any, *, scale: float = 1.0, bias: bool = True) -> nn.Linear:
    """`scale * layer(norm(x))` as a linear of `normalise(x)`; without `bias`, its constant part is left out."""
    constant = layer.weight @ norm.bias + (0.0 if layer.bias is None else layer.bias)
    return linear(scale * layer.weight * norm.weight, scale * constant if bias else None)


class LowRank(NamedTuple):
    """What an adapter adds to a matrix: up @ down."""

    down: Tensor  # shape = (rank, n_in)
    up: Tensor  # shape = (n_out, rank)


class Sided(nn.Module):
    """A linear, shared with those who do without, and an adapter beside it.

    `norm` is the LayerNorm folded into the linear; `shift` is what the linear's input lacks of what the adapter saw.
    """

    def __init__(
        self,
        base: nn.Linear,
        part: LowRank,
        *,
        norm: nn.LayerNorm | None = None,
        shift: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        gain, shift = (norm.weight, norm.bias) if norm else (1.0, shift)
        self.base = base
        self.down = linear(part.down * gain, None if shift is None else part.down @ shift)
        self.up = linear(scale * part.up)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes are those of the linear."""
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention over keys and values that the caller holds."""

    def __init__(self, attention: Any, norm: nn.LayerNorm, kv_norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        kv_norm = kv_norm or norm
        self.n_head: int = attention.num_heads
        self.query = after_norm(norm, attention.q_proj, scale=attention.head_dim**-0.5)
        self.key = after_norm(kv_norm, attention.k_proj, bias=False)
        value = after_norm(kv_norm, attention.v_proj)
        self.value = linear(value.weight)
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias + attention.out_proj.weight @ value.bias)

    def heads(self, x: Tensor) -> Tensor:
        """(1, n, d_model) -> (n_head, n, d_head). Three axes, as the runtime multiplies: a fourth would be copied away."""
        return x.view(x.shape[1], self.n_head, -1).transpose(0, 1)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (n_head, n, d_head) and values (n_head, d_head, n) of `normalise`d x, (1, n, d_model).

        Both have the axis that is summed over last, the order in which the runtime packs a matrix fastest.
        """
        return self.heads(self.key(x)), self.heads(self.value(x)).transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `normalise`d x (1, n, d_model) to keys and values; mask is added to the scores."""
        q = self.heads(self.query(x))
        n = self._heads_at_once(x.shape[1] * k.shape[1])
        groups = [self._attend(q[i : i + n], k[i : i + n], v[i : i + n], mask) for i in range(0, self.n_head, n)]
        return self.out(side_by_side(groups))  # type: ignore[no-any-return]

    def _heads_at_once(self, n_scores: int) -> int:
        """The largest divisor of the number of heads whose scores stay below `MAX_SCORES`, but never one head.

        A product of two single matrices would be exported as a linear layer with changing weights, which is slow.
        """
        divisors = [n for n in range(2, self.n_head + 1) if self.n_head % n == 0]
        fitting = [n for n in divisors if n * n_scores <= MAX_SCORES]
        return max(fitting, default=divisors[0] if divisors else 1)

    def watch(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`forward`, and the weights that `heads` gave to the keys, added up. shape of these = (1, n, n_keys)"""
        weights = torch.softmax(self.heads(self.query(x)) @ k.transpose(1, 2) + mask, -1)
        found = weights @ v.transpose(1, 2)
        watched = sum(weights[head : head + 1] for head in heads[1:]) + weights[heads[0] : heads[0] + 1]
        return self.out(side_by_side([found])), watched

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(n_head, n, d_head) of the values, by scaled queries of that shape."""
        scores = q @ k.transpose(1, 2)
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v.transpose(1, 2)


def side_by_side(groups: Sequence[Tensor]) -> Tensor:
    """What groups of heads found, each (n_heads, n, d_head), as (1, n, d_model).

    Each group is turned before they are joined: joined head after head, the converter would make their products one
    again, over a copy of all scores.
    """
    turned = [found.transpose(0, 1).reshape(1, found.shape[1], -1) for found in groups]
    return torch.cat(turned, -1) if len(turned) > 1 else turned[0]


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.fc1 = after_norm(layer.final_layer_norm, layer.fc1)
        self.fc2 = linear(layer.fc2.weight, layer.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shape of x and of the result: (1, n, d_model)."""
        return self.fc2(F.gelu(self.fc1(normalise(x))))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention = Attention(layer.self_attn, layer.self_attn_layer_norm)
        self.mlp = Mlp(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Shape of x and of the result: (1, n, d_model)."""
        y = normalise(x)
        x = x + self.attention(y, *self.attention.keys_values(y))
        return x + self.mlp(x)  # type: ignore[no-any-return]

    def stream(self, x: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` over committed keys and values as well; also returns x's own, see `Attention.keys_values`."""
        y = normalise(x)
        k, v = self.attention.keys_values(y)
        x = x + self.attention(y, torch.cat([past_k, k], 1), torch.cat([past_v, v], 2), mask)
        return x + self.mlp(x), k, v

    def beside(self, layer: Any, parts: Mapping[str, LowRank]) -> EncoderLayer:
        """The layer with an adapter beside its matrices, which both share. `layer` is transformers' own."""
        twin: EncoderLayer = _twin(self)
        twin.attention, twin.mlp = _twin(self.attention), _twin(self.mlp)
        source, norm = layer.self_attn, layer.self_attn_layer_norm
        a: Any = twin.attention  # torch's own types would have the parts stay what they were
        mlp: Any = twin.mlp
        constant = after_norm(norm, source.v_proj).bias  # of the values, which `out` adds
        a.query = Sided(a.query, parts["self_attn.q_proj"], norm=norm, scale=source.head_dim**-0.5)
        a.key = Sided(a.key, parts["self_attn.k_proj"], norm=norm)
        a.value = Sided(a.value, parts["self_attn.v_proj"], norm=norm)
        a.out = Sided(a.out, parts["self_attn.out_proj"], shift=constant)
        mlp.fc1 = Sided(mlp.fc1, parts["fc1"], norm=layer.final_layer_norm)
        mlp.fc2 = Sided(mlp.fc2, parts["fc2"])
        return twin


def _twin(module: Any) -> Any:
    """A module with the same parts, which may be replaced without the other's knowing."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module.named_children())
    return twin


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward. The encoder's last LayerNorm is folded into `cross`."""

    def __init__(self, layer: Any, encoder_norm: nn.LayerNorm) -> None:
        super().__init__()
        self.attention = Attention(layer.self_attn, layer.self_attn_layer_norm)
        self.cross = Attention(layer.encoder_attn, layer.encoder_attn_layer_norm, encoder_norm)
        self.mlp = Mlp(layer)


class FoldedWhisper(nn.Module):
    """The parts that graphs are made of. Computes what `model` (WhisperForConditionalGeneration) computes."""

    encoder_layers: Any  # of EncoderLayer; torch's own types say Module
    streaming_layers: Any  # of EncoderLayer; the same where there is no adapter beside them
    decoder_layers: Any  # of DecoderLayer

    def __init__(
        self,
        model: Any,
        alignment_heads: Sequence[tuple[int, int]],
        beside: Sequence[Mapping[str, LowRank]] | None = None,  # an adapter for streaming alone, by layer
    ) -> None:
        super().__init__()
        self.alignment_heads = list(alignment_heads)  # (decoder layer, head) whose attention follows the audio
        encoder, decoder = model.model.encoder, model.model.decoder
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2
        self.encoder_layers = nn.ModuleList(EncoderLayer(layer) for layer in encoder.layers)
        self.streaming_layers = self.encoder_layers
        if beside is not None:
            taught = zip(self.encoder_layers, encoder.layers, beside, strict=True)
            self.streaming_layers = nn.ModuleList(folded.beside(layer, parts) for folded, layer, parts in taught)
        self.decoder_layers = nn.ModuleList(DecoderLayer(layer, encoder.layer_norm) for layer in decoder.layers)
        self.token_embedding = decoder.embed_tokens
        self.positions: Tensor = decoder.embed_positions.weight
        self.final_norm = decoder.layer_norm
        self.eval().requires_grad_(requires_grad=False)

    def stem(self, mel: Tensor) -> Tensor:
        """Log-mel (1, 2n, n_mels) -> (1, n, d_model), positions not yet added."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel.transpose(1, 2)))))
        return x.transpose(1, 2)

    def stem_between(self, mel: Tensor, is_inside: Tensor) -> Tensor:
        """The stem of a stretch with its context, (1, 2n + 3, n_mels) -> (1, n, d_model).

        `is_inside` (1,) is 0 at the start of the audio, where the second convolution pads with zeros, and else 1.
        """
        x = F.gelu(F.conv1d(mel.transpose(1, 2), self.conv1.weight, self.conv1.bias))
        x = torch.cat([x[:, :, :1] * is_inside, x[:, :, 1:]], 2)
        return F.gelu(F.conv1d(x, self.conv2.weight, self.conv2.bias, stride=2)).transpose(1, 2)

    def logits(self, x: Tensor) -> Tensor:
        """(1, n, d_model) -> (1, n, n_vocab), through the tied embedding."""
        return F.linear(self.final_norm(x), self.token_embedding.weight)
