"""What the ear and the engine's process say to each other: one reply to each request, over a socket pair.

Apart from both, so that the ear does not load what only the engine needs.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from .config import RecogniserConfig
from .messages import SpeechChunk, Thrift, Transcript


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first request."""

    bundle: str
    cache_dir: str
    config: RecogniserConfig


class Batch(msgspec.Struct, frozen=True, tag=True):
    """Speech, in order; chunks of one segment that waited are joined."""

    chunks: list[SpeechChunk]
    is_live: bool  # it goes on whether or not the engine keeps up; a file waits
    thrift: Thrift = Thrift.NORMAL
    tuning: RecogniserConfig | None = None  # holds from here on; None: what held before


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The reply to Start."""

    load_s: float


class Heard(msgspec.Struct, frozen=True, tag=True):
    """The reply to a Batch."""

    transcripts: list[Transcript]
    busy_s: float  # of the processor
    hop_ms: float | None  # speech between two partials from now on; None: finals only
    skipped: int  # partials that were not made, for lack of time


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The reply to a request that cannot be met; the process ends after it."""

    reason: str


Request = Start | Batch
Reply = Ready | Heard | Failed


def unheard(first: SpeechChunk, last: SpeechChunk) -> Transcript:
    """The final of a segment that no engine survived."""
    return Transcript(
        utterance=first.utterance,
        segment=first.segment,
        revision=0,
        text="",
        stable_chars=0,
        start=first.start,
        end=last.speech_end,
        is_final=True,
        language="",
        continues=last.continues,
        rejected="engine_failed",
    )


def _enc_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise NotImplementedError(type(value))


def _dec_hook(_kind: Any, value: Any) -> Any:
    return np.frombuffer(value, np.int16)


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_requests = msgspec.msgpack.Decoder(Request, dec_hook=_dec_hook)
_replies = msgspec.msgpack.Decoder(Reply, dec_hook=_dec_hook)


def send(connection: Connection, message: Request | Reply) -> None:
    """Raises OSError when the other side is gone."""
    connection.send_bytes(_encoder.encode(message))


def ask(connection: Connection, request: Request, timeout_s: float) -> Reply | None:
    """One request, one reply; None if that takes too long. Raises EOFError or OSError when the engine is gone."""
    with contextlib.suppress(BlockingIOError):  # a long request to an engine that does not even read, see `pair`
        send(connection, request)
        if connection.poll(timeout_s):
            reply: Reply = _replies.decode(connection.recv_bytes())
            return reply
    return None


def pair(timeout_s: float) -> tuple[Connection, socket.socket]:
    """A connection on which sending gives up after `timeout_s`, and the engine's end of it."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout_s), 0))
    return Connection(ours.detach()), theirs


def receive_request(connection: Connection) -> Request:
    """The next request. Raises EOFError when the ear is gone."""
    request: Request = _requests.decode(connection.recv_bytes())
    return request
