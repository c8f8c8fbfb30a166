"""The engine's process: batches of speech in, transcripts out, one reply to each request.

A process of its own because a run of the model holds Python's lock from start to end; in the ear's process it would
stall the audio callback. It ends when the ear does: the connection closes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from whisperlet.audio import samples, seconds
from whisperlet.bundle import Bundle, open_bundle
from whisperlet.errors import WhisperletError

from . import transcriber
from .config import RecogniserConfig
from .engine import load_engine
from .memory import give_back_memory
from .messages import SpeechChunk, Thrift, Transcript
from .pace import FINALS_ONLY, Pace
from .protocol import Batch, Failed, Heard, Ready, Start, receive_request, send
from .quiet import quiet_stderr

LEAST_LEVEL = {  # of the pace
    Thrift.NORMAL: 0,
    Thrift.LONGER_HOP: 1,
    Thrift.NO_PARTIALS: FINALS_ONLY,
    Thrift.FINALS_ONLY: FINALS_ONLY,
}
NEVER_MS = 1e6  # a hop that no segment is long enough for


def load(start: Start, bundle: Bundle) -> transcriber.Transcriber:
    """A transcriber that has run once, so that the first utterance does not pay for it."""
    engine = load_engine(bundle, start.config.threads, Path(start.cache_dir))
    ready = transcriber.build(bundle, engine, start.config)
    ready.feed(transcriber.whole(np.zeros(1600, np.int16)))
    ready.finish()
    ready.reset()
    return ready


class Listener:
    """A transcriber that makes its partials at the pace that the machine can keep, and each of its finals."""

    def __init__(
        self, ready: transcriber.Transcriber, config: RecogniserConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transcriber, self._clock = ready, clock
        self._set_pace(config)
        self._n_fresh = 0  # samples since the last partial
        self._key = (0, 0)
        self._busy_s, self._rested_s = 0.0, clock()  # how long the last batch took, and when it was done

    def _set_pace(self, config: RecogniserConfig) -> None:
        self._pace = Pace(config.hop_ms) if config.partials else None
        self._missed = Missed(samples(config.hop_ms))

    def hear(self, batch: Batch) -> Heard:
        """Finals of the segments that end in the batch, then perhaps a partial of the one that goes on."""
        began_s, began_cpu_s = self._clock(), time.process_time()
        if batch.tuning:
            self._set_pace(batch.tuning)
            self._missed.begin(batch.chunks[0].start)
            self._transcriber.retune(batch.tuning)
        new_s = seconds(sum(len(chunk.samples) for chunk in batch.chunks))
        waited_s = self._waited_s(new_s, began_s) if batch.is_live else 0.0
        if self._pace:
            self._pace.hold(LEAST_LEVEL[batch.thrift])
            self._pace.find(waited_s)
        transcripts, n_missed = [], 0
        for chunk in batch.chunks:
            self._feed(chunk)
            if chunk.is_last:
                transcripts.append(self._transcriber.finish())
                n_missed += self._missed.at_end(waited_s)
        if partial := self._step(new_s, batch.thrift):
            transcripts.append(partial)
        is_slowed = self._pace is not None and self._pace.is_slowed
        n_missed += self._missed.at_step(waited_s, is_made=partial is not None, is_slowed=is_slowed)
        self._rested_s = self._clock()
        self._busy_s = self._rested_s - began_s
        busy_cpu_s = time.process_time() - began_cpu_s
        return Heard(transcripts, busy_cpu_s, self._pace.hop_ms if self._pace else None, n_missed if self._pace else 0)

    def _waited_s(self, new_s: float, now_s: float) -> float:
        """How much of the new speech came while the last batch was being heard, and so had to wait.

        The rest came later, or at once: the gate holds an utterance back until it is sure of it.
        """
        return min(max(0.0, new_s - (now_s - self._rested_s)), self._busy_s)

    def _feed(self, chunk: SpeechChunk) -> None:
        if chunk.key != self._key:
            self._key, self._n_fresh = chunk.key, 0
            self._missed.begin(chunk.start)
        self._n_fresh += len(chunk.samples)
        self._missed.feed(chunk)
        self._transcriber.feed(chunk)

    def _step(self, new_s: float, thrift: Thrift) -> Transcript | None:
        if self._pace is None:
            return None if thrift is Thrift.FINALS_ONLY else self._transcriber.step()
        hop_ms = self._pace.hop_ms
        if hop_ms is None:
            self._pace.observe(0.0, new_s)  # nor is a final heard in advance, which would often be in vain ...
            if thrift is Thrift.NO_PARTIALS:
                self._transcriber.step(NEVER_MS)  # ... but for this
            return None
        began_s = self._clock()
        partial = self._transcriber.step(hop_ms)
        if partial and not self._transcriber.in_pause:
            self._pace.observe(self._clock() - began_s, seconds(self._n_fresh))
            self._n_fresh = 0
        return partial


class Missed:
    """Counts the partials of the configured hop that there was no time for. Mutable; `begin` for each segment."""

    def __init__(self, n_hop: int) -> None:
        self._n_hop = n_hop
        self.begin(0)

    def begin(self, start: int) -> None:
        """Nothing of the segment that starts there is late."""
        self._voiced_end = start
        self._n_due = 0  # samples of speech for which no partial was made or missed yet

    def feed(self, chunk: SpeechChunk) -> None:
        """Take note of speech; the silence after it needs no partial."""
        end = chunk.start + len(chunk.samples) if chunk.voiced_end is None else chunk.voiced_end
        end = max(chunk.speech_end if chunk.is_last else end, self._voiced_end)
        self._n_due += end - self._voiced_end
        self._voiced_end = end

    def at_step(self, waited_s: float, *, is_made: bool, is_slowed: bool) -> int:
        """Partials that were missed up to a moment when one could be made."""
        if self._n_due < self._n_hop:
            self._n_due = 0 if is_made else self._n_due
            return 0
        if not is_made and not is_slowed:  # the transcriber had no news
            self._n_due = 0
            return 0
        n_late = min(self._n_due - self._n_hop, samples(1e3 * waited_s))  # what came at once is not late
        n_missed, self._n_due = divmod(n_late, self._n_hop)
        return n_missed + (not is_made)

    def at_end(self, waited_s: float) -> int:
        """Partials that were missed since then, when the segment has ended."""
        n_missed, self._n_due = min(self._n_due, samples(1e3 * waited_s)) // self._n_hop, 0
        return n_missed


def serve(connection: Connection) -> None:
    """Answer requests until the connection closes."""
    start = receive_request(connection)
    assert isinstance(start, Start), start
    began = time.monotonic()
    try:
        with quiet_stderr():
            ready = load(start, open_bundle(Path(start.bundle)))
        give_back_memory()
    except WhisperletError as error:
        send(connection, Failed(str(error)))
        return
    send(connection, Ready(time.monotonic() - began))
    listener = Listener(ready, start.config)
    while True:
        batch = receive_request(connection)
        assert isinstance(batch, Batch), batch
        send(connection, listener.hear(batch))


def main() -> None:
    """`python -m agent.worker FD`: serve the connection on an inherited file descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ear, which then closes the connection
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        os._exit(0)  # nothing is left to save, and the runtime would announce its own end on standard error


if __name__ == "__main__":
    main()
