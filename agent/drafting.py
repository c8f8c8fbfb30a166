"""What is heard while the talk goes on: a draft of which more and more is stable."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from whisperlet.bundle import Vocabulary

from .alignment import MAX_BACK, PLACE_TOKENS, place
from .decoding import Hypothesis, loop_start
from .guess import Guess
from .preference import Preference
from .reader import Decoder, Reader, Said
from .terms import Terms

MAX_STALLED = 4  # hops without a stable token; then the place is held to be wrong, not the token
LOST_SHARE = 0.5  # of the heads' attention; if more goes to the padding after the audio, nothing is left to hear


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
    decoder.position = min(decoder.position, len(prompt) + len(draft.stable) - 1)
    guess, preference = Guess(draft.unstable, block), Preference(terms, vocabulary.eot, draft.its_own)
    reader = Reader(decoder, vocabulary, prompt, guess, preference, doubt=(0, vocabulary.no_speech))
    found = Found(draft)
    reader.catch_up(found.tokens, block - len(draft.unstable))  # more is unread where others used the decoder
    n_agreed: int | None = None
    while True:
        read = reader.read(found.tokens, is_first=not found.tokens)
        n_agreed = reader.n_agreed if n_agreed is None else n_agreed
        for said in read:
            if said.token == vocabulary.eot or found.is_lost(said) or len(found.tokens) >= limit:
                return found.parted(n_agreed, frontier, reader.doubt)
            found.add(said)
            back = reader.goes_back(found.tokens)
            if back is not None:
                n_agreed = min(n_agreed, back - len(draft.stable))
                found.go_back(back, frontier)
                break
        else:
            if loop_start(found.tokens) is not None or found.looks[-1] >= edge:
                return found.parted(n_agreed, frontier, reader.doubt)


class Found:
    """What one call of `follow` has heard so far. Mutable."""

    def __init__(self, draft: Draft) -> None:
        n_stable = len(draft.stable)
        self._draft = draft
        self.tokens = list(draft.stable)
        self._logprobs = draft.logprobs[:n_stable]
        self.looks: list[int] = []  # without those of what was stable before
        self._its_own = list(draft.its_own)

    def is_lost(self, said: Said) -> bool:
        """Whether the heads look at the padding, or at what was said long before."""
        draft = self._draft
        rewinds = said.frame < place([*draft.looks, *self.looks]) - MAX_BACK and draft.n_stalled < MAX_STALLED
        return rewinds or said.beyond > LOST_SHARE

    def add(self, said: Said) -> None:
        """One token more."""
        self.tokens.append(said.token)
        self._logprobs.append(said.logprob)
        self.looks.append(said.frame)

    def go_back(self, place: int, frontier: int) -> None:
        """Forget what was said from that token on; if its audio is complete, the model has its own way there for good."""
        n_new = len(self.tokens) - place
        if self.looks[-n_new] < frontier:
            self._its_own.append(place)
        del self.tokens[place:], self._logprobs[place:], self.looks[-n_new:]

    def parted(self, n_agreed: int, frontier: int, no_speech_prob: float | None) -> Draft:
        """Stable tokens told from unstable ones, and the further rounds of a loop left out."""
        draft, before, looks = self._draft, len(self._draft.stable), self.looks
        n_stable = 0
        while n_stable < min(n_agreed, len(looks)) and looks[n_stable] < frontier:
            n_stable += 1
        start = loop_start(self.tokens)
        kept = self.tokens if start is None else self.tokens[: max(start, before)]
        n_stable = min(n_stable, len(kept) - before)
        return Draft(
            stable=kept[: before + n_stable],
            unstable=kept[before + n_stable :],
            looks=[*draft.looks, *looks[:n_stable]][-PLACE_TOKENS:],
            n_stalled=0 if n_stable else draft.n_stalled + 1,
            looped=start is not None,
            logprobs=self._logprobs[: len(kept)],
            no_speech_prob=draft.no_speech_prob if no_speech_prob is None else no_speech_prob,
            its_own=self._its_own,
        )
