"""What leaves the device: one frozen struct a topic, JSON on the wire, units in the names, UTC outside.

Fields have no defaults, so every message carries every field; a reader ignores fields that it does not know.
`schemas.py` writes the JSON Schemas that `docs/schema` publishes.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .clock import Clock, rfc3339
from .inventory import Hardware, System, Versions
from .measurements import Energy, Heat, Otel
from .messages import Envelope, Kind, Transcript

Utc = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$", description="UTC, RFC 3339")]
Session = Annotated[str, Meta(min_length=1, description="random, one for each start of the agent")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0)]
Total = Annotated[int, Meta(ge=0, description="since the agent started")]
Sample = Annotated[int, Meta(ge=0, description="index of a sample since the source was opened")]
Milliseconds = Annotated[float, Meta(ge=0, description="milliseconds")]
Historical = Annotated[bool, Meta(description="comes late: from before a restart, or after a wait of more than 30 s")]
Seconds = Annotated[float, Meta(ge=0, description="seconds")]


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is published."""


MicrophoneState = Literal["starting", "listening", "silent", "lost"]


class Condition(Payload, frozen=True):
    """How an agent is that is there."""

    microphone: Annotated[MicrophoneState, Meta(description="silent: open, but it brings only one number")]
    muted: bool
    hop_ms: Annotated[float, Meta(gt=0, description="speech between two partials; null: finals only")] | None
    outbox_messages: Annotated[int, Meta(ge=0, description="waiting when this was written")]


class StatusPayload(Payload, frozen=True):
    """Whether the agent is there, and how; retained, and the last will. Written again when that changes."""

    state: Literal["online", "offline"]
    reason: Literal["connected", "stopped", "connection_lost"]
    session: Session
    time_utc: Utc | None  # None in the last will: the broker sends it later, and does not say when
    condition: Condition | None  # None while offline


class BundleInfo(Payload, frozen=True):
    """The model."""

    name: str
    sha256: Sha256
    languages: list[str]  # ISO 639-1


class InfoPayload(Payload, frozen=True):
    """What this agent is; retained."""

    session: Session
    started_utc: Utc
    versions: Versions
    bundle: BundleInfo | None
    hardware: Hardware
    system: System
    config_sha256: Sha256  # tells whether two agents are configured alike
    capabilities: list[str]  # such as "partials"
    sample_rate_hz: Annotated[int, Meta(gt=0)]


class TranscriptPayload(Payload, frozen=True):
    """Text of one segment. (session, utterance, segment, revision) names it, also when it comes twice."""

    session: Session
    historical: Historical
    utterance: Count
    segment: Count  # within the utterance
    revision: Count  # within the segment
    text: str
    stable_chars: Annotated[int, Meta(ge=0, description="this much of `text` is not expected to change")]
    start_samples: Sample
    end_samples: Sample
    start_utc: Utc
    end_utc: Utc
    language: str  # ISO 639-1
    is_final: bool
    continues: Annotated[bool, Meta(description="the talk goes on in the next segment")]
    rejected: Annotated[str, Meta(description="why the text was withheld")] | None
    avg_logprob: Annotated[float, Meta(description="natural logarithm, mean over the tokens")]
    no_speech_prob: Annotated[float, Meta(ge=0, le=1)]
    finalise_ms: Annotated[float, Meta(ge=0, description="since the gate decided that speech had ended, ms")] | None
    end_to_final_ms: Annotated[float, Meta(ge=0, description="since the last voiced sample, ms")] | None
    encode_ms: Milliseconds
    decode_ms: Milliseconds
    n_attempts: Annotated[int, Meta(ge=1, description="to hear it: more where a text left speech out, or went round")]


class EventPayload(Payload, frozen=True):
    """Something happened that somebody may have to know. (session, sequence) names it, also when it comes twice."""

    session: Session
    sequence: Annotated[int, Meta(ge=1, description="counts the events of a session; a gap is an event that was lost")]
    historical: Historical
    name: str  # such as "engine_restarted", "microphone_lost", "session_taken_over"
    detail: str
    time_utc: Utc


class Percentiles(Payload, frozen=True):
    """Of a latency over the interval; None without a measurement."""

    p50: Milliseconds | None
    p95: Milliseconds | None


class Queues(Payload, frozen=True):
    """What waits."""

    outbox_messages: Count
    outbox_bytes: Count
    backlog_s: Annotated[float, Meta(ge=0, description="seconds of speech that wait for the engine")]


class CounterValues(Payload, frozen=True):
    """Everything counted; each grows for the life of the agent."""

    finals: Total
    partials: Total
    reheard_finals: Annotated[int, Meta(ge=0, description="heard more than once; since the agent started")]
    events: Total
    restored_messages: dict[str, Total]  # by kind: left in the outbox by an earlier run
    stored_messages: dict[str, Total]  # by kind: that the outbox accepted
    sent_messages: dict[str, Total]  # by kind: acknowledged by the broker
    dropped_messages: dict[str, Total]  # by kind
    refused_messages: Annotated[int, Meta(ge=0, description="the broker would not have them; since the agent started")]
    engine_restarts: Total
    skipped_partials: Annotated[int, Meta(ge=0, description="not made for lack of time; since the agent started")]
    rejected_segments: Annotated[int, Meta(ge=0, description="not held to be speech; since the agent started")]
    dropped_segments: Annotated[int, Meta(ge=0, description="unheard, the engine was behind; since the agent started")]
    failed_segments: Annotated[int, Meta(ge=0, description="given up by the engine; since the agent started")]
    failed_reports: Annotated[int, Meta(ge=0, description="of telemetry; since the agent started")]
    failed_looks: Annotated[int, Meta(ge=0, description="at power and heat; since the agent started")]
    reconnects: Total
    commands: dict[str, Total]  # by outcome; "retained" ones were not done
    dropped_samples: Annotated[int, Meta(ge=0, description="audio lost; since the agent started")]
    source_overflows: Annotated[int, Meta(ge=0, description="of the capture driver; since the agent started")]
    source_faults: Annotated[int, Meta(ge=0, description="microphone lost or silent; since the agent started")]


