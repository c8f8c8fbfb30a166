"""A peer in a process of its own: `python -m tests.benchmarks.peer_worker KIND MODEL THREADS`.

Reads one JSON object a line and answers each with one; loads nothing but the peer's own library and numpy.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .local_agreement import stream

Transcribe = Callable[[Any], str]  # audio, float32, 16 kHz, shape = (n,)


def faster_whisper(model: str, threads: int) -> Transcribe:
    """CTranslate2 with int8 weights: greedy, no time stamps, no fallback to other temperatures."""
    library: Any = importlib.import_module("faster_whisper")  # has no types
    whisper = library.WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)

    def transcribe(audio: Any) -> str:
        found, _ = whisper.transcribe(
            audio,
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return "".join(segment.text for segment in found).strip()

    return transcribe


def whisper_cpp(model: str, threads: int) -> Transcribe:
    """whisper.cpp: greedy, no time stamps, no fallback to other temperatures."""
    from pywhispercpp.model import Model

    whisper = Model(
        model,
        redirect_whispercpp_logs_to=None,
        n_threads=threads,
        language="en",
        no_timestamps=True,
        temperature_inc=0.0,
        greedy={"best_of": 1},
        print_progress=False,
    )

    def transcribe(audio: Any) -> str:
        return " ".join(segment.text for segment in whisper.transcribe(audio)).strip()

    return transcribe


def pytorch(model: str, threads: int) -> Transcribe:
    """The checkpoint in PyTorch float32 with the full 30 s window, decoded by the agent's own rules."""
    import torch

    from convert import model as models
    from convert.evaluate import reference_texts
    from whisperlet.audio import to_pcm16

    torch.set_num_threads(threads)
    checkpoint = models.load(model)
    return lambda audio: reference_texts(checkpoint, [to_pcm16(audio)], "en")[0]


KINDS: dict[str, Callable[[str, int], Transcribe]] = {
    "faster-whisper": faster_whisper,
    "whisper.cpp": whisper_cpp,
    "pytorch": pytorch,
}


def answer(request: dict[str, Any], transcribe: Transcribe) -> dict[str, Any]:
    """Transcribe the audio, at once or as it is spoken."""
    audio = np.load(request["audio"])
    began_s, began_core_s = time.perf_counter(), time.process_time()
    if "decision_s" in request:
        result: dict[str, Any] = {"messages": stream(audio, request["decision_s"], request["speech_end_s"], transcribe)}
    else:
        result = {"text": transcribe(audio)}
    return {**result, "wall_s": time.perf_counter() - began_s, "core_s": time.process_time() - began_core_s}


def main() -> None:
    """Load, say so, and serve until standard input ends."""
    kind, model, threads = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # libraries print

        def reply(record: dict[str, Any]) -> None:
            replies.write(json.dumps(record) + "\n")
            replies.flush()

        transcribe = KINDS[kind](model, int(threads))
        reply({"ready": True})
        for line in sys.stdin:
            reply(answer(json.loads(line), transcribe))


if __name__ == "__main__":
    main()
