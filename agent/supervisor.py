"""The ear's side of the engine process: hands it speech, restarts it when it fails, and loses nothing meanwhile.

Speech is kept until its final has come. The engine gets one batch at a time; what arrives meanwhile waits and is
joined, so a slow engine gets fewer, longer chunks and makes fewer partials. An engine that dies, or does not answer
in time, is started anew and given everything unfinished again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import BundleError

from .config import RecogniserConfig
from .engine_process import START_TIMEOUT_S, EngineLost, EngineProcess
from .messages import SpeechChunk, Thrift, Transcript
from .pace import pace_news
from .protocol import Batch, Heard, unheard

__all__ = ["EngineCounters", "EngineLost", "Supervisor"]

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 3  # then a segment that kills the engine is given up
RESTART_MAX_S = 30.0
STOP_S = 1.0  # for what the engine is at when it is stopped
PACE_NEWS_S = 5.0  # at least, between two events about the engine's pace
IDLE_S = 20.0  # the longest sleep of a loop that has nothing to do
CLOSE_S = 10.0  # at most, to put an end to an engine


class Pending(msgspec.Struct):
    """A segment whose final has not come. Mutable."""

    chunks: list[SpeechChunk]
    n_sent: int = 0
    n_lost: int = 0  # engines that were lost while they had it
    has_final: bool = False  # on its way; it is too late to drop the segment


class EngineCounters(msgspec.Struct):
    """Mutable; written by the link's thread."""

    restarts: int = 0
    dropped_segments: int = 0
    failed_segments: int = 0
    skipped_partials: int = 0  # for lack of time
    busy_s: float = 0.0  # processor seconds that the engine spent on speech
    speech_s: float = 0.0  # seconds of speech in finals
    utterances: int = 0  # that have all their finals


