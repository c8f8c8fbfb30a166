"""Follows speech while it lasts: the streaming encoder a chunk at a time, the decoder on from what it said before."""

from __future__ import annotations

from collections.abc import Sequence

from whisperlet.audio import FRAMES_PER_SECOND, WINDOW_FRAMES, Float32
from whisperlet.bundle import Manifest, StreamSpec
from whisperlet.errors import ConfigError
from whisperlet.logmel import LogMel

from . import drafting
from .alignment import Looks
from .drafting import Draft
from .engine import Engine
from .terms import Terms

MEL_PER_FRAME = 2  # the second convolution has stride 2
CONTEXT_BEFORE, CONTEXT_AFTER = 2, 1  # mel frames around an encoder frame's own two that the convolutions see
MARGIN = 10  # frames before the end of the audio; a token that looks there may stand for a word that is cut off
EDGE = 14  # frames before the end of the audio; a token that looks there is the last one of a partial
NOTHING = Draft([], [])


def stream_spec(manifest: Manifest, overlap: int | None) -> StreamSpec | None:
    """The way of streaming with that overlap in frames, by default the first; None if the bundle does not stream.

    Raises ConfigError if it streams with other overlaps.
    """
    specs = {spec.overlap: spec for spec in manifest.streams}
    if not specs or overlap is None:
        return next(iter(specs.values()), None)
    if overlap not in specs:
        has = ", ".join(map(str, specs))
        raise ConfigError(f"recogniser.overlap_frames: the bundle does not have {overlap}; it has {has}")
    return specs[overlap]


class Bound:
    """An engine with the decoder's state that it is to work on."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.state = engine, engine.new_state()

    @property
    def position(self) -> int:
        """Tokens so far."""
        return self.state.position

    @position.setter
    def position(self, value: int) -> None:
        self.state.position = value

    @property
    def looks(self) -> Looks:
        """Where the tokens of the last call looked."""
        return self.state.looks

    def decode(self, tokens: Sequence[int]) -> Float32:
        """See `Engine.decode`."""
        return self.engine.decode(self.state, tokens)


class Follower:
    """What is heard of one segment after another while it lasts. Its decoder may be used by others in between."""

    def __init__(self, decoder: Bound, manifest: Manifest, spec: StreamSpec) -> None:
        self._decoder, self._manifest, self._spec = decoder, manifest, spec
        self._stream = decoder.engine.new_stream(spec)
        self._is_displaced = False  # the decoder's state was used by others
        self.draft = NOTHING
        self.n_heard = 0  # frames that the draft knows

    @property
    def width(self) -> int:
        """Frames of a step."""
        return self._spec.width

    def begin(self) -> None:
        """Start on another segment."""
        self._stream.begin()
        self.draft, self.n_heard = NOTHING, 0
        self.displace()

    def displace(self) -> None:
        """Say that the decoder's state is not what it was."""
        self._is_displaced = True

    def is_due(self, logmel: LogMel, hop_ms: float) -> bool:
        """Whether a hop has passed since the last look."""
        hop = max(self._spec.chunk, round(hop_ms * FRAMES_PER_SECOND / 1000))
        return self._latest(logmel) - self.n_heard >= hop

    def listen(self, logmel: LogMel) -> None:
        """Encode up to the latest frame at which a full step can end, so that how audio was cut makes no difference."""
        end = self._latest(logmel)
        while self._stream.n_frames < end:
            first = self._stream.committed
            n_frames = min(self._spec.reach, end - first)
            n_mel = MEL_PER_FRAME * self._spec.width + CONTEXT_BEFORE + CONTEXT_AFTER
            mel = logmel.stretch(
                MEL_PER_FRAME * first - CONTEXT_BEFORE, n_mel, MEL_PER_FRAME * (first + n_frames) + CONTEXT_AFTER
            )
            self._decoder.engine.listen(self._stream, mel, n_frames)
        self.n_heard = end

    def attend(self) -> None:
        """Let the decoder look at what was encoded."""
        self._decoder.engine.attend(self._decoder.state, self._stream)
        if self._is_displaced:
            self._decoder.position = 0
            self._is_displaced = False

    def hear(self, prompt: Sequence[int], limit: int, terms: Terms | None = None) -> Draft:
        """What is said up to the last frame that was encoded; `attend` comes first."""
        self.draft = drafting.follow(
            self._decoder,
            self._manifest.vocabulary,
            prompt,
            self.draft,
            frontier=self.n_heard - MARGIN,
            edge=self.n_heard - EDGE,
            limit=limit,
            block=max(self._manifest.decode_tokens),
            terms=terms,
        )
        return self.draft

    def _latest(self, logmel: LogMel) -> int:
        """The last frame, complete with its context, after which a step may end: the overlap plus whole chunks."""
        n_complete = min((logmel.n_frames - CONTEXT_AFTER) // MEL_PER_FRAME, WINDOW_FRAMES - self._spec.padding)
        return n_complete - (n_complete - self._spec.overlap) % self._spec.chunk
