"""Signs of life: what systemd is told, and which stage has gone silent."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class Notifier:
    """Speaks sd_notify(3); silent where systemd does not listen."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # abstract namespace
            self._address = "\0" + self._address[1:]
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog_us) / 1e6 if watchdog_us.isdecimal() else None  # systemd kills us after this

    def ready(self) -> None:
        """Tell that start-up is done."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        self._send(f"STATUS={text.splitlines()[0] if text else ''}")

    def watchdog(self) -> None:
        """Tell that all is well; to be called at least twice within `watchdog_s`."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Tell that the end is intended."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
                client.setblocking(False)
                client.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning("systemd was not told %s: %s", message, error)


class Heartbeat:
    """When each stage was last alive, against how long it may be silent. Stages beat from their own threads."""

    def __init__(self) -> None:
        self._bounds_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}

    def watch(self, stage: str, bound_s: float, now_s: float) -> None:
        """Expect `stage` to beat at least every `bound_s` seconds from `now_s` (monotonic) on."""
        self._last_s[stage] = now_s
        self._bounds_s[stage] = bound_s

    def beat(self, stage: str, now_s: float) -> None:
        """Note that `stage` is alive at `now_s` (monotonic)."""
        self._last_s[stage] = now_s

    def forget(self, stage: str) -> None:
        """Expect nothing of a stage that has ended in good order."""
        self._bounds_s.pop(stage, None)

    def stale(self, now_s: float) -> list[str]:
        """Stages that have been silent for longer than their bound."""
        return [stage for stage, bound_s in list(self._bounds_s.items()) if now_s - self._last_s[stage] > bound_s]
