"""The ear's side of the engine, on a stub of the engine's process that proves what it was given."""

import threading

import numpy as np
import psutil

from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.supervisor import Supervisor

# The real worker, but for what it hears: the text is a checksum of all audio of the segment and the number of chunks.
STUB = """
import os, time
from pathlib import Path
from agent import worker
from agent.messages import Transcript
from whisperlet.errors import BundleError

folder = Path(os.environ["STUB"])

class Ears:
    in_pause = False

    def __init__(self):
        self.key = None

    def feed(self, chunk):
        if (folder / f"poison {chunk.utterance}").exists():
            os._exit(7)
        while (folder / f"wait {chunk.utterance}").exists():
            time.sleep(0.01)
        if chunk.key != self.key:
            self.key, self.n, self.sum, self.n_chunks, self.start = chunk.key, 0, 0, 0, chunk.start
        assert chunk.start == self.start + self.n, "audio is missing"
        self.n += len(chunk.samples)
        self.sum += int(chunk.samples.astype(int).sum())
        self.n_chunks += 1
        self.last = chunk

    def transcript(self):
        text = f"{self.n} {self.sum} {self.n_chunks}"
        end = self.start + self.n
        return Transcript(*self.key, 1, text, 0, self.start, end, self.last.is_last, "en")

    def step(self):
        return None if self.last.is_last else self.transcript()

    def retune(self, config):
        pass

    finish = transcript

def load(start, bundle):
    if (folder / "refuse").exists():
        raise BundleError("it is gone")
    return Ears()

worker.load, worker.open_bundle = load, lambda path: None
worker.main()
"""


class Ear:
    """A supervisor, and what it reports."""

    def __init__(self, bundle, caches, **config):
        self.transcripts, self.events = [], []
        settings = RecogniserConfig(**{"threads": 1, "hop_ms": 100, **config})
        self.engine = Supervisor(
            bundle, settings, caches, self.transcripts.append, lambda *event: self.events.append(event)
        )

    @property
    def finals(self):
        return {t.key: t for t in self.transcripts if t.is_final}

    def say(self, pcm, utterance=1, pieces=1, first=0, *, ends=True, wait=False):
        """Hand in `pcm` in pieces, `first` samples of the utterance having come before."""
        parts = np.array_split(pcm, pieces)
        for i, samples in enumerate(parts):
            is_last = ends and i == pieces - 1
            speech_end = first + len(samples) if is_last else 0
            chunk = SpeechChunk(utterance, 0, samples, first, is_last=is_last, speech_end=speech_end)
            self.engine.submit(chunk, wait=wait)
            first += len(samples)

    def hear_all(self, timeout_s=15.0):
        assert self.engine.drain(timeout_s), "a final is missing"


NOISE = np.random.default_rng(0).integers(-1000, 1000, 480_000).astype(np.int16)


def checksum(pcm):
    return [len(pcm), int(pcm.astype(int).sum())]


def heard(transcript):
    """Samples and their sum, then the number of chunks."""
    return [int(number) for number in transcript.text.split()]


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def workers():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "worker" in str(child.cmdline())]


def links():
    return [thread for thread in threading.enumerate() if thread.name == "engine-link"]
