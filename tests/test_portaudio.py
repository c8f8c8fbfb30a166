"""The microphone without a sound card: real PortAudio, by way of ALSA, on a private PulseAudio."""

import itertools
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from brokers import wait_for

from agent import ear_check
from agent.audio_files import read_file
from agent.config import RecogniserConfig, SourceConfig
from agent.findings import Level
from agent.messages import SpeechChunk
from agent.microphone import Microphone
from agent.reopening import ReopeningMicrophone
from agent.ring import SourceCounters
from agent.supervisor import Supervisor
from whisperlet.audio import SAMPLE_RATE, seconds
from whisperlet.errors import AudioDeviceLost

CLIP = Path(__file__).parent.parent / "demo/speech/1089-134691-0000.flac"


def missing():
    """Why PortAudio cannot be tested here, or None."""
    try:
        import pyaudio  # noqa: F401
    except ImportError:
        return "PyAudio is not installed"
    for program in ("pulseaudio", "pacat", "pactl"):
        if not shutil.which(program):
            return f"{program} is not installed"
    plugin = "alsa-lib/libasound_module_pcm_pulse.so"
    if not [*Path("/usr").glob(f"lib*/{plugin}"), *Path("/usr").glob(f"lib*/*/{plugin}")]:
        return "ALSA's plug-in for PulseAudio (libasound2-plugins) is not installed"
    return None


class Room:
    """A private PulseAudio with one loudspeaker that is its own microphone."""

    def __init__(self, folder):
        self._socket = folder / "socket"
        self._server = None

    def plug(self):
        self._server = subprocess.Popen(
            [
                *("pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--disable-shm=yes"),
                *("--exit-idle-time=-1", "--log-target=stderr"),
                *("-L", f"module-native-protocol-unix socket={self._socket} auth-anonymous=1"),
                *("-L", f"module-null-sink sink_name=room rate={SAMPLE_RATE} channels=1"),
            ]
        )
        for _ in range(100):
            if subprocess.run(["pactl", "info"], capture_output=True, check=False).returncode == 0:
                return True
            time.sleep(0.05)
        return False

    def unplug(self):
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()
        self._socket.unlink(missing_ok=True)

    def freeze(self):
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self):
        self._server.send_signal(signal.SIGCONT)

    def play(self, pcm, device="room"):
        player = subprocess.Popen(
            [
                *("pacat", "--playback", "--raw", "--latency-msec=250", f"--device={device}"),
                *(f"--rate={SAMPLE_RATE}", "--channels=1", "--format=s16le"),
            ],
            stdin=subprocess.PIPE,
        )
        threading.Thread(target=player.communicate, args=[pcm.tobytes()]).start()


@pytest.fixture
def room(tmp_path, monkeypatch):
    if reason := missing():
        pytest.skip(reason)
    server = f"unix:{tmp_path / 'socket'}"
    (tmp_path / "asound.conf").write_text(
        f'pcm.!default {{ type pulse server "{server}" }}\n'
        f'pcm.room {{ type pulse server "{server}" hint {{ show on description "room" }} }}\n'
    )
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(tmp_path / "asound.conf"))
    monkeypatch.setenv("PULSE_SERVER", server)
    for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    room = Room(tmp_path)
    started = room.plug()
    if started:
        yield room
    room.unplug()
    if not started:
        pytest.skip("PulseAudio does not start here")


@pytest.fixture(scope="module")
def speech():
    return read_file(CLIP)


def where(heard, pcm):
    """Offset at which `heard` holds `pcm`, by cross-correlation."""
    n = len(heard) + len(pcm)
    product = np.fft.rfft(heard.astype(float), n) * np.conj(np.fft.rfft(pcm.astype(float), n))
    return int(np.argmax(np.fft.irfft(product, n)[: len(heard)]))


def listen(microphone, duration_s):
    chunks = []
    for chunk in microphone:
        chunks.append(chunk)
        if seconds(chunk.end) > duration_s:
            microphone.close()
    return chunks


def padded(pcm):
    return np.concatenate([np.zeros(8000, np.int16), pcm, np.zeros(16_000, np.int16)])