class TelemetryPayload(Payload, frozen=True):
    """The agent about itself, every `telemetry.interval_s`. (session, sequence) names it, also when it comes twice."""

    session: Session
    sequence: Annotated[int, Meta(ge=1, description="counts the reports of a session")]
    historical: Historical
    time_utc: Utc
    interval_s: Seconds
    real_time_factor: Annotated[float, Meta(ge=0, description="engine seconds per second of speech")] | None
    hop_ms: Annotated[float, Meta(gt=0, description="speech between two partials; null: finals only")] | None
    muted: bool
    finalise_ms: Percentiles
    end_to_final_ms: Percentiles
    cpu_percent: Annotated[float, Meta(ge=0, description="all processes of the agent; 100 is one core")]
    resident_bytes: Annotated[int, Meta(ge=0, description="all processes of the agent; shared pages count twice")]
    temperature_c: Annotated[float, Meta(description="hottest sensor, degrees Celsius")] | None
    queues: Queues
    counters: CounterValues
    energy: Energy | None
    heat: Heat
    otel: Otel


def new_session() -> str:
    """Name of this run of the agent, so that its utterance numbers are not mistaken for another run's."""
    return secrets.token_hex(8)


def status_payload(
    session: str,
    reason: Literal["connected", "stopped", "connection_lost"],
    condition: Condition | None = None,
) -> StatusPayload:
    """Online when connected, offline for any other reason."""
    time_utc = None if reason == "connection_lost" else rfc3339(time.time())
    state: Literal["online", "offline"] = "online" if reason == "connected" else "offline"
    return StatusPayload(state=state, reason=reason, session=session, time_utc=time_utc, condition=condition)


def event_payload(session: str, sequence: int, name: str, detail: str = "") -> EventPayload:
    """Make an event that happens now."""
    now = rfc3339(time.time())
    return EventPayload(session=session, sequence=sequence, historical=False, name=name, detail=detail, time_utc=now)


def partial_payload(transcript: Transcript, clock: Clock, session: str) -> TranscriptPayload:
    """Text that may still change: it has no latency yet."""
    assert not transcript.is_final
    return _transcript_payload(transcript, clock, session, now_monotonic_s=None)


def final_payload(transcript: Transcript, clock: Clock, session: str, now_monotonic_s: float) -> TranscriptPayload:
    """Text for good, ready at `now_monotonic_s`, from where its latencies are counted back."""
    assert transcript.is_final
    return _transcript_payload(transcript, clock, session, now_monotonic_s)


def _transcript_payload(
    transcript: Transcript, clock: Clock, session: str, now_monotonic_s: float | None
) -> TranscriptPayload:
    return TranscriptPayload(
        session=session,
        historical=False,
        utterance=transcript.utterance,
        segment=transcript.segment,
        revision=transcript.revision,
        text=transcript.text,
        stable_chars=transcript.stable_chars,
        start_samples=transcript.start,
        end_samples=transcript.end,
        start_utc=clock.utc_of_sample(transcript.start),
        end_utc=clock.utc_of_sample(transcript.end),
        language=transcript.language,
        is_final=transcript.is_final,
        continues=transcript.continues,
        rejected=transcript.rejected,
        avg_logprob=transcript.avg_logprob,
        no_speech_prob=transcript.no_speech_prob,
        finalise_ms=_elapsed_ms(transcript.decided_monotonic_s, now_monotonic_s),
        end_to_final_ms=_elapsed_ms(transcript.speech_end_monotonic_s, now_monotonic_s),
        encode_ms=transcript.encode_ms,
        decode_ms=transcript.decode_ms,
        n_attempts=transcript.n_attempts,
    )


def _elapsed_ms(since_s: float | None, now_s: float | None) -> float | None:
    if since_s is None or now_s is None:
        return None
    return max(0.0, round((now_s - since_s) * 1e3, 1))


TOPICS: dict[str, tuple[type[Payload], Kind]] = {
    "status": (StatusPayload, Kind.EVENT),
    "info": (InfoPayload, Kind.EVENT),
    "transcript/partial": (TranscriptPayload, Kind.PARTIAL),
    "transcript/final": (TranscriptPayload, Kind.FINAL),
    "event": (EventPayload, Kind.EVENT),
    "telemetry": (TelemetryPayload, Kind.TELEMETRY),
}
RETAINED = {"status", "info"}


def to_envelope(payload: Payload) -> Envelope:
    """Encode the payload as JSON, with its topic and how it is to be delivered."""
    if isinstance(payload, TranscriptPayload):
        topic = "transcript/final" if payload.is_final else "transcript/partial"
    else:
        topic = next(topic for topic, (struct, _) in TOPICS.items() if type(payload) is struct)
    kind = TOPICS[topic][1]
    qos = 0 if kind is Kind.PARTIAL else 1
    return Envelope(topic, msgspec.json.encode(payload), kind, qos, retain=topic in RETAINED)


def historical(envelope: Envelope) -> Envelope:
    """The envelope with a payload that says that it comes late."""
    fields = msgspec.json.decode(envelope.payload, type=dict[str, msgspec.Raw])
    return msgspec.structs.replace(envelope, payload=msgspec.json.encode({**fields, "historical": True}))
