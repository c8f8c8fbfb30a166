"""`whisperlet-agent`: listen and publish, or transcribe files."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from whisperlet.bundle import Bundle, open_bundle
from whisperlet.errors import ConfigError, WhisperletError

from . import config as configs
from . import logs
from .config import Config, LogConfig, checked_language, default_cache_dir
from .confirm import ConfirmedGate
from .controls import RESTART_STATUS
from .hearing import listen
from .messages import SpeechChunk, Transcript
from .sources import Source, open_source, paced
from .supervisor import EngineLost, Supervisor

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML file; firmware_config/agent.toml has every key.")
]
BundleOption = Annotated[str | None, typer.Option("--bundle", help="The .tflite bundle; overrides recogniser.bundle.")]
FINAL_TIMEOUT_S = 3600.0


@app.callback()
def _about() -> None:
    """Hear speech, publish words."""


@app.command()
def run(
    config: ConfigOption = None,
    source: Annotated[str, typer.Option(help="mic, - (raw 16 kHz PCM on standard input), a file or a folder.")] = "mic",
    bundle: BundleOption = None,
    broker: Annotated[str | None, typer.Option(help="mqtt://HOST[:PORT]; overrides mqtt.url.")] = None,
    pace: Annotated[bool, typer.Option("--pace", help="Play files in real time.")] = False,
) -> None:
    """Listen, recognise, publish over MQTT, until the source ends or a signal comes."""
    from .pipeline import Pipeline  # and with it all that talks to a broker, which the other commands do without

    settings = configs.load(config, {"recogniser.bundle": bundle, "mqtt.url": broker})
    logs.set_up(settings.log)
    opened = opened_bundle(settings)

    def make(on_event: Callable[[str, str], None], beat: Callable[[float], None]) -> Source:
        must_exist = "INVOCATION_ID" not in os.environ  # systemd's service waits for its microphone
        plain = open_source(source, settings.source, on_event=on_event, beat=beat, must_exist=must_exist)
        return paced(plain) if pace else plain

    pipeline = Pipeline(settings, opened, make, cache_dir(settings))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: pipeline.stop())
    pipeline.run(realtime=pace or source == "mic")
    if pipeline.controls.is_restart_asked:
        raise typer.Exit(RESTART_STATUS)


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Audio files.")],
    bundle: BundleOption = None,
    config: ConfigOption = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a file.")] = False,
) -> None:
    """Print what is said in audio files; no broker."""
    settings = configs.load(config, {"recogniser.bundle": bundle, "recogniser.partials": False})
    opened = opened_bundle(settings)
    sources = [open_source(str(file), settings.source) for file in files]
    finals: list[Transcript] = []
    engine = Supervisor(opened.path, settings.recogniser, cache_dir(settings), finals.append, _complain)
    engine.start()
    try:
        for file, source in zip(files, sources, strict=True):
            finals.clear()
            _hear_file(source, settings, engine)
            _print_file(file, finals, as_json=json)
    finally:
        engine.stop()


@app.command()
def doctor(
    config: ConfigOption = None,
    bundle: BundleOption = None,
    broker: Annotated[str | None, typer.Option(help="mqtt://HOST[:PORT]; overrides mqtt.url.")] = None,
    microphone: Annotated[bool, typer.Option(help="Listen; the service must be stopped for it.")] = True,
    listen_s: Annotated[float, typer.Option(min=0.5, max=60, help="For how many seconds.")] = 3.0,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Say what is wrong with this device, and what to change. Exit code 0: nothing; 1: warnings; 2: something fails."""
    from . import doctor as doctors

    overrides = {"recogniser.bundle": bundle, "mqtt.url": broker}
    errors = Console(stderr=True)
    tell = (lambda _what: None) if json or not errors.is_terminal else errors.print
    findings = doctors.examine(config, overrides, listen_s if microphone else None, tell)
    if json:
        print(doctors.as_json(findings))
    else:
        doctors.print_table(findings, Console(width=None if sys.stdout.isatty() else 160))
    raise typer.Exit(doctors.exit_code(findings))


def _hear_file(source: Source, settings: Config, engine: Supervisor) -> None:
    def submit(speech: SpeechChunk) -> None:
        engine.submit(speech, wait=True)

    listen(source, ConfirmedGate(settings.vad), submit, lambda _chunk: None)
    if not engine.drain(FINAL_TIMEOUT_S):
        raise EngineLost("the engine did not finish")


def _print_file(file: Path, finals: list[Transcript], *, as_json: bool) -> None:
    if as_json:
        record: dict[str, Any] = {"file": str(file), "text": joined(finals), "segments": finals}
        print(msgspec.json.encode(record).decode(), flush=True)
    else:
        print(f"{file.name}: {joined(finals)}", flush=True)


def joined(finals: list[Transcript]) -> str:
    """Text of several finals."""
    return " ".join(final.text for final in finals if final.text)


def _complain(name: str, detail: str) -> None:
    logging.getLogger(__name__).warning("%s: %s", name, detail)


def opened_bundle(settings: Config) -> Bundle:
    """The verified bundle, with the language that is asked of it."""
    if settings.recogniser.bundle is None:
        raise ConfigError("recogniser.bundle: is not set; give --bundle FILE or set it in the configuration")
    opened = open_bundle(Path(settings.recogniser.bundle))
    checked_language(settings.recogniser.language, opened.manifest.vocabulary.languages)
    return opened


def cache_dir(settings: Config) -> Path:
    """Where packed weights are kept."""
    chosen = settings.recogniser.weight_cache_dir
    return Path(chosen) if chosen else default_cache_dir()


def main() -> None:
    """Run the command; what a user can mend ends with one sentence and exit code 2."""
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # says where each thread was when systemd's watchdog ends us
    threading.excepthook = logs.log_fault
    try:
        logs.set_up(LogConfig())
        app()
    except (WhisperletError, EngineLost) as error:
        print(f"whisperlet-agent: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WhisperletError) else 1)
    except Exception:
        logging.getLogger(__name__).critical("ended by a fault of its own", exc_info=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
