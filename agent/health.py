"""Signs of life: what systemd is told, and which stage has gone silent."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial

logger = logging.getLogger(__name__)
SLACK_S = 10.0  # a busy machine and a slow card may keep a stage for this much longer than it has promised


class Notifier:
    """Speaks sd_notify(3); silent where systemd does not listen."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # abstract namespace
            self._address = "\0" + self._address[1:]
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        self._is_deaf = False  # systemd, so far as we know
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
            self._is_deaf = False
        except OSError as error:
            logger.log(
                logging.DEBUG if self._is_deaf else logging.WARNING, "systemd was not told %s: %s", message, error
            )
            self._is_deaf = True


class Heartbeat:
    """Until when each stage has promised to show that it lives. Stages call from their own threads.

    A promise is as long as what the stage is about to do may take, so that a loop may wait for a minute, and an engine
    may work for as long as it is allowed to, without anybody being held for dead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, slack_s: float = SLACK_S) -> None:
        self._clock = clock
        self._slack_s = slack_s
        self._due_s: dict[str, float] = {}

    def beat(self, stage: str, within_s: float) -> None:
        """Note that `stage` is alive, and will be here again within so many seconds."""
        self._due_s[stage] = self._clock() + within_s + self._slack_s

    def of(self, stage: str) -> Callable[[float], None]:
        """`beat` for one stage."""
        return partial(self.beat, stage)

    def forget(self, stage: str) -> None:
        """Expect nothing of a stage that has ended in good order."""
        self._due_s.pop(stage, None)

    def stale(self) -> list[str]:
        """Stages that did not keep their promise."""
        now_s = self._clock()
        return [stage for stage, due_s in list(self._due_s.items()) if now_s > due_s]
