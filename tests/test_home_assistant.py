"""What Home Assistant is told; its templates are rendered as it would, over what the agent publishes."""

import json

import msgspec
import pytest
from test_mqtt import INFO
from test_payloads import FINAL, telemetry

from agent import payloads
from agent.commands import Set, Settings, parse
from agent.config import Config, MqttConfig
from agent.dispatch import Actions, Dispatcher
from agent.home_assistant import discovery
from agent.inventory import Hardware
from agent.measurements import Energy

from test_payloads import CLOCK  # isort: skip

jinja2 = pytest.importorskip("jinja2")
UNKNOWN_MACHINE = Hardware(id=None, model=None, architecture="aarch64", n_cpus=4, memory_bytes=None)


def topic(name):
    return f"whisperlet/kiosk 7/{name}"


def announced(info=INFO, **config):
    notice = discovery(info, topic, "kiosk 7", MqttConfig(**config))
    return notice, json.loads(notice.payload)


def energy():
    figures = dict.fromkeys(("joules", "idle_watts", "joules_per_audio_s", "joules_per_utterance"))
    return Energy(source="rapl", quality="measured_package", watts=3.5, total_joules=7.0, **figures)


@pytest.fixture
def published():
    """Payload by topic."""
    settings = Settings.of(Config())
    dispatcher = Dispatcher(topic, "s1", msgspec.structs.replace(settings, muted=True), {}, Actions(print, print, dict))
    (reported,) = dispatcher.greeting()
    examples = [
        payloads.status_payload("s1", "connected"),
        payloads.final_payload(msgspec.structs.replace(FINAL, text="x" * 300), CLOCK, "s1", 103.0),
        telemetry(temperature_c=51.5, energy=energy()),
    ]
    envelopes = map(payloads.to_envelope, examples)
    return {topic(e.topic): json.loads(e.payload) for e in envelopes} | {reported.topic: json.loads(reported.payload)}


def rendered(template, payload):
    """By Home Assistant's rules: an unknown field is an error here, though."""
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(value_json=payload)


def test_it_is_retained_where_it_is_looked_for():
    notice, _ = announced()
    assert (notice.topic, notice.retain) == ("homeassistant/device/whisperlet_kiosk_7/config", True)
    assert announced(home_assistant_prefix="ha/x")[0].topic == "ha/x/device/whisperlet_kiosk_7/config"


@pytest.mark.parametrize(
    ("entity", "state"),
    [
        ("connectivity", "ON"),
        ("mute", "ON"),
        ("transcript", "x" * 255),
        ("temperature", "51.5"),
        ("power", "3.5"),
        ("latency", "700.0"),
    ],
)
def test_every_entity_shows_what_is_published(published, entity, state):
    config = announced()[1]["components"][entity]
    assert rendered(config["value_template"], published[config["state_topic"]]) == state
    if entity != "connectivity":
        assert rendered(config["availability_template"], published[config["availability_topic"]]) == "online"


def test_what_is_not_measured_is_none(published):
    components = announced()[1]["components"]
    blank = json.loads(payloads.to_envelope(telemetry()).payload)
    blank["end_to_final_ms"]["p50"] = None
    for entity in ("temperature", "power", "latency"):
        assert rendered(components[entity]["value_template"], blank) == "None"  # which stands for unknown there


def test_the_switch_gives_commands_that_are_taken():
    switch = announced()[1]["components"]["mute"]
    assert switch["command_topic"] == topic("cmd/set")
    assert parse("set", switch["payload_on"].encode()) == Set(muted=True)
    assert parse("set", switch["payload_off"].encode()) == Set(muted=False)


def test_no_switch_where_nobody_listens_to_it():
    assert "mute" not in announced(commands=False)[1]["components"]


def test_a_device_has_one_identity():
    document = announced()[1]
    assert document["device"]["identifiers"][0] == "whisperlet_kiosk_7"
    ids = [entity["unique_id"] for entity in document["components"].values()]
    assert len(set(ids)) == len(ids) == 6
    assert all(name.startswith("whisperlet_kiosk_7_") for name in ids)
    assert document["origin"]["name"] == "whisperlet"


def test_nothing_is_null_where_the_machine_does_not_say():
    device = announced(msgspec.structs.replace(INFO, hardware=UNKNOWN_MACHINE))[1]["device"]
    assert None not in device.values()
    assert device["model"] == "aarch64"
