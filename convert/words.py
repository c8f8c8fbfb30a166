"""How often a language, or a corpus, needs each token."""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import speechset
from .scoring import SPACELESS
from .tokens import Bpe

LISTS = {"no": "nb", "nn": "nb", "tl": "fil", "yue": "zh"}  # Whisper's code -> the word list's, where they differ
N_WORDS = 150_000  # of a list; the rarest of them once in 50 million words
# Lists are in lower case and do not tell how often a word stands without a space before it, as after a quotation mark,
# or begins with a capital. The tokenizer does: merges were made in the order of their frequency, so of the forms that are
# one token the one with the lower id is the more frequent, by about this law. Found on what whisper-base says of
# `en_read_train`; any from 1 to 2 is as good within a fifth.
RANK_OFFSET, RANK_POWER = 1000, 2
RARE = 1e-3  # share of a form that is not one token, where another is
UNMERGED = {"lower": 1.0, "capitalised": 0.1, "bare": 3e-3, "upper": 1e-3}  # shares where none is
LONGEST_UPPER = 4  # letters


def available() -> set[str]:
    """Languages that have a word list, by the list's own codes."""
    import wordfreq

    return set(wordfreq.available_languages())


def listed(language: str) -> dict[str, float]:
    """The most frequent words of a language, with their share of all words."""
    import wordfreq

    words = wordfreq.get_frequency_dict(LISTS.get(language, language))
    return dict(sorted(words.items(), key=lambda item: -item[1])[:N_WORDS])


def forms(word: str, language: str) -> dict[str, float]:
    """How a word is written in running text, and which share of its occurrences each form has if nothing more is known."""
    if language in SPACELESS:
        return dict.fromkeys((word, *_traditional(word, language)), 1.0)
    capitalised = word[:1].upper() + word[1:]
    found = {word: UNMERGED["bare"], capitalised: UNMERGED["bare"]}
    if len(word) <= LONGEST_UPPER:
        found[f" {word.upper()}"] = UNMERGED["upper"]
    return found | {f" {capitalised}": UNMERGED["capitalised"], f" {word}": UNMERGED["lower"]}


def _traditional(word: str, language: str) -> list[str]:
    """The list is in Simplified Chinese; Whisper writes either."""
    return [_to_traditional().convert(word)] if LISTS.get(language, language) == "zh" else []


@functools.cache
def _to_traditional() -> Any:
    import opencc

    return opencc.OpenCC("s2t")


def weights(bpe: Bpe, language: str) -> dict[str, float]:
    """Share of the language's words that need a token, by token."""
    words, found = listed(language), defaultdict[str, float](float)
    spellings = iter(bpe.encode([form for word in words for form in forms(word, language)]))
    characters = defaultdict[str, float](float)
    for word, share in words.items():
        written = forms(word, language)
        spelled = [next(spellings) for _ in written]
        for tokens, part in zip(spelled, _parts(bpe, list(written.values()), spelled), strict=True):
            for token in set(tokens):
                found[token] += share * part
        for character in set("".join(written)):
            characters[character] += share
    if language in SPACELESS:
        for token, share in _runs(bpe, characters).items():
            found[token] = max(found[token], share)
    return found


def _parts(bpe: Bpe, plain: list[float], spelled: list[list[str]]) -> list[float]:
    """Which share of a word's occurrences each of its forms has."""
    merged = [(bpe.text[s[0]] + RANK_OFFSET) ** -RANK_POWER if len(s) == 1 else 0.0 for s in spelled]
    if not any(merged):
        return plain
    return [part / sum(merged) or RARE for part in merged]


def _runs(bpe: Bpe, characters: dict[str, float]) -> dict[str, float]:
    """Tokens of several words, where no space parts them: each as often as its rarest character at the most."""
    texts = {token: text.strip() for token, text in bpe.said().items()}
    return {token: min(characters.get(c, 0.0) for c in text) for token, text in texts.items() if text}


def symbols(bpe: Bpe) -> set[str]:
    """Tokens of digits, punctuation and spaces alone, which any language needs."""
    return {
        token for token, text in bpe.said().items() if text and all(unicodedata.category(c)[0] in "NPSZ" for c in text)
    }


def needed(bpe: Bpe, corpus: Path) -> set[str]:
    """Every token that a corpus is spelled with, as it is written and in the forms of its words."""
    texts: set[str] = set()
    for text, language in texts_of(corpus):
        texts |= {text, f" {text}"}
        for word in text.split():
            for variant in {word, word.lower()}:
                texts |= forms(variant, language).keys()
    return {token for tokens in bpe.encode(sorted(texts)) for token in tokens}


def texts_of(corpus: Path) -> Iterator[tuple[str, str]]:
    """Texts and their languages: of a manifest, or the lines of a text file."""
    if corpus.is_dir() or corpus.suffix == ".jsonl":
        yield from ((clip.text, clip.language) for clip in speechset.read(corpus) if clip.text)
    else:
        yield from ((line.strip(), "") for line in corpus.read_text(encoding="utf-8").splitlines() if line.strip())


def coverage(bpe: Bpe, language: str, chosen: set[str]) -> float:
    """Share of the language's running words that are spelled with chosen tokens alone, as they were."""
    words = listed(language)
    space = "" if language in SPACELESS else " "
    spelled = zip(words.values(), bpe.encode([space + word for word in words]), strict=True)
    return sum(share for share, tokens in spelled if chosen.issuperset(tokens)) / sum(words.values())
