"""The engine's process: batches of speech in, transcripts out, one reply to each request.

A process of its own because a run of the model holds Python's lock from start to end; in the ear's process it would
stall the audio callback. It ends when the ear does: the connection closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from whisperlet.bundle import Bundle, open_bundle
from whisperlet.errors import WhisperletError

from . import transcriber
from .engine import load_engine
from .messages import Transcript
from .protocol import Batch, Failed, Heard, Ready, Start, receive_request, send
from .quiet import quiet_stderr


def load(start: Start, bundle: Bundle) -> transcriber.Transcriber:
    """A transcriber that has run once, so that the first utterance does not pay for it."""
    engine = load_engine(bundle, start.config.threads, Path(start.cache_dir))
    ready = transcriber.build(bundle, engine, start.config)
    ready.feed(transcriber.whole(np.zeros(1600, np.int16)))
    ready.finish()
    return ready


def _give_back_memory() -> None:
    """Return to the system what loading freed: with glibc it would stay ours, 30 MB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def hear(ready: transcriber.Transcriber, batch: Batch) -> list[Transcript]:
    """Finals of the segments that end in the batch, then a partial of the one that goes on."""
    transcripts = []
    for chunk in batch.chunks:
        ready.feed(chunk)
        if chunk.is_last:
            transcripts.append(ready.finish())
    partial = ready.step()
    return [*transcripts, partial] if partial else transcripts


def serve(connection: Connection) -> None:
    """Answer requests until the connection closes."""
    start = receive_request(connection)
    assert isinstance(start, Start), start
    began = time.monotonic()
    try:
        with quiet_stderr():
            ready = load(start, open_bundle(Path(start.bundle)))
        _give_back_memory()
    except WhisperletError as error:
        send(connection, Failed(str(error)))
        return
    send(connection, Ready(time.monotonic() - began))
    while True:
        batch = receive_request(connection)
        assert isinstance(batch, Batch), batch
        began = time.process_time()
        transcripts = hear(ready, batch)
        send(connection, Heard(transcripts, time.process_time() - began))


def main() -> None:
    """`python -m agent.worker FD`: serve the connection on an inherited file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ear, which then closes the connection
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        os._exit(0)  # nothing is left to save, and the runtime would announce its own end on standard error


if __name__ == "__main__":
    main()
