"""Whispers whose layers differ in size: what pruning leaves of a checkpoint, and how it is put together again.

A `config.json` has one number of heads and of feed-forward channels for all layers. That of a pruned checkpoint has a
table of each layer's besides, `pruned`; the width of a head stays what the numbers for all layers say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from whisperlet.bundle import LayerHeads
from whisperlet.errors import ModelError

if TYPE_CHECKING:
    import torch

    from .model import Checkpoint

KEY = "pruned"  # of config.json
HALVES = ("encoder", "decoder")


class LayerSize(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is left of a layer."""

    heads: int
    ffn: int
    cross_heads: int | None = None  # of the decoder's attention to the audio

    def weights(self, d_model: int, d_head: int) -> int:
        """Of its matrices."""
        return 4 * d_model * d_head * (self.heads + (self.cross_heads or 0)) + 2 * d_model * self.ffn


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every layer's."""

    encoder: tuple[LayerSize, ...]
    decoder: tuple[LayerSize, ...]

    def weights(self, d_model: int, d_head: int) -> int:
        """Of the matrices of all layers: embeddings and convolutions aside."""
        return sum(layer.weights(d_model, d_head) for layer in (*self.encoder, *self.decoder))


def multiply_adds(model: Any, n_frames: int) -> dict[str, int]:
    """Of encoding so many frames, keys and values for the decoder included, and of a token that looks at them."""
    config, sizes, width = model.config, sizes_of(model), d_head(model)
    d, n_cross = config.d_model, sum(layer.cross_heads or 0 for layer in sizes.decoder)
    stem = n_frames * 3 * d * (2 * config.num_mel_bins + d)
    scores = 2 * n_frames**2 * width * sum(layer.heads for layer in sizes.encoder)
    layers = n_frames * sum(layer.weights(d, width) for layer in sizes.encoder)
    cross = 2 * d * width * n_cross  # keys and values of a frame
    matrices = sum(layer.weights(d, width) for layer in sizes.decoder) - cross
    token = matrices + 2 * n_frames * width * n_cross + d * config.vocab_size
    return {"encoder": stem + layers + scores + n_frames * cross, "token": token}


class KeptLayer(msgspec.Struct, frozen=True):
    """A layer of the parent that stays: its number, and what stays of it, both by the parent's count."""

    number: int
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    cross_heads: tuple[int, ...] | None = None

    @property
    def size(self) -> LayerSize:
        """How much that is."""
        return LayerSize(len(self.heads), len(self.ffn), None if self.cross_heads is None else len(self.cross_heads))

    def indices(self, matrix: str, d_head: int) -> torch.Tensor | None:
        """Rows or columns that stay of `self_attn.q_proj` and the like; None where all do."""
        import torch

        if matrix in ("fc1", "fc2"):
            return torch.tensor(self.ffn)
        if matrix.endswith("_proj"):
            heads = self.heads if matrix.startswith("self_attn.") else self.cross_heads or ()
            return (torch.tensor(heads)[:, None] * d_head + torch.arange(d_head)).flatten()
        return None


class Kept(msgspec.Struct, frozen=True):
    """What stays of a model."""

    encoder: tuple[KeptLayer, ...]
    decoder: tuple[KeptLayer, ...]

    @property
    def sizes(self) -> Sizes:
        """How much that is."""
        return Sizes(tuple(layer.size for layer in self.encoder), tuple(layer.size for layer in self.decoder))


def everything(sizes: Sizes) -> Kept:
    """Of a model of these sizes, all of it."""
    halves = (
        tuple(
            KeptLayer(
                number,
                tuple(range(size.heads)),
                tuple(range(size.ffn)),
                None if size.cross_heads is None else tuple(range(size.cross_heads)),
            )
            for number, size in enumerate(half)
        )
        for half in (sizes.encoder, sizes.decoder)
    )
    return Kept(*halves)


def read_sizes(settings: Mapping[str, Any], source: str) -> Sizes | None:
    """The table in a checkpoint's settings, if it has one. Raises ModelError."""
    if settings.get(KEY) is None:
        return None
    try:
        sizes = msgspec.convert(settings[KEY], Sizes)
    except msgspec.ValidationError as error:
        raise ModelError(f"{source}: config.json: {KEY}: {error}") from None
    for half in HALVES:
        layers = getattr(sizes, half)
        if len(layers) != (n := settings.get(f"{half}_layers")):
            raise ModelError(f"{source}: config.json: {KEY}.{half}: has {len(layers)} layers, {half}_layers says {n}")
        for number, layer in enumerate(layers):
            counts = [layer.heads, layer.ffn, *([] if layer.cross_heads is None else [layer.cross_heads])]
            if min(counts) < 1 or (layer.cross_heads is None) == (half == "decoder"):
                raise ModelError(f"{source}: config.json: {KEY}.{half}[{number}]: is no layer of a Whisper: {layer}")
    return sizes


def resize(model: Any, sizes: Sizes) -> None:
    """Give every layer of a WhisperForConditionalGeneration new, empty matrices of these sizes."""
    for half in HALVES:
        for layer, size in zip(getattr(model.model, half).layers, getattr(sizes, half), strict=True):
            _resize_attention(layer.self_attn, size.heads)
            if size.cross_heads is not None:
                _resize_attention(layer.encoder_attn, size.cross_heads)
            layer.fc1 = _like(layer.fc1, layer.fc1.in_features, size.ffn)
            layer.fc2 = _like(layer.fc2, size.ffn, layer.fc2.out_features)