class Supervisor:
    """Keeps an engine process at work on the segments that are handed in."""

    def __init__(
        self,
        bundle: Path,
        config: RecogniserConfig,
        cache_dir: Path,
        on_transcript: Callable[[Transcript], None],
        on_event: Callable[[str, str], None],
        beat: Callable[[float], None] = lambda _within_s: None,
    ) -> None:
        self._bundle, self._config, self._cache_dir = bundle, config, cache_dir
        self._on_transcript, self._on_event, self._beat = on_transcript, on_event, beat
        self.counters = EngineCounters()
        self._pending: dict[tuple[int, int], Pending] = {}  # in the order of speech
        self._changed = threading.Condition()
        self._is_live = True  # whoever hands in speech does not wait for the engine
        self.hop_ms = self._told_hop_ms = float(config.hop_ms) if config.partials else None  # None: finals only
        self._told_s = -math.inf
        self.thrift = Thrift.NORMAL  # may be set from any thread
        self._stopping = False
        self._tuning: RecogniserConfig | None = None  # that the engine was not told yet
        self._is_renewing = False
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

    def retune(self, config: RecogniserConfig) -> None:
        """Have speech recognised under another configuration from now on; what takes a new engine stays as it is."""
        with self._changed:
            self._config = self._tuning = config
            self.hop_ms = self._told_hop_ms = float(config.hop_ms) if config.partials else None

    def renew(self) -> None:
        """Have the engine replaced by another one; what it has not finished is heard again."""
        with self._changed:
            self._is_renewing = True
            if self._engine:
                self._engine.kill()
            self._changed.notify_all()

    def submit(self, chunk: SpeechChunk, *, wait: bool = False) -> None:
        """Hand in speech. A microphone must not wait; a file may, until half of the backlog's bound is free."""
        with self._changed:
            if wait:
                half = self._config.max_backlog_s * SAMPLE_RATE / 2
                self._changed.wait_for(lambda: self._stopping or self._n_samples() <= half)
            self._is_live = not wait
            self._pending.setdefault(chunk.key, Pending([])).chunks.append(chunk)
            self._bound_backlog()
            self._changed.notify_all()

    def _bound_backlog(self) -> None:
        """Past `max_backlog_s` the oldest whole segment goes: late words help less than present ones."""
        limit = self._config.max_backlog_s * SAMPLE_RATE
        *older, _ = [key for key, pending in self._pending.items() if not pending.has_final]
        while older and self._n_samples() > limit:
            key = older.pop(0)
            del self._pending[key]
            self.counters.dropped_segments += 1
            self._on_event("speech_dropped", f"utterance {key[0]} segment {key[1]}: the engine is too far behind")

    def _n_samples(self) -> int:
        unfinished = (pending for pending in self._pending.values() if not pending.has_final)
        return sum(len(chunk.samples) for pending in unfinished for chunk in pending.chunks)

    def drain(self, timeout_s: float) -> bool:
        """Wait until every segment has its final; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def stop(self) -> None:
        """End the engine and the thread; what is unfinished is dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(STOP_S)
            if engine := self._engine:  # hung, or busy with what nobody waits for any more
                engine.kill()
        if self._engine:
            self._engine.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                if self._is_renewing:
                    raise EngineLost("a command asked for it")  # noqa: TRY301 - as if it had gone by itself
                if self._engine is None:
                    self._restart()
                assert self._engine is not None
                if batch.chunks:
                    self._beat(self._config.reply_timeout_s + CLOSE_S)
                    self._deliver(self._engine.hear(batch, self._config.reply_timeout_s))
            except EngineLost as error:
                if not self._stopping:
                    self._lost(str(error))

    def _next_batch(self) -> Batch | None:
        """Everything that was not sent yet, nothing while there is no engine to send it to, or None to stop."""
        with self._changed:
            self._beat(IDLE_S)
            while not self._changed.wait_for(self._has_news, IDLE_S):
                self._beat(IDLE_S)
            if self._stopping:
                return None
            if self._lacks_engine():
                return Batch([], self._is_live)
            unsent = [pending for pending in self._pending.values() if _unsent(pending)]
            n = 1 if unsent[0].n_lost else len(unsent)  # the segment that takes engines down goes without the others
            tuning, self._tuning = self._tuning, None
            return Batch([_take_unsent(pending) for pending in unsent[:n]], self._is_live, self.thrift, tuning)

    def _lacks_engine(self) -> bool:
        return self._engine is None or self._is_renewing

    def _has_news(self) -> bool:
        return self._stopping or self._lacks_engine() or any(map(_unsent, self._pending.values()))

    def _deliver(self, heard: Heard) -> None:
        self.counters.busy_s += heard.busy_s
        self.counters.skipped_partials += heard.skipped
        if self._tuning is None:  # else it speaks of a hop that is not asked for any more
            self.hop_ms = heard.hop_ms
        for transcript in heard.transcripts:
            if self._hand_on(transcript) and transcript.is_final:
                self.counters.speech_s += (transcript.end - transcript.start) / SAMPLE_RATE
                self.counters.utterances += not transcript.continues
        self._tell_pace()

    def _hand_on(self, transcript: Transcript) -> bool:
        """Whether the transcript was wanted: a segment may have been dropped while it was being heard."""
        with self._changed:
            pending = self._pending.get(transcript.key)
            if pending is None:
                return False
            pending.has_final = transcript.is_final
        self._on_transcript(transcript)
        if transcript.is_final:
            with self._changed:
                del self._pending[transcript.key]
                self._changed.notify_all()
        return True

    def _tell_pace(self) -> None:
        """Report another hop, unless another one was reported just now, or the heat is to blame for it."""
        now_s = time.monotonic()
        if self.thrift:
            self._told_hop_ms = self.hop_ms
        if self.hop_ms != self._told_hop_ms and now_s - self._told_s >= PACE_NEWS_S:
            self._told_hop_ms, self._told_s = self.hop_ms, now_s
            self._on_event("engine_pace", pace_news(self.hop_ms, self._config.hop_ms))

    def _lost(self, reason: str) -> None:
        """Put everything back to be sent again; give up what has now taken several engines down."""
        self._is_renewing = False
        log.error("engine lost: %s", reason)
        if self._engine:
            self._engine.kill()
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
        self.counters.failed_segments += self._hand_on(unheard(pending.chunks[0], pending.chunks[-1]))

    def _restart(self) -> None:
        """Start another engine, with growing pauses while that fails."""
        wait_s = 0.5
        while not self._stopping:
            self._beat(START_TIMEOUT_S + CLOSE_S + wait_s)
            self._engine = EngineProcess(self._bundle, self._config, self._cache_dir)
            try:
                log.info("engine restarted in %.1f s", self._engine.wait_ready())
            except (BundleError, EngineLost) as error:
                self._engine.close()
                self._engine = None
                if self._stopping:
                    break
                log.error("engine does not start: %s", error)  # noqa: TRY400 - the sentence says it
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
