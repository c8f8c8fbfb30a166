"""Power and heat as telemetry tells them. Units in the names; null: not known, and never guessed."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Meters = Literal["hwmon", "rpi_pmic", "rapl", "battery", "model"]
Quality = Literal["measured_board", "measured_rail", "measured_package", "estimated"]
Joules = Annotated[float, Meta(ge=0, description="joules")]
Watts = Annotated[float, Meta(ge=0, description="watts")]


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What the source says; null wherever that was not measured throughout. See docs/telemetry.md."""

    source: Meters
    quality: Annotated[Quality, Meta(description="what the figures stand for; all but `estimated` are measured")]
    joules: Annotated[float, Meta(ge=0, description="over the interval")] | None
    watts: Annotated[float, Meta(ge=0, description="mean over the interval")] | None
    idle_watts: Annotated[float, Meta(ge=0, description="while nobody spoke, median of the latest")] | None
    joules_per_audio_s: Annotated[float, Meta(description="beyond idle, of talk settled in the interval")] | None
    joules_per_utterance: Annotated[float, Meta(description="beyond idle, of talk settled in the interval")] | None
    total_joules: Annotated[float, Meta(ge=0, description="since the agent started, as far as measured")]


Level = Literal["normal", "longer_hop", "no_partials", "finals_only"]


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """What is done without because of heat."""

    thrift: Annotated[Level, Meta(description="each goes without what the one before it does, too")]
    is_throttled: Annotated[bool, Meta(description="slowed down by firmware or kernel, now")] | None
    is_under_voltage: Annotated[bool, Meta(description="the power supply is too weak, now")] | None


class Otel(msgspec.Struct, frozen=True, kw_only=True):
    """The same measurements under the names and units of OpenTelemetry's semantic conventions; null: not known."""

    hw_energy: Joules | None = msgspec.field(name="hw.energy")  # since the agent started
    hw_power: Watts | None = msgspec.field(name="hw.power")
    hw_temperature: Annotated[float, Meta(description="Cel, hottest sensor")] | None = msgspec.field(
        name="hw.temperature"
    )
    process_cpu_time: Annotated[float, Meta(ge=0, description="s, all processes, since the agent started")] = (
        msgspec.field(name="process.cpu.time")
    )
    process_memory_usage: Annotated[int, Meta(ge=0, description="By, resident, all processes")] = msgspec.field(
        name="process.memory.usage"
    )