def test_what_is_said_is_heard(room, speech):
    """To the bit; on a busy machine the made-up sound card itself may stutter, so it may repeat itself twice."""
    for _ in range(3):
        microphone = Microphone(SourceConfig(device="room"))
        room.play(padded(speech))
        chunks = listen(microphone, 4)
        assert {len(c.samples) for c in chunks} == {320}
        assert all(a.end == b.start for a, b in itertools.pairwise(chunks))
        assert microphone.counters == SourceCounters()
        heard = np.concatenate([c.samples for c in chunks])
        at = where(heard, speech)
        if np.array_equal(heard[at : at + len(speech)], speech):
            return
    pytest.fail("the speech never arrived whole")


@pytest.mark.parametrize(("ring_s", "busy_s", "drops"), [(2.0, 1.0, False), (0.5, 1.5, True)])
def test_a_busy_reader_drops_nothing_until_the_ring_is_full(room, ring_s, busy_s, drops):
    microphone = Microphone(SourceConfig(ring_s=ring_s))
    chunks = iter(microphone)
    before = next(chunks)
    time.sleep(busy_s)
    after = [next(chunks) for _ in range(20)]
    microphone.close()
    everything = [before, *after]
    jump = sum(b.start - a.end for a, b in itertools.pairwise(everything))
    assert jump == microphone.counters.dropped_samples
    assert (jump > 0) is drops
    assert list(chunks) == []


def test_unplugged_and_plugged_in_again(room):
    happened = []
    config = SourceConfig(retry_s=0.2, retry_max_s=0.4)
    source = ReopeningMicrophone(config, lambda name, detail: happened.append((time.monotonic(), name, detail)))
    chunks = iter(source)
    first = next(chunks)
    room.unplug()
    plugging = threading.Timer(3, room.plug)
    plugging.start()
    last = after = first
    while len(happened) < 2:
        last, after = after, next(chunks)
    plugging.join()
    names = [name for _, name, _ in happened]
    assert names == ["microphone_lost", "microphone_back"]
    assert "no audio for 2 s" in happened[0][2]
    assert seconds(after.start - last.end) == pytest.approx(
        after.arrived_monotonic_s - last.arrived_monotonic_s, abs=0.1
    )
    assert seconds(after.start - last.end) > 2
    source.close()
    assert list(chunks) == []


def test_a_reader_in_another_thread_is_freed(room):
    microphone = Microphone(SourceConfig())
    chunks = []
    reader = threading.Thread(target=lambda: chunks.extend(microphone))
    reader.start()
    until = time.monotonic() + 10
    while not chunks and time.monotonic() < until:
        time.sleep(0.05)
    microphone.close()
    reader.join(2)
    assert not reader.is_alive()
    assert chunks


def test_nothing_plugged_in(room):
    room.unplug()
    with pytest.raises(AudioDeviceLost, match="no audio input device"):
        Microphone(SourceConfig())


@pytest.mark.bundle
def test_nothing_is_dropped_while_the_longest_encode_runs(room, real_bundle, tmp_path):
    finals = []
    engine = Supervisor(
        real_bundle.path, RecogniserConfig(partials=False), tmp_path, finals.append, lambda *event: finals.append(event)
    )
    engine.start()
    try:
        microphone = Microphone(SourceConfig(device="room", ring_s=0.5))
        window = np.zeros(28 * SAMPLE_RATE, np.int16)
        for utterance in range(3):
            engine.submit(SpeechChunk(utterance, 0, window, 0, is_last=True, speech_end=len(window)))
        n_heard = sum(len(chunk.samples) for chunk in listen(microphone, 3.0))
        assert engine.drain(60)
    finally:
        engine.stop()
    assert len(finals) == 3
    assert n_heard >= 3 * SAMPLE_RATE
    assert (microphone.counters.dropped_samples, microphone.counters.overflows) == (0, 0)


