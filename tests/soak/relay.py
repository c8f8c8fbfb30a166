"""A broker's port that can be out of reach: what is connected is cut off, and nobody gets through."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Self


class Relay(threading.Thread):
    """Passes bytes on between one client at a time and a port of the loopback while `is_open`."""

    def __init__(self, target: int) -> None:
        super().__init__(name="relay", daemon=True)
        self.is_open = True
        self.n_cuts = 0
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.1)
        self.port = self._server.getsockname()[1]
        self._closing = False

    def run(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                client, _ = self._server.accept()
                with client:
                    if self.is_open:
                        self._pass_on(client)

    def _pass_on(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._target)) as broker, contextlib.suppress(OSError):
            while not self._closing:
                if not self.is_open:
                    self.n_cuts += 1
                    return
                for ready in select.select([client, broker], [], [], 0.02)[0]:
                    data = ready.recv(65_536)
                    if not data:
                        return
                    (broker if ready is client else client).sendall(data)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.join()
        self._server.close()
