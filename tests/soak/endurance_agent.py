"""`python -m soak.endurance_agent PORT FOLDER HOURS`: the agent of `endurance.py`, one line of JSON a simulated minute."""

from __future__ import annotations

import itertools
import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import toy

from agent import engine_process
from agent.audio_files import read_file
from agent.config import Config, MqttConfig, OutboxConfig, RecogniserConfig, SourceConfig, TelemetryConfig
from agent.messages import AudioChunk
from agent.pipeline import Pipeline
from agent.reopening import ReopeningMicrophone
from whisperlet.audio import SAMPLE_RATE, Pcm16, samples, seconds
from whisperlet.errors import AudioDeviceLost

CLIPS = toy.REPOSITORY / "demo" / "speech"
CHUNK = samples(20)
LOSS_EVERY_S = 600  # the microphone goes; it cannot be opened at the first attempts
DRAIN_S = 60.0
LOOKS, LOOK_S = 5, 0.002
# The engine's process, but for what it hears: each partial says how long the segment is, each final too.
STUB = """
from agent import worker
from agent.messages import Transcript

class Ears:
    in_pause = False
    key = None

    def feed(self, chunk):
        if chunk.key != self.key:
            self.key, self.n, self.n_stepped, self.start = chunk.key, 0, 0, chunk.start
        self.n += len(chunk.samples)
        self.last = chunk

    def step(self, hop_ms=300):
        if self.last.is_last or self.n - self.n_stepped < 16 * hop_ms:
            return None
        self.n_stepped = self.n
        return self.finish()

    def finish(self):
        return Transcript(*self.key, 1, f"{self.n} samples", 0, self.start, self.start + self.n, self.last.is_last, "en")

worker.load, worker.open_bundle = lambda start, bundle: Ears(), lambda path: None
worker.main()
"""


class Life:
    """What there is to be heard, the same each time: samples in pieces, and where the microphone goes (None)."""

    def __init__(self, hours: float) -> None:
        self.n_clips = self.n_losses = 0
        self.now = 0  # samples that the world has lived, heard or not
        self._end = round(3600 * hours * SAMPLE_RATE)
        self._random = random.Random(1)
        self._noise = np.random.default_rng(1)
        self._clips = [read_file(path) for path in sorted(CLIPS.glob("*.flac"))]

    def pieces(self) -> Iterator[Pcm16 | None]:
        """Until the hours are over."""
        next_loss = LOSS_EVERY_S * SAMPLE_RATE // 2
        for what in itertools.cycle(["silence", "speech", "silence", "noise"]):
            if self.now >= self._end:
                return
            if self.now >= next_loss and what == "noise":  # between two utterances
                next_loss += LOSS_EVERY_S * SAMPLE_RATE
                self.n_losses += 1
                self.now += samples(1e3 * self._random.uniform(1, 30))
                yield None
            piece = self._piece(what)
            self.now += len(piece)
            yield piece

    def _piece(self, what: str) -> Pcm16:
        if what == "speech":
            self.n_clips += 1
            return self._random.choice(self._clips)
        duration_s, level = {"silence": (self._random.uniform(3, 40), 8), "noise": (self._random.uniform(1, 4), 4000)}[
            what
        ]
        return self._noise.integers(-level, level, samples(1e3 * duration_s)).astype(np.int16)


class Microphones:
    """Opens one after the other on the same life."""

    def __init__(self, life: Life, tell: Callable[[int], None], drained: Callable[[], bool]) -> None:
        self._life, self._pieces = life, life.pieces()
        self._tell, self._drained = tell, drained
        self._n_refusals = 0
        self._minute = 0
        self._began_s = time.monotonic()
        self.close_source: Callable[[], None] = lambda: None

    def open(self, _config: SourceConfig, _counters: object) -> Microphones:
        if self._n_refusals:
            self._n_refusals -= 1
            raise AudioDeviceLost("microphone: it is not there")
        return self

    def __iter__(self) -> Iterator[AudioChunk]:
        start = 0
        for piece in self._pieces:
            if piece is None:
                self._n_refusals = 2
                raise AudioDeviceLost("microphone: unplugged")
            began = self._life.now - len(piece)
            for at in range(0, len(piece), CHUNK):
                part = piece[at : at + CHUNK]
                yield AudioChunk(part, start, self._began_s + seconds(began + at + len(part)))
                start += len(part)
            self._tell_minutes()
        until_s = time.monotonic() + DRAIN_S
        while not self._drained() and time.monotonic() < until_s:
            time.sleep(0.05)
        self.close_source()

    def _tell_minutes(self) -> None:
        minute = int(seconds(self._life.now) / 60)
        if minute > self._minute:
            self._minute = minute
            self._tell(minute)

    def close(self) -> None:
        """Nothing is held."""


def stubbed(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """The stub in place of the engine."""
    return subprocess.Popen([command[0], "-c", STUB, *command[3:]], **options)


def held(process: psutil.Process) -> int:
    """Handles that stay: the fewest of some looks, for telemetry opens a file ten times a second and closes it."""
    fewest = process.num_fds()
    for _ in range(LOOKS - 1):
        time.sleep(LOOK_S)
        fewest = min(fewest, process.num_fds())
    return fewest


def main(port: int, folder: Path, hours: float) -> None:
    """Live, telling each minute, and at the end what was counted."""
    engine_process.subprocess = SimpleNamespace(Popen=stubbed, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[attr-defined]
    process = psutil.Process()
    life = Life(hours)

    def tell(minute: int) -> None:
        told = {
            "minute": minute,
            "resident_bytes": process.memory_info().rss,
            "threads": process.num_threads(),
            "handles": held(process),
            "outbox_messages": pipeline.outbox.depth,
        }
        print(json.dumps(told), flush=True)

    microphones = Microphones(life, tell, lambda: not pipeline.supervisor.backlog and not pipeline.outbox.depth)

    def source(on_event: Callable[[str, str], None], beat: Callable[[float], None]) -> ReopeningMicrophone:
        config = SourceConfig(retry_s=0.1, retry_max_s=0.1)
        made = ReopeningMicrophone(config, on_event, beat=beat, open_microphone=microphones.open)
        microphones.close_source = made.close
        return made

    config = Config(
        mqtt=MqttConfig(url=f"mqtt://127.0.0.1:{port}", device="kiosk", reconnect_min_s=0.1, reconnect_max_s=1.0),
        outbox=OutboxConfig(dir=str(folder / "outbox")),
        telemetry=TelemetryConfig(interval_s=1.0, sample_s=0.1),
        recogniser=RecogniserConfig(),
    )
    bundle = SimpleNamespace(path=folder / "no.tflite", manifest=toy.make_manifest(), sha256="0" * 64)
    pipeline = Pipeline(config, bundle, source, folder)  # type: ignore[arg-type]
    pipeline.run(realtime=True)
    counters = pipeline.telemetry.counters
    result = {
        "clips_spoken": life.n_clips,
        "microphone_losses": life.n_losses,
        "finals": counters.finals,
        "partials": counters.partials,
        "rejected_segments": counters.rejected_segments,
        "dropped_segments": counters.dropped_segments,
        "failed_segments": counters.failed_segments,
        "failed_reports": counters.failed_reports,
        "dropped_messages": sum(n for kind, n in pipeline.outbox.dropped().items()),
        "left_in_outbox": pipeline.outbox.depth,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
