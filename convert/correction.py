"""Transcripts with mistakes, for a decoder that is also to learn how what is said here is spelt."""

from __future__ import annotations

import random
from collections.abc import Sequence

N_CANDIDATES = 50  # words that are compared to find one that looks alike


def corrupt(text: str, words: Sequence[str], rng: random.Random, share: float) -> str:
    """The text with about `share` of its words lost, said twice, misspelt, or replaced by one that looks alike.

    `words` are those to replace by.
    """
    changed = (_changed(word, words, rng) if rng.random() < share else word for word in text.split())
    return " ".join(word for word in changed if word)


def _changed(word: str, words: Sequence[str], rng: random.Random) -> str:
    kind = rng.choice(("lose", "double", "misspell", "alike", "alike"))
    if kind == "lose":
        return ""
    if kind == "double":
        return f"{word} {word}"
    return _misspelt(word, rng) if kind == "misspell" else _alike(word, words, rng)


def _misspelt(word: str, rng: random.Random) -> str:
    """Two neighbouring letters change places, or one is lost."""
    place = rng.randrange(len(word))
    if rng.random() < 0.5:
        return word[:place] + word[place + 1 :]
    return word[:place] + word[place : place + 2][::-1] + word[place + 2 :]


def _alike(word: str, words: Sequence[str], rng: random.Random) -> str:
    from rapidfuzz import distance, process

    others = [other for other in rng.choices(words, k=N_CANDIDATES) if other.lower() != word.lower()]
    found = process.extractOne(word, others, scorer=distance.Levenshtein.normalized_similarity)
    return str(found[0]) if found else word
