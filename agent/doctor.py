"""`whisperlet-agent doctor`: everything that keeps a device from hearing, deciding or telling, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from whisperlet.bundle import open_bundle
from whisperlet.errors import BundleError, ConfigError

from . import broker_check, ear_check, machine
from .config import RecogniserConfig, checked_language, load
from .findings import Finding, Level, fail, ok, warn

EXIT_CODES = {Level.OK: 0, Level.WARN: 1, Level.FAIL: 2}
COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


def examine(
    path: Path | None, overrides: dict[str, str | None], listen_s: float | None, tell: Callable[[str], None]
) -> list[Finding]:
    """All checks; `listen_s` None leaves the microphone alone. `tell` hears what is being done, for whoever waits."""
    try:
        config = load(path, overrides)
    except ConfigError as error:
        return [fail("configuration", str(error), "correct this line; the other checks need it")]
    findings = [configuration(path)]
    tell("reading the bundle")
    findings += bundle(config.recogniser)
    findings += machine.examine(config)
    tell(f"asking the broker at {config.mqtt.url}")
    findings += broker_check.examine(config.mqtt)
    if listen_s is not None:
        tell(f"listening for {listen_s:g} s")
        findings += ear_check.examine(config.source, listen_s)
    return findings


def configuration(path: Path | None) -> Finding:
    """It was valid, or nothing would have got here."""
    if path is None:
        return warn(
            "configuration", "the defaults", "give --config /etc/whisperlet/agent.toml to check what the service has"
        )
    return ok("configuration", str(path))


def bundle(config: RecogniserConfig) -> Iterable[Finding]:
    """Whether the model is whole, and speaks the language."""
    if config.bundle is None:
        yield fail("bundle", "none", "set recogniser.bundle, or give --bundle FILE")
        return
    try:
        opened = open_bundle(Path(config.bundle))
    except BundleError as error:
        yield fail("bundle", str(error), "copy it to the device again")
        return
    try:
        checked_language(config.language, opened.manifest.vocabulary.languages)
    except ConfigError as error:
        yield fail("bundle", str(error), "set another recogniser.language, or use another bundle")
        return
    yield ok("bundle", f"{opened.manifest.name}, sha256 {opened.sha256[:12]}, whole")


def exit_code(findings: Iterable[Finding]) -> int:
    """0: all is well; 1: warnings; 2: something fails."""
    return max((EXIT_CODES[finding.level] for finding in findings), default=0)


def as_json(findings: list[Finding]) -> str:
    """For a program: the worst level, and each finding."""
    worst = max((finding.level for finding in findings), key=EXIT_CODES.__getitem__, default=Level.OK)
    return msgspec.json.encode({"level": worst, "findings": findings}).decode()


def print_table(findings: list[Finding], console: Console) -> None:
    """For a person."""
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "what to change"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = f"[{COLOURS[finding.level]}]{finding.level.value}[/]"
        table.add_row(finding.check, mark, _plain(finding.found), _plain(finding.advice))
    console.print(table)


def _plain(text: str) -> str:
    """Brackets are no markup here."""
    return text.replace("[", r"\[")
