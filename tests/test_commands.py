"""What is taken for a command, and what is done with it; time passes because the test says so."""

import contextlib
import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import commands
from agent.commands import KEYS, MAX_BYTES, Refused, Settings, changed, desired_wishes, parse
from agent.config import Config, VadConfig
from agent.dispatch import MAX_IDS, Actions, Dispatcher
from agent.messages import Request
from whisperlet.errors import ConfigError

SCHEMAS = Path(__file__).parents[1] / "docs" / "schema"
NOON = 1_738_324_800.0  # 2025-01-31 12:00:00 UTC
CONFIGURED = Settings.of(Config())
LANGUAGES = {"en": 1, "de": 2}


class Device:
    """A dispatcher, and what it has asked of the pipeline."""

    def __init__(self, name="dev", **actions):
        self.applied, self.restarts, self.now_s = [], [], NOON
        told = {"apply": self.applied.append, "restart": self.restarts.append, "diagnostics": lambda: {"log": []}}
        self.dispatcher = Dispatcher(
            lambda topic: f"whisperlet/{name}/{topic}",
            "s1",
            CONFIGURED,
            LANGUAGES,
            Actions(**told | actions),
            now=lambda: self.now_s,
        )

    def notices(self, topic, payload=b"", **more):
        body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        return self.dispatcher.handle(Request(topic, body, **more))

    def tell(self, name, payload=b"", **more):
        """The answer to a command."""
        answer, *_ = self.notices(f"cmd/{name}", payload, **more)
        body = json.loads(answer.payload)
        jsonschema.validate(body, json.loads((SCHEMAS / "cmd-result.json").read_text()))
        return body

    def desire(self, document):
        """What is reported then; None if nothing is."""
        notices = self.notices("desired", document)
        if not notices:
            return None
        (reported,) = notices
        assert (reported.topic, reported.retain) == ("whisperlet/dev/reported", True)
        body = json.loads(reported.payload)
        jsonschema.validate(body, json.loads((SCHEMAS / "reported.json").read_text()))
        return body


@pytest.fixture
def device():
    return Device()


EXAMPLES = [
    ("mute", {}),
    ("unmute", {"id": "7"}),
    ("transcribe", {"on": False}),
    ("set", {"muted": True, "transcribing": False}),
    ("set", {"recogniser": {"hop_ms": 500, "language": "de", "partials": False}, "telemetry": {"interval_s": 5}}),
    ("set", {"vad": {"start_ms": 140, "confirm_probability": 0}}),
    ("restart", {}),
    ("restart", {"what": "engine", "time_utc": "2025-01-31T12:00:00+01:00", "expires_s": 2.5}),
    ("diagnostics", {"id": "x" * 64}),
]


@pytest.mark.parametrize(("name", "payload"), EXAMPLES)
def test_examples_are_what_their_schema_says_and_are_done(device, name, payload):
    jsonschema.validate(payload, json.loads((SCHEMAS / f"cmd-{name}.json").read_text()))
    payload = {key: value for key, value in payload.items() if key != "expires_s"}
    answer = device.tell(name, payload)
    assert (answer["outcome"], answer["command"], answer["id"]) == ("ok", name, payload.get("id"))
    assert device.dispatcher.counts == {"ok": 1}


