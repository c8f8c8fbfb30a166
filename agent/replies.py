"""What an agent answers to commands, and the settings that it reports back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from .payloads import Payload, Session, Utc

Outcome = Literal["ok", "refused", "invalid", "unknown", "expired", "repeated", "failed"]


class ResultPayload(Payload, frozen=True):
    """What became of a command."""

    session: Session
    command: str
    id: Annotated[str, Meta(description="that the command carried")] | None
    outcome: Annotated[Outcome, Meta(description="only what is ok was done")]
    detail: Annotated[str, Meta(description="why not, in a sentence")]
    data: Annotated[dict[str, Any], Meta(description="what was asked for, such as diagnostics")] | None
    time_utc: Utc


class ReportedPayload(Payload, frozen=True):
    """The settings that hold; retained."""

    session: Session
    muted: bool
    transcribing: bool
    recogniser: dict[str, Any]
    vad: dict[str, Any]
    telemetry: dict[str, Any]
    refused: Annotated[dict[str, str], Meta(description="of the last `desired`: key and reason")]
    time_utc: Utc
