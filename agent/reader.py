"""Calls a decoder with what is known and a guess at what follows, and keeps of the guess what the model says itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from whisperlet.audio import Float32
from whisperlet.bundle import Vocabulary

from .alignment import Looks
from .guess import Guess, agreed
from .preference import Preference


class Decoder(Protocol):
    """Appends tokens to a state that it holds; `position` may be set back."""

    position: int

    @property
    def looks(self) -> Looks:
        """Where the tokens of the last call looked."""

    def decode(self, tokens: Sequence[int]) -> Float32:
        """Logits after each token. shape = (n_tokens, n_vocab)"""


def suppress(logits: Float32, vocabulary: Vocabulary, *, first: bool) -> Float32:
    """Logits with what may not be said set to minus infinity, in place. shape = (n, n_vocab); `first`: of row 0."""
    logits[:, vocabulary.suppress] = -np.inf
    logits[:, vocabulary.eot + 1 :] = -np.inf
    if first:
        logits[0, vocabulary.suppress_begin] = -np.inf
    return logits


def log_softmax_at(logits: Float32, tokens: Sequence[int]) -> list[float]:
    """Log-probability of one token a row. logits shape = (n, n_vocab)"""
    top = logits.max(-1)
    total = np.log(np.exp(logits - top[:, None]).sum(-1))
    chosen = logits[np.arange(len(tokens)), tokens]
    return [float(value) for value in chosen - top - total]


def probability_at(logits: Float32, token: int) -> float:
    """Probability of a token after one row of shape (n_vocab,)."""
    return float(np.exp(log_softmax_at(logits[None], [token])[0]))


class Said(NamedTuple):
    """A token, and what is known of it."""

    token: int
    logprob: float  # natural logarithm
    frame: int  # that its alignment heads look at
    beyond: float  # share of their attention that goes to the padding after the audio


class Reader:
    """Makes a text pass by pass, token for token what greedy decoding one by one gives. Mutable.

    `before` is what the text follows; of both, the decoder holds as many tokens as its position says. The `doubt` is a
    place in them, and a token: how likely that one was to come next is noted when a pass covers the place.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        before: Sequence[int],
        guess: Guess,
        preference: Preference,
        doubt: tuple[int, int],
    ) -> None:
        self._decoder, self._vocabulary, self._before = decoder, vocabulary, list(before)
        self._guess, self._preference, self._doubt = guess, preference, doubt
        self.doubt: float | None = None  # None until a pass has covered its place
        self.n_agreed = 0  # tokens of the guess that the last pass confirmed

    def read(self, text: Sequence[int], *, is_first: bool) -> list[Said]:
        """What follows the text: as many tokens as the guess has right, and one more. `is_first`: nothing was said."""
        known = self._unread(text)
        proposal = self._guess.ahead(len(known))
        rows = self._logits([*known, *proposal])[len(known) - 1 :]
        picks = self._preference.picks(suppress(rows, self._vocabulary, first=is_first), text, proposal)
        n = self.n_agreed = agreed(picks, proposal)
        self._decoder.position -= len(proposal) - n
        self._guess.hear(n, len(proposal), picks[n])
        logprobs = log_softmax_at(rows[: n + 1], picks[: n + 1])
        frames, beyond = (values[len(known) - 1 :][: n + 1].tolist() for values in self._decoder.looks)
        return [Said(*row) for row in zip(picks[: n + 1], logprobs, frames, beyond, strict=True)]

    def catch_up(self, text: Sequence[int], most: int) -> None:
        """Take in all but the text's last token, where what is to be taken in is more than that many tokens."""
        known = self._unread(text)
        if len(known) > max(1, most):
            self._logits(known[:-1])

    def goes_back(self, text: Sequence[int]) -> int | None:
        """Told of each token in turn, as the text's last: the place to go back to, or None. See `Preference`."""
        place = self._preference.goes_back(text)
        if place is not None:
            self._decoder.position = len(self._before) + place - 1
        return place

    def _unread(self, text: Sequence[int]) -> list[int]:
        return [*self._before, *text][self._decoder.position :]

    def _logits(self, tokens: Sequence[int]) -> Float32:
        place, token = self._doubt
        row = place - self._decoder.position
        logits = self._decoder.decode(tokens)
        if self.doubt is None and 0 <= row < len(logits):
            self.doubt = probability_at(logits[row], token)
        return logits
