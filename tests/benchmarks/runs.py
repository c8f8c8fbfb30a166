"""The agent's engine process at work on clips, by two clocks.

`Stepped` hands the engine 20 ms at a time and waits for each reply: the clock is the audio's own, so nothing is ever
joined or left out, and a run can be repeated exactly. `Live` plays a clip in real time through the agent's gate and
supervisor: what a person in front of the device would see, and when.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import psutil

from agent.config import RecogniserConfig, VadConfig, default_cache_dir
from agent.confirm import ConfirmedGate
from agent.engine_process import EngineProcess
from agent.messages import AudioChunk, SpeechChunk, Transcript
from agent.protocol import Batch
from agent.supervisor import Supervisor
from agent.vad import segments
from convert.machine import peak_rss_mb
from whisperlet.audio import Pcm16, samples, seconds
from whisperlet.errors import ConfigError

BLOCK = samples(20)  # what a microphone hands on at a time
TAIL = samples(1500)  # silence after each clip, so that the gate closes
FINAL_TIMEOUT_S = 120.0


class Message(msgspec.Struct, frozen=True):
    """A transcript, and when it came: seconds after the clip's first sample was captured."""

    at_s: float
    transcript: Transcript


class Played(msgspec.Struct, frozen=True):
    """What was seen of a clip that was played."""

    messages: list[Message]
    speech_starts: dict[int, float]  # utterance -> seconds, first voiced sample
    opened_s: float  # monotonic, when the first sample was captured

    @property
    def finals(self) -> list[Message]:
        """In order; one for each segment."""
        return [message for message in self.messages if message.transcript.is_final]


def core_s(process: psutil.Process) -> float:
    """Processor seconds that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def rss_mb(process: psutil.Process) -> float:
    """Resident memory, 10^6 bytes."""
    return float(process.memory_info().rss) / 1e6


class Meter:
    """What a process has used since it was looked at first."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self._loaded_core_s = core_s(self.process)

    @property
    def core_s(self) -> float:
        """Processor seconds, loading left out."""
        return core_s(self.process) - self._loaded_core_s

    @property
    def rss_mb(self) -> float:
        """Resident memory now, 10^6 bytes."""
        return rss_mb(self.process)

    @property
    def peak_rss_mb(self) -> float:
        """Resident memory at its highest, 10^6 bytes."""
        return peak_rss_mb(self.process.pid)


class Stepped:
    """An engine process that is asked a chunk at a time."""

    def __init__(self, bundle: Path, config: RecogniserConfig) -> None:
        self._engine = EngineProcess(bundle, config, default_cache_dir())
        self._timeout_s = config.reply_timeout_s
        self._n_clips = 0

    def __enter__(self) -> Self:
        self.load_s = self._engine.wait_ready()
        self.meter = Meter(self._engine.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def ask(self, chunk: SpeechChunk) -> list[Message]:
        """What the engine says to a chunk, at the time of its last sample."""
        at_s = seconds(chunk.start + len(chunk.samples))
        heard = self._engine.hear(Batch([chunk], is_live=False), self._timeout_s)
        return [Message(at_s, transcript) for transcript in heard.transcripts]

    def hear(self, chunks: Iterable[SpeechChunk]) -> list[Message]:
        """Transcripts of a clip, which gets utterance numbers of its own."""
        self._n_clips += 1
        first = 1000 * self._n_clips
        numbered = (msgspec.structs.replace(chunk, utterance=first + chunk.utterance) for chunk in chunks)
        return [message for chunk in numbered for message in self.ask(chunk)]


class Live:
    """The agent's gate and supervisor, hearing clips as they are spoken."""

    def __init__(self, bundle: Path, config: RecogniserConfig, vad: VadConfig = VadConfig()) -> None:  # noqa: B008
        self._supervisor = Supervisor(bundle, config, default_cache_dir(), self._collect, lambda *_: None)
        self._vad = vad
        self._messages: list[tuple[float, Transcript]] = []  # monotonic
        self._n_clips = 0

    def __enter__(self) -> Self:
        self.load_s = self._supervisor.start()
        assert self._supervisor.pid is not None
        self.meter = Meter(self._supervisor.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._supervisor.stop()

    def _collect(self, transcript: Transcript) -> None:
        self._messages.append((time.monotonic(), transcript))

    def play(self, pcm: Pcm16) -> Played:
        """A clip and the silence after it, in real time. Raises ConfigError if a final does not come."""
        self._n_clips += 1
        self._messages = []
        heard = np.concatenate([pcm, np.zeros(TAIL, np.int16)])
        opened_s = time.monotonic()
        for chunk in self._gated(heard, opened_s):
            mine = msgspec.structs.replace(chunk, utterance=1000 * self._n_clips + chunk.utterance)
            self._supervisor.submit(mine)
        if not self._supervisor.drain(FINAL_TIMEOUT_S):
            raise ConfigError(f"the engine gave no final within {FINAL_TIMEOUT_S:g} s")
        messages = [Message(at_s - opened_s, transcript) for at_s, transcript in self._messages]
        starts = {1000 * self._n_clips + key: start for key, start in speech_starts(heard, self._vad).items()}
        return Played(messages, starts, opened_s)

    def _gated(self, heard: Pcm16, opened_s: float) -> Iterator[SpeechChunk]:
        gate = ConfirmedGate(self._vad)
        for chunk in audio_chunks(heard, opened_s):
            time.sleep(max(0.0, chunk.arrived_monotonic_s - time.monotonic()))
            yield from gate.feed(chunk)
        yield from gate.flush()


def audio_chunks(pcm: Pcm16, opened_s: float = 0.0, start: int = 0) -> Iterator[AudioChunk]:
    """A clip as a microphone gives it, each chunk with the time at which its last sample is captured."""
    for first in range(0, len(pcm), BLOCK):
        piece = pcm[first : first + BLOCK]
        yield AudioChunk(piece, start + first, opened_s + seconds(start + first + len(piece)))


def gated(pcm: Pcm16) -> Iterator[SpeechChunk]:
    """What the agent's gate makes of a clip and the silence after it, as fast as it can."""
    gate = ConfirmedGate(VadConfig())
    for chunk in audio_chunks(np.concatenate([pcm, np.zeros(TAIL, np.int16)])):
        yield from gate.feed(chunk)
    yield from gate.flush()


def speech_starts(pcm: Pcm16, vad: VadConfig) -> dict[int, float]:
    """When each utterance begins, by the gate's first voiced frame, in seconds."""
    without_pre_roll = msgspec.structs.replace(vad, pre_roll_ms=0)
    return {s.utterance: seconds(s.start) for s in segments(pcm, without_pre_roll) if s.segment == 0}


def one_segment(pcm: Pcm16, block: int | None = BLOCK) -> Iterator[SpeechChunk]:
    """A clip of up to 28 s as one segment, uncut, in blocks; all at once with `block` None."""
    ends = [*range(block, len(pcm), block), len(pcm)] if block else [len(pcm)]
    start = 0
    for end in ends:
        is_last = end == len(pcm)
        yield SpeechChunk(1, 0, pcm[start:end], start, is_last=is_last, speech_end=end if is_last else 0)
        start = end


def joined(messages: Sequence[Message], language: str = "en") -> str:
    """Text of the finals."""
    finals = (message.transcript.text for message in messages if message.transcript.is_final)
    return ("" if language == "zh" else " ").join(filter(None, finals))
