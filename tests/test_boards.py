"""The files of the boards: each is read here by what reads it on the device, or by its grammar."""

import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from toy import REPOSITORY

from agent.config import Config, load

FOLDER = REPOSITORY / "firmware_config"
BOARDS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
READ_HERE = {"agent.toml", "asound.conf", "config.txt", "microphone.rules", "pipewire.conf"}
READ_IN_TEST_SERVICE = {"service.conf", "tmpfiles.conf"}  # by systemd


def test_all_boards_are_there_and_every_file_has_its_test():
    assert BOARDS == ["generic-x86", "raspberry-pi-4", "raspberry-pi-5", "snapdragon"]
    assert {path.name for path in FOLDER.glob("*/*")} == READ_HERE | READ_IN_TEST_SERVICE
    for board in BOARDS:
        names = {path.name for path in (FOLDER / board).iterdir()}
        assert names >= {"agent.toml", "asound.conf", "microphone.rules"} | READ_IN_TEST_SERVICE


@pytest.mark.parametrize("board", BOARDS)
def test_configuration_is_valid_and_says_only_what_differs(board):
    config, default = load(FOLDER / board / "agent.toml"), Config()
    for section, keys in tomllib.loads((FOLDER / board / "agent.toml").read_text()).items():
        for key, value in keys.items():
            assert getattr(getattr(config, section), key) == value
            if (section, key) != ("recogniser", "threads"):  # which is part of the board's description
                assert value != getattr(getattr(default, section), key), key
    assert config.source.device == "whisperlet"
    assert config.recogniser.weight_cache_dir == "/run/whisperlet"  # RuntimeDirectory= of the unit


@pytest.mark.parametrize("board", [board for board in BOARDS if board.startswith("raspberry-pi")])
def test_the_service_may_ask_the_firmware(board):
    """`vcgencmd` opens /dev/vcio, which is the group video's: without, nothing tells of throttling or a weak supply."""
    lines = (FOLDER / board / "service.conf").read_text().splitlines()
    assert {"SupplementaryGroups=video", "DeviceAllow=/dev/vcio rw"} <= set(lines)


ALSA = """
import ctypes, sys
alsa = ctypes.CDLL(sys.argv[1])
handler = ctypes.CFUNCTYPE(None)
alsa.snd_strerror.restype = ctypes.c_char_p
if code := alsa.snd_config_update():
    if code < 0:
        sys.exit(alsa.snd_strerror(code).decode())
top = ctypes.c_void_p.in_dll(alsa, "snd_config")
for name in sys.argv[2:]:
    node, text = ctypes.c_void_p(), ctypes.c_char_p()
    if alsa.snd_config_search(top, name.encode(), ctypes.byref(node)) < 0:
        sys.exit(f"{name} is not there")
    alsa.snd_config_get_string(node, ctypes.byref(text))
    print((text.value or b"").decode())
"""


