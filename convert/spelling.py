"""References in the checkpoint's own style, where they have neither case nor punctuation.

Trained on upper case alone, a model unlearns both. So the checkpoint transcribes the undistorted recording, and lends
the reference its spelling of every word on which both agree.
"""

from __future__ import annotations

from difflib import SequenceMatcher

from . import scoring

ENDS = ".?!"  # of sentences


def lend(reference: str, heard: str, language: str) -> str:
    """The reference's words, as `heard` has them where it has them, else in lower case."""
    words, theirs = reference.split(), heard.split()
    ours, others = ([_plain(word, language) for word in some] for some in (words, theirs))
    spelt = [word.lower() for word in words]
    for match in SequenceMatcher(None, ours, others, autojunk=False).get_matching_blocks():
        spelt[match.a : match.a + match.size] = theirs[match.b : match.b + match.size]
    return " ".join(_capital(word, before) for word, before in zip(spelt, ["", *spelt], strict=False))


def has_style(text: str) -> bool:
    """Whether a text has both cases."""
    return text not in (text.upper(), text.lower())


def _plain(word: str, language: str) -> str:
    return scoring.normalise(word, language) or word


def _capital(word: str, before: str) -> str:
    """Sentences begin with a capital; the text's first word too."""
    is_first = not before or before[-1] in ENDS
    return word[:1].upper() + word[1:] if is_first else word
