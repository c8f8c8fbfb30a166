"""The doctor on made-up machines, made-up microphones and a real broker."""

import io
import json
import math
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from brokers import MOSQUITTO, Broker, Subscriber, free_port, needs_mosquitto, wait_for
from rich.console import Console
from toy import REPOSITORY

from agent import broker_check, doctor, ear_check, machine
from agent.config import Config, MqttConfig, OutboxConfig, PowerConfig, RecogniserConfig, SourceConfig
from agent.findings import Level, fail, ok, warn
from agent.messages import AudioChunk
from agent.ring import SourceCounters
from whisperlet.errors import AudioDeviceLost, AudioError

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL

# The machine

PI_4 = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nprocessor\t: 1\nFeatures\t: fp asimd\n"
PI_5 = PI_4.replace("crc32", "crc32 asimddp")
PC = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma\nprocessor\t: 1\nflags\t\t: fpu sse2 avx2 fma\n"


def tree(root, files):
    for name, contents in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{contents}\n")
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "threads", "level", "found", "advice"),
    [
        (PI_5, 2, OK, "2 cores, asimddp", ""),
        (PC, 2, OK, "2 cores, avx2", ""),
        (PC.replace("avx2", "avx2 avx512_vnni"), 1, OK, "2 cores, avx512_vnni", ""),
        (PI_4, 2, WARN, "2 cores, nothing for int8", "hop_ms = 1000"),
        (PI_5, 4, WARN, "2 cores, asimddp", "recogniser.threads is 4: set 1"),
        ("", 1, WARN, "unknown", "cannot be read"),
    ],
)
def test_processor(tmp_path, cpuinfo, threads, level, found, advice):
    finding = machine.processor(threads, tree(tmp_path, {"cpuinfo": cpuinfo}))
    assert (finding.level, finding.found) == (level, found)
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("modes", "level", "found"),
    [
        ([("schedutil", "cpufreq-dt"), ("performance", "cpufreq-dt")], OK, "performance, schedutil"),
        ([("powersave", "intel_pstate")], OK, "powersave"),
        ([("powersave", "cpufreq-dt")], WARN, "powersave"),
        ([("schedutil", "x"), ("userspace", "x")], WARN, "userspace"),
        ([], OK, "the system does not set the clock rate"),
    ],
)
def test_governor(tmp_path, modes, level, found):
    for i, (mode, driver) in enumerate(modes):
        folder = tmp_path / f"devices/system/cpu/cpufreq/policy{i}"
        tree(folder, {"scaling_governor": mode, "scaling_driver": driver})
    finding = machine.governor(tmp_path)
    assert (finding.level, finding.found) == (level, found)
    assert ("schedutil" in finding.advice) == (level is WARN)


@pytest.mark.parametrize(
    ("files", "firmware", "level", "found"),
    [
        ({"class/thermal/thermal_zone0/temp": 51_200}, "", OK, "51 °C"),
        ({"class/thermal/thermal_zone0/temp": 80_000}, "", WARN, "80 °C"),
        ({"class/thermal/thermal_zone0/temp": 60_000}, "throttled=0x50004", WARN, "60 °C, throttled"),
        ({"class/thermal/thermal_zone0/temp": 40_000}, "throttled=0x50001", FAIL, "40 °C, under voltage"),
        ({}, "throttled=0x0", OK, "nothing tells the temperature"),
    ],
)
def test_heat(tmp_path, files, firmware, level, found):
    config = Config(power=PowerConfig(sysfs_dir=str(tree(tmp_path, files))))
    finding = machine.heat(config, lambda _command: firmware)
    assert (finding.level, finding.found, bool(finding.advice)) == (level, found, level is not OK)


@pytest.mark.parametrize(
    ("meminfo", "level", "found"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    2000000 kB", OK, "2048 MB available"),
        ("MemAvailable: 300000 kB", WARN, "307 MB available"),
        ("", WARN, "unknown"),
    ],
)
def test_memory(tmp_path, meminfo, level, found):
    finding = machine.memory(tree(tmp_path, {"meminfo": meminfo}))
    assert (finding.level, finding.found) == (level, found)


@pytest.mark.parametrize(("state", "level"), [(0, OK), (1, OK), (5, WARN), (None, WARN)])
def test_time(state, level):
    assert machine.time_sync(state).level is level


def test_the_kernel_says_how_its_clock_is():
    assert machine.kernel_clock() in {None, 0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(("free", "level"), [(2e9, OK), (3e8, WARN), (5e7, FAIL)])
def test_disk(tmp_path, free, level):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=free)

    config = Config(
        recogniser=RecogniserConfig(weight_cache_dir=str(tmp_path / "weights")),
        outbox=OutboxConfig(dir=str(tmp_path / "not/made/yet")),
    )
    findings = list(machine.disks(machine.folders(config), usage))
    assert [finding.level for finding in findings] == [level] * 2
    assert asked == [tmp_path, tmp_path]


