"""A running engine process as the ear sees it: started, asked, ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from whisperlet.errors import BundleError

from .config import RecogniserConfig
from .protocol import Batch, Failed, Heard, Ready, Reply, Request, Start, ask, pair

START_TIMEOUT_S = 120.0  # the first start on a slow device packs the weights
ENVIRONMENT = {
    # glibc keeps what was freed unless it was mapped by itself; buffers of the engine come and go by the megabyte. The
    # rest goes back where it is more than some megabytes: by default every pass would ask anew for the same pages.
    "MALLOC_MMAP_THRESHOLD_": str(256 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 1024 * 1024),
    # numpy's product of a spectrogram would wake a thread a core, and each then waits awake for more: 75 ms a final.
    "OPENBLAS_NUM_THREADS": "1",
}


class EngineLost(Exception):
    """The engine process died, hung or could not start."""


class EngineProcess:
    """A running engine and the connection to it."""

    def __init__(self, bundle: Path, config: RecogniserConfig, cache_dir: Path) -> None:
        self._connection, theirs = pair(config.reply_timeout_s)
        with theirs:
            command = [sys.executable, "-m", "agent.worker", str(theirs.fileno())]
            environment = {**os.environ, **ENVIRONMENT}
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        self._start = Start(str(bundle.absolute()), str(cache_dir.absolute()), config)

    def wait_ready(self) -> float:
        """Seconds that loading took. Raises BundleError or EngineLost."""
        reply = self.ask(self._start, START_TIMEOUT_S)
        if isinstance(reply, Failed):
            raise BundleError(reply.reason)
        assert isinstance(reply, Ready), reply
        return reply.load_s

    def hear(self, batch: Batch, timeout_s: float) -> Heard:
        """Raises EngineLost."""
        reply = self.ask(batch, timeout_s)
        if not isinstance(reply, Heard):
            raise EngineLost(f"unexpected reply: {reply}")
        return reply

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """One request, one reply. Raises EngineLost."""
        try:
            reply = ask(self._connection, request, timeout_s)
        except (EOFError, OSError):
            raise EngineLost(f"it ended with status {self._status()}") from None
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise EngineLost(f"it does not make sense: {error}") from None
        if reply is None:
            raise EngineLost(f"no answer within {timeout_s:g} s")
        return reply

    def _status(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=5)
        return None

    def kill(self) -> None:
        """End it at once, from any thread; whoever waits for its answer gets EngineLost."""
        self.process.kill()

    def close(self, timeout_s: float = 2.0) -> None:
        """End it, by force if it does not end by itself."""
        self._connection.close()
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