@pytest.mark.parametrize(
    ("name", "payload", "reason"),
    [
        ("mute", b"[]", "the payload: Expected `object`, got `array`"),
        ("mute", b"{", "the payload: Input data was truncated"),
        ("mute", b"\xff", "the payload: JSON is malformed"),
        ("mute", {"what": 1}, "what: unknown key"),
        ("mute", {"id": ""}, "id: Expected `str` of length >= 1"),
        ("mute", {"id": "x" * 65}, "id: Expected `str` of length <= 64"),
        ("mute", {"expires_s": 5}, "expires_s: counts from time_utc, which is missing"),
        ("mute", {"time_utc": "2025-01-31T12:00:00"}, "time_utc: Expected `datetime` with a timezone"),
        ("mute", {"time_utc": "noon"}, "time_utc: Invalid RFC3339"),
        ("transcribe", {}, "the payload: Object missing required field `on`"),
        ("restart", {"what": "world"}, "what: Invalid enum value 'world'"),
        ("set", {"vad": {"start_ms": 5}}, "vad.start_ms: Expected `int` >= 20"),
        ("set", {"vad": {"strat_ms": 5}}, "vad.strat_ms: unknown key"),
        ("set", {"recogniser": {"threads": 1}}, "recogniser.threads: unknown key"),
        ("set", b'{"muted": true}' + b" " * MAX_BYTES, "bytes are too many"),
    ],
)
def test_invalid_in_one_sentence(device, name, payload, reason):
    answer = device.tell(name, payload)
    assert answer["outcome"] == "invalid"
    assert reason in answer["detail"]
    assert (device.applied, device.restarts) == ([], [])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"recogniser": {"language": "xx"}}, "recogniser.language: the bundle does not have 'xx'; it has en, de"),
        ({"recogniser": {"terms": ["Rhabarber\t90"]}}, "recogniser.terms: item 1: the boost 90 is not above 0"),
        ({"vad": {"max_segment_s": 5, "cut_window_s": 5}}, "vad.cut_window_s: must be less than"),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(device, payload, reason):
    answer = device.tell("set", payload | {"muted": True})
    assert answer["outcome"] == "refused"
    assert reason in answer["detail"]
    assert device.applied == []


def test_an_unknown_command_is_answered(device):
    answer = device.tell("dance")
    assert answer["outcome"] == "unknown"
    assert "there is no command 'dance'; there are mute, " in answer["detail"]


def test_commands_change_what_holds(device):
    assert device.tell("mute")["data"] == {"muted": True}
    assert device.tell("set", {"vad": {"start_ms": 140}})["data"] == {"vad.start_ms": 140}
    assert device.tell("transcribe", {"on": False})["outcome"] == "ok"
    assert [(s.muted, s.transcribing, s.vad.start_ms) for s in device.applied] == [
        (True, True, 120),
        (True, True, 140),
        (True, False, 140),
    ]
    device.tell("unmute")
    assert not device.applied[-1].muted
    assert device.tell("unmute")["outcome"] == "ok"
    assert len(device.applied) == 4  # once more is no news


def test_what_holds_is_reported_when_it_changes(device):
    _, reported = device.notices("cmd/mute")
    assert (reported.topic, reported.retain) == ("whisperlet/dev/reported", True)
    assert json.loads(reported.payload)["muted"] is True
    assert len(device.notices("cmd/mute")) == 1
    assert json.loads(device.dispatcher.greeting()[0].payload)["muted"] is True


def test_a_late_command_is_not_done(device):
    order = {"time_utc": "2025-01-31T13:00:00+01:00", "expires_s": 10, "id": "1"}
    device.now_s = NOON + 10.5
    answer = device.tell("mute", order)
    assert (answer["outcome"], answer["id"], device.applied) == ("expired", "1", [])
    device.now_s = NOON + 9.5
    assert device.tell("mute", order)["outcome"] == "ok"


def test_a_repeated_command_is_done_once(device):
    assert device.tell("restart", {"id": "1"})["outcome"] == "ok"
    answer = device.tell("restart", {"id": "1"})
    assert (answer["outcome"], device.restarts) == ("repeated", ["agent"])
    assert "with the outcome ok" in answer["detail"]
    assert device.tell("restart", {"id": "2"})["outcome"] == "ok"
    assert device.dispatcher.counts == {"ok": 2, "repeated": 1}


def test_ids_are_remembered_within_bounds(device):
    for n in range(MAX_IDS + 1):
        device.tell("mute", {"id": str(n)})
    assert len(device.dispatcher._seen) == MAX_IDS
    assert device.tell("mute", {"id": "1"})["outcome"] == "repeated"
    assert device.tell("mute", {"id": "0"})["outcome"] == "ok"


def test_a_restart_that_the_broker_repeats_is_not_done(device):
    assert device.tell("restart", is_again=True)["outcome"] == "repeated"
    assert device.tell("mute", is_again=True)["outcome"] == "ok"
    assert device.restarts == []


def test_a_retained_command_is_counted_only(device):
    assert device.notices("cmd/mute", is_retained=True) == []
    assert device.dispatcher.counts == {"retained": 1}
    assert device.applied == []


def test_a_command_that_fails_is_answered():
    device = Device(diagnostics=lambda: 1 / 0)
    answer = device.tell("diagnostics")
    assert (answer["outcome"], answer["detail"]) == ("failed", "division by zero")
    assert device.tell("mute")["outcome"] == "ok"


