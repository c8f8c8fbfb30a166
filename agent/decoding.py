"""Greedy decoding as pure functions over logits, and the one loop that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np

from whisperlet.audio import Float32
from whisperlet.bundle import Vocabulary

from .alignment import MAX_BACK, PLACE_TOKENS, place
from .guess import Guess, agreed
from .preference import Preference
from .state import Looks
from .terms import Terms

MAX_PERIOD = 64  # tokens, a long sentence; a loop that is longer than this ends at the token limit
MIN_REPEATED = 12  # tokens that a loop must fill ...
MAX_STALLED = 4  # hops without a stable token; then the place is held to be wrong, not the token
LOST_SHARE = 0.5  # of the heads' attention; if more goes to the padding after the audio, nothing is left to hear
MIN_REPEATS = 3  # ... and times that it must come round, before it counts as one


class Decoder(Protocol):
    """Appends tokens to a state that it holds; `position` may be set back."""

    position: int

    @property
    def looks(self) -> Looks:
        """Where the tokens of the last call looked."""

    def decode(self, tokens: Sequence[int]) -> Float32:
        """Logits after each token. shape = (n_tokens, n_vocab)"""


class Hypothesis(msgspec.Struct, frozen=True):
    """What the decoder heard."""

    tokens: list[int]  # without prompt and end of text
    avg_logprob: float  # natural logarithm, mean over the tokens and the end of text
    no_speech_prob: float
    looped: bool  # a repetition was cut
    looks: list[int] = []  # frames that the tokens looked at


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
    tokens: list[int] = []
    logprobs: list[float] = []
    looks: list[int] = []
    no_speech_prob: float | None = None
    before = [*prompt, *said]
    first = decoder.position + len(before)  # position of the first token
    known, guess, preference = before, Guess(draft, block), Preference(terms, vocabulary.eot)
    while True:
        proposal = guess.ahead(len(known))
        logits = decoder.decode([*known, *proposal])
        if no_speech_prob is None:
            row, token = (len(known) - 1, vocabulary.eot) if said else (0, vocabulary.no_speech)
            no_speech_prob = probability_at(logits[row], token)
        rows = suppress(logits[len(known) - 1 :], vocabulary, first=not tokens and not said)
        picks = preference.picks(rows, tokens, proposal)
        n = agreed(picks, proposal)
        decoder.position -= len(proposal) - n
        new = picks[: n + 1]
        guess.hear(n, len(proposal), new[-1])
        logprobs += log_softmax_at(rows[: n + 1], new)
        looks += decoder.looks.frames[len(known) - 1 :][: n + 1].tolist()
        known = [new[-1]]
        for token in new:
            tokens.append(token)
            back = preference.goes_back(tokens)
            if back is not None:
                tokens, logprobs, looks = tokens[:back], logprobs[:back], looks[:back]
                known, decoder.position = [*before, *tokens][-1:], first + back - 1
                break
            kept, looped = _kept(tokens, vocabulary.eot, limit)
            if kept is not None:
                counted = logprobs[: min(kept + 1, len(tokens))]  # a pass may have gone on past the limit
                return Hypothesis(tokens[:kept], sum(counted) / len(counted), no_speech_prob, looped, looks[:kept])


def _kept(tokens: Sequence[int], eot: int, limit: int) -> tuple[int | None, bool]:
    """How many tokens the transcript has, None if it goes on, and whether a loop was cut."""
    if tokens[-1] == eot:
        return len(tokens) - 1, False
    start = loop_start(tokens)
    if start is not None:
        return start, True
    return (len(tokens), False) if len(tokens) >= limit else (None, False)


class Draft(msgspec.Struct, frozen=True):
    """What is heard while the talk goes on."""

    stable: list[int]  # tokens that will not change before the final
    unstable: list[int]  # what the model would say next
    looks: list[int] = []  # frames that the last stable tokens looked at, `PLACE_TOKENS` of them at the most
    n_stalled: int = 0  # calls of `follow` in a row that found nothing stable
    looped: bool = False  # a repetition was cut
    logprobs: list[float] = []  # of all tokens, each as it was heard last
    no_speech_prob: float = 0.0
    its_own: list[int] = []  # places, in tokens, at which no term is preferred: it came to nothing

    @property
    def tokens(self) -> list[int]:
        """All of them."""
        return self.stable + self.unstable

    @property
    def hypothesis(self) -> Hypothesis:
        """The same without the difference between stable and unstable."""
        avg_logprob = sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0
        return Hypothesis(self.tokens, avg_logprob, self.no_speech_prob, self.looped)


def follow(
    decoder: Decoder,
    vocabulary: Vocabulary,
    prompt: Sequence[int],
    draft: Draft,
    *,
    frontier: int,
    edge: int,
    limit: int,
    block: int,
    terms: Terms | None = None,
) -> Draft:
    """Go on from what was heard before, without decoding any of it again.

    The draft's unstable tokens are verified in the first pass, which appends to what is stable those that were heard
    twice and whose alignment heads look at a frame before `frontier`: the audio that they stand for is complete (as in
    AlignAtt, Papi et al. 2023). What is said further on is unstable, up to where the heads look at the padding rather
    than at the audio, or far back: there the model only goes on because it must. Nor is anything asked for after a
    token that looks at `edge` or beyond: its end is hardly heard yet, and a pass costs as much as a look at it later.
    """
    known = [*prompt, *draft.stable]
    decoder.position = min(decoder.position, len(known) - 1)
    known, guess = known[decoder.position :], Guess(draft.unstable, block)
    preference = Preference(terms, vocabulary.eot, draft.its_own)
    heard = Found(list(draft.stable), [], draft.logprobs[: len(draft.stable)], draft.no_speech_prob)
    if len(known) + len(draft.unstable) > block and len(known) > 1:  # others used the decoder: it has to read all again
        heard.opens(decoder.position, decoder.decode(known[:-1]), vocabulary)
        known = known[-1:]
    n_agreed: int | None = None
    while True:
        proposal = guess.ahead(len(known))
        began, logits = decoder.position, decoder.decode([*known, *proposal])
        heard.opens(began, logits, vocabulary)
        rows = suppress(logits[len(known) - 1 :], vocabulary, first=not heard.tokens)
        picks = preference.picks(rows, heard.tokens, proposal)
        n = agreed(picks, proposal)
        n_agreed = n if n_agreed is None else n_agreed
        decoder.position -= len(proposal) - n
        guess.hear(n, len(proposal), picks[n])
        logprobs = log_softmax_at(rows[: n + 1], picks[: n + 1])
        frames, beyond = (values[len(known) - 1 :].tolist() for values in decoder.looks)
        for token, logprob, frame, share in zip(picks[: n + 1], logprobs, frames, beyond, strict=False):
            rewinds = frame < place([*draft.looks, *heard.looks]) - MAX_BACK and draft.n_stalled < MAX_STALLED
            lost = rewinds or share > LOST_SHARE
            if token == vocabulary.eot or lost or len(heard.tokens) >= limit:
                return _parted(heard, draft, n_agreed, frontier)
            heard.add(token, frame, logprob)
            back = preference.goes_back(heard.tokens)
            if back is not None:
                n_agreed = min(n_agreed, back - len(draft.stable))
                heard.go_back(back, frontier)
                known, decoder.position = [*prompt, *heard.tokens][-1:], len(prompt) + back - 1
                break
        if back is not None:
            continue
        if loop_start(heard.tokens) is not None or heard.looks[-1] >= edge:
            return _parted(heard, draft, n_agreed, frontier)
        known = [picks[n]]


class Found(msgspec.Struct):
    """What one call of `follow` has heard so far. Mutable."""

    tokens: list[int]  # with the stable ones from before
    looks: list[int]  # without theirs
    logprobs: list[float]  # of all tokens
    no_speech_prob: float
    its_own: list[int] = []  # places, in tokens, of terms that came to nothing though their audio is complete

    def add(self, token: int, look: int, logprob: float) -> None:
        """One token more."""
        self.tokens.append(token)
        self.looks.append(look)
        self.logprobs.append(logprob)

    def go_back(self, place: int, frontier: int) -> None:
        """Forget what was said from that token on."""
        n_new = len(self.tokens) - place
        if self.looks[-n_new] < frontier:
            self.its_own.append(place)
        del self.tokens[place:], self.logprobs[place:], self.looks[-n_new:]

    def opens(self, position: int, logits: Float32, vocabulary: Vocabulary) -> None:
        """Note the doubt that anyone spoke, which stands after the very first token; `position` is that of row 0."""
        if position == 0:
            self.no_speech_prob = probability_at(logits[0], vocabulary.no_speech)


def _parted(heard: Found, draft: Draft, n_agreed: int, frontier: int) -> Draft:
    """Tell stable from unstable tokens, and leave out the further rounds of a loop."""
    tokens, looks, before = heard.tokens, heard.looks, len(draft.stable)
    n_stable = 0
    while n_stable < min(n_agreed, len(looks)) and looks[n_stable] < frontier:
        n_stable += 1
    start = loop_start(tokens)
    kept = tokens if start is None else tokens[: max(start, before)]
    n_stable = min(n_stable, len(kept) - before)
    return Draft(
        stable=kept[: before + n_stable],
        unstable=kept[before + n_stable :],
        looks=[*draft.looks, *looks[:n_stable]][-PLACE_TOKENS:],
        n_stalled=0 if n_stable else draft.n_stalled + 1,
        looped=start is not None,
        logprobs=heard.logprobs[: len(kept)],
        no_speech_prob=heard.no_speech_prob,
        its_own=[*draft.its_own, *heard.its_own],
    )
