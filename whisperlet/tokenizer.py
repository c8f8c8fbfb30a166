"""Token ids to text. A character whose bytes are not all there yet is held back."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from .bundle import Vocabulary

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


class Tokenizer:
    """Whisper's byte-level tokenizer and the ids that steer decoding."""

    def __init__(self, tokenizer_json: bytes, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        self.vocabulary = vocabulary

    def text(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones left out, without a half-finished character at the end."""
        plain = [token for token in tokens if token < self.vocabulary.eot]
        return self._tokenizer.decode(plain).rstrip(_INCOMPLETE).strip()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, language: str) -> list[int]:
        """Tokens that ask for a transcript in `language`, without timestamps."""
        v = self.vocabulary
        if v.transcribe is None:
            return [v.sot, v.no_timestamps]
        return [v.sot, v.languages[language], v.transcribe, v.no_timestamps]