@pytest.mark.parametrize(
    ("wanted", "used"),
    [
        (None, "whisperlet/dev/cmd/mute/result"),
        ("", "whisperlet/dev/cmd/mute/result"),
        ("operators/7", "operators/7"),
        ("whisperlet/fleet/result", "whisperlet/fleet/result"),
        ("whisperlet/other/cmd/restart", "whisperlet/dev/cmd/mute/result"),
        ("whisperlet/dev/status", "whisperlet/dev/cmd/mute/result"),
        ("$SYS/broker", "whisperlet/dev/cmd/mute/result"),
        ("operators/#", "whisperlet/dev/cmd/mute/result"),
    ],
)
def test_answers_go_where_they_do_no_harm(device, wanted, used):
    answer, _ = device.notices("cmd/mute", response_topic=wanted, correlation=b"\0c")
    assert (answer.topic, answer.correlation, answer.retain) == (used, b"\0c", False)


def test_a_desired_document_holds_key_by_key(device):
    document = {"muted": True, "vad": {"start_ms": 5, "hang_over_ms": 600}, "recogniser": {"language": "xx"}, "x": 1}
    reported = device.desire(document)
    assert (reported["muted"], reported["vad"]["start_ms"], reported["vad"]["hang_over_ms"]) == (True, 120, 600)
    assert reported["recogniser"]["language"] == "en"
    assert set(reported["refused"]) == {"vad.start_ms", "recogniser.language", "x"}
    assert "Expected `int` >= 20" in reported["refused"]["vad.start_ms"]
    assert device.applied == [device.dispatcher.settings]


def test_what_hangs_together_is_desired_together(device):
    assert device.desire({"vad": {"cut_window_s": 5, "max_segment_s": 6}})["refused"] == {}
    assert device.dispatcher.settings.vad == VadConfig(cut_window_s=5, max_segment_s=6)


def test_a_document_that_comes_again_changes_nothing(device):
    device.desire({"muted": True})
    device.tell("unmute")
    assert device.desire({"muted": True}) is None
    assert not device.dispatcher.settings.muted


def test_what_is_not_desired_any_more_goes_back_and_the_rest_is_left_alone(device):
    device.desire({"muted": True, "vad": {"start_ms": 140}})
    device.tell("set", {"vad": {"hang_over_ms": 700}})
    device.desire({"muted": True})
    assert device.dispatcher.settings.vad == VadConfig(hang_over_ms=700)
    device.desire(b"")
    assert not device.dispatcher.settings.muted


@pytest.mark.parametrize("document", [b"[]", b"{", b"[" * 10_000, b'{"x":' * 5000, b" " * (MAX_BYTES + 1)])
def test_a_document_that_is_none_is_refused(device, document):
    assert set(device.desire(document)["refused"]) == {"desired"}
    assert device.applied == []


def test_every_key_that_can_be_set_can_be_read_back():
    assert set(CONFIGURED.settable()) == KEYS


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
documents = st.dictionaries(
    st.sampled_from(sorted(key.partition(".")[0] for key in KEYS)) | st.text(max_size=5),
    values | st.dictionaries(st.sampled_from(sorted(key.partition(".")[2] for key in KEYS)), values),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*commands.COMMANDS, "other"]), st.binary(max_size=60) | documents.map(msgspec.json.encode))
def test_anything_is_a_command_or_refused(name, payload):
    with contextlib.suppress(Refused):
        assert type(parse(name, payload)) is commands.COMMANDS[name]


@settings(max_examples=150, deadline=None)
@given(documents)
def test_any_document_leaves_settings_that_are_valid(document):
    found, refused = commands.as_far_as_possible(CONFIGURED, desired_wishes(msgspec.json.encode(document)), LANGUAGES)
    assert msgspec.convert(msgspec.to_builtins(found), Settings) == found
    for key, value in desired_wishes(msgspec.json.encode(document)).items():
        if key[:64] not in refused:
            assert found.settable()[key] == value


def test_a_setting_that_would_break_others_is_refused_alone():
    with pytest.raises(ConfigError, match=r"^vad\.cut_window_s"):
        changed(CONFIGURED, {"vad.max_segment_s": 5, "vad.cut_window_s": 5}, LANGUAGES)
