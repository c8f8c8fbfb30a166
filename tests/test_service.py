"""The service as systemd sees it, and the files where a distribution's package would put them."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib

import pytest
from toy import REPOSITORY

UNIT = REPOSITORY / "systemd/whisperlet-agent.service"
BOARDS = sorted(path.name for path in (REPOSITORY / "firmware_config").iterdir() if path.is_dir())
AGENT = "usr/lib/whisperlet/bin/whisperlet-agent"


def program(name):
    """Path of a program; skips the test where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def make(target, root, board="generic-x86"):
    arguments = [f"DESTDIR={root}", f"BOARD={board}", "RECIPE=none", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        ["make", "-s", target, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def installed(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(params=BOARDS)
def device(request, tmp_path):
    """A root folder with everything that a board gets."""
    assert make("install-device", tmp_path, request.param) == (0, "")
    return tmp_path


def exposure(root):
    """What `systemd-analyze security` says, 0 (safe) to 10."""
    command = [program("systemd-analyze"), "security", "--offline=true", "--no-pager", f"--root={root}"]
    done = subprocess.run([*command, "whisperlet-agent.service"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1])


def test_exposure_is_low_on_every_board(device):
    assert exposure(device) <= 2.0


def test_the_unit_is_what_systemd_understands(device):
    """With every unit that it names, and its program, in place."""
    agent = device / AGENT
    agent.parent.mkdir(parents=True)
    agent.write_text("#!/bin/sh\n")
    agent.chmod(0o755)
    for name in ("sysinit", "basic", "shutdown", "network-online", "sound", "multi-user"):
        (device / f"usr/lib/systemd/system/{name}.target").write_text("[Unit]\nDescription=stands for another\n")
    command = [program("systemd-analyze"), "verify", "--man=no", "--recursive-errors=one", f"--root={device}"]
    done = subprocess.run([*command, "whisperlet-agent.service"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def settings(path):
    return dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))


def test_times_fit_the_agents_own():
    from agent.engine_process import START_TIMEOUT_S
    from agent.link import CONNECT_TIMEOUT_S
    from agent.mqtt import FAREWELL_S
    from agent.pipeline import DRAIN_S, FLUSH_S, PULSE_S
    from agent.store import CLOSE_TIMEOUT_S

    unit = settings(UNIT)
    assert int(unit["TimeoutStartSec"]) > START_TIMEOUT_S
    assert int(unit["TimeoutStopSec"]) > DRAIN_S + FLUSH_S + CONNECT_TIMEOUT_S + FAREWELL_S + CLOSE_TIMEOUT_S
    assert int(unit["WatchdogSec"]) > 4 * PULSE_S
    # a watchdog that bites again and again is not to end in the start limit at once
    assert int(unit["StartLimitIntervalSec"]) / int(unit["StartLimitBurst"]) > int(unit["WatchdogSec"])


def test_a_wrong_configuration_is_not_tried_again(tmp_path):
    (tmp_path / "agent.toml").write_text("[sourse]\n")
    command = [sys.executable, "-m", "agent", "run", "--config", str(tmp_path / "agent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert str(done.returncode) == settings(UNIT)["RestartPreventExitStatus"]


@pytest.mark.bundle
def test_the_engine_lives_without_memory_that_is_writable_and_executable(real_bundle, tmp_path):
    """MemoryDenyWriteExecute, as Linux itself has it since 6.3."""
    code = """
import ctypes, mmap, sys
from pathlib import Path
import numpy as np

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except OSError:
    pass
else:
    sys.exit("it is not forbidden")

from agent.config import RecogniserConfig, VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import SpeechChunk
from agent.supervisor import Supervisor
import agent.pipeline, agent.reopening

finals = []
ConfirmedGate(VadConfig())
engine = Supervisor(Path(sys.argv[1]), RecogniserConfig(), Path(sys.argv[2]), finals.append, print)
engine.start()
pcm = np.zeros(16000, np.int16)
engine.submit(SpeechChunk(1, 0, pcm, 0, is_last=True, speech_end=16000))
assert engine.drain(60)
engine.stop()
print(len(finals))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(real_bundle.path), str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# Files


def test_every_file_of_a_board_is_installed(device):
    """No file without a place on the device."""
    sources = {path.read_bytes() for path in device.rglob("*") if path.is_file()}
    board = settings_board(device)
    for path in (*(REPOSITORY / "firmware_config" / board).iterdir(), *(REPOSITORY / "systemd").iterdir()):
        assert path.read_bytes() in sources, path.name


def settings_board(device):
    """Which board it is, by its configuration."""
    text = (device / "etc/whisperlet/agent.toml").read_text()
    return next(name for name in BOARDS if (REPOSITORY / f"firmware_config/{name}/agent.toml").read_text() == text)


def test_modes_are_those_of_a_package(device):
    modes = {name: stat.S_IMODE((device / name).stat().st_mode) for name in installed(device)}
    assert modes.pop("etc/whisperlet/agent.toml") == 0o640  # it may name files with secrets
    assert set(modes.values()) == {0o644}


def test_an_update_leaves_the_configuration_alone_and_uninstalling_leaves_the_data(tmp_path):
    assert make("install-device", tmp_path)[0] == 0
    mine, data = tmp_path / "etc/whisperlet/agent.toml", tmp_path / "var/lib/whisperlet/outbox.db"
    mine.write_text("[mqtt]\n")
    data.parent.mkdir(parents=True)
    data.write_text("a final")
    assert make("install-device", tmp_path)[0] == 0
    assert mine.read_text() == "[mqtt]\n"
    assert make("uninstall-device", tmp_path) == (0, "")
    assert installed(tmp_path) == {"etc/whisperlet/agent.toml", "var/lib/whisperlet/outbox.db"}
    assert make("uninstall-device", tmp_path) == (0, "")


def test_an_unknown_board_installs_nothing(tmp_path):
    code, said = make("install-device", tmp_path, "toaster")
    assert code != 0
    assert "there is no firmware_config/toaster" in said
    assert installed(tmp_path) == set()


def test_user_and_folders_are_what_systemd_understands(tmp_path):
    """A dry run of both on an empty root."""
    make("install-device", tmp_path)
    sysusers = [program("systemd-sysusers"), "--dry-run", f"--root={tmp_path}"]
    done = subprocess.run(sysusers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?i)whisperlet agent", done.stdout + done.stderr)
    for name in ("whisperlet.conf", "whisperlet-board.conf"):
        for line in (tmp_path / "usr/lib/tmpfiles.d" / name).read_text().splitlines():
            assert re.fullmatch(r"#.*|[dezw] /\S+ (\d{4}|-) (root|whisperlet|-) (whisperlet|-) \S+( \S+)?", line), line


def tmpfiles(root, what):
    """Run systemd-tmpfiles on a folder in which a Raspberry Pi 5's files were installed."""
    make("install-device", root, "raspberry-pi-5")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nwhisperlet:x:990:990::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nwhisperlet:x:990:\n")
    names = ["whisperlet.conf", "whisperlet-board.conf"]
    command = [program("systemd-tmpfiles"), what, f"--root={root}", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
def test_folders_are_made_and_the_governor_is_set(tmp_path):
    governor = tmp_path / "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.touch()
    tmpfiles(tmp_path, "--create")
    assert governor.read_text().strip() == "schedutil"
    etc = (tmp_path / "etc/whisperlet").stat()
    assert (stat.S_IMODE(etc.st_mode), etc.st_gid) == (0o750, 990)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
def test_weights_of_bundles_of_long_ago_go(tmp_path):
    cache = tmp_path / "var/cache/whisperlet"
    cache.mkdir(parents=True)
    for name, age_days in (("old.xnnpack", 31), ("read.xnnpack", 29)):
        (cache / name).touch()
        os.utime(cache / name, (time.time() - 86_400 * age_days, time.time() - 86_400 * 400))  # read, written
    tmpfiles(tmp_path, "--clean")
    assert [path.name for path in cache.iterdir()] == ["read.xnnpack"]


def test_the_board_table_says_what_the_files_say():
    table = (REPOSITORY / "docs/device.md").read_text()
    for board in BOARDS:
        row = re.search(rf"^\| `{board}` \|(.*)$", table, re.MULTILINE)[1]
        recogniser = tomllib.loads((REPOSITORY / f"firmware_config/{board}/agent.toml").read_text())["recogniser"]
        assert f"| {recogniser['threads']}" in row
        assert f"| {recogniser['hop_ms']} ms |" in row
        limit = settings(REPOSITORY / f"firmware_config/{board}/service.conf").get(
            "MemoryMax", settings(UNIT)["MemoryMax"]
        )
        assert f"| {limit.replace('M', ' MB').replace('G', ' GB')} |" in row
