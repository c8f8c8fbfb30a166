"""Whisper in PyTorch float32: what a bundle is measured against.

Shares nothing with the exported graphs: transformers' own layers and cache, the full 30 s window. It stands behind the
interface of the device's engine, so that the agent's own policy (prompt, suppressed tokens, loop cut, thresholds) runs
on both, and a difference is a difference of the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from agent.alignment import Looks
from whisperlet.audio import WINDOW_FRAMES, Float32
from whisperlet.bundle import FORMAT_VERSION, Dims, Manifest, Vocabulary

from .export import model_dims
from .model import Checkpoint


class TorchState:
    """What is carried from one decoder pass to the next; going back is setting `position`."""

    def __init__(self) -> None:
        self.position = 0  # tokens so far
        self.encoded = torch.zeros(0)  # shape = (1, n_frames, d_model)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.looks = Looks(np.zeros(0, np.int64), np.zeros(0, np.float32))


class TorchEngine:
    """Does what `agent.engine.Engine` asks for."""

    def __init__(self, model: Any, manifest: Manifest) -> None:
        self.model, self.manifest = model, manifest

    def new_state(self) -> TorchState:
        """Room for one utterance at a time."""
        return TorchState()

    @torch.inference_mode()
    def encode(self, state: TorchState, mel: Float32) -> None:
        """Put a window into `state`. mel shape = (1, 2n, n_mels)"""
        features = torch.from_numpy(mel).transpose(1, 2)
        state.encoded = self.model.model.encoder(features).last_hidden_state
        state.cache, state.position = EncoderDecoderCache(DynamicCache(), DynamicCache()), 0

    @torch.inference_mode()
    def decode(self, state: TorchState, tokens: Sequence[int]) -> Float32:
        """Append tokens; logits after each. shape = (n_tokens, n_vocab). Leaves `state.looks`."""
        if state.cache.get_seq_length() > state.position:
            state.cache.self_attention_cache.crop(state.position)
        with _telling(self.model):
            decoded = self.model.model.decoder(
                torch.tensor([list(tokens)]),
                encoder_hidden_states=state.encoded,
                past_key_values=state.cache,
                position_ids=torch.arange(state.position, state.position + len(tokens))[None],
                use_cache=True,
                output_attentions=True,
            )
        attention = sum(decoded.cross_attentions[layer][0, head] for layer, head in self.manifest.alignment_heads)
        state.looks = Looks.of(attention.numpy(), attention.shape[-1])
        state.position += len(tokens)
        logits: Float32 = self.model.proj_out(decoded.last_hidden_state[0]).numpy()
        return logits.copy()


@contextmanager
def _telling(model: Any) -> Iterator[None]:
    """Attention that tells where it looked, which is slower; the encoder and others have theirs back afterwards."""
    usual = model.config._attn_implementation  # noqa: SLF001 - no other way to ask
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """What decoding needs to know of a checkpoint's ids."""
    g = checkpoint.generation
    return Vocabulary(
        sot=g.sot,
        eot=g.eot,
        no_timestamps=g.no_timestamps,
        no_speech=g.no_speech,
        transcribe=g.transcribe if checkpoint.multilingual else None,
        languages=dict(g.lang_ids) if checkpoint.multilingual else {},
        suppress=list(g.suppress_tokens),
        suppress_begin=list(g.begin_suppress_tokens),
    )


def manifest(checkpoint: Checkpoint, name: str, dims: Dims | None = None) -> Manifest:
    """A manifest that describes the checkpoint itself: one window, the full one."""
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        dims=dims or model_dims(checkpoint.model, 224),
        vocabulary=vocabulary(checkpoint),
        alignment_heads=[(layer, head) for layer, head in checkpoint.generation.alignment_heads],
        encode_frames=[WINDOW_FRAMES],
        cross_frames=[WINDOW_FRAMES],
        decode_tokens=[1, 4, 16],
        streams=[],
        silence_frames={"default": 0},
        graphs=[],
        source=checkpoint.source,
        source_sha256=checkpoint.sha256,
        recipe={},
        tools={},
    )
