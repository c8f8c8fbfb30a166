"""`python -m tests.benchmarks.terms`: words that a list of terms saves, and what it costs the other words.

Terms are the rare words of a whole set: those of four letters or more that another set's texts do not have. Settings
are compared on en_read_train (its every fourth clip against the rest), and what was chosen is scored on en_read_dev.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jiwer
import numpy as np
import typer

from agent import decoding, terms, transcriber
from agent.audio_files import read_file
from agent.config import RecogniserConfig, default_cache_dir
from agent.engine import load_engine
from agent.follower import Bound
from agent.segment import Stretch
from agent.term_list import Term
from agent.terms import Terms
from convert import scoring, speechset
from convert.speechset import Clip
from whisperlet.audio import to_float32
from whisperlet.bundle import open_bundle
from whisperlet.logmel import LogMel

from .base import default_speech

MIN_LETTERS = 4
MAX_S = 27.0  # of a clip, which is then one segment


class Score(NamedTuple):
    """Words of the references and those that were not heard."""

    n_terms: int
    wrong_terms: int
    n_others: int
    wrong_others: int  # with what was said besides
    false_terms: int  # said where the reference has something else

    def __str__(self) -> str:
        terms = f"terms {self.wrong_terms}/{self.n_terms} wrong, {self.false_terms} false"
        return f"{terms}; others {self.wrong_others}/{self.n_others} = {100 * self.wrong_others / self.n_others:.2f} %"


def words(clips: Sequence[Clip]) -> set[str]:
    """All that occur in the references."""
    return {word for clip in clips for word in scoring.normalise(clip.text or "", "en").split()}


def rare(clips: Sequence[Clip], common: set[str]) -> list[str]:
    """Terms of a set, in alphabetical order."""
    return sorted(word for word in words(clips) - common if len(word) >= MIN_LETTERS and word.isalpha())


def score(pairs: Sequence[tuple[str, str]], listed: set[str]) -> Score:
    """Of references and hypotheses, normalised."""
    done = jiwer.process_words([ref for ref, _ in pairs], [hyp for _, hyp in pairs])
    counts = dict.fromkeys(Score._fields, 0)
    for ref, hyp, chunks in zip(done.references, done.hypotheses, done.alignments, strict=True):
        counts["n_terms"] += sum(word in listed for word in ref)
        for chunk in chunks:
            if chunk.type == "equal":
                continue
            missed, said = ref[chunk.ref_start_idx : chunk.ref_end_idx], hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
            wrong = sum(word in listed for word in missed)
            counts["wrong_terms"] += wrong
            counts["wrong_others"] += len(missed) - wrong + (len(said) if chunk.type == "insert" else 0)
            counts["false_terms"] += sum(word in listed for word in said)
        counts["n_others"] += sum(word not in listed for word in ref)
    return Score(**counts)


class Ears:
    """Decodes a clip under several dictionaries after encoding it once."""

    def __init__(self, bundle: Path) -> None:
        opened = open_bundle(bundle)
        self.engine = load_engine(opened, 2, default_cache_dir())
        self.transcriber = transcriber.build(opened, self.engine, RecogniserConfig())
        self.decoder = Bound(self.engine)

    def hear(self, clip: Clip, dictionaries: Sequence[Terms | None]) -> list[str]:
        """A text for each, the first of them None."""
        pcm = to_float32(read_file(clip.audio))
        logmel = LogMel(self.engine.manifest.dims.n_mels)
        logmel.feed(pcm)
        n_frames = self.transcriber._windows(Stretch(logmel, len(pcm)))[0]
        self.engine.encode(self.decoder.state, logmel.window(2 * n_frames, len(pcm)))
        manifest, tokenizer = self.engine.manifest, self.transcriber.tokenizer
        texts, draft = [], list[int]()
        for dictionary in dictionaries:
            self.decoder.position = 0
            found = decoding.greedy(
                self.decoder,
                manifest.vocabulary,
                tokenizer.prompt("en"),
                draft,
                limit=self.transcriber._token_limit(len(pcm)),
                block=max(manifest.decode_tokens),
                terms=dictionary,
            )
            draft = draft or found.tokens
            texts.append(scoring.normalise(tokenizer.text(found.tokens), "en"))
        return texts


def step_ms(dictionary: Terms, n_vocab: int, tokens: Sequence[int]) -> float:
    """Time that a decoder's step takes longer, the median of many."""
    logits, took = np.random.default_rng(0).normal(size=n_vocab).astype(np.float32), []
    for n in range(200):
        began = time.perf_counter()
        dictionary.pick(logits, 0, tokens[: n % len(tokens)])
        took.append(time.perf_counter() - began)
    return 1e3 * float(np.median(took))


def setting(listed: Sequence[str], boost: float, share: float, ears: Ears) -> Terms:
    """A dictionary in which no term has a boost of its own."""
    terms.FIRST_SHARE = share
    return Terms([Term(word, boost) for word in listed], ears.transcriber.tokenizer.encode)


def measure(
    name: Annotated[str, typer.Argument(help="en_read_train or en_read_dev.")],
    boost: Annotated[list[float], typer.Option()] = [terms.BOOST],  # noqa: B006 - typer copies it
    share: Annotated[list[float], typer.Option()] = [terms.FIRST_SHARE],  # noqa: B006
    n_clips: int = 30,
    show: Annotated[bool, typer.Option("--show", help="What the first setting changes.")] = False,
    bundle: Path = Path("build/base_wi8.tflite"),
) -> None:
    """Score `n_clips` evenly spaced clips with every setting, the plain bundle first."""
    clips = sorted(speechset.read(default_speech() / name, max_s=MAX_S), key=lambda clip: clip.id)
    train = sorted(speechset.read(default_speech() / "en_read_train"), key=lambda clip: clip.id)
    if name == "en_read_train":
        ours = {clip.id for clip in train[::4]}
        clips, train = [clip for clip in clips if clip.id in ours], [clip for clip in train if clip.id not in ours]
    listed, ears = rare(clips, words(train)), Ears(bundle)
    settings = [(one, other) for one in boost for other in share]
    dictionaries = [None, *(setting(listed, *each, ears) for each in settings)]
    scored = clips[:: max(1, len(clips) // n_clips)][:n_clips]
    refs = [scoring.normalise(clip.text or "", "en") for clip in scored]
    heard = [ears.hear(clip, dictionaries) for clip in scored]
    print(f"{name}: {len(scored)} of {len(clips)} clips, {len(listed)} terms")
    for label, hyps in zip(["plain", *settings], zip(*heard, strict=True), strict=True):
        print(f"{label}: {score(list(zip(refs, hyps, strict=True)), set(listed))}")
    for ref, (plain, now, *_) in zip(refs, heard, strict=True) if show else ():
        if plain != now:
            print(f"said  {ref}\nplain {plain}\nterms {now}")
    few = setting(listed[:100], boost[0], share[0], ears)
    tokens = ears.transcriber.tokenizer.encode(" ".join(refs[:3]))[:60]
    n_vocab = ears.engine.manifest.dims.n_vocab
    print(f"a step takes {step_ms(few, n_vocab, tokens):.3f} ms longer with 100 terms")
    if len(dictionaries) > 1 and dictionaries[1]:
        print(f"... {step_ms(dictionaries[1], n_vocab, tokens):.3f} ms with {len(listed)}")


if __name__ == "__main__":
    typer.run(measure)
