"""`python -m tests.fuzzing`: fuzz for a while, and say how many inputs were tried.

With atheris, which is guided by coverage, where it can be imported; else with hypothesis. Each target in a process of
its own, so that one that hangs or crashes the interpreter is a failure of that target and no more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

TESTS = Path(__file__).parents[1]
HANG_S = 20  # for one input
GRACE_S = 120  # to start and to end
RSS_MB = 2048
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # for a file that is written 10,000 times a second


def fuzz(
    names: Annotated[list[str] | None, typer.Argument(help="Targets; all if none is given.")] = None,
    minutes: Annotated[float, typer.Option(help="For all of them together.")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Write what was found here, as JSON.")] = None,
) -> None:
    """Fuzz, report, and end with 1 if anything was found."""
    from .targets import TARGETS

    chosen = names or list(TARGETS)
    engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    results = [one(name, engine, max(1.0, 60 * minutes / len(chosen))) for name in chosen]
    report = {
        "engine": engine,
        "executions": sum(result["executions"] for result in results),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "targets": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(any(not result["clean"] for result in results))


def one(name: str, engine: str, seconds: float) -> dict[str, Any]:
    """Fuzz a target in a process of its own."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, "-m", "tests.fuzzing.child", name, engine, f"{seconds:g}", folder]
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        status: int | str
        try:
            status = child.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            status = "hung"
        finally:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
        log.seek(0)
        said = log.read()
    counts = re.findall(r"Done (\d+) runs|number_of_executed_units: (\d+)", said)
    result = {
        "target": name,
        "clean": status == 0 and bool(counts),
        "executions": int("".join(counts[-1])) if counts else 0,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    if not result["clean"]:
        print(said[-6000:], file=sys.stderr)
        result["status"] = status
    print(f"{name}: {result['executions']} executions, {'clean' if result['clean'] else 'FAILED'}", file=sys.stderr)
    return result


def environment() -> dict[str, str]:
    """With the tests' own modules in reach."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}


if __name__ == "__main__":
    typer.run(fuzz)
