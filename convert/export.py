"""PyTorch -> one float .tflite with every signature, through litert-torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from whisperlet.bundle import Dims, GraphSpec

from .fold import FoldedWhisper
from .graphs import signatures
from .recipe import Export


def model_dims(model: Any, n_text_ctx: int) -> Dims:
    """Sizes of a WhisperForConditionalGeneration."""
    config = model.config
    return Dims(
        n_mels=config.num_mel_bins,
        d_model=config.d_model,
        n_head=config.decoder_attention_heads,
        n_audio_layer=config.encoder_layers,
        n_text_layer=config.decoder_layers,
        n_vocab=config.vocab_size,
        n_text_ctx=n_text_ctx,
    )


def export_float(
    whisper: FoldedWhisper, dims: Dims, stage: Export, path: Path, on_signature: Callable[[str], None] = lambda _: None
) -> list[GraphSpec]:
    """Write all signatures to one .tflite, float32; returns what they are."""
    import litert_torch

    converter: Any = litert_torch
    specs = []
    for spec, module in signatures(whisper, dims, stage):
        on_signature(spec.name)
        converter = converter.signature(spec.name, module.eval(), sample_kwargs=module.examples())
        specs.append(spec)
    on_signature("convert")
    converter.convert().export(str(path))
    return specs
