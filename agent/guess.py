"""What is likely to be said next, so that the decoder verifies many tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence

RETRIED = 4  # tokens in a pass after a guess was wrong; it takes little longer than a pass of one
SEARCHED = 8  # tokens of a guess, before and after a wrong one, among which the right one is looked for


def agreed(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


class Guess:
    """What is likely to be said next: an earlier hypothesis, read along with what is said. Mutable.

    A wrong token does not end it. Where the right one stands nearby, tokens were left out or put in; else one took
    another's place. Either way the guess goes on from there, in smaller passes until it is right again.
    """

    def __init__(self, tokens: Sequence[int], block: int) -> None:
        self._tokens, self._at = list(tokens), 0
        self._block = self._width = block

    def ahead(self, n_known: int) -> list[int]:
        """What to propose in a pass that also takes `n_known` tokens."""
        return self._tokens[self._at : self._at + max(0, self._width - n_known)]

    def hear(self, n_agreed: int, n_proposed: int, token: int) -> None:
        """Go on after the first of what was proposed, and `token` after those."""
        at = self._at + n_agreed
        is_right = self._tokens[at : at + 1] == [token]
        self._width = self._block if is_right or (n_proposed and n_agreed == n_proposed) else min(RETRIED, self._block)
        first, last = max(0, at - SEARCHED), at + SEARCHED
        places = [i for i, guess in enumerate(self._tokens[first:last], first) if guess == token]
        self._at = 1 + min(places, key=lambda i: abs(i - at), default=at)
