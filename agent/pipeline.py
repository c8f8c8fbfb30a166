"""The ear: source, gate, engine link, telemetry and publisher, wired. The one module that knows all stages.

Started from the sink to the source and stopped from the source to the sink, so that whatever a stage hands on always
finds the next one there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from whisperlet.bundle import Bundle
from whisperlet.errors import AudioError

from .broker import Broker
from .clock import Clock
from .commands import Settings
from .config import Config
from .confirm import ConfirmedGate
from .controls import Controls, Levers
from .diagnostics import RecentLog, dump
from .dispatch import Actions, Dispatcher
from .energy import Activity
from .hearing import listen
from .home_assistant import discovery
from .identity import introduction, named
from .kept import KeptSwitches
from .messages import AudioChunk, Thrift, Transcript
from .monitor import make_monitor
from .mqtt import Publisher
from .outboxes import new_outbox
from .payloads import Payload, event_payload, final_payload, new_session, partial_payload, to_envelope
from .sources import Source
from .supervisor import Supervisor
from .switches import SwitchedGate
from .telemetry import Delivery, Telemetry, Usage
from .vitals import Sensed, Vitals

log = logging.getLogger(__name__)
DRAIN_S = 10.0  # for the last finals when the agent stops
FLUSH_S = 5.0  # for the last messages
EAR_S = 30.0  # within which audio comes, or the microphone says that there is none
PULSE_S = 5.0  # between two looks at the other stages, at most


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
        self._log = RecentLog()
        self.vitals = Vitals(self._sense, self._renew_status, self.report)
        beats = self.vitals.heartbeat
        self.outbox = new_outbox(config.outbox, self.report, beats.of("outbox"))
        self.supervisor = Supervisor(
            bundle.path, config.recogniser, cache_dir, self._on_transcript, self.report, beats.of("engine")
        )
        self.gate = ConfirmedGate(config.vad)
        self.switched = SwitchedGate(self.gate)
        used = Usage()
        self.monitor = make_monitor(
            config, self._activity, lambda: used.read()[0], self._on_thrift, self.report, beats.of("monitor")
        )
        self.telemetry = Telemetry(self.session, energy=self.monitor.energy, heat=self.monitor.heat)
        self.info = introduction(self.session, config, bundle)
        self.kept = KeptSwitches.of(config)
        self.controls = Controls(Settings.of(config), self._levers())
        self.dispatcher = self._make_dispatcher(bundle.manifest.vocabulary.languages)
        self.publisher = Publisher(
            named(config).mqtt,
            self.outbox,
            self.info,
            self.report,
            condition=self.vitals.condition,
            beat=beats.of("publisher"),
            remote=self.dispatcher,
        )
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
        logging.getLogger().addHandler(self._log)
        self.outbox.start()
        self.dispatcher.resume(*msgspec.structs.astuple(self.kept.read()))
        self.publisher.start()
        try:
            log.info("engine ready in %.1f s", self.supervisor.start())
            self._pulse.start()
            self.monitor.start()
            self.vitals.notifier.ready()
            submit = partial(self.supervisor.submit, wait=not realtime)
            listen(self.source, self.switched, submit, self._note)
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
            stages.callback(logging.getLogger().removeHandler, self._log)
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
            for speech in self.switched.flush():
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
        reported_s = time.monotonic()
        pulse_s = min(PULSE_S, (self.vitals.notifier.watchdog_s or math.inf) / 4)
        due_s = reported_s + self._interval_s
        while not self._stopping.wait(max(0.0, min(pulse_s, due_s - time.monotonic()))):
            self.vitals.turn()
            due_s = reported_s + self._interval_s  # which may be set meanwhile
            if time.monotonic() >= due_s:
                reported_s = due_s
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
            commands=dict(self.dispatcher.counts),
        )
        hop_ms, is_muted = self.supervisor.hop_ms, self.vitals.is_muted
        self._publish(self.telemetry.snapshot(delivery, self.supervisor.backlog_s, hop_ms, is_muted=is_muted))

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

    @property
    def _interval_s(self) -> float:
        return self.controls.settings.telemetry.interval_s

    def _levers(self) -> Levers:
        return Levers(
            switch=self.switched.switch,
            keep=self.kept.keep,
            tune_gate=self.switched.retune,
            tune_engine=self.supervisor.retune,
            show_muted=partial(setattr, self.vitals, "is_muted"),
            report=self.report,
            renew_engine=self.supervisor.renew,
            stop=self.stop,
        )

    def _make_dispatcher(self, languages: dict[str, int]) -> Dispatcher:
        mqtt = self.config.mqtt
        topic, device = (broker := Broker.of(mqtt)).topic, broker.device
        greetings = [discovery(self.info, topic, device, mqtt)] if mqtt.home_assistant else []
        actions = Actions(self.controls.apply, self.controls.restart, self._diagnose)
        return Dispatcher(topic, self.session, self.controls.settings, languages, actions, greetings)

    def _diagnose(self) -> dict[str, Any]:
        self._collect_counters()
        state = {
            "line": self.vitals.line(),
            "counters": msgspec.to_builtins(self.telemetry.counters),
            "publisher": msgspec.to_builtins(self.publisher.counts()),
            "dropped_messages": {kind.value: n for kind, n in self.outbox.dropped().items()},
            "backlog_s": self.supervisor.backlog_s,
            "hop_ms": self.supervisor.hop_ms,
        }
        return dump(self.info, self.config, self.controls.settings, state, self._log)
