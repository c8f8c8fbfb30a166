"""What the kernel tells in small files, and the Raspberry Pi's firmware by way of `vcgencmd`. Absent is not an error."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

SYSFS = Path("/sys")
TIMEOUT_S = 2.0  # of the firmware

Firmware = Callable[[str], str]  # a command, such as "get_throttled" -> what it answers; "" where there is none


def text(path: Path) -> str:
    """Contents without the white space around them, or the zero at their end; "" if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:  # not there, for root only, or the sensor does not answer
        return ""


def number(path: Path) -> int | None:
    """Contents as a whole number; None if they are none."""
    try:
        return int(text(path))
    except ValueError:
        return None


def vcgencmd(command: str) -> str:
    """Ask the firmware of a Raspberry Pi; "" on any other machine, or where /dev/vcio is out of reach."""
    program = shutil.which("vcgencmd")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
