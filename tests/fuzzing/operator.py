"""What an operator, or whoever else may publish there, sends to a device."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.commands import COMMANDS, Settings
from agent.config import Config
from agent.dispatch import Actions, Dispatcher
from agent.messages import Request

NAMES = [*COMMANDS, "desired", "nonsense"]


def new_dispatcher() -> Dispatcher:
    """One whose actions do nothing."""

    def diagnostics() -> dict[str, Any]:
        return {}

    actions = Actions(lambda _settings: None, lambda _what: None, diagnostics)
    topic = "whisperlet/kiosk/".__add__
    return Dispatcher(topic, "s1", Settings.of(Config()), {"en": 1, "de": 2}, actions)


def ask(data: bytes) -> None:
    """First byte: what is asked; the rest: its payload. It must be answered, and by no unforeseen error."""
    name = NAMES[data[0] % len(NAMES)] if data else "mute"
    topic = name if name == "desired" else f"cmd/{name}"
    dispatcher = new_dispatcher()
    notices = dispatcher.handle(Request(topic, data[1:]))
    assert notices, "there is no answer"
    for notice in notices:
        msgspec.json.decode(notice.payload)
    assert not dispatcher.counts["failed"], notices[0].payload
    if name == "desired":
        assert set(msgspec.structs.asdict(dispatcher.settings)) == {
            "muted",
            "transcribing",
            "recogniser",
            "vad",
            "telemetry",
        }


def seeds() -> list[bytes]:
    """A right one of each, after the byte of its name."""
    payloads: dict[str, list[bytes]] = {
        "mute": [b"", b'{"id": "a", "time_utc": "2026-01-01T00:00:00Z", "expires_s": 5}'],
        "unmute": [b"{}"],
        "transcribe": [b'{"on": false}'],
        "set": [
            b'{"muted": true, "vad": {"start_ms": 200}, "recogniser": {"hop_ms": 500, "language": "de"}}',
            b'{"recogniser": {"terms": ["a"]}}',
        ],
        "restart": [b'{"what": "engine"}'],
        "diagnostics": [b"{}"],
        "desired": [b'{"telemetry": {"interval_s": 5.0}, "vad": {"max_segment_s": 6, "cut_window_s": 1}, "odd": 1}'],
        "nonsense": [b"[]"],
    }
    return [bytes([NAMES.index(name)]) + payload for name in NAMES for payload in payloads[name]]
