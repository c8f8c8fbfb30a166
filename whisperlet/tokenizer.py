"""Token ids to text. A character whose bytes are not all there yet is held back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import tokenizers

from .bundle import Vocabulary

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


class Tokenizer:
    """Whisper's byte-level tokenizer and the ids that steer decoding."""

    def __init__(self, tokenizer_json: bytes, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(_decoding_only(tokenizer_json))
        self._json = tokenizer_json
        self.vocabulary = vocabulary

    def text(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones left out, without a half-finished character at the end."""
        plain = [token for token in tokens if token < self.vocabulary.eot]
        return self._tokenizer.decode(plain).rstrip(_INCOMPLETE).strip()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text. The first call loads the merges."""
        ids: list[int] = self._with_merges.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _with_merges(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._json.decode())

    def prompt(self, language: str) -> list[int]:
        """Tokens that ask for a transcript in `language`, without timestamps."""
        v = self.vocabulary
        if v.transcribe is None:
            return [v.sot, v.no_timestamps]
        return [v.sot, v.languages[language], v.transcribe, v.no_timestamps]


def _decoding_only(tokenizer_json: bytes) -> str:
    """The tokenizer without its merges, which only turn text into tokens and would take 20 MB."""
    parts = msgspec.json.decode(tokenizer_json)
    parts["model"]["merges"] = []
    return msgspec.json.encode(parts).decode()
