"""The ear: source, gate, engine link, telemetry and publisher, wired. The one module that knows all stages.

Started from the sink to the source and stopped from the source to the sink, so that whatever a stage hands on always
finds the next one there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from whisperlet.audio import SAMPLE_RATE
from whisperlet.bundle import Bundle
from whisperlet.errors import AudioError

from .clock import Clock, rfc3339
from .config import Config, OutboxConfig, default_state_dir
from .confirm import ConfirmedGate
from .energy import Activity
from .inventory import config_sha256, hardware, system, versions
from .messages import AudioChunk, SpeechChunk, Thrift, Transcript
from .monitor import make_monitor
from .mqtt import Publisher
from .outbox import Limits, MemoryOutbox
from .payloads import (
    BundleInfo,
    InfoPayload,
    Payload,
    event_payload,
    final_payload,
    new_session,
    partial_payload,
    to_envelope,
)
from .sources import Source
from .store import DurableOutbox
from .supervisor import Supervisor
from .telemetry import Delivery, Telemetry, Usage
from .vad import Hearing
from .vitals import Sensed, Vitals

log = logging.getLogger(__name__)
DRAIN_S = 10.0  # for the last finals when the agent stops
FLUSH_S = 5.0  # for the last messages
RUNTIME = "ai-edge-litert"
EAR_S = 30.0  # within which audio comes, or the microphone says that there is none
PULSE_S = 5.0  # between two looks at the other stages, at most


def listen(
    source: Source, gate: Hearing, submit: Callable[[SpeechChunk], None], note: Callable[[AudioChunk], None]
) -> None:
    """Everything from the source through the gate, to its end. Raises AudioError."""
    try:
        for chunk in source:
            note(chunk)
            for speech in gate.feed(chunk):
                submit(speech)
    finally:
        for speech in gate.flush():
            submit(speech)


class Pipeline:
    """An agent at work. `run` listens until the source ends or `stop` is called from elsewhere."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        source: Callable[[Callable[[str, str], None], Callable[[float], None]], Source],
        cache_dir: Path,
    ) -> None:
        self.config = config
        self.session = new_session()
        self.outbox = new_outbox(config.outbox, self.report)
        self.vitals = Vitals(self._sense, self._renew_status, self.report)
        beats = self.vitals.heartbeat
        self.publisher = Publisher(
            named(config).mqtt,
            self.outbox,
            self._info(bundle),
            self.report,
            condition=self.vitals.condition,
            beat=beats.of("publisher"),
        )
        self.supervisor = Supervisor(
            bundle.path, config.recogniser, cache_dir, self._on_transcript, self.report, beats.of("engine")
        )
        self.gate = ConfirmedGate(config.vad)
        used = Usage()
        self.monitor = make_monitor(config, self._activity, lambda: used.read()[0], self._on_thrift, self.report)
        self.telemetry = Telemetry(self.session, energy=self.monitor.energy, heat=self.monitor.heat)
        self._beat_ear = beats.of("ear")  # source and gate, which share a loop
        self.source = source(self._on_source_event, self._beat_ear)
        self._anchor = (0, time.monotonic())  # a sample, and when it was captured
        self._said: tuple[int, int, str, int] | None = None  # last; a partial without news is not sent
        self._is_realtime = False
        self._event_numbers = itertools.count(1)
        self._stopping = threading.Event()
        self._pulse = threading.Thread(target=self._run_pulse, name="pulse", daemon=True)

    def run(self, *, realtime: bool) -> None:
        """Listen. Without `realtime` the source waits for the engine. Raises ConfigError, BundleError or AudioError."""
        self._is_realtime = realtime
        self.outbox.start()
        self.publisher.start()
        try:
            log.info("engine ready in %.1f s", self.supervisor.start())
            self._pulse.start()
            self.monitor.start()
            self.vitals.notifier.ready()
            listen(self.source, self.gate, lambda speech: self.supervisor.submit(speech, wait=not realtime), self._note)
        except AudioError as error:
            self.report("source_failed", str(error))
            raise
        finally:
            self._shut_down()

    def stop(self) -> None:
        """Make `run` come to its end; may be called from a signal handler."""
        self.source.close()

    def _shut_down(self) -> None:
        """Stop every stage, from the source to the sink, also if one of them cannot be stopped."""
        with contextlib.ExitStack() as stages:
            stages.callback(self.outbox.close)
            stages.callback(self.publisher.stop, FLUSH_S)
            stages.callback(self._stop_pulse)
            stages.callback(self.monitor.stop)
            stages.callback(self._stop_engine)
            stages.callback(self.source.close)
            stages.callback(self.vitals.heartbeat.forget, "ear")
            self.vitals.notifier.stopping()

    def _stop_engine(self) -> None:
        if not self.supervisor.drain(DRAIN_S if self.supervisor.pid else 0):
            log.warning("stopped with %d segments unfinished", self.supervisor.backlog)
        self.supervisor.stop()

    def _stop_pulse(self) -> None:
        self._stopping.set()
        if self._pulse.ident is not None:
            self._pulse.join()

    def _on_source_event(self, name: str, detail: str) -> None:
        """Called from the thread that reads the source."""
        if name == "microphone_lost":  # whoever was speaking is not left waiting for its return
            for speech in self.gate.flush():
                self.supervisor.submit(speech)
        self.vitals.note_event(name)
        self.report(name, detail)

    def report(self, name: str, detail: str) -> None:
        """Log and publish an event."""
        log.warning("%s: %s", name, detail, extra={"event": name})
        self.telemetry.counters.events += 1
        self._publish(event_payload(self.session, next(self._event_numbers), name, detail))

    def _activity(self) -> Activity:
        counters = self.supervisor.counters
        return Activity(self.supervisor.backlog > 0, counters.speech_s, counters.utterances)

    def _on_thrift(self, thrift: Thrift) -> None:
        """Called from the monitor's thread."""
        self.supervisor.thrift = thrift
        self.gate.is_strict = thrift is Thrift.FINALS_ONLY

    def _note(self, chunk: AudioChunk) -> None:
        self._anchor = (chunk.end, chunk.arrived_monotonic_s)
        if self._is_realtime:  # a file may have to wait for the engine
            self._beat_ear(EAR_S)
        self.vitals.note_audio()

    def _on_transcript(self, transcript: Transcript) -> None:
        """Called from the engine link's thread, which must not die of one transcript."""
        try:
            self._deliver(transcript)
        except Exception as error:
            log.exception("utterance %d could not be handed on", transcript.utterance)
            self.report("transcript_lost", f"utterance {transcript.utterance}: {error}")

    def _deliver(self, transcript: Transcript) -> None:
        now_s = time.monotonic()
        clock = Clock.at(time.time(), now_s, *self._anchor)
        if transcript.is_final:
            payload = final_payload(transcript, clock, self.session, now_s)
        else:
            payload = partial_payload(transcript, clock, self.session)
        self.telemetry.add(payload)
        if payload.is_final and self.config.log.transcripts:
            log.info("%s", payload.text, extra={"event": "final", "utterance": payload.utterance})
        said = (payload.utterance, payload.segment, payload.text, payload.stable_chars)
        if payload.is_final or (payload.text and said != self._said):
            self._publish(payload)
        self._said = said

    def _publish(self, payload: Payload) -> None:
        self.publisher.put(to_envelope(payload))

    def _run_pulse(self) -> None:
        """Telemetry at its interval, signs of life at systemd's."""
        interval_s = self.config.telemetry.interval_s
        pulse_s = min(PULSE_S, (self.vitals.notifier.watchdog_s or math.inf) / 4)
        due_s = time.monotonic() + interval_s
        while not self._stopping.wait(max(0.0, min(pulse_s, due_s - time.monotonic()))):
            self.vitals.turn()
            if time.monotonic() >= due_s:
                due_s += interval_s
                self._try_telemetry()
        self._try_telemetry()

    def _try_telemetry(self) -> None:
        """Publish a report, or count that there was none: the signs of life must go on."""
        try:
            self._publish_telemetry()
        except Exception:
            self.telemetry.counters.failed_reports += 1
            log.exception("telemetry could not be reported")

    def _publish_telemetry(self) -> None:
        self._collect_counters()
        counts = self.publisher.counts()
        delivery = Delivery(
            depth=self.outbox.depth,
            bytes=self.outbox.bytes,
            restored=self.outbox.restored(),
            stored=self.outbox.stored(),
            sent=self.outbox.sent(),
            dropped=self.outbox.dropped(),
            partials_dropped=counts.partials_dropped,
            refused=counts.refused,
            reconnects=max(0, counts.connects - 1),
        )
        self._publish(self.telemetry.snapshot(delivery, self.supervisor.backlog_s, self.supervisor.hop_ms))

    def _renew_status(self) -> None:
        self.publisher.renew_status()

    def _sense(self) -> Sensed:
        return Sensed(self.supervisor.hop_ms, self.outbox.depth, self.publisher.is_connected)

    def _collect_counters(self) -> None:
        """Take over what the stages count by themselves."""
        counters, engine, lost = self.telemetry.counters, self.supervisor.counters, self.source.counters
        counters.engine_restarts = engine.restarts
        counters.skipped_partials = engine.skipped_partials
        counters.dropped_segments, counters.failed_segments = engine.dropped_segments, engine.failed_segments
        counters.failed_looks = self.monitor.n_failed
        counters.rejected_segments = self.gate.n_rejected
        counters.dropped_samples, counters.source_overflows = lost.dropped_samples, lost.overflows
        counters.source_faults = lost.faults

    def _info(self, bundle: Bundle) -> InfoPayload:
        manifest = bundle.manifest
        return InfoPayload(
            session=self.session,
            started_utc=rfc3339(time.time()),
            versions=versions(RUNTIME),
            bundle=BundleInfo(
                name=manifest.name, sha256=bundle.sha256, languages=sorted(manifest.vocabulary.languages) or ["en"]
            ),
            hardware=hardware(),
            system=system(),
            config_sha256=config_sha256(self.config),
            capabilities=["partials", "finals", "telemetry"]
            if self.config.recogniser.partials
            else ["finals", "telemetry"],
            sample_rate_hz=SAMPLE_RATE,
        )


def named(config: Config) -> Config:
    """The configuration with the host's name for a device that has none."""
    if config.mqtt.device is not None:
        return config
    return msgspec.structs.replace(config, mqtt=msgspec.structs.replace(config.mqtt, device=socket.gethostname()))


def new_outbox(config: OutboxConfig, on_event: Callable[[str, str], None]) -> MemoryOutbox:
    """The outbox that is asked for."""
    limits = Limits(
        messages=config.max_messages,
        bytes=config.max_bytes,
        age_s=config.max_age_s,
        telemetry_age_s=config.telemetry_max_age_s,
    )
    if not config.durable:
        return MemoryOutbox(limits)
    return DurableOutbox(Path(config.dir) if config.dir else default_state_dir(), limits, on_event)