class Ear:
    """A reopening microphone that is read by a thread of its own, and what it reported."""

    def __init__(self, **config):
        self.events, self.beats, self.chunks = [], [], []
        settings = SourceConfig(**{"retry_s": 0.2, "retry_max_s": 0.5, "silent_s": 0} | config)
        self.source = ReopeningMicrophone(settings, lambda *event: self.events.append(event), beat=self.beats.append)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        for chunk in self.source:
            self.chunks.append(chunk)

    @property
    def names(self):
        return [name for name, _ in self.events]

    def hears(self, pcm, timeout_s=15.0):
        """Wait until `pcm`, more or less, is in what was heard."""
        wait_for(lambda: len(self.chunks) > 50 and likeness(joined(self.chunks), pcm) > 0.8, timeout_s)

    def goes_on(self, timeout_s=15.0):
        """Wait until more audio has come."""
        n = len(self.chunks)
        wait_for(lambda: len(self.chunks) > n + 20, timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.source.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


def joined(chunks):
    return np.concatenate([chunk.samples for chunk in list(chunks)])


def likeness(heard, pcm):
    """Correlation where `pcm` fits best into `heard`, 0 to 1."""
    if len(heard) < len(pcm):
        return 0.0
    found = heard[where(heard, pcm) :][: len(pcm)].astype(float)
    norm = np.linalg.norm(found) * np.linalg.norm(pcm.astype(float))
    return float(found @ pcm[: len(found)]) / norm if len(found) == len(pcm) and norm else 0.0


def pactl(*words):
    return subprocess.run(["pactl", *words], capture_output=True, text=True, check=True).stdout


def test_suspended_and_resumed(room):
    with Ear() as ear:
        ear.goes_on()
        pactl("suspend-sink", "room", "1")
        wait_for(lambda: ear.names == ["microphone_lost"], 15)
        pactl("suspend-sink", "room", "0")
        resumed_s = time.monotonic()
        wait_for(lambda: ear.names == ["microphone_lost", "microphone_back"], 15)
        assert time.monotonic() - resumed_s < 10
        assert ear.source.counters.faults == 1


def test_moved_to_another_microphone(room, speech):
    """The stream goes on, with what the other one hears."""
    pactl("load-module", "module-null-sink", "sink_name=other", f"rate={SAMPLE_RATE}", "channels=1")
    with Ear() as ear:
        ear.goes_on()
        stream = pactl("list", "short", "source-outputs").split()[0]
        pactl("move-source-output", stream, "other.monitor")
        room.play(padded(speech), device="other")
        ear.hears(speech)
        assert ear.names in ([], ["microphone_lost", "microphone_back"])


def test_its_microphone_is_taken_away_and_another_is_there(room, speech):
    pactl("load-module", "module-null-sink", "sink_name=other", f"rate={SAMPLE_RATE}", "channels=1")
    with Ear() as ear:
        ear.goes_on()
        pactl("unload-module", "module-null-sink")  # all of them
        wait_for(lambda: ear.names == ["microphone_lost"], 15)
        pactl("load-module", "module-null-sink", "sink_name=third", "rate=48000", "channels=2")  # at another rate
        wait_for(lambda: ear.names == ["microphone_lost", "microphone_back"], 15)
        room.play(padded(speech), device="third")
        ear.hears(speech)


def test_open_but_silent(room, speech):
    """A null sink that nothing plays to brings zeros, as a muted microphone does."""
    with Ear(silent_s=1.0) as ear:
        wait_for(lambda: ear.names == ["microphone_silent"], 15)
        assert "nothing but 0 for 1 s" in ear.events[0][1]
        room.play(padded(speech))
        wait_for(lambda: ear.names[:2] == ["microphone_silent", "microphone_back"], 15)


def test_a_server_that_hangs_is_like_one_that_is_gone(room):
    with Ear() as ear:
        ear.goes_on()
        room.freeze()
        wait_for(lambda: ear.names == ["microphone_lost"], 15)
        room.thaw()
        wait_for(lambda: ear.names == ["microphone_lost", "microphone_back"], 25)


def test_an_alsa_device_that_reads_a_file(room, speech, tmp_path):
    """ALSA's `file` plug-in, at the pace of the made-up sound card."""
    (tmp_path / "speech.raw").write_bytes(padded(speech).tobytes())
    with (tmp_path / "asound.conf").open("a") as conf:
        conf.write(
            'pcm.recording { type file slave.pcm "room" file "/dev/null" format "raw" '
            f'infile "{tmp_path / "speech.raw"}" hint {{ show on description "recording" }} }}\n'
        )
    with Ear(device="recording") as ear:
        ear.hears(speech)
        assert ear.names == []


def test_the_doctor_listens_to_it(room):
    (microphone, *others) = ear_check.examine(SourceConfig(device="room"), 1.0)
    assert "room, 16000 Hz, 1 channel" in microphone.found
    assert [f.check for f in others if f.level is Level.FAIL] == ["level"]  # nothing plays: a muted microphone
    room.play(np.random.default_rng(0).normal(0, 100, 8 * SAMPLE_RATE).astype(np.int16))
    wait_for(
        lambda: {f.check: f.level for f in ear_check.examine(SourceConfig(device="room"), 1.0)}["level"] is Level.OK
    )
