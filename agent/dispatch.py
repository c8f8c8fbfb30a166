"""Carries out what operators ask for, through what the pipeline lends it, and answers.

Called from the publisher's thread alone. A command is done once and answered with its outcome; one that is retained is
not meant for now, and only counted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from whisperlet.errors import ConfigError

from .clock import rfc3339
from .commands import (
    Command,
    Diagnostics,
    Mute,
    Refused,
    Restart,
    Set,
    Settings,
    Transcribe,
    Unmute,
    as_far_as_possible,
    changed,
    desired_wishes,
    is_expired,
    parse,
    wishes,
)
from .messages import Notice, Request
from .replies import Outcome, ReportedPayload, ResultPayload

MAX_IDS = 256  # of commands that are remembered; the oldest is forgotten first
COMMAND = "cmd/"
DESIRED, REPORTED = "desired", "reported"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Actions:
    """What the pipeline lets itself be told; each returns at once."""

    apply: Callable[[Settings], None]
    restart: Callable[[str], None]  # "engine" or "agent"
    diagnostics: Callable[[], dict[str, Any]]


class Dispatcher:
    """Knows the settings that hold. `topic` gives the full name of a topic of this device; `now` is the wall clock."""

    def __init__(
        self,
        topic: Callable[[str], str],
        session: str,
        settings: Settings,
        languages: dict[str, int],
        actions: Actions,
        greetings: Sequence[Notice] = (),
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = self._configured = settings
        self.counts: Counter[str] = Counter()  # of commands, by outcome, or "retained"
        self._topic, self._session, self._languages = topic, session, languages
        self._actions, self._greetings, self._now = actions, greetings, now
        self._seen: OrderedDict[str, Outcome] = OrderedDict()
        self._document: bytes | None = None  # the last `desired`
        self._desired: dict[str, Any] = {}  # what of it holds
        self._refused: dict[str, str] = {}

    def resume(self, muted: bool, transcribing: bool) -> None:
        """Have the switches stand as they did before the agent was started anew."""
        self._take(msgspec.structs.replace(self.settings, muted=muted, transcribing=transcribing))

    def greeting(self) -> list[Notice]:
        """What a new connection begins with."""
        return [self._reported(), *self._greetings]

    def handle(self, request: Request) -> list[Notice]:
        """Do what is asked, if it is to be done; what is to be published then."""
        if request.topic == DESIRED:
            return self._desire(request.payload)
        name = request.topic.removeprefix(COMMAND)
        if request.is_retained:
            log.warning("a retained command %r is not done: it would be done at each connection", name[:64])
            self.counts["retained"] += 1
            return []
        before = self.settings
        result = self._obey(name, request)
        self.counts[result.outcome] += 1
        log.info("command %r: %s %s", name[:64], result.outcome, result.detail)
        answer = Notice(self._answer_topic(name, request), msgspec.json.encode(result), correlation=request.correlation)
        return [answer, *self._news(before)]

    def _obey(self, name: str, request: Request) -> ResultPayload:
        command, data, outcome, detail = None, None, "ok", ""
        try:
            command = parse(name, request.payload)
            self._check_timely(command, request)
            data = self._execute(command)
        except Refused as refusal:
            outcome, detail = refusal.outcome, str(refusal)
        except ConfigError as error:
            outcome, detail = "refused", str(error)
        except Exception as error:
            log.exception("command %r failed", name[:64])
            outcome, detail = "failed", str(error)
        command_id = command.id if command else None
        if command_id and outcome not in {"repeated", "expired"}:
            self._remember(command_id, outcome)
        return ResultPayload(
            session=self._session,
            command=name[:64],
            id=command_id,
            outcome=outcome,  # type: ignore[arg-type]
            detail=detail,
            data=data,
            time_utc=rfc3339(self._now()),
        )

    def _check_timely(self, command: Command, request: Request) -> None:
        """Raises Refused for what has come too late or came before."""
        if is_expired(command, self._now()):
            raise Refused("expired", f"it was to be done within {command.expires_s:g} s")
        if command.id and command.id in self._seen:
            raise Refused("repeated", f"it was done before, with the outcome {self._seen[command.id]}")
        if request.is_again and isinstance(command, Restart):  # it may be why we have just started
            raise Refused("repeated", "the broker has sent it before")

    def _remember(self, command_id: str, outcome: Any) -> None:
        self._seen[command_id] = outcome
        if len(self._seen) > MAX_IDS:
            self._seen.popitem(last=False)

    def _execute(self, command: Command) -> dict[str, Any] | None:
        match command:
            case Mute() | Unmute():
                return self._set({"muted": isinstance(command, Mute)})
            case Transcribe():
                return self._set({"transcribing": command.on})
            case Set():
                return self._set(wishes(command))
            case Restart():
                self._actions.restart(command.what)
            case Diagnostics():
                return self._actions.diagnostics() | {"commands": dict(self.counts)}
        return None

    def _set(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self._take(changed(self.settings, wanted, self._languages))
        return {key: value for key, value in self.settings.settable().items() if key in wanted}

    def _take(self, settings: Settings) -> None:
        if settings != self.settings:
            self._actions.apply(settings)
            self.settings = settings

    def _desire(self, payload: bytes) -> list[Notice]:
        """Have a document hold; what the one before asked for and this one does not goes back to the configuration.

        It comes anew with each connection, and does nothing then: what was set since shall stay.
        """
        if payload == self._document:
            return []
        self._document, before = payload, self.settings
        try:
            wanted, self._refused = desired_wishes(payload), {}
        except Refused as refusal:
            self._refused = {DESIRED: str(refusal)}
            return [self._reported()]
        configured = self._configured.settable()
        gone = {key: configured[key] for key in self._desired if key not in wanted}
        settings, self._refused = as_far_as_possible(self.settings, gone | wanted, self._languages)
        self._desired = {key: value for key, value in wanted.items() if key not in self._refused}
        try:
            self._take(settings)
        except Exception as error:
            log.exception("the desired settings could not be applied")
            self._refused[DESIRED] = str(error)
        return self._news(before) or [self._reported()]

    def _news(self, before: Settings) -> list[Notice]:
        """What holds now, if that is another thing than before."""
        return [self._reported()] if self.settings != before else []

    def _reported(self) -> Notice:
        sections: dict[str, dict[str, Any]] = {"recogniser": {}, "vad": {}, "telemetry": {}}
        for key, value in self.settings.settable().items():
            section, _, name = key.rpartition(".")
            if section:
                sections[section][name] = value
        payload = ReportedPayload(
            session=self._session,
            muted=self.settings.muted,
            transcribing=self.settings.transcribing,
            **sections,
            refused=self._refused,
            time_utc=rfc3339(self._now()),
        )
        return Notice(self._topic(REPORTED), msgspec.json.encode(payload), retain=True)

    def _answer_topic(self, name: str, request: Request) -> str:
        """Where the asker wants it, but nowhere where it could be taken for something else."""
        wanted = request.response_topic
        is_ours = wanted is not None and wanted.startswith("whisperlet/") and not wanted.endswith("/result")
        if not wanted or is_ours or wanted.startswith("$") or set("+#\0") & set(wanted):
            return self._topic(f"{COMMAND}{name[:64]}/result")
        return wanted
