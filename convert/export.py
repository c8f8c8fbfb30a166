"""PyTorch -> float .tflite, through litert-torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.text import Text

from whisperlet.bundle import Dims, GraphSpec

from .fold import FoldedWhisper
from .graphs import signatures
from .machine import peak_rss_mb
from .pruned import layer_heads
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
        layer_heads=layer_heads(model),
    )


def export_float(
    whisper: FoldedWhisper, dims: Dims, stage: Export, work: Path, on_step: Callable[[str], None] = lambda _: None
) -> tuple[list[GraphSpec], list[Path], float]:
    """Write all signatures as float32 .tflite files into `work`; what they are, the files, and the processes' peak MB.

    Encoder and decoder share no matrix, so each half is converted in a process of its own, at the same time: the
    converter is slow Python and gives its memory back only with its process. `on_step` is called twice a signature.
    """
    modules = work / "folded.pt"
    torch.save(whisper, modules)
    context = get_context("spawn")
    steps = context.SimpleQueue()
    with ProcessPoolExecutor(len(HALVES), context, initializer=_begin, initargs=(steps, work / "tools.log")) as pool:
        jobs = [pool.submit(_export_half, modules, dims, stage, work / f"{half}float.tflite", half) for half in HALVES]
        while wait(jobs, timeout=0.2).not_done:
            while not steps.empty():
                on_step(steps.get())
        paths, peaks = zip(*(job.result() for job in jobs), strict=True)
    return [spec for spec, _ in signatures(whisper, dims, stage)], list(paths), sum(peaks)


HALVES = {"encode_": ("encode_", "stream_"), "decode_": ("decode_",)}  # signatures that share matrices, by file
_steps: SimpleQueue[str] | None = None


def _begin(steps: SimpleQueue[str], log: Path) -> None:
    """Set a process up: what the tools say goes to a file, how far they are to the queue; it ends with its parent."""
    global _steps  # noqa: PLW0603 - a pool's initialiser has no other way to hand something on
    _steps = steps
    Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and the converter would go on for minutes."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _export_half(modules: Path, dims: Dims, stage: Export, path: Path, half: str) -> tuple[Path, float]:
    """Convert the signatures whose names begin with `half`; runs in a process of its own."""
    import litert_torch

    assert _steps is not None
    whisper = torch.load(modules, weights_only=False, mmap=True)
    converter: Any = litert_torch
    for spec, module in signatures(whisper, dims, stage):
        if spec.name.startswith(HALVES[half]):
            converter = converter.signature(spec.name, module.eval(), sample_kwargs=module.examples())
    with _overheard(_steps.put):
        converter.convert().export(str(path))
    return path, peak_rss_mb()


class _Eavesdropper:
    """Stands in for the console on which litert-torch announces its steps."""

    STEP = re.compile(r"\[START\].* > (Torch Export|Lower to MLIR): (\w+)$")

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self._on_step = on_step

    def print(self, message: str) -> None:
        step = self.STEP.search(Text.from_markup(message).plain)
        if step:
            self._on_step(step[2])


@contextlib.contextmanager
def _overheard(on_step: Callable[[str], None]) -> Iterator[None]:
    """Converting takes minutes and has no callback; what it prints says how far it is."""
    from litert_torch import progress

    console, progress.console = progress.console, _Eavesdropper(on_step)
    try:
        yield
    finally:
        progress.console = console
