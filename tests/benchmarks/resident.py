"""The whole agent as it runs on a device: memory of all its processes, and how long its first final takes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from convert.speechset import Clip
from whisperlet.errors import ConfigError

SAMPLE_S = 0.5
N_STARTS = 3
TIMEOUT_S = 60.0  # for an agent that does not end after its clips have
AGENT_CONFIG = '[mqtt]\ndevice = "bench"\n[recogniser]\nthreads = {threads}\n'


class Resident(msgspec.Struct, frozen=True):
    """Memory at the moment when all processes together had most, in 10^6 bytes."""

    ear_mb: float
    engine_mb: float
    total_mb: float  # pages that processes share are counted for each
    total_pss_mb: float  # ... are shared out among them


def measure_resident(bundle: Path, clips: Sequence[Clip], threads: int) -> Resident:
    """`whisperlet-agent run` on clips in real time, publishing to a broker; raises ConfigError if it fails."""
    from demo.demo import broker

    with tempfile.TemporaryDirectory() as name, broker(folder := Path(name)) as port:
        (folder / "agent.toml").write_text(AGENT_CONFIG.format(threads=threads), encoding="utf-8")
        (folder / "clips").mkdir()
        for number, clip in enumerate(clips):
            (folder / "clips" / f"{number:03}{clip.audio.suffix}").symlink_to(clip.audio.resolve())
        command = [sys.executable, "-m", "agent", "run", "--source", str(folder / "clips"), "--pace"]
        command += ["--bundle", str(bundle), "--broker", f"mqtt://127.0.0.1:{port}"]
        command += ["--config", str(folder / "agent.toml")]
        agent = subprocess.Popen(command, env={**os.environ, "WHISPERLET_LOG": "ERROR"})
        samples = _watch(agent)
    if agent.returncode or not samples:
        raise ConfigError(f"the agent ended with status {agent.returncode}")
    return max(samples, key=lambda sample: sample.total_mb)


def _watch(agent: subprocess.Popen[bytes]) -> list[Resident]:
    """Memory every half second until the agent ends."""
    ear, samples = psutil.Process(agent.pid), []
    try:
        while agent.poll() is None:
            time.sleep(SAMPLE_S)
            try:
                samples.append(_sample(ear))
            except psutil.Error:  # it ended between the two
                break
    except BaseException:
        agent.terminate()
        raise
    agent.wait(TIMEOUT_S)
    return samples


def _sample(ear: psutil.Process) -> Resident:
    mine, *others = ([p.memory_info().rss / 1e6, p.memory_full_info().pss / 1e6] for p in [ear, *ear.children()])
    engine_mb = sum(rss for rss, _ in others)
    return Resident(mine[0], engine_mb, mine[0] + engine_mb, mine[1] + sum(pss for _, pss in others))


def cold_start_s(bundle: Path, clip: Clip) -> tuple[float, float]:
    """Seconds from starting `whisperlet-agent transcribe` to its first final: of the first start ever, which packs the
    weights, and the median of three later ones."""
    with tempfile.TemporaryDirectory() as cache:
        first_s, *later_s = [_first_final_s(bundle, clip, cache) for _ in range(1 + N_STARTS)]
    return first_s, statistics.median(later_s)


def _first_final_s(bundle: Path, clip: Clip, cache: str) -> float:
    command = [sys.executable, "-m", "agent", "transcribe", str(clip.audio), "--bundle", str(bundle)]
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "WHISPERLET_LOG": "ERROR"}
    began_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as agent:
        assert agent.stdout is not None
        line = agent.stdout.readline()
        took_s = time.monotonic() - began_s
    if agent.returncode or not line:
        raise ConfigError(f"the agent could not transcribe {clip.id}")
    return took_s
