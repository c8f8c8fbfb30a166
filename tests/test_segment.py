from agent.decoding import Hypothesis
from agent.segment import Heard


def test_what_mends_others_takes_their_time_too():
    first, second, third = (
        Heard(Hypothesis([n], avg_logprob=0.0, no_speech_prob=0.0, looped=False), "en", 10.0 * n, 1.0 * n, astray=n < 3)
        for n in (1, 2, 3)
    )
    heard = third.after([first, second])
    assert (heard.encode_ms, heard.decode_ms, heard.n_attempts) == (60.0, 6.0, 3)
    assert (heard.hypothesis.tokens, heard.astray) == ([3], False)
