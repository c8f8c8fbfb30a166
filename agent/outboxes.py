"""The outbox that the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from .config import OutboxConfig, outbox_dir
from .outbox import Limits, MemoryOutbox
from .store import DurableOutbox


def new_outbox(
    config: OutboxConfig, on_event: Callable[[str, str], None], beat: Callable[[float], None]
) -> MemoryOutbox:
    """On disk or in memory, not started; `on_event(name, detail)` and `beat(within_s)` are for one on disk."""
    limits = Limits(
        messages=config.max_messages,
        bytes=config.max_bytes,
        age_s=config.max_age_s,
        telemetry_age_s=config.telemetry_max_age_s,
    )
    if not config.durable:
        return MemoryOutbox(limits)
    return DurableOutbox(outbox_dir(config), limits, on_event, beat=beat)
