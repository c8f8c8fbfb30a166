"""The ear's side of the engine process: hands it speech, restarts it when it fails, and loses nothing meanwhile.

Speech is kept until its final has come. The engine gets one batch at a time; what arrives meanwhile waits and is
joined, so a slow engine gets fewer, longer chunks and makes fewer partials. An engine that dies, or does not answer
in time, is started anew and given everything unfinished again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import BundleError

from .config import RecogniserConfig
from .messages import SpeechChunk, Transcript
from .protocol import Batch, Failed, Heard, Ready, Reply, Request, Start, ask, pair

log = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0  # the first start on a slow device packs the weights
# glibc keeps what was freed unless it was mapped by itself; buffers of the engine come and go by the megabyte.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
MAX_ATTEMPTS = 3  # then a segment that kills the engine is given up
RESTART_MAX_S = 30.0


class EngineLost(Exception):
    """The engine process died, hung or could not start."""


class Pending(msgspec.Struct):
    """A segment whose final has not come. Mutable."""

    chunks: list[SpeechChunk]
    n_sent: int = 0
    n_lost: int = 0  # engines that were lost while they had it


class EngineCounters(msgspec.Struct):
    """Mutable; written by the link's thread."""

    restarts: int = 0
    dropped_segments: int = 0
    failed_segments: int = 0
    busy_s: float = 0.0  # processor seconds that the engine spent on speech
    speech_s: float = 0.0  # seconds of speech in finals