def alsa_values(board, *names):
    """What ALSA's own reader finds under these names."""
    library = ctypes.util.find_library("asound") or pytest.skip("libasound is not installed")
    environment = {**os.environ, "ALSA_CONFIG_PATH": str(FOLDER / board / "asound.conf")}
    done = subprocess.run(
        [sys.executable, "-c", ALSA, library, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("board", ["raspberry-pi-4", "raspberry-pi-5"])
def test_alsa_alone(board):
    names = (
        "pcm.whisperlet.type",
        "pcm.whisperlet.slave.pcm",
        "pcm.whisperlet.hint.description",
        "ctl.whisperlet.card",
    )
    assert alsa_values(board, *names) == ["plug", "hw:CARD=whispermic,DEV=0", "whisperlet", "whispermic"]
    names = ("pcm.whisperlet_i2s.slave.pcm.type", "pcm.whisperlet_i2s.slave.pcm.slave.format")
    assert alsa_values(board, *names) == ["route", "S32_LE"]


@pytest.mark.parametrize("board", ["generic-x86", "snapdragon"])
def test_alsa_by_way_of_pipewire(board):
    names = ("pcm.whisperlet.type", "pcm.whisperlet.capture_node", "pcm.whisperlet_direct.slave.pcm")
    expected = ["pipewire", "whisperlet_echo_cancel", "hw:CARD=whispermic,DEV=0"]
    assert alsa_values(board, *names) == expected
    (module,) = spa_json((FOLDER / board / "pipewire.conf").read_text())["context.modules"]
    assert module["name"] == "libpipewire-module-echo-cancel"
    args = module["args"]
    assert args["source.props"]["node.name"] == expected[1]
    assert args["library.name"] == "aec/libspa-aec-webrtc"
    assert args["aec.args"] == {"webrtc.gain_control": True, "webrtc.noise_suppression": False}


def spa_json(text):
    """PipeWire's relaxed JSON: `=` for `:`, no commas, no quotes needed, `#` begins a comment."""
    words = re.findall(r'"[^"]*"|[\[\]{}=]|[^\s\[\]{}="]+', re.sub(r"#.*", "", text))
    value, rest = _spa_object([*words, "}"])
    assert rest == []
    return value


def _spa_value(words):
    first, *rest = words
    if first == "{":
        return _spa_object(rest)
    if first == "[":
        items = []
        while rest[0] != "]":
            item, rest = _spa_value(rest)
            items.append(item)
        return items, rest[1:]
    try:
        return json.loads(first), rest
    except json.JSONDecodeError:
        return first, rest


def _spa_object(words):
    found = {}
    while words[0] != "}":
        name, equals, *rest = words
        assert equals == "=", name
        found[name], words = _spa_value(rest)
    return found, words[1:]


RULE = re.compile(r'([A-Z]+(?:\{[^}]+\})?)(==|!=|=|\+=|:=)"([^"]*)"')


def rules(path):
    """Each rule of a udev file as a list of (key, operator, value)."""
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            parts = line.split(", ")
            matches = [RULE.fullmatch(part) for part in parts]
            assert all(matches), line
            yield [match.groups() for match in matches]


@pytest.mark.parametrize("board", BOARDS)
def test_the_microphone_has_a_stable_name(board):
    path = FOLDER / board / "microphone.rules"
    found = list(rules(path))
    named = [rule for rule in found if ("ATTR{id}", "=", "whispermic") in rule]
    assert named
    for rule in named:
        assert {("ACTION", "==", "change"), ("SUBSYSTEM", "==", "sound"), ("KERNEL", "==", "card[0-9]*")} <= set(rule)
    awake = [rule for rule in found if ("ATTR{power/control}", "=", "on") in rule]
    assert len(awake) == 1
    card = re.search(r"CARD=(\w+)", (FOLDER / board / "asound.conf").read_text())[1]
    assert card == "whispermic"


@pytest.mark.parametrize("board", BOARDS)
def test_udev_understands_the_rules(board, tmp_path):
    udevadm = shutil.which("udevadm", path="/usr/bin:/usr/sbin:/bin:/sbin") or pytest.skip("udevadm is not installed")
    if "verify" not in subprocess.run([udevadm, "--help"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("udevadm has no verify before systemd 254")
    path = tmp_path / "85-whisperlet-microphone.rules"
    path.write_text((FOLDER / board / "microphone.rules").read_text())
    done = subprocess.run([udevadm, "verify", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("board", ["raspberry-pi-4", "raspberry-pi-5"])
def test_the_boot_lines_are_assignments_that_the_firmware_knows(board):
    lines = [line for line in (FOLDER / board / "config.txt").read_text().splitlines() if not line.startswith("#")]
    assert "dtoverlay=googlevoicehat-soundcard" in lines
    assert "dtparam=i2s=on" in lines
    for line in lines:
        assert re.fullmatch(r"(dtparam|dtoverlay|temp_soft_limit)=[\w=,-]+", line), line


def test_the_journal_is_bounded():
    lines = (FOLDER / "journald.conf").read_text().splitlines()
    assert lines[1] == "[Journal]"
    values = dict(line.split("=") for line in lines[2:])
    assert values["SystemMaxUse"] == "64M"
    assert set(values) == {"SystemMaxUse", "SystemKeepFree", "MaxRetentionSec", "SyncIntervalSec"}
