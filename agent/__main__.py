"""`whisperlet-agent`: listen and publish, or transcribe files."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

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

FINAL_TIMEOUT_S = 3600.0


def run(*, config: Path | None, bundle: str | None, broker: str | None, source: str, pace: bool) -> int:
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
    return RESTART_STATUS if pipeline.controls.is_restart_asked else 0


def transcribe(*, config: Path | None, bundle: str | None, files: list[Path], json: bool) -> int:
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
    return 0


def doctor(
    *, config: Path | None, bundle: str | None, broker: str | None, microphone: bool, listen_s: float, json: bool
) -> int:
    """Say what is wrong with this device, and what to change. Exit code 0: nothing; 1: warnings; 2: something fails."""
    from rich.console import Console

    from . import doctor as doctors

    overrides = {"recogniser.bundle": bundle, "mqtt.url": broker}
    errors = Console(stderr=True)
    tell = (lambda _what: None) if json or not errors.is_terminal else errors.print
    findings = doctors.examine(config, overrides, listen_s if microphone else None, tell)
    if json:
        print(doctors.as_json(findings))
    else:
        doctors.print_table(findings, Console(width=None if sys.stdout.isatty() else 160))
    return doctors.exit_code(findings)


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


def parser() -> ArgumentParser:
    """The command line. argparse's: what more comfortable packages load takes 18 MB and 0.15 s of the device."""
    settings = ArgumentParser(add_help=False)
    settings.add_argument("--config", metavar="FILE", type=Path, help="TOML; firmware_config/agent.toml has every key")
    settings.add_argument("--bundle", metavar="FILE", help="the .tflite bundle; overrides recogniser.bundle")
    publishing = ArgumentParser(add_help=False)
    publishing.add_argument("--broker", metavar="URL", help="mqtt://HOST[:PORT]; overrides mqtt.url")
    as_json = ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="for a program")

    top = ArgumentParser(prog="whisperlet-agent", description="Hear speech, publish words.", allow_abbrev=False)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def add(command: Callable[..., int], *parents: ArgumentParser) -> ArgumentParser:
        about = (command.__doc__ or "").partition("\n")[0]
        one = commands.add_parser(
            command.__name__, help=about, description=about, parents=[settings, *parents], allow_abbrev=False
        )
        one.set_defaults(command=command)
        return one

    running = add(run, publishing)
    running.add_argument(
        "--source", default="mic", help="mic, - (raw 16 kHz PCM on standard input), a file or a folder; default: mic"
    )
    running.add_argument("--pace", action="store_true", help="play files in real time")
    add(transcribe, as_json).add_argument("files", metavar="FILE", nargs="+", type=Path, help="audio")
    examining = add(doctor, publishing, as_json)
    examining.add_argument(
        "--microphone", action=BooleanOptionalAction, default=True, help="listen; the service must be stopped for it"
    )
    examining.add_argument(
        "--listen-s", metavar="S", type=_listening_s, default=3.0, help="for how many seconds, 0.5 to 60; default: 3"
    )
    return top


def _listening_s(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.5 <= (value := float(text)) <= 60:
            return value
    raise ArgumentTypeError("must be a number from 0.5 to 60")


def main() -> None:
    """Run the command; what a user can mend ends with one sentence and exit code 2."""
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # says where each thread was when systemd's watchdog ends us
    threading.excepthook = logs.log_fault
    try:
        logs.set_up(LogConfig())
        options = vars(parser().parse_args())
        sys.exit(options.pop("command")(**options))
    except (WhisperletError, EngineLost) as error:
        print(f"whisperlet-agent: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WhisperletError) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        logging.getLogger(__name__).critical("ended by a fault of its own", exc_info=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
