"""What a dictionary of terms makes of one text: it begins a term against the model's own choice, and takes that back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from whisperlet.audio import Float32

from .terms import Terms


class Preference:
    """For one text, token by token. Mutable.

    A term that was begun, or gone on with, for its boost alone may come to nothing: what follows is not of it. Then the
    text goes back to that place, where the model has its own way this time.
    """

    def __init__(self, terms: Terms | None, eot: int, its_own: Iterable[int] = ()) -> None:
        self._terms, self._eot = terms, eot
        self.its_own = set(its_own)  # places, in tokens, at which nothing is preferred
        self._changed: set[int] = set()  # places at which something was
        self._since: int | None = None  # the first of them that no complete term covers yet

    def picks(self, rows: Float32, said: Sequence[int], proposal: Sequence[int]) -> list[int]:
        """What to say after `said` and each more of the proposal, right up to the first that differs from it.

        shape of `rows` = (1 + len(proposal), n_vocab). The end of the text is never put off for a term.
        """
        found = [int(token) for token in rows.argmax(-1)]
        for i, plain in enumerate(found if self._terms else []):
            place = len(said) + i
            if plain != self._eot and place not in self.its_own:
                assert self._terms
                found[i] = self._terms.pick(rows[i], plain, [*said, *proposal[:i]])
                if found[i] != plain:
                    self._changed.add(place)
            if found[i : i + 1] != list(proposal[i : i + 1]):
                break
        return found

    def goes_back(self, tokens: Sequence[int]) -> int | None:
        """Told of each token in turn, as the last of `tokens`: the place to go back to, or None."""
        if self._since is None and len(tokens) - 1 in self._changed:
            self._since = len(tokens) - 1
        if self._since is None or not self._terms:
            return None
        is_complete = self._terms.covers(tokens, self._since)
        if is_complete is None:
            return None
        place, self._since = self._since, None
        if is_complete:
            return None
        self._changed = {changed for changed in self._changed if changed < place}
        self.its_own.add(place)
        return place
