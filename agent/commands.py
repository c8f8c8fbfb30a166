"""What an operator may ask of a running agent: parsed and checked here, done elsewhere.

A command is a JSON object on `whisperlet/<device>/cmd/<name>`; an empty payload stands for `{}`. What may be set while
the agent runs has the names of the configuration file. Nothing here has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from whisperlet.errors import ConfigError

from . import term_list
from .config import (
    Config,
    RecogniserConfig,
    Section,
    TelemetryConfig,
    VadConfig,
    checked_language,
    contradiction,
    key_and_reason,
)

MAX_BYTES = 16 * 1024  # of a payload
SETTABLE = {
    "recogniser": ("language", "partials", "hop_ms", "terms"),
    "vad": tuple(VadConfig.__struct_fields__),
    "telemetry": ("interval_s",),
}
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)  # ValueError: text that is not UTF-8


class Refused(Exception):
    """A command that is not carried out; `outcome` is one of `replies.Outcome`."""

    def __init__(self, outcome: Literal["invalid", "unknown", "expired", "repeated", "refused"], detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def _settable(section: type[Section]) -> type[msgspec.Struct]:
    """The keys of a section that may be set, none of which need be there."""
    name = section.__name__.removesuffix("Config")
    types = {field.name: field.type for field in msgspec.structs.fields(section)}
    fields = [(key, types[key] | UnsetType, UNSET) for key in SETTABLE[name.lower()]]
    options = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
    return msgspec.defstruct(f"{name}Settings", fields, **options)  # type: ignore[arg-type]


if TYPE_CHECKING:
    RecogniserSettings: TypeAlias = Any
    VadSettings: TypeAlias = Any
    TelemetrySettings: TypeAlias = Any
else:
    RecogniserSettings = _settable(RecogniserConfig)
    VadSettings = _settable(VadConfig)
    TelemetrySettings = _settable(TelemetryConfig)


class Desired(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that are to hold, on the retained topic `desired`; what is not mentioned is left alone."""

    muted: bool | UnsetType = UNSET
    transcribing: bool | UnsetType = UNSET
    recogniser: RecogniserSettings | UnsetType = UNSET
    vad: VadSettings | UnsetType = UNSET
    telemetry: TelemetrySettings | UnsetType = UNSET


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every command may carry."""

    id: Annotated[
        str, Meta(min_length=1, max_length=64, description="a command whose id was seen is not done again")
    ] | (None) = None
    time_utc: Annotated[datetime, Meta(tz=True, description="when it was given, RFC 3339")] | None = None
    expires_s: Annotated[float, Meta(gt=0, description="seconds after `time_utc` for which it may be done")] | None = (
        None
    )


class Mute(Command, frozen=True):
    """Drop all audio before anything looks at it."""


class Unmute(Command, frozen=True):
    """Listen again."""


class Transcribe(Command, frozen=True):
    """Turn speech into text, or notice it only."""

    on: bool


class Set(Command, frozen=True):
    """Change settings until they are changed again or the agent starts anew: all of them, or none."""

    muted: bool | UnsetType = UNSET
    transcribing: bool | UnsetType = UNSET
    recogniser: RecogniserSettings | UnsetType = UNSET
    vad: VadSettings | UnsetType = UNSET
    telemetry: TelemetrySettings | UnsetType = UNSET


class Restart(Command, frozen=True):
    """Start the engine's process anew, or end the agent so that systemd does it."""

    what: Literal["engine", "agent"] = "agent"


class Diagnostics(Command, frozen=True):
    """Tell everything that may help to find a fault."""


COMMANDS: dict[str, type[Command]] = {
    "mute": Mute,
    "unmute": Unmute,
    "transcribe": Transcribe,
    "set": Set,
    "restart": Restart,
    "diagnostics": Diagnostics,
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What holds at the moment and may be changed."""

    muted: bool = False
    transcribing: bool = True
    recogniser: RecogniserConfig
    vad: VadConfig
    telemetry: TelemetryConfig

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Those that the agent starts with."""
        return cls(recogniser=config.recogniser, vad=config.vad, telemetry=config.telemetry)

    def settable(self) -> dict[str, Any]:
        """Value of each key that may be set, the keys like "vad.start_ms"."""
        values = flat(msgspec.to_builtins(self))
        return {key: value for key, value in values.items() if key in KEYS}


KEYS = {"muted", "transcribing", *(f"{section}.{key}" for section, keys in SETTABLE.items() for key in keys)}


def parse(name: str, payload: bytes) -> Command:
    """The command of this name. Raises Refused."""
    if name not in COMMANDS:
        raise Refused("unknown", f"there is no command {name[:64]!r}; there are {', '.join(COMMANDS)}")
    if len(payload) > MAX_BYTES:
        raise Refused("invalid", f"{len(payload)} bytes are too many; {MAX_BYTES} may come")
    try:
        command = msgspec.json.decode(payload or b"{}", type=COMMANDS[name])
    except UNREADABLE as error:
        raise Refused("invalid", key_and_reason(str(error), "the payload")) from None
    if command.expires_s is not None and command.time_utc is None:
        raise Refused("invalid", "expires_s: counts from time_utc, which is missing")
    return command


def is_expired(command: Command, now_s: float) -> bool:
    """Whether the command has come too late; `now_s` counts since 1970."""
    if command.time_utc is None or command.expires_s is None:
        return False
    return now_s > command.time_utc.timestamp() + command.expires_s


def wishes(command: Set) -> dict[str, Any]:
    """What a command is to set, the keys like "vad.start_ms"."""
    shared = set(Command.__struct_fields__)
    return flat({key: value for key, value in msgspec.to_builtins(command).items() if key not in shared})


def desired_wishes(payload: bytes) -> dict[str, Any]:
    """What a `desired` document is to set; its values are not checked yet. Raises Refused."""
    if len(payload) > MAX_BYTES:
        raise Refused("invalid", f"{len(payload)} bytes are too many; {MAX_BYTES} may come")
    try:
        document = msgspec.json.decode(payload or b"{}", type=dict[str, Any])
    except UNREADABLE as error:
        raise Refused("invalid", str(error)) from None
    return flat(document)


def flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Sections unfolded: {"vad": {"start_ms": 1}} as {"vad.start_ms": 1}."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            found[key] = value
    return found


def changed(now: Settings, wanted: Mapping[str, Any], languages: dict[str, int]) -> Settings:
    """Settings with all that is wanted. Raises ConfigError that begins with the key."""
    document = msgspec.to_builtins(now)
    for key, value in wanted.items():
        if key not in KEYS:
            raise ConfigError(f"{key[:64]}: unknown key, or one that takes a restart")
        section, _, name = key.rpartition(".")
        (document[section] if section else document)[name] = value
    try:
        settings = msgspec.convert(document, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(key_and_reason(str(error))) from None
    if "recogniser.language" in wanted:
        checked_language(settings.recogniser.language, languages)
    if "recogniser.terms" in wanted:
        term_list.checked(settings.recogniser.terms, "recogniser.terms")
    if reason := contradiction(settings.vad):
        raise ConfigError(reason)
    return settings


def as_far_as_possible(
    now: Settings, wanted: Mapping[str, Any], languages: dict[str, int]
) -> tuple[Settings, dict[str, str]]:
    """Settings with what can be had of what is wanted, and why the rest cannot, by key."""
    try:
        return changed(now, wanted, languages), {}
    except ConfigError:
        pass
    refused: dict[str, str] = {}
    for key, value in wanted.items():
        try:
            now = changed(now, {key: value}, languages)
        except ConfigError as error:
            refused[key[:64]] = str(error)
    return now, refused
