"""Who this agent is, for the retained topic `info`."""

from __future__ import annotations

import socket
import time

import msgspec

from whisperlet.audio import SAMPLE_RATE
from whisperlet.bundle import Bundle

from .clock import rfc3339
from .config import Config
from .inventory import config_sha256, hardware, system, versions
from .payloads import BundleInfo, InfoPayload

RUNTIME = "ai-edge-litert"


def introduction(session: str, config: Config, bundle: Bundle) -> InfoPayload:
    """Everything that stays as it is until the agent ends."""
    manifest = bundle.manifest
    languages = sorted(manifest.vocabulary.languages) or ["en"]
    return InfoPayload(
        session=session,
        started_utc=rfc3339(time.time()),
        versions=versions(RUNTIME),
        bundle=BundleInfo(name=manifest.name, sha256=bundle.sha256, languages=languages),
        hardware=hardware(),
        system=system(),
        config_sha256=config_sha256(config),
        capabilities=capabilities(config),
        sample_rate_hz=SAMPLE_RATE,
    )


def capabilities(config: Config) -> list[str]:
    """What there is to be had of this agent."""
    partials = ["partials"] if config.recogniser.partials else []
    return [*partials, "finals", "telemetry", *(["commands"] if config.mqtt.commands else [])]


def named(config: Config) -> Config:
    """The configuration with the host's name for a device that has none."""
    if config.mqtt.device is not None:
        return config
    return msgspec.structs.replace(config, mqtt=msgspec.structs.replace(config.mqtt, device=socket.gethostname()))
