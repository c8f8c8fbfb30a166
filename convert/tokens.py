"""A byte-level BPE tokenizer as data: which tokens others are made of, and the same with fewer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from whisperlet.errors import ModelError

if TYPE_CHECKING:
    import tokenizers


class Bpe:
    """What `tokenizer.json` says of tokens; text tokens and special ones by their ids."""

    def __init__(self, tokenizer_json: bytes) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        self._parts: dict[str, Any] = json.loads(tokenizer_json)
        self.tokenizer: tokenizers.Tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self.special: dict[str, int] = {token["content"]: token["id"] for token in self._parts["added_tokens"]}
        vocab = self._parts["model"]["vocab"]
        self.text: dict[str, int] = {token: i for token, i in vocab.items() if token not in self.special}
        self._merges = [_pair(merge) for merge in self._parts["model"]["merges"]]
        self._parents: dict[str, list[tuple[str, str]]] = {}
        for left, right in self._merges:
            self._parents.setdefault(left + right, []).append((left, right))
        self.bytes = frozenset(pre_tokenizers.ByteLevel.alphabet())
        if lacking := sorted(self.bytes - self.text.keys()):
            raise ModelError(f"its tokenizer is not byte-level: it lacks {' '.join(lacking[:5])}")
        self._by_id = {token_id: token for token, token_id in self.text.items()}

    def encode(self, texts: list[str]) -> list[list[str]]:
        """Tokens of each text."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # which leaves out more than ids
        return [[self._by_id[token_id] for token_id in encoding.ids] for encoding in encoded]

    def said(self) -> dict[str, str]:
        """Text of each token that is no fragment of a character."""
        texts = {token: self.tokenizer.decode([token_id]) for token, token_id in self.text.items()}
        return {token: text for token, text in texts.items() if "\N{REPLACEMENT CHARACTER}" not in text}

    def made_of(self, token: str) -> set[str]:
        """The token and all that are merged on the way to it."""
        found: set[str] = set()
        waiting = [token]
        while waiting:
            token = waiting.pop()
            if token not in found:
                found.add(token)
                waiting += [part for pair in self._parents.get(token, ()) for part in pair]
        return found

    def choose(self, weights: Mapping[str, float], n: int, kept: Iterable[str] = ()) -> set[str]:
        """`n` text tokens: every byte, what is to be `kept`, then the heaviest, each with all that it is made of.

        What is spelled with chosen tokens alone is spelled as it was: merges that are gone had no part in it.
        """
        chosen = set(self.bytes).union(*map(self.made_of, kept))
        order = sorted(weights, key=lambda token: (-weights[token], self.text[token]))
        for token in order:
            if token not in chosen:
                added = self.made_of(token) - chosen
                if len(chosen) + len(added) <= n:
                    chosen |= added
        return chosen

    def reduced(self, chosen: set[str], special: set[str]) -> tuple[bytes, list[int]]:
        """The tokenizer with these tokens only, and the ids that they had, in the order of those that they get.

        The order stays what it was, so text comes before the end of text, and other special tokens after it.
        """
        had = sorted([self.text[token] for token in chosen] + [self.special[token] for token in special])
        new = {old: i for i, old in enumerate(had)}
        parts = json.loads(json.dumps(self._parts))
        vocab = parts["model"]["vocab"]
        parts["model"]["vocab"] = {token: new[i] for token, i in vocab.items() if i in new}
        parts["model"]["merges"] = [
            merge
            for merge, (left, right) in zip(parts["model"]["merges"], self._merges, strict=True)
            if {left, right, left + right} <= chosen
        ]
        parts["added_tokens"] = [{**t, "id": new[t["id"]]} for t in parts["added_tokens"] if t["id"] in new]
        _renumber(parts.get("post_processor"), {token: new[self.special[token]] for token in special})
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode(), had


def deflatable(tokenizer_json: bytes) -> bytes:
    """The same tokenizer, written so that it deflates best: tokens by name, merges as text, no white space."""
    parts = json.loads(tokenizer_json)
    model = parts["model"]
    model["vocab"] = dict(sorted(model["vocab"].items()))
    merges = [_pair(merge) for merge in model["merges"]]
    if not any(" " in part for merge in merges for part in merge):
        model["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Older files have one string with a space between the parts."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumber(processor: dict[str, Any] | None, ids: Mapping[str, int]) -> None:
    """Give the special tokens that are put round a text their new ids."""
    for inner in (processor or {}).get("processors", ()):
        _renumber(inner, ids)
    for token in ((processor or {}).get("special_tokens") or {}).values():
        token["ids"] = [ids[name] for name in token["tokens"]]
