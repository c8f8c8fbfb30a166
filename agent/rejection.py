"""Why a text is withheld: what the model's own figures tell of noise that passed for speech."""

from __future__ import annotations

from .config import RecogniserConfig
from .decoding import Hypothesis

LOOP_DOUBT = 0.5  # of `logprob_threshold`; a loop that is likelier may be somebody who says a thing again and again


def reason(hypothesis: Hypothesis, config: RecogniserConfig) -> str | None:
    """Of a final: "no_speech", "unlikely", "repetition", or None if its text stands."""
    likelihood = hypothesis.avg_logprob
    if hypothesis.no_speech_prob > config.no_speech_threshold and likelihood < config.logprob_threshold:
        return "no_speech"
    if likelihood < config.least_logprob:
        return "unlikely"
    if hypothesis.looped and likelihood < LOOP_DOUBT * config.logprob_threshold:
        return "repetition"
    return None