class EngineProcess:
    """A running engine and the connection to it."""

    def __init__(self, bundle: Path, config: RecogniserConfig, cache_dir: Path) -> None:
        self._connection, theirs = pair(config.reply_timeout_s)
        with theirs:
            command = [sys.executable, "-m", "agent.worker", str(theirs.fileno())]
            environment = {**os.environ, **GIVE_BACK}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._start = Start(str(bundle.absolute()), str(cache_dir.absolute()), config)

    def wait_ready(self) -> float:
        """Seconds that loading took. Raises BundleError or EngineLost."""
        reply = self.ask(self._start, START_TIMEOUT_S)
        if isinstance(reply, Failed):
            raise BundleError(reply.reason)
        assert isinstance(reply, Ready), reply
        return reply.load_s

    def hear(self, batch: Batch, timeout_s: float) -> Heard:
        """Raises EngineLost."""
        reply = self.ask(batch, timeout_s)
        if not isinstance(reply, Heard):
            raise EngineLost(f"unexpected reply: {reply}")
        return reply

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """One request, one reply. Raises EngineLost."""
        try:
            reply = ask(self._connection, request, timeout_s)
        except (EOFError, OSError):
            raise EngineLost(f"it ended with status {self._status()}") from None
        if reply is None:
            raise EngineLost(f"no answer within {timeout_s:g} s")
        return reply

    def _status(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=5)
        return None

    def close(self, timeout_s: float = 2.0) -> None:
        """End it, by force if it does not end by itself."""
        self._connection.close()
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Supervisor:
    """Keeps an engine process at work on the segments that are handed in."""

    def __init__(
        self,
        bundle: Path,
        config: RecogniserConfig,
        cache_dir: Path,
        on_transcript: Callable[[Transcript], None],
        on_event: Callable[[str, str], None],
    ) -> None:
        self._bundle, self._config, self._cache_dir = bundle, config, cache_dir
        self._on_transcript, self._on_event = on_transcript, on_event
        self.counters = EngineCounters()
        self._pending: dict[tuple[int, int], Pending] = {}  # in the order of speech
        self._changed = threading.Condition()
        self._stopping = False
        self._engine: EngineProcess | None = None
        self._thread = threading.Thread(target=self._run, name="engine-link", daemon=True)

    def start(self) -> float:
        """Load the engine; seconds that it took. Raises BundleError or EngineLost."""
        self._engine = EngineProcess(self._bundle, self._config, self._cache_dir)
        try:
            load_s = self._engine.wait_ready()
        except (BundleError, EngineLost):
            self._engine.close()
            raise
        self._thread.start()
        return load_s

    @property
    def pid(self) -> int | None:
        """Process id of the engine while there is one."""
        engine = self._engine
        return engine.process.pid if engine else None

    @property
    def backlog(self) -> int:
        """Segments without their final."""
        return len(self._pending)

    @property
    def backlog_s(self) -> float:
        """Seconds of speech in segments without their final."""
        with self._changed:
            return self._n_samples() / SAMPLE_RATE

    def submit(self, chunk: SpeechChunk, *, wait: bool = False) -> None:
        """Hand in speech. A microphone must not wait; a file may, until half of the backlog's bound is free."""
        with self._changed:
            if wait:
                half = self._config.max_backlog_s * SAMPLE_RATE / 2
                self._changed.wait_for(lambda: self._stopping or self._n_samples() <= half)
            self._pending.setdefault(chunk.key, Pending([])).chunks.append(chunk)
            self._bound_backlog()
            self._changed.notify_all()

    def _bound_backlog(self) -> None:
        """Past `max_backlog_s` the oldest whole segment goes: late words help less than present ones."""
        limit = self._config.max_backlog_s * SAMPLE_RATE
        while len(self._pending) > 1 and self._n_samples() > limit:
            key = next(iter(self._pending))
            del self._pending[key]
            self.counters.dropped_segments += 1
            self._on_event("speech_dropped", f"utterance {key[0]} segment {key[1]}: the engine is too far behind")

    def _n_samples(self) -> int:
        return sum(len(chunk.samples) for pending in self._pending.values() for chunk in pending.chunks)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every segment has its final; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def stop(self) -> None:
        """End the engine and the thread; what is unfinished is dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self._engine:
            self._engine.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                if self._engine is None:
                    self._restart()
                assert self._engine is not None
                self._deliver(self._engine.hear(batch, self._config.reply_timeout_s))
            except EngineLost as error:
                if not self._stopping:
                    self._lost(str(error))

    def _next_batch(self) -> Batch | None:
        """Everything that was not sent yet, or None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or any(map(_unsent, self._pending.values())))
            if self._stopping:
                return None
            unsent = [pending for pending in self._pending.values() if _unsent(pending)]
            n = 1 if unsent[0].n_lost else len(unsent)  # the segment that takes engines down goes without the others
            return Batch([_take_unsent(pending) for pending in unsent[:n]])

    def _deliver(self, heard: Heard) -> None:
        self.counters.busy_s += heard.busy_s
        for transcript in heard.transcripts:
            self._on_transcript(transcript)
            if transcript.is_final:
                self.counters.speech_s += (transcript.end - transcript.start) / SAMPLE_RATE
                self._forget(transcript.key)

    def _forget(self, key: tuple[int, int]) -> None:
        with self._changed:
            self._pending.pop(key, None)
            self._changed.notify_all()

    def _lost(self, reason: str) -> None:
        """Put everything back to be sent again; give up what has now taken several engines down."""
        log.error("engine lost: %s", reason)
        if self._engine:
            self._engine.process.kill()
            self._engine.close()
            self._engine = None
        with self._changed:
            had_it = [p for p in self._pending.values() if p.n_sent]
            for pending in had_it:
                pending.n_sent, pending.n_lost = 0, pending.n_lost + 1
        self.counters.restarts += 1
        self._on_event("engine_restarted", reason)
        for pending in [p for p in had_it if p.n_lost >= MAX_ATTEMPTS and p.chunks[-1].is_last]:
            self._give_up(pending)

    def _give_up(self, pending: Pending) -> None:
        first, last = pending.chunks[0], pending.chunks[-1]
        self.counters.failed_segments += 1
        self._on_transcript(
            Transcript(
                utterance=first.utterance,
                segment=first.segment,
                revision=0,
                text="",
                stable_chars=0,
                start=first.start,
                end=last.speech_end,
                is_final=True,
                language="",
                continues=last.continues,
                rejected="engine_failed",
            )
        )
        self._forget(first.key)

    def _restart(self) -> None:
        """Start another engine, with growing pauses while that fails."""
        wait_s = 0.5
        while not self._stopping:
            self._engine = EngineProcess(self._bundle, self._config, self._cache_dir)
            try:
                log.info("engine restarted in %.1f s", self._engine.wait_ready())
            except (BundleError, EngineLost) as error:
                log.error("engine does not start: %s", error)  # noqa: TRY400 - the sentence says it
                self._engine.close()
                self._engine = None
                self._on_event("engine_not_starting", str(error))
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, wait_s)
                wait_s = min(2 * wait_s, RESTART_MAX_S)
            else:
                return
        raise EngineLost("stopped")


def _unsent(pending: Pending) -> bool:
    return pending.n_sent < len(pending.chunks)


def _take_unsent(pending: Pending) -> SpeechChunk:
    """What waited, as one chunk; it is kept as one chunk too."""
    waiting = pending.chunks[pending.n_sent :]
    joined = waiting[-1]
    if len(waiting) > 1:
        samples = np.concatenate([chunk.samples for chunk in waiting])
        joined = msgspec.structs.replace(joined, samples=samples, start=waiting[0].start)
    pending.chunks[pending.n_sent :] = [joined]
    pending.n_sent = len(pending.chunks)
    return joined
