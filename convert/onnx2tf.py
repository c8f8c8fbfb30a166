"""ONNX -> .tflite through onnx2tf and TensorFlow: an independent second path, to check the first one by.

Both live in an environment of their own under the cache, made on first use, since they want other versions of nearly
everything. Nothing is imported from it: the converter runs as a program, its result on the device's runtime.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from torch import Tensor

from whisperlet.errors import ConfigError, ModelError

from . import wheels
from .onnx_export import Tensors

NAME = "onnx2tf, LiteRT"
PINS = "onnx2tf-constraints.txt"
PYTHON = (3, 11)  # whose wheels are pinned
CONVERT_TIMEOUT_S = 1200
INSTALL_TIMEOUT_S = 1800


def folder() -> Path:
    """Where the environment is, or will be."""
    return wheels.cache_dir() / "onnx2tf"


def is_there() -> bool:
    """Whether the environment has been made, wholly."""
    return (folder() / PINS).is_file()


def environment(say: Callable[[str], None] = lambda _: None) -> Path:
    """The environment's folder, made first if need be, which downloads 600 MB. Raises ConfigError."""
    if is_there():
        return folder()
    if sys.version_info[:2] != PYTHON:
        raise ConfigError(
            f"onnx2tf's pinned wheels are for Python {PYTHON[0]}.{PYTHON[1]}; run the converter with that"
        )
    say("installs onnx2tf and TensorFlow")
    venv.create(folder(), with_pip=True, clear=True)
    with as_file(files("convert") / PINS) as pins:
        command = [
            str(folder() / "bin/python"),
            "-m",
            "pip",
            "install",
            "-qq",
            "--no-input",
            "--no-deps",
            "-r",
            str(pins),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        if done.returncode:
            raise ConfigError(f"onnx2tf cannot be installed into {folder()}: {_last_line(done.stderr)}")
        (folder() / PINS).write_bytes(pins.read_bytes())  # last: says that all of it is there
    return folder()


def convert(path: Path, inputs: dict[str, Tensor], work: Path) -> Path:
    """What onnx2tf makes of an ONNX file. Raises ModelError naming the op at which it stops."""
    kept = [name for name, value in inputs.items() if value.ndim > 2]  # no reordering of axes as images would need
    command = [
        str(folder() / "bin/onnx2tf"),
        *("--input_onnx_file_path", str(path), "--output_folder_path", str(work)),
        *("--copy_onnx_input_output_names_to_tflite", "--not_use_onnxsim", "--non_verbose"),
        *("--replace_to_pseudo_operators", "Erf"),  # the device's runtime has no such op
        *("--keep_shape_absolutely_input_names", *kept),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path.name}: onnx2tf took more than {CONVERT_TIMEOUT_S} s") from None
    found = work / f"{path.stem}_float32.tflite"
    if done.returncode or not found.is_file():
        raise ModelError(f"{path.name}: onnx2tf cannot convert it: {reason(done.stdout + done.stderr)}")
    return found


def reason(log: str) -> str:
    """The op that a failed run names, and what was wrong with it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log)
    op = re.search(r"onnx_op_(?:type|name): \S+(?: onnx_op_name: \S+)?", plain)
    error = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", plain, re.MULTILINE)
    said = [op[0] if op else "", error[-1] if error else _last_line(plain)]
    return "; ".join(part for part in said if part)


def run(path: Path, inputs: dict[str, Tensor]) -> Tensors:
    """Outputs of a .tflite of the second path, by the names that the ONNX file has them under."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        runner = Interpreter(str(path), num_threads=2).get_signature_runner()
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path.name}: the device's runtime refuses it: {_last_line(str(error))}") from None
    wanted = runner.get_input_details()
    found: Tensors = runner(**{name: value.numpy() for name, value in inputs.items() if name in wanted})
    return found


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
