"""The second path: another converter, in an environment of its own."""

import subprocess
import sys
import types

import pytest
import toy
from rich.console import Console

from convert import artefacts, onnx2tf
from convert.onnx_export import MAX_ERROR, Shapes
from whisperlet.errors import ConfigError, ModelError

LOG = """
INFO: 17 / 90
INFO: onnx_op_type: Gather onnx_op_name: node_embedding
ERROR: The trace log is below.
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: Shape must be rank 1 but is rank 0
ERROR: input_onnx_file_path: decode.onnx
"""


def test_a_failure_is_named_by_its_op():
    assert onnx2tf.reason(LOG) == (
        "onnx_op_type: Gather onnx_op_name: node_embedding; ValueError: Shape must be rank 1 but is rank 0"
    )
    assert onnx2tf.reason("no such option\n") == "no such option"


def test_it_is_made_only_once_and_counts_only_when_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("WHISPERLET_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(onnx2tf.venv, "create", lambda folder, **_: made.append(folder) or folder.mkdir(parents=True))
    failed = types.SimpleNamespace(returncode=1, stderr="warning\nno matching distribution\n")
    monkeypatch.setattr(onnx2tf.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(onnx2tf, "PYTHON", sys.version_info[:2])
    with pytest.raises(ConfigError, match=r"cannot be installed .*: no matching distribution"):
        onnx2tf.environment()
    assert not onnx2tf.is_there()
    made[0].rmdir()
    monkeypatch.setattr(onnx2tf.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=0))
    assert onnx2tf.environment() == onnx2tf.folder() == made[0]
    onnx2tf.environment()
    assert len(made) == 2
    assert onnx2tf.is_there()


def test_another_python_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WHISPERLET_CACHE", str(tmp_path))
    monkeypatch.setattr(onnx2tf, "PYTHON", (3, 9))
    with pytest.raises(ConfigError, match=r"for Python 3\.9"):
        onnx2tf.environment()


def test_what_it_cannot_convert_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("WHISPERLET_CACHE", str(tmp_path))
    (tmp_path / "onnx2tf/bin").mkdir(parents=True)
    program = tmp_path / "onnx2tf/bin/onnx2tf"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LOG}\nEND\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ModelError, match=r"d\.onnx: onnx2tf cannot convert it: onnx_op_type: Gather"):
        onnx2tf.convert(tmp_path / "d.onnx", {}, tmp_path)
    assert subprocess.run([program], check=False, capture_output=True).returncode == 1


def test_the_encoder_agrees(tmp_path):
    """And the decoder, or it says what stopped it."""
    if not onnx2tf.is_there():
        pytest.skip("onnx2tf's environment is not there; `whisperlet-convert onnx RECIPE --exporter onnx2tf` makes it")
    toy.save_checkpoint(tmp_path / "checkpoint")
    shapes = Shapes(n_frames=128, n_tokens=1)
    rows = artefacts.make(toy.recipe(tmp_path), shapes, tmp_path, Console(quiet=True), second=True)
    encoder, decoder = (row for row in rows if row.runtime == onnx2tf.NAME)
    assert encoder.error <= MAX_ERROR
    assert (decoder.error is not None and decoder.error <= MAX_ERROR) or "onnx_op" in decoder.note
    assert (tmp_path / "toy.encode_128.tflite").is_file()
