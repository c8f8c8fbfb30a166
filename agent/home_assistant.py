"""Introduces the device to Home Assistant: one retained message from which it makes a device with its entities."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from .config import MqttConfig
from .messages import Notice
from .payloads import InfoPayload

MAX_STATE = 255  # characters that Home Assistant takes for a state
ORIGIN = "whisperlet"


def discovery(info: InfoPayload, topic: Callable[[str], str], device: str, config: MqttConfig) -> Notice:
    """The message; `topic` gives full names."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", f"{ORIGIN}_{device}")
    entities = {
        name: entity for name, entity in _entities(topic).items() if config.commands or "command_topic" not in entity
    }
    payload = {
        "device": _without_none(
            identifiers=[key, *([info.hardware.id] if info.hardware.id else [])],
            name=device,
            manufacturer=ORIGIN,
            model=info.hardware.model or info.hardware.architecture,
            hw_version=info.hardware.architecture,
            sw_version=info.versions.agent,
        ),
        "origin": {"name": ORIGIN, "sw_version": info.versions.agent},
        "components": {name: {"unique_id": f"{key}_{name}", **entity} for name, entity in entities.items()},
        "qos": 1,
    }
    return Notice(f"{config.home_assistant_prefix}/device/{key}/config", msgspec.json.encode(payload), retain=True)


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _entities(topic: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """By their names, which stay: unique ids are made of them."""
    there = {
        "availability_topic": topic("status"),
        "availability_template": "{{ value_json.state }}",
        "payload_available": "online",
        "payload_not_available": "offline",
    }
    return {
        "connectivity": {
            "platform": "binary_sensor",
            "name": "Connected",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": topic("status"),
            "value_template": "{{ 'ON' if value_json.state == 'online' else 'OFF' }}",
        },
        "mute": there
        | {
            "platform": "switch",
            "name": "Mute",
            "icon": "mdi:microphone-off",
            "command_topic": topic("cmd/set"),
            "payload_on": '{"muted": true}',
            "payload_off": '{"muted": false}',
            "state_topic": topic("reported"),
            "value_template": "{{ 'ON' if value_json.muted else 'OFF' }}",
            "state_on": "ON",
            "state_off": "OFF",
        },
        "transcript": there
        | {
            "platform": "sensor",
            "name": "Transcript",
            "icon": "mdi:text-recognition",
            "state_topic": topic("transcript/final"),
            "value_template": "{{ value_json.text[:%d] }}" % MAX_STATE,  # noqa: UP031 - braces are the template's
            "json_attributes_topic": topic("transcript/final"),
        },
        "temperature": there
        | _measured(topic, "Temperature", "value_json.temperature_c", "°C", device_class="temperature"),
        "power": there
        | _measured(
            topic,
            "Power",
            "value_json.energy.watts if value_json.energy else none",
            "W",
            device_class="power",
        ),
        "latency": there | _measured(topic, "Latency", "value_json.end_to_final_ms.p50", "ms", device_class="duration"),
    }


def _measured(topic: Callable[[str], str], name: str, value: str, unit: str, *, device_class: str) -> dict[str, Any]:
    """A figure of the telemetry."""
    return {
        "platform": "sensor",
        "name": name,
        "device_class": device_class,
        "state_class": "measurement",
        "entity_category": "diagnostic",
        "unit_of_measurement": unit,
        "state_topic": topic("telemetry"),
        "value_template": f"{{{{ {value} }}}}",
    }
