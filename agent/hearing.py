"""The ear's loop: everything from the source through the gate."""

from __future__ import annotations

from collections.abc import Callable

from .messages import AudioChunk, SpeechChunk
from .sources import Source
from .vad import Hearing


def listen(
    source: Source, gate: Hearing, submit: Callable[[SpeechChunk], None], note: Callable[[AudioChunk], None]
) -> None:
    """Everything from the source through the gate, to its end. Raises AudioError."""
    try:
        for chunk in source:
            note(chunk)
            for speech in gate.feed(chunk):
                submit(speech)
    finally:
        for speech in gate.flush():
            submit(speech)