def test_the_whole_machine(tmp_path):
    proc = tree(tmp_path / "proc", {"cpuinfo": PC, "meminfo": "MemAvailable: 2000000 kB"})
    sysfs = tree(tmp_path / "sys", {"class/thermal/thermal_zone0/temp": 40_000})
    findings = machine.examine(
        Config(power=PowerConfig(sysfs_dir=str(sysfs))), proc=proc, firmware=lambda _: "", clock_state=lambda: 0
    )
    assert [f.check for f in findings][:5] == ["processor", "governor", "heat", "memory", "time"]
    assert {f.level for f in findings[:5]} == {OK}


# The microphone

NOISE = np.random.default_rng(0).normal(0, 60, 64_000)


class FakeMicrophone:
    """Brings `pcm` in chunks of 20 ms, `pace` times as fast as it should."""

    def __init__(self, pcm, *, rate=48_000, pace=1.0, overflows=0, dies=False):
        self.counters = SourceCounters(overflows=overflows)
        self.name, self.rate, self.n_channels = "USB", rate, 2
        self.pcm, self.pace, self.dies, self.closed = pcm, pace, dies, False

    def __call__(self, _config):
        return self

    def __iter__(self):
        for start in range(0, len(self.pcm) - 319, 320):
            chunk = self.pcm[start : start + 320].clip(-32_768, 32_767).astype(np.int16)
            yield AudioChunk(chunk, start, (start + 320) / 16_000 / self.pace)
        if self.dies:
            raise AudioDeviceLost("microphone 'USB': no audio for 2 s")

    def close(self):
        self.closed = True


def heard(microphone):
    findings = ear_check.examine(SourceConfig(), 2.0, microphone)
    assert microphone.closed
    return {finding.check: finding for finding in findings}


def test_a_good_microphone():
    findings = heard(FakeMicrophone(NOISE))
    assert {finding.level for finding in findings.values()} == {OK}
    assert findings["microphone"].found == "USB, 48000 Hz, 2 channels"
    assert findings["level"].found == "-55 dBFS"
    assert findings["sample rate"].found == "48000 Hz, resampled to 16000 Hz"


@pytest.mark.parametrize(
    ("microphone", "check", "level", "found"),
    [
        (FakeMicrophone(0 * NOISE), "level", FAIL, "nothing but 0"),
        (FakeMicrophone(0 * NOISE + 7), "level", FAIL, "nothing but 7"),
        (FakeMicrophone(NOISE / 20), "level", WARN, "-82 dBFS"),
        (FakeMicrophone(NOISE * 100), "level", WARN, "-15 dBFS"),
        (FakeMicrophone(NOISE + 4000), "level", WARN, "offset of 12 %"),
        (FakeMicrophone(NOISE * 200), "clipping", WARN, "% of the samples"),
        (FakeMicrophone(NOISE, overflows=3), "xruns", WARN, "3 overflows"),
        (FakeMicrophone(NOISE, rate=8_000), "sample rate", WARN, "8000 Hz"),
        (FakeMicrophone(NOISE, pace=44.1 / 48), "sample rate", WARN, "48000 Hz promised, 441"),
        (FakeMicrophone(NOISE[:4000], dies=True), "microphone", FAIL, "no audio for 2 s"),
        (FakeMicrophone(NOISE[:4000]), "microphone", FAIL, "no audio came"),
    ],
)
def test_what_may_be_wrong_with_a_microphone(microphone, check, level, found):
    finding = heard(microphone)[check]
    assert finding.level is level
    assert found in finding.found
    assert finding.advice


@pytest.mark.parametrize(
    ("error", "advice"), [(AudioDeviceLost("busy"), "systemctl stop"), (AudioError("no PyAudio"), "install")]
)
def test_no_microphone(error, advice):
    def refuse(_config):
        raise error

    (finding,) = ear_check.examine(SourceConfig(), 1.0, refuse)
    assert (finding.level, finding.found) == (FAIL, str(error))
    assert advice in finding.advice


# The broker


@pytest.fixture
def broker(tmp_path):
    broker = Broker(tmp_path)
    yield broker
    broker.kill()


def asked(port, **config):
    findings = broker_check.examine(MqttConfig(url=f"mqtt://127.0.0.1:{port}", device="dev", **config), timeout_s=2.0)
    return [(finding.check, finding.level) for finding in findings], findings


@needs_mosquitto
def test_a_broker_that_takes_our_word(broker):
    broker.start()
    with Subscriber(broker.port) as subscriber:
        levels, findings = asked(broker.port)
        assert levels == [("broker", OK), ("rights", OK)]
        assert findings[1].found == "may publish to whisperlet/dev/event"
        assert wait_for(lambda: subscriber.on("event"))[0]["name"] == "doctor"
        assert subscriber.on("status") == []
    levels, _ = asked(broker.port, version="3.1.1")
    assert levels == [("broker", OK), ("rights", WARN)]


