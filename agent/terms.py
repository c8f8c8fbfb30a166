"""A dictionary of terms over token ids, which makes the decoder prefer them.

The first token of a term gets a part of its boost only: a list has many first tokens, and each that is begun in vain
costs a pass (see `preference.py`). Tokens that go on with it, or that are all of it, get the whole.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from whisperlet.audio import Float32

from .term_list import Term

BOOST = 2.5  # of a logit, where a term names none
FIRST_SHARE = 0.8  # of the boost, for a token that only begins a term


class Node(msgspec.Struct):
    """What may follow some tokens. Mutable while terms are added."""

    boosts: dict[int, float] = {}  # of each token that may
    children: dict[int, Node] = {}
    ends: bool = False  # a term is complete here


class Terms:
    """A trie of terms, each in the ways in which it may be written."""

    def __init__(self, terms: Iterable[Term], encode: Callable[[str], list[int]]) -> None:
        self._anywhere, self._at_start = Node(), Node()
        self._depth = 1
        for term in terms:
            boost = BOOST if term.boost is None else term.boost
            for form in forms(term.text):
                self._add(self._at_start, encode(form), boost)
                self._add(self._anywhere, encode(" " + form), boost)
                if is_spaceless(form):
                    self._add(self._anywhere, encode(form), boost)

    def _add(self, root: Node, tokens: Sequence[int], boost: float) -> None:
        self._depth = max(self._depth, len(tokens))
        node = root
        for place, token in enumerate(tokens):
            begins_only = place == 0 and len(tokens) > 1
            worth = boost * FIRST_SHARE if begins_only else boost
            node.boosts[token] = max(worth, node.boosts.get(token, 0.0))
            node = node.children.setdefault(token, Node())
        node.ends = True

    def bias(self, tokens: Sequence[int]) -> dict[int, float]:
        """What is to be added to the logits after these tokens: boost by token, the highest where terms share one."""
        found: dict[int, float] = {}
        for _, node in self._begun(tokens):
            for token, boost in node.boosts.items():
                if boost > found.get(token, 0.0):
                    found[token] = boost
        return found

    def covers(self, tokens: Sequence[int], place: int) -> bool | None:
        """Whether a term that holds the token at `place` is complete with the last one; None: it is begun, but no more."""
        nodes = [node for start, node in self._begun(tokens) if start <= place]
        if any(node.ends for node in nodes):
            return True
        return None if any(node.children for node in nodes) else False

    def _begun(self, tokens: Sequence[int]) -> Iterator[tuple[int, Node]]:
        """Each term that the tokens may have begun, those with nothing yet among them: its start, its place in the trie."""
        starts = [(self._anywhere, start) for start in range(max(0, len(tokens) - self._depth), len(tokens) + 1)]
        if len(tokens) <= self._depth:
            starts.append((self._at_start, 0))
        for root, start in starts:
            node: Node | None = root
            for token in tokens[start:]:
                node = node.children.get(token) if node else None
            if node:
                yield start, node

    def pick(self, logits: Float32, plain: int, tokens: Sequence[int]) -> int:
        """The token to say after `tokens`, `plain` being the one of the highest logit. logits shape = (n_vocab,)"""
        bias = self.bias(tokens)
        ids = np.fromiter(bias, np.int64, len(bias))
        scores = logits[ids] + np.fromiter(bias.values(), np.float32, len(bias))
        best = int(scores.argmax()) if len(ids) else 0
        is_better = len(ids) > 0 and scores[best] > logits[plain] + np.float32(bias.get(plain, 0.0))
        return int(ids[best]) if is_better else plain


def forms(text: str) -> list[str]:
    """Ways to write a term: as it is listed and, if that is all in lower case, with capitals."""
    found = [text]
    if text == text.lower():
        found += [text[:1].upper() + text[1:], " ".join(word[:1].upper() + word[1:] for word in text.split(" "))]
    return list(dict.fromkeys(found))


def is_spaceless(text: str) -> bool:
    """Whether it begins with a character that no space comes before, as in Chinese."""
    return unicodedata.east_asian_width(text[0]) in "WF"
