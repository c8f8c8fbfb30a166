"""Readers of foreign bytes refuse in one sentence, and never crash or hang: a little of what `make fuzz` does."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from fuzzing.mutation import near
from fuzzing.targets import TARGETS, checked, with_manifest
from hypothesis import HealthCheck, given, settings

from whisperlet import bundle
from whisperlet.errors import BundleError, ConfigError


def loud_wav():
    """Samples that are finite, and no sound."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(100, 1e38, np.float32), 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.parametrize("name", TARGETS)
def test_nearly_right(name, tmp_path):
    run = checked(name, tmp_path)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(near(TARGETS[name].seeds()))
    def nearly_right(data):
        run(data)

    nearly_right()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_read(name, tmp_path):
    """Else the fuzzer would only ever knock at the door."""
    TARGETS[name].run(TARGETS[name].seeds()[name == "pcm"], tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config", b"x = " + b"[" * 5000),
        ("config", b"x = " + b"1" * 5000),
        ("config", b"[vad]\nstart_ms = " + b"1" * 4000),
        ("bundle_manifest", b"[" * 100_000),
        ("bundle_manifest", b'{"format_version": 2, "recipe": ' + b'{"a":' * 100_000),
        ("bundle_manifest", b'{"format_version": 2, "\xff": 1}'),
        ("firmware", b"X_A current(0)=1.2.3A X_V volt(0)=.V"),
        ("command", b"\x00{" * 20_000),
        ("command", b"\x03" + b'{"id":' + b"[" * 100_000),
        ("command", b'\x00{"id": "\xff"}'),
        ("command", b'\x00{"\xff": 1}'),
        ("command", b'\x06{"\xff": 1}'),
        ("audio", loud_wav()),
        ("reply", b"\x82\xa4type\xa6Faile\x80d\xa6reason\xa3why"),
        ("reply", b"\x84\xa4type\xa5Heard"),
    ],
)
def test_found_before(name, data, tmp_path):
    checked(name, tmp_path)(data)


def test_what_a_bundle_unpacks_to_is_bounded(tmp_path):
    path = tmp_path / "bomb.tflite"
    path.write_bytes(with_manifest(b" " * (bundle.MAX_ENTRY_BYTES + 1)))
    assert path.stat().st_size < 200_000
    with pytest.raises(BundleError, match="is larger than"):
        bundle.open_bundle(path)


def test_a_refusal_of_a_config_is_one_sentence(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_bytes(b'[mqtt]\n"a\\nb" = 1\nurl = "mqtt://x"')
    with pytest.raises(ConfigError) as refused:
        TARGETS["config"].run(path.read_bytes(), tmp_path)
    assert "\n" not in str(refused.value)


def test_the_long_form_counts_what_it_ran(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.fuzzing", "pcm", "firmware", "--minutes", "0.04", "--out", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [target["target"] for target in found["targets"]] == ["pcm", "firmware"]
    assert all(target["clean"] and target["executions"] > 10 for target in found["targets"])
    assert found["executions"] == sum(target["executions"] for target in found["targets"])
