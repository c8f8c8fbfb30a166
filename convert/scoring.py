"""Word and character error rates as the field defines them for Whisper."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

SPACELESS = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km", "bo"})  # written without spaces: no words to count


@functools.cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    normaliser: Callable[[str], str] = EnglishTextNormalizer()
    return normaliser


@functools.cache
def _basic() -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    normaliser: Callable[[str], str] = BasicTextNormalizer()
    return normaliser


@functools.cache
def _to_simplified() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


def normalise(text: str, language: str) -> str:
    """Whisper's English normaliser for English, its basic one for others; Chinese is folded to Simplified first."""
    if language == "en":
        return _english()(text).strip()
    if language == "zh":
        text = _to_simplified().convert(text)
    return _basic()(text).strip()


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Percent over (reference, hypothesis), normalised; None without a reference word."""
    import jiwer

    pairs = [(ref, hyp) for ref, hyp in pairs if ref]
    if not pairs:
        return None
    refs, hyps = zip(*pairs, strict=True)
    return 100.0 * float(jiwer.wer(list(refs), list(hyps)))


def character_error_rate(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Percent over (reference, hypothesis), normalised, white space left out; None without a reference character."""
    import jiwer

    pairs = [("".join(ref.split()), "".join(hyp.split())) for ref, hyp in pairs]
    pairs = [(ref, hyp) for ref, hyp in pairs if ref]
    if not pairs:
        return None
    refs, hyps = zip(*pairs, strict=True)
    return 100.0 * float(jiwer.cer(list(refs), list(hyps)))