@needs_mosquitto
def test_the_agents_own_connection_stands(broker):
    """The doctor does not take its session over."""
    from test_mqtt import running

    broker.start()
    with running(broker.port) as agent:
        wait_for(lambda: agent.is_connected)
        asked(broker.port)
        assert agent.is_connected
        assert agent.counts().connects == 1


@needs_mosquitto
def test_a_broker_that_forbids_our_topic(broker, tmp_path):
    (tmp_path / "acl").write_text("topic readwrite other/#\n")
    broker.start(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}")
    levels, findings = asked(broker.port)
    assert levels == [("broker", OK), ("rights", FAIL)]
    assert "whisperlet/dev/#" in findings[1].advice


@needs_mosquitto
def test_a_broker_that_does_not_let_us_in(broker, tmp_path):
    passwords = tmp_path / "passwords"
    passwords.touch()
    program = [MOSQUITTO.replace("/sbin/", "/bin/") + "_passwd", "-b", str(passwords), "someone", "else"]
    if subprocess.run(program, capture_output=True, check=False).returncode:
        pytest.skip("mosquitto_passwd is not installed")
    broker.start(f"allow_anonymous false\npassword_file {passwords}")
    levels, findings = asked(broker.port)
    assert levels == [("broker", FAIL)]
    assert "access list" in findings[0].advice or "password" in findings[0].advice


def test_no_broker():
    levels, findings = asked(free_port())
    assert levels == [("broker", FAIL)]
    assert "Connection refused" in findings[0].found


def test_something_else_at_the_brokers_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        levels, findings = asked(server.getsockname()[1])
    assert levels == [("broker", FAIL)]
    assert "does not answer" in findings[0].found


def test_a_password_file_that_is_not_there():
    levels, findings = asked(1, password_file="/nonexistent/password", username="me")
    assert levels == [("broker", FAIL)]
    assert findings[0].found.startswith("mqtt.password_file: ")


# Bundle, table and command


def test_a_whole_bundle(toy_path):
    findings = list(doctor.bundle(RecogniserConfig(bundle=str(toy_path))))
    assert [finding.level for finding in findings] == [OK]
    assert "whole" in findings[0].found


def test_a_damaged_bundle(toy_path, tmp_path):
    data = bytearray(toy_path.read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "bad.tflite").write_bytes(data)
    for bundle, found in ((str(tmp_path / "bad.tflite"), "damaged"), (None, "none"), ("/nonexistent", "No such file")):
        (finding,) = doctor.bundle(RecogniserConfig(bundle=bundle))
        assert finding.level is FAIL
        assert found in finding.found


def test_a_language_that_the_bundle_does_not_have(toy_path):
    (finding,) = doctor.bundle(RecogniserConfig(bundle=str(toy_path), language="tlh"))
    assert finding.level is FAIL
    assert "does not have 'tlh'" in finding.found


def test_exit_codes_and_json():
    findings = [ok("a", "x"), warn("b", "y", "z")]
    assert [doctor.exit_code(each) for each in ([], findings[:1], findings, [*findings, fail("c", "", "")])] == [
        0,
        0,
        1,
        2,
    ]
    assert json.loads(doctor.as_json(findings)) == {
        "level": "warn",
        "findings": [
            {"check": "a", "level": "ok", "found": "x", "advice": ""},
            {"check": "b", "level": "warn", "found": "y", "advice": "z"},
        ],
    }


def test_the_table_shows_brackets_as_they_are():
    out = io.StringIO()
    doctor.print_table([warn("microphone", "pip install 'whisperlet[mic]'", "[red]")], Console(file=out, width=120))
    assert "whisperlet[mic]" in out.getvalue()
    assert "[red]" in out.getvalue()


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "agent", "doctor", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_the_command(toy_path):
    code, shown = command("--bundle", toy_path, "--broker", f"mqtt://127.0.0.1:{free_port()}", "--no-microphone")
    assert code == 2
    assert re.search(r"^broker +fail +127\.0\.0\.1:\d+: Connection refused", shown, re.MULTILINE)
    assert re.search(r"^bundle +ok", shown, re.MULTILINE)
    assert "microphone" not in shown


def test_the_command_for_a_program_and_a_wrong_configuration(tmp_path):
    (tmp_path / "agent.toml").write_text("[sourse]\n")
    code, shown = command("--config", tmp_path / "agent.toml", "--json")
    (finding,) = json.loads(shown)["findings"]
    assert code == 2
    assert (finding["check"], finding["level"]) == ("configuration", "fail")
    assert "sourse: unknown key" in finding["found"]


def test_thresholds_make_sense():
    """A whisper across a room is above the floor, a shout into the microphone below the ceiling."""
    assert ear_check.QUIET_DBFS < 20 * math.log10(10 / 32_768) < ear_check.LOUD_DBFS
