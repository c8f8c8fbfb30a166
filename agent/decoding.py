"""Greedy decoding, with what to do about a text that goes round in circles."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from whisperlet.audio import SAMPLE_RATE, Float32
from whisperlet.bundle import Vocabulary

from .guess import Guess
from .preference import Preference
from .reader import Decoder, Reader
from .terms import Terms

TOKENS_PER_SECOND = 25  # no language that Whisper spells byte by byte is spoken faster
MIN_TOKENS = 16
MAX_PERIOD = 64  # tokens, a long sentence; a loop that is longer than this ends at the token limit
MIN_REPEATED = 12  # tokens that a loop must fill ...
MIN_REPEATS = 3  # ... and times that it must come round, before it counts as one


class Hypothesis(msgspec.Struct, frozen=True):
    """What the decoder heard."""

    tokens: list[int]  # without prompt and end of text
    avg_logprob: float  # natural logarithm, mean over the tokens and the end of text
    no_speech_prob: float
    looped: bool  # a repetition was cut
    looks: list[int] = []  # frames that the tokens looked at


def most_tokens(n_samples: int) -> int:
    """How many tokens so much audio can hold."""
    return MIN_TOKENS + TOKENS_PER_SECOND * n_samples // SAMPLE_RATE


def best_language(logits: Float32, vocabulary: Vocabulary) -> tuple[str, float]:
    """Most likely language after the start token, and its share among languages. logits shape = (n_vocab,)"""
    codes, ids = zip(*vocabulary.languages.items(), strict=True)
    scores = logits[list(ids)]
    weights = np.exp(scores - scores.max())
    best = int(weights.argmax())
    return codes[best], float(weights[best] / weights.sum())


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the second round of a loop at the end of `tokens` begins, or None if there is no loop."""
    for period in range(1, min(MAX_PERIOD, len(tokens) // MIN_REPEATS) + 1):
        n_same = 0
        while n_same < len(tokens) - period and tokens[-1 - n_same] == tokens[-1 - n_same - period]:
            n_same += 1
        if n_same >= max(MIN_REPEATED, (MIN_REPEATS - 1) * period):
            return len(tokens) - n_same
    return None


def greedy(
    decoder: Decoder,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    draft: Sequence[int],
    *,
    limit: int,
    block: int,
    terms: Terms | None = None,
    said: Sequence[int] = (),
) -> Hypothesis:
    """Greedy transcript, token for token what going one by one gives, with a draft verified on the way.

    Each pass takes the tokens that are known but not yet in the state, then up to `block` in all of the draft. What
    the model would have said itself is kept, up to the first difference; see `Guess` for how it goes on there.
    Terms are preferred, see `Preference`; probabilities are what they are without them. With `said`, a text that the
    audio begins with, the transcript is what follows it, which may be nothing: how likely that is then stands for the
    doubt of speech.
    """
    before, guess, preference = [*prompt, *said], Guess(draft, block), Preference(terms, vocabulary.eot)
    doubt = (len(before) - 1, vocabulary.eot) if said else (0, vocabulary.no_speech)
    reader = Reader(decoder, vocabulary, before, guess, preference, doubt)
    tokens: list[int] = []
    logprobs: list[float] = []
    looks: list[int] = []
    while True:
        for token, logprob, frame, _ in reader.read(tokens, is_first=not tokens and not said):
            tokens.append(token)
            logprobs.append(logprob)
            looks.append(frame)
            back = reader.goes_back(tokens)
            if back is not None:
                del tokens[back:], logprobs[back:], looks[back:]
                break
            kept, looped = _kept(tokens, vocabulary.eot, limit)
            if kept is not None:
                assert reader.doubt is not None
                counted = logprobs[: kept + 1]
                return Hypothesis(tokens[:kept], sum(counted) / len(counted), reader.doubt, looped, looks[:kept])


def _kept(tokens: Sequence[int], eot: int, limit: int) -> tuple[int | None, bool]:
    """How many tokens the transcript has, None if it goes on, and whether a loop was cut."""
    if tokens[-1] == eot:
        return len(tokens) - 1, False
    start = loop_start(tokens)
    if start is not None:
        return start, True
    return (len(tokens), False) if len(tokens) >= limit else (None, False)
