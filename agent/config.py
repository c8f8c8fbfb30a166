"""Configuration: one TOML file, frozen, typed, nested by stage. `firmware_config/agent.toml` documents each key."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from whisperlet.errors import ConfigError

from . import term_list

Positive = msgspec.Meta(gt=0)
NO_LOGIN = "wants HOST[:PORT]; a login goes into mqtt.username and mqtt.password_file"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class SourceConfig(Section, frozen=True):
    """Where audio comes from."""

    device: str | int | None = None  # microphone, by index or a part of its name; None: the system's default
    chunk_ms: Annotated[int, msgspec.Meta(ge=10, le=200)] = 20
    ring_s: Annotated[float, msgspec.Meta(ge=0.5, le=30)] = 2.0  # audio held while the gate is busy
    retry_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 1.0  # first wait before a lost microphone is reopened
    retry_max_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 5.0
    silent_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 8.0  # of one and the same number; 0: for ever


class VadConfig(Section, frozen=True):
    """When someone is held to be speaking."""

    aggressiveness: Annotated[int, msgspec.Meta(ge=0, le=3)] = 2  # of webrtcvad; 3 lets the least noise through
    start_ms: Annotated[int, msgspec.Meta(ge=20, le=1000)] = 120  # voiced time that opens the gate
    pre_roll_ms: Annotated[int, msgspec.Meta(ge=0, le=2000)] = 300  # audio kept from before the gate opened
    hang_over_ms: Annotated[int, msgspec.Meta(ge=100, le=5000)] = 500  # unvoiced time that closes the gate
    confirm_probability: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.6  # of Silero's network; 0: webrtcvad suffices
    confirm_ms: Annotated[int, msgspec.Meta(ge=32, le=1000)] = 440  # of certainty, before anything is heard
    confirm_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.9  # of energy that is speech, for shorter words
    max_segment_s: Annotated[float, msgspec.Meta(ge=5, le=28)] = 28.0  # a final is forced here at the latest
    cut_window_s: Annotated[float, msgspec.Meta(gt=0, le=5)] = 3.0  # ... at the quietest point of this last stretch


class RecogniserConfig(Section, frozen=True):
    """How speech becomes text."""

    bundle: str | None = None  # path of the .tflite
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # of the engine; a second one spins while it waits
    weight_cache_dir: str | None = None  # None: $XDG_CACHE_HOME/whisperlet
    language: str = "en"  # as Whisper spells it, or "auto"
    partials: bool = True
    hop_ms: Annotated[int, msgspec.Meta(ge=100, le=5000)] = 300  # between two partials
    overlap_frames: int | None = None  # of the streaming encoder, 20 ms each; None: the bundle's first
    final_pass: bool = True  # hear each utterance once more as a whole when it has ended
    join_pause_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 1500  # or less: heard with what was said before
    settle_ms: Annotated[int, msgspec.Meta(ge=0, le=5000)] = 260  # of silence; then the final is heard in advance
    silence_frames: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None  # None: as measured for the language
    no_speech_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.6
    logprob_threshold: Annotated[float, msgspec.Meta(le=0)] = -1.0
    terms_file: str | None = None  # of words and phrases to prefer, one a line; read into `terms` at the start
    terms: list[str] = []  # "term", or "term<tab>boost"
    reply_timeout_s: Annotated[float, msgspec.Meta(ge=1, le=600)] = 20.0  # then the engine is restarted
    max_backlog_s: Annotated[float, msgspec.Meta(ge=30, le=3600)] = 120.0  # speech kept for an engine that is behind


class MqttConfig(Section, frozen=True):
    """The broker and how hard to try to reach it."""

    url: str = "mqtt://127.0.0.1:1883"  # mqtts:// for TLS
    device: str | None = None  # <device> in the topics; None: the host's name
    version: Literal["5", "3.1.1"] = "5"
    username: str | None = None
    password_file: str | None = None  # None: systemd's credential mqtt-password, if there is one
    ca_file: str | None = None  # PEM; None: the system's authorities
    cert_file: str | None = None  # PEM, what we show the broker
    key_file: str | None = None  # PEM; None: it stands in cert_file
    keepalive_s: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 30
    will_delay_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 30  # MQTT 5 only
    reconnect_min_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 1.0
    reconnect_max_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0
    commands: bool = True  # listen on the topics cmd/... and desired
    home_assistant: bool = False  # introduce the device there
    home_assistant_prefix: Annotated[str, msgspec.Meta(pattern="^[^#+]+$")] = "homeassistant"


class OutboxConfig(Section, frozen=True):
    """What is kept until the broker has it."""

    durable: bool = True  # on disk; False: in memory
    dir: str | None = None  # None: $STATE_DIRECTORY, else $XDG_STATE_HOME/whisperlet
    max_messages: Annotated[int, msgspec.Meta(ge=10, le=1_000_000)] = 50_000
    max_bytes: Annotated[int, msgspec.Meta(ge=100_000, le=10_000_000_000)] = 32_000_000
    max_age_s: Annotated[float, msgspec.Meta(ge=60, le=315_360_000)] = 2_592_000.0  # of finals and events
    telemetry_max_age_s: Annotated[float, msgspec.Meta(ge=60, le=315_360_000)] = 604_800.0


class TelemetryConfig(Section, frozen=True):
    """What is measured of the agent itself."""

    interval_s: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 30.0
    sample_s: Annotated[float, msgspec.Meta(ge=0.1, le=30)] = 2.0  # between two looks at power and heat


class PowerConfig(Section, frozen=True):
    """Where energy is measured."""

    source: Literal["auto", "hwmon", "rpi_pmic", "rapl", "battery", "model", "none"] = "auto"
    hwmon_channel: str | None = None  # chip/label, where there are several
    core_watts: Annotated[float, msgspec.Meta(gt=0, le=200)] | None = None  # of a busy core; None: no estimate
    sysfs_dir: str = "/sys"


class ThermalConfig(Section, frozen=True):
    """From which heat on what is done without."""

    enabled: bool = True
    longer_hop_c: Annotated[float, msgspec.Meta(ge=30, le=120)] = 80.0
    no_partials_c: Annotated[float, msgspec.Meta(ge=30, le=120)] = 85.0
    finals_only_c: Annotated[float, msgspec.Meta(ge=30, le=120)] = 90.0
    hysteresis_c: Annotated[float, msgspec.Meta(ge=1, le=30)] = 5.0
    rise_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 10.0  # of heat, before each step
    dwell_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0  # of less heat, before each step back


class LogConfig(Section, frozen=True):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "logfmt", "json"] = "auto"
    transcripts: bool = False  # what was said is nobody's business but the broker's


class Config(Section, frozen=True):
    """The whole file."""

    source: SourceConfig = SourceConfig()
    vad: VadConfig = VadConfig()
    recogniser: RecogniserConfig = RecogniserConfig()
    mqtt: MqttConfig = MqttConfig()
    outbox: OutboxConfig = OutboxConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    power: PowerConfig = PowerConfig()
    thermal: ThermalConfig = ThermalConfig()
    log: LogConfig = LogConfig()


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Configuration from a file, with overrides like `{"mqtt.url": ...}`; None among the values is skipped.

    Raises ConfigError naming the file, the key and the reason.
    """
    tables = _read(path) if path else {}
    for key, value in (overrides or {}).items():
        if value is not None:
            section, name = key.split(".")
            tables.setdefault(section, {})[name] = value
    origin = str(path) if path else "the command line"
    try:
        config = msgspec.convert(tables, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {key_and_reason(str(error))}") from None
    return _with_terms(_checked(config, origin), origin)


def _with_terms(config: Config, origin: str) -> Config:
    """The same with the terms of the file that it names."""
    recogniser = config.recogniser
    if recogniser.terms_file is None:
        term_list.checked(recogniser.terms, f"{origin}: recogniser.terms")
        return config
    if recogniser.terms:
        raise ConfigError(f"{origin}: recogniser.terms: cannot be set beside recogniser.terms_file")
    terms = term_list.read(Path(recogniser.terms_file))
    return msgspec.structs.replace(config, recogniser=msgspec.structs.replace(recogniser, terms=terms))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also a number of too many digits, or too many brackets
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def key_and_reason(message: str, whole: str = "the file") -> str:
    """`msgspec`'s "reason - at `$.a.b`" with the key in front, or the name of the whole."""
    reason, _, where = message.partition(" - at `$")
    unknown = re.fullmatch(r"Object contains unknown field `(.+)`", reason, re.DOTALL)
    key = (where.strip("`.") + ("." + unknown[1] if unknown else "")).strip(".") or whole
    return f"{_on_one_line(key)}: {'unknown key' if unknown else reason}"


def _on_one_line(key: str) -> str:
    """The key, escaped if it holds what does not print."""
    return key if key.isprintable() else repr(key)


def _checked(config: Config, origin: str) -> Config:
    """What types cannot say."""
    if "@" in config.mqtt.url:  # not shown: it may hold a password
        raise ConfigError(f"{origin}: mqtt.url: {NO_LOGIN}")
    if not _is_broker(config.mqtt.url):
        raise ConfigError(f"{origin}: mqtt.url: {config.mqtt.url!r} is not mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    if config.mqtt.device is not None and not re.fullmatch(r"[^/+#\0]+", config.mqtt.device):
        raise ConfigError(f"{origin}: mqtt.device: {config.mqtt.device!r} is empty or contains one of / + #")
    if reason := contradiction(config.vad):
        raise ConfigError(f"{origin}: {reason}")
    thermal = config.thermal
    if not thermal.longer_hop_c < thermal.no_partials_c < thermal.finals_only_c:
        raise ConfigError(f"{origin}: thermal: longer_hop_c, no_partials_c and finals_only_c must grow in this order")
    if config.power.source == "model" and config.power.core_watts is None:
        raise ConfigError(f'{origin}: power.core_watts: must be set for power.source = "model"')
    return config


def contradiction(vad: VadConfig) -> str | None:
    """Why these cannot hold together, beginning with a key; None if they can."""
    return None if vad.cut_window_s < vad.max_segment_s else "vad.cut_window_s: must be less than vad.max_segment_s"


def _is_broker(url: str) -> bool:
    """Whether scheme, host and port are there and make sense."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("mqtt", "mqtts") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an open bracket, or a port that is not a number up to 65535
        return False


def checked_language(language: str, known: dict[str, int]) -> str | None:
    """The language to transcribe, None to detect it. Raises ConfigError if the model does not have it."""
    if language == "auto":
        return None if known else "en"
    if language in known or (not known and language == "en"):
        return language
    raise ConfigError(f"recogniser.language: the bundle does not have {language!r}; it has {', '.join(known) or 'en'}")


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/whisperlet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whisperlet"


def default_state_dir() -> Path:
    """The first of systemd's $STATE_DIRECTORY, else $XDG_STATE_HOME/whisperlet."""
    if given := os.environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "whisperlet"


def outbox_dir(config: OutboxConfig) -> Path:
    """Where messages, and the switches that outlive the agent, are kept."""
    return Path(config.dir) if config.dir else default_state_dir()