def _resize_attention(attention: Any, n_heads: int) -> None:
    width, d_model = n_heads * attention.head_dim, attention.q_proj.in_features
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, _like(getattr(attention, name), d_model, width))
    attention.out_proj = _like(attention.out_proj, width, d_model)
    attention.num_heads, attention.embed_dim = n_heads, width


def _like(linear: Any, n_in: int, n_out: int) -> Any:
    weight = linear.weight
    return type(linear)(n_in, n_out, bias=linear.bias is not None, device=weight.device, dtype=weight.dtype)


def sizes_of(model: Any) -> Sizes:
    """Of a WhisperForConditionalGeneration, pruned or not."""
    encoder = (LayerSize(layer.self_attn.num_heads, layer.fc1.out_features) for layer in model.model.encoder.layers)
    decoder = (
        LayerSize(layer.self_attn.num_heads, layer.fc1.out_features, layer.encoder_attn.num_heads)
        for layer in model.model.decoder.layers
    )
    return Sizes(tuple(encoder), tuple(decoder))


def _n_head(model: Any) -> int:
    count: int = model.config.decoder_attention_heads
    return count


def d_head(model: Any) -> int:
    """Width of an attention head, the same in every Whisper's encoder and decoder."""
    width: int = model.config.d_model // _n_head(model)
    return width


def layer_heads(model: Any) -> LayerHeads | None:
    """Heads of each layer; None where all have as many as the configuration says."""
    sizes = sizes_of(model)
    found = LayerHeads(
        encoder=tuple(layer.heads for layer in sizes.encoder),
        decoder=tuple(layer.heads for layer in sizes.decoder),
        cross=tuple(layer.cross_heads or 0 for layer in sizes.decoder),
    )
    is_plain = getattr(model.config, KEY, None) is None
    return None if is_plain or {*found.encoder, *found.decoder, *found.cross} == {_n_head(model)} else found


def cut_tensors(state: Mapping[str, torch.Tensor], kept: Kept, d_head: int) -> dict[str, torch.Tensor]:
    """The tensors of what is kept, by the names that they then have."""
    cut = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    for half in HALVES:
        for number, layer in enumerate(getattr(kept, half)):
            old, new = (f"model.{half}.layers.{n}." for n in (layer.number, number))
            for name, tensor in state.items():
                if name.startswith(old):
                    cut[new + name.removeprefix(old)] = _cut_tensor(name.removeprefix(old), tensor, layer, d_head)
    return cut


def _cut_tensor(name: str, tensor: torch.Tensor, layer: KeptLayer, d_head: int) -> torch.Tensor:
    matrix, _, part = name.rpartition(".")
    indices = layer.indices(matrix, d_head)
    is_closing = matrix.endswith(("out_proj", "fc2"))  # its columns are what the others' rows are
    if indices is None or (is_closing and part == "bias"):
        return tensor
    return tensor.index_select(1 if is_closing else 0, indices)


def cut_settings(settings: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """The configuration of what is kept."""
    n_layers = {f"{half}_layers": len(getattr(kept, half)) for half in HALVES}
    return {**settings, **n_layers, KEY: msgspec.to_builtins(kept.sizes)}


def kept_heads(heads: Sequence[tuple[int, int]], kept: Kept) -> Iterator[tuple[int, int]]:
    """Those of some (decoder layer, head of the attention to the audio) that stay, by the new count."""
    for number, layer in enumerate(kept.decoder):
        places = {head: place for place, head in enumerate(layer.cross_heads or ())}
        yield from ((number, places[head]) for old, head in heads if old == layer.number and head in places)


def alignment_heads(heads: Sequence[Sequence[int]] | None, model: Any) -> tuple[tuple[int, int], ...]:
    """The heads named; those of the upper half of the decoder where none is, or another model's."""
    counts = [size.cross_heads or 0 for size in sizes_of(model).decoder]
    if heads and all(layer < len(counts) and head < counts[layer] for layer, head in heads):
        return tuple((layer, head) for layer, head in heads)
    upper = range(len(counts) // 2, len(counts))
    return tuple((layer, head) for layer in upper for head in range(counts[layer]))


def cut(checkpoint: Checkpoint, kept: Kept) -> Checkpoint:
    """What is kept of a checkpoint, as one of its own. The tensors are copies."""
    from . import model as models

    model = checkpoint.model
    state = {name: tensor for name, tensor in model.state_dict().items() if name != models.PROJECTION}
    tensors = cut_tensors(state, kept, d_head(model))
    settings = cut_settings(model.config.to_dict(), kept)
    small = models.build(settings, {name: tensor.clone() for name, tensor in tensors.items()}, checkpoint.source)
    heads = alignment_heads(list(kept_heads(checkpoint.generation.alignment_heads, kept)), small)
    generation = replace(checkpoint.generation, alignment_heads=heads)
    return rehashed(replace(checkpoint, model=small, generation=generation))


def rehashed(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the hash that its tensors have now."""
    from . import model as models

    return replace(checkpoint, sha256=models.hash_tensors(checkpoint.model))
