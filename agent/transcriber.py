"""Speech in, text out, with three verbs: `feed` audio, `step` to a partial, `finish` with the final.

Knows nothing of processes, microphones or brokers: the agent, `transcribe`, the evaluator and the tests all call it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from whisperlet.audio import SAMPLES_PER_FRAME, samples, to_float32
from whisperlet.bundle import Bundle
from whisperlet.logmel import MAX_SAMPLES
from whisperlet.tokenizer import Tokenizer

from . import decoding, rejection, term_list, windows
from .config import RecogniserConfig, checked_language
from .decoding import Hypothesis
from .engine import Engine
from .follower import Bound, Follower, stream_spec
from .memory import give_back_memory
from .messages import SpeechChunk, Transcript
from .segment import NOTHING_HEARD, Before, Heard, Segment, Stretch
from .terms import Terms

MIN_DETECT_FRAMES = 50  # of speech before its language is judged


class Transcriber:
    """Turns the SpeechChunks of one segment after another into Transcripts."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: RecogniserConfig) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.manifest = engine.manifest
        self._room = self.manifest.dims.n_text_ctx - 8  # for tokens of texts
        self._terms: Terms | None = None
        self._listed: list[str] = []
        self.retune(config)
        self._adopt()
        self._decoder = Bound(engine)
        spec = stream_spec(self.manifest, self.config.overlap_frames)
        self._follower = Follower(self._decoder, self.manifest, spec) if spec else None
        self._segment: Segment | None = None
        self._before: Before | None = None  # the segment that was heard last, if anything was said

    def retune(self, config: RecogniserConfig) -> None:
        """Go on under another configuration from the next segment on; the way of streaming stays as it was built."""
        self._next_config = config

    def _adopt(self) -> None:
        """Raises ConfigError if the model does not have the language."""
        self.config = self._next_config
        self.language = checked_language(self.config.language, self.manifest.vocabulary.languages)
        if self.config.terms != self._listed:
            self._listed, self._terms = self.config.terms, self._dictionary(self.config.terms)

    def _dictionary(self, listed: list[str]) -> Terms | None:
        """Of the listed terms; None if there are none. What turns text into tokens is let go of afterwards: 40 MB."""
        if not listed:
            return None
        made = Terms(term_list.checked(listed, "recogniser.terms"), copy.copy(self.tokenizer).encode)
        give_back_memory()
        return made

    def feed(self, chunk: SpeechChunk) -> None:
        """Take in audio. The first chunk of another segment starts that one."""
        if self._segment is None or (self._segment.utterance, self._segment.segment) != chunk.key:
            self._adopt()
            near = self._before and self._before.is_just_before(chunk, self.config.join_pause_ms)
            self._segment = Segment(chunk, self.manifest.dims.n_mels, self._before if near else None)
            if self._follower:
                self._follower.begin()
        segment = self._segment
        segment.logmel.feed(to_float32(chunk.samples))
        if chunk.voiced_end is not None:
            segment.voiced_end = max(0, chunk.voiced_end - segment.start)  # before a cut may lie all that was voiced
        if chunk.is_last:
            segment.last = chunk

    def step(self, hop_ms: float | None = None) -> Transcript | None:
        """A partial, or None while less than a hop of speech has come since the last one; by default the configured.

        In a pause that may be the end, the final is heard in advance, and shown if it says something else.
        """
        segment = self._segment
        if segment is None or segment.last is not None:
            return None
        if self.in_pause:
            return self._in_advance(segment)
        return self._partial(segment, hop_ms or self.config.hop_ms) if self.config.partials else None

    @property
    def in_pause(self) -> bool:
        """Whether the speaker has been silent for so long that this may be the end."""
        segment = self._segment
        return segment is not None and segment.n_silent >= max(1, samples(self.config.settle_ms))

    def _in_advance(self, segment: Segment) -> Transcript | None:
        """The final as it will be if nothing follows; thrown away if something does."""
        end = segment.voiced_end
        if not end or not self.config.final_pass or (segment.in_advance and segment.in_advance[0] == end):
            return None
        heard = self._exact(segment, end)
        segment.in_advance = end, heard
        return self._shown_early(segment, heard, end) if self.config.partials else None

    def _shown_early(self, segment: Segment, heard: Heard, end: int) -> Transcript | None:
        """As a partial, if that is news and leaves alone what is stable: the speaker may go on."""
        text = self.tokenizer.text(heard.hypothesis.tokens)
        is_news = text != segment.shown and text.startswith(segment.stable)
        if not is_news or rejection.reason(heard.hypothesis, self.config):
            return None
        segment.shown = text
        early = self._transcript(segment, heard, segment.reached(end))
        return msgspec.structs.replace(early, stable_chars=len(segment.stable))

    def _partial(self, segment: Segment, hop_ms: float) -> Transcript | None:
        follower = self._follower
        is_silent = segment.voiced_end is not None and segment.voiced_end <= segment.voiced_heard
        if follower is None or is_silent or not follower.is_due(segment.logmel, hop_ms):
            return None
        segment.voiced_heard = segment.logmel.n_samples
        began = time.perf_counter()
        follower.listen(segment.logmel)
        follower.attend()
        encoded = time.perf_counter()
        language = self.language or segment.language
        if language is None:
            if follower.n_heard < MIN_DETECT_FRAMES:
                return None
            language = segment.language = self._detect()
        end = follower.n_heard * SAMPLES_PER_FRAME
        draft = follower.hear(self.tokenizer.prompt(language), self._token_limit(end), self._terms)
        segment.draft = draft.tokens
        decoded = time.perf_counter()
        heard = Heard(draft.hypothesis, language, 1e3 * (encoded - began), 1e3 * (decoded - encoded), len(draft.stable))
        partial = self._transcript(segment, heard, segment.reached(end))
        segment.shown, segment.stable = partial.text, partial.text[: partial.stable_chars]
        return partial

    def finish(self) -> Transcript:
        """The final of the segment whose last chunk has been fed, which equals an offline decode of its speech.

        One that follows another soon is heard with it. `final_pass = false`: the stream's, unless speech is left out.
        """
        segment = self._segment
        assert segment is not None, "nothing was fed"
        assert segment.last is not None, "the segment goes on"
        self._segment = self._before = None
        end = segment.last.speech_end - segment.start
        if end <= 0:  # what follows a forced cut may hold no speech
            return self._transcript(segment, NOTHING_HEARD, 0)
        heard = self._final(segment, end)
        final = self._transcript(segment, heard, end)
        if final.text:
            tokens = heard.hypothesis.tokens
            self._before = Before(final.key, segment.logmel, segment.start, final.end, tokens, heard.language)
        return final

    def _final(self, segment: Segment, end: int) -> Heard:
        if segment.in_advance and segment.in_advance[0] == end:
            return segment.in_advance[1]
        attempts = [] if self.config.final_pass or not self._follower else [self._streamed(segment, end)]
        if attempts and not attempts[0].astray:
            return attempts[0]
        return self._exact(segment, end).after(attempts)

    def reset(self) -> None:
        """Forget the segment in hand, and the one before."""
        self._segment = self._before = None

    def _exact(self, segment: Segment, end: int) -> Heard:
        """One look at the whole segment, further ones with more silence while that leads astray: it mends most."""
        own = Stretch(segment.logmel, end)
        attempts, sizes = self._together(segment, end), self._windows(own)
        while not attempts or (attempts[-1].astray and sizes):
            if attempts:
                segment.draft = []  # leads astray
            attempts.append(self._hear(segment, own, sizes.pop(0)))
        return attempts.pop().after(attempts)

    def _together(self, segment: Segment, end: int) -> list[Heard]:
        """The segment as what follows the one before it; none if there is none."""
        before = segment.before
        if before is None or before.language != self.language or len(before.tokens) > self._room // 2:
            return []
        most = windows.joint(self.manifest.cross_frames) - self._silence(self.language)
        if (both := before.together(segment, end, most * SAMPLES_PER_FRAME)) is None:
            return []
        return [self._hear(segment, both, self._windows(both)[0])]

    def _hear(self, segment: Segment, stretch: Stretch, n_frames: int) -> Heard:
        """Encode a window with the audio and decode what is new in it, verifying the draft."""
        began = time.perf_counter()
        if self._follower:
            self._follower.displace()
        self.engine.encode(self._decoder.state, stretch.logmel.window(2 * n_frames, stretch.end))
        encoded = time.perf_counter()
        language = self.language or self._detect()
        hypothesis = self._verified(language, segment.draft, stretch.end, stretch.said)
        segment.draft = hypothesis.tokens
        decoded = time.perf_counter()
        astray = stretch.is_misheard(hypothesis, self.config)
        return Heard(hypothesis, language, 1e3 * (encoded - began), 1e3 * (decoded - encoded), astray=astray)

    def _streamed(self, segment: Segment, end: int) -> Heard:
        """What the stream makes of the segment with some silence after it; it may have stopped half-way."""
        assert self._follower is not None
        began = time.perf_counter()
        n_silent = SAMPLES_PER_FRAME * (self._silence(self.language) + self._follower.width)
        segment.logmel.feed(np.zeros(min(n_silent, MAX_SAMPLES - segment.logmel.n_samples), np.float32))
        self._follower.listen(segment.logmel)
        self._follower.attend()
        encoded = time.perf_counter()
        self._decoder.position = 0
        language = self.language or segment.language or self._detect()
        hypothesis = self._verified(language, segment.draft, segment.logmel.n_samples)
        decoded = time.perf_counter()
        astray = Stretch(segment.logmel, end).is_misheard(hypothesis, self.config)
        return Heard(hypothesis, language, 1e3 * (encoded - began), 1e3 * (decoded - encoded), astray=astray)

    def _verified(self, language: str, draft: list[int], end: int, said: Sequence[int] = ()) -> Hypothesis:
        """What the decoder says about the audio that it looks at, after what was said of it before."""
        return decoding.greedy(
            self._decoder,
            self.manifest.vocabulary,
            self.tokenizer.prompt(language),
            draft=draft,
            limit=self._token_limit(end) - len(said),
            block=max(self.manifest.decode_tokens),
            terms=self._terms,
            said=said,
        )

    def _windows(self, stretch: Stretch) -> list[int]:
        """Encoder windows to try, one after the other, for the audio and the silence that the language needs."""
        n_frames = -(-stretch.end // SAMPLES_PER_FRAME) + self._silence(self.language)
        return windows.to_try(self.manifest.encode_frames, n_frames)

    def _silence(self, language: str | None) -> int:
        """Frames of silence that the language needs after the speech."""
        by_language = self.manifest.silence_frames
        if self.config.silence_frames is not None:
            return self.config.silence_frames
        return by_language.get(language or "default", by_language["default"])

    def _token_limit(self, end: int) -> int:
        """How many tokens the audio can hold, within the decoder's context."""
        return min(decoding.most_tokens(end), self._room)

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
        rejected = rejection.reason(hypothesis, self.config)
        text = "" if rejected else self.tokenizer.text(hypothesis.tokens)
        stable = len(self.tokenizer.text(hypothesis.tokens[: heard.stable]))
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
            n_attempts=heard.n_attempts,
            speech_end_monotonic_s=last.speech_end_monotonic_s if last else None,
            decided_monotonic_s=last.decided_monotonic_s if last else None,
        )


def build(bundle: Bundle, engine: Engine, config: RecogniserConfig) -> Transcriber:
    """A transcriber for an opened bundle."""
    return Transcriber(engine, Tokenizer(bundle.tokenizer_json, bundle.manifest.vocabulary), config)


def whole(pcm: np.ndarray[tuple[int], np.dtype[np.int16]], utterance: int = 1, start: int = 0) -> SpeechChunk:
    """A clip as one segment, start to end."""
    return SpeechChunk(utterance, 0, pcm, start, is_last=True, speech_end=start + len(pcm))
