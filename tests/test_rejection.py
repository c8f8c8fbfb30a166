"""Which texts are withheld, by the model's own figures."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import RecogniserConfig
from agent.decoding import Hypothesis
from agent.rejection import reason

CONFIG = RecogniserConfig()
HYPOTHESES = st.builds(Hypothesis, st.just([1, 2]), st.floats(-20, 0), st.floats(0, 1), st.booleans())
CONFIGS = st.builds(
    RecogniserConfig,
    no_speech_threshold=st.floats(0, 1),
    logprob_threshold=st.floats(-5, 0),
)


@pytest.mark.parametrize(
    ("avg_logprob", "no_speech_prob", "looped", "expected"),
    [
        (-0.2, 0.01, False, None),
        (-1.5, 0.59, False, None),  # mumbled
        (-0.9, 0.95, False, None),  # short, and likely
        (-1.1, 0.61, False, "no_speech"),
        (-1.7, 0.61, True, "no_speech"),
        (-1.7, 0.59, True, None),  # the model does not doubt that someone spoke
        (-0.4, 0.3, True, None),  # a talker who repeats
        (0.0, 1.0, False, None),  # nothing was heard: there is nothing to withhold
    ],
)
def test_reasons(avg_logprob, no_speech_prob, looped, expected):
    assert reason(Hypothesis([1], avg_logprob, no_speech_prob, looped), CONFIG) == expected


@given(CONFIGS, HYPOTHESES, st.floats(0, 20), st.floats(0, 1))
def test_a_likelier_text_is_not_withheld_where_a_less_likely_one_stands(config, hypothesis, more, less_doubt):
    likelier = msgspec.structs.replace(
        hypothesis,
        avg_logprob=min(0.0, hypothesis.avg_logprob + more),
        no_speech_prob=max(0.0, hypothesis.no_speech_prob - less_doubt),
    )
    assert reason(hypothesis, config) is not None or reason(likelier, config) is None


@given(HYPOTHESES)
def test_the_threshold_can_be_turned_off(hypothesis):
    assert reason(hypothesis, RecogniserConfig(logprob_threshold=-99)) is None
