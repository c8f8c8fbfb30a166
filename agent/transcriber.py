"""Speech in, text out, with three verbs: `feed` audio, `step` to a partial, `finish` with the final.

Knows nothing of processes, microphones or brokers: the agent, `transcribe`, the evaluator and the tests all call it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from whisperlet.audio import FRAMES_PER_SECOND, SAMPLES_PER_FRAME, Float32, samples, to_float32
from whisperlet.bundle import Bundle
from whisperlet.logmel import LogMel
from whisperlet.tokenizer import Tokenizer

from . import decoding
from .config import RecogniserConfig, checked_language
from .decoding import Hypothesis
from .engine import DecoderState, Engine
from .messages import SpeechChunk, Transcript

TOKENS_PER_SECOND = 25  # no language that Whisper spells byte by byte is spoken faster
MIN_TOKENS = 16


class Segment:
    """What is known of the segment that is being heard. Mutable; one at a time."""

    def __init__(self, first: SpeechChunk, n_mels: int) -> None:
        self.utterance, self.segment, self.start = first.utterance, first.segment, first.start
        self.logmel = LogMel(n_mels)
        self.n_stepped = 0  # samples that the last partial knew
        self.revision = 0
        self.tokens: list[int] = []  # of the last hypothesis
        self.stable: list[int] = []  # what two hypotheses in a row agreed on
        self.last: SpeechChunk | None = None  # the chunk that ended it


class Heard(msgspec.Struct, frozen=True):
    """One look at the audio."""

    hypothesis: Hypothesis
    language: str
    encode_ms: float
    decode_ms: float


NOTHING_HEARD = Heard(Hypothesis([], avg_logprob=0.0, no_speech_prob=1.0, looped=False), "", 0.0, 0.0)


class _Bound:
    """An engine with the state that it is to work on."""

    def __init__(self, engine: Engine, state: DecoderState) -> None:
        self._engine, self._state = engine, state

    @property
    def position(self) -> int:
        return self._state.position

    @position.setter
    def position(self, value: int) -> None:
        self._state.position = value

    def decode(self, tokens: Sequence[int]) -> Float32:
        return self._engine.decode(self._state, tokens)


class Transcriber:
    """Turns the SpeechChunks of one segment after another into Transcripts."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: RecogniserConfig) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.manifest = engine.manifest
        self.language = checked_language(config.language, self.manifest.vocabulary.languages)
        self._state = engine.new_state()
        self._decoder = _Bound(engine, self._state)
        self._segment: Segment | None = None

    def feed(self, chunk: SpeechChunk) -> None:
        """Take in audio. The first chunk of another segment starts that one."""
        if self._segment is None or (self._segment.utterance, self._segment.segment) != chunk.key:
            self._segment = Segment(chunk, self.manifest.dims.n_mels)
        self._segment.logmel.feed(to_float32(chunk.samples))
        if chunk.is_last:
            self._segment.last = chunk

    def step(self, hop_ms: float | None = None) -> Transcript | None:
        """A partial, or None while less than a hop of audio has come since the last one; by default the configured."""
        segment = self._segment
        if segment is None or not self.config.partials or segment.last is not None:
            return None
        n_samples = segment.logmel.n_samples
        if n_samples - segment.n_stepped < samples(hop_ms or self.config.hop_ms):
            return None
        segment.n_stepped = n_samples
        heard = self._hear(segment, n_samples)
        tokens = heard.hypothesis.tokens
        segment.stable = tokens[: decoding.agreed(tokens, segment.tokens)]
        segment.tokens = tokens
        return self._transcript(segment, heard, n_samples)

    def finish(self) -> Transcript:
        """The final of the segment whose last chunk has been fed: one exact pass over its speech, then zeros."""
        segment = self._segment
        assert segment is not None, "nothing was fed"
        assert segment.last is not None, "the segment goes on"
        self._segment = None
        end = segment.last.speech_end - segment.start
        if end <= 0:  # what follows a forced cut may hold no speech
            return self._transcript(segment, NOTHING_HEARD, 0)
        heard = self._hear(segment, end)
        if heard.hypothesis.looped:  # more silence ends most loops
            heard = self._hear(segment, end, full_window=True)
        return self._transcript(segment, heard, end)

    def reset(self) -> None:
        """Forget the segment in hand."""
        self._segment = None

    def _hear(self, segment: Segment, end: int, *, full_window: bool = False) -> Heard:
        """Encode the audio up to sample `end` of the segment and decode it, verifying what was heard before."""
        began = time.perf_counter()
        language = self.language
        n_frames = max(self.manifest.encode_frames) if full_window else self._window(end, language)
        self.engine.encode(self._state, segment.logmel.window(2 * n_frames, end))
        encoded = time.perf_counter()
        if language is None:
            language = self._detect()
        hypothesis = decoding.greedy(
            self._decoder,
            self.manifest.vocabulary,
            self.tokenizer.prompt(language),
            draft=[] if full_window else segment.tokens,
            limit=self._token_limit(end),
            block=max(self.manifest.decode_tokens),
        )
        decoded = time.perf_counter()
        return Heard(hypothesis, language, 1e3 * (encoded - began), 1e3 * (decoded - encoded))

    def _window(self, end: int, language: str | None) -> int:
        """The smallest encoder window with room for the audio and the silence that the language needs."""
        by_language = self.manifest.silence_frames
        silence = self.config.silence_frames
        if silence is None:
            silence = by_language.get(language or "default", by_language["default"])
        wanted = -(-end // SAMPLES_PER_FRAME) + silence
        return min((n for n in self.manifest.encode_frames if n >= wanted), default=max(self.manifest.encode_frames))

    def _token_limit(self, end: int) -> int:
        """How many tokens the audio can hold, within the decoder's context."""
        by_audio = MIN_TOKENS + TOKENS_PER_SECOND * end // (FRAMES_PER_SECOND * SAMPLES_PER_FRAME)
        return min(by_audio, self.manifest.dims.n_text_ctx - 8)

    def _detect(self) -> str:
        vocabulary = self.manifest.vocabulary
        if not vocabulary.languages:
            return "en"
        logits = self._decoder.decode([vocabulary.sot])
        self._decoder.position = 0
        return decoding.best_language(logits[0], vocabulary)[0]

    def _transcript(self, segment: Segment, heard: Heard, end: int) -> Transcript:
        segment.revision += 1
        last, hypothesis = segment.last, heard.hypothesis
        rejected = self._rejection(hypothesis)
        text = "" if rejected else self.tokenizer.text(hypothesis.tokens)
        stable = len(text) if last else len(self.tokenizer.text(segment.stable))
        return Transcript(
            utterance=segment.utterance,
            segment=segment.segment,
            revision=segment.revision,
            text=text,
            stable_chars=min(stable, len(text)),
            start=segment.start,
            end=segment.start + end,
            is_final=last is not None,
            language=heard.language,
            continues=last.continues if last else False,
            rejected=rejected,
            n_tokens=len(hypothesis.tokens),
            avg_logprob=hypothesis.avg_logprob,
            no_speech_prob=hypothesis.no_speech_prob,
            encode_ms=heard.encode_ms,
            decode_ms=heard.decode_ms,
            speech_end_monotonic_s=last.speech_end_monotonic_s if last else None,
            decided_monotonic_s=last.decided_monotonic_s if last else None,
        )

    def _rejection(self, hypothesis: Hypothesis) -> str | None:
        """Why the text is withheld: the model itself doubts that there was speech."""
        silent = hypothesis.no_speech_prob > self.config.no_speech_threshold
        return "no_speech" if silent and hypothesis.avg_logprob < self.config.logprob_threshold else None


def build(bundle: Bundle, engine: Engine, config: RecogniserConfig) -> Transcriber:
    """A transcriber for an opened bundle."""
    return Transcriber(engine, Tokenizer(bundle.tokenizer_json, bundle.manifest.vocabulary), config)


def whole(pcm: np.ndarray[tuple[int], np.dtype[np.int16]], utterance: int = 1, start: int = 0) -> SpeechChunk:
    """A clip as one segment, start to end."""
    return SpeechChunk(utterance, 0, pcm, start, is_last=True, speech_end=start + len(pcm))
