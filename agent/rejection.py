"""Why a text is withheld: what the model's own figures tell of noise that passed for speech."""

from __future__ import annotations

from .config import RecogniserConfig
from .decoding import Hypothesis


def reason(hypothesis: Hypothesis, config: RecogniserConfig) -> str | None:
    """The reason "no_speech", or None if the text stands."""
    is_silent = hypothesis.no_speech_prob > config.no_speech_threshold
    return "no_speech" if is_silent and hypothesis.avg_logprob < config.logprob_threshold else None
