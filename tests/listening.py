"""Speech fed to a transcriber in parts, and what must hold of the transcripts that come."""

import itertools

from agent import transcriber
from agent.messages import SpeechChunk


def voiced_until(sample, pauses):
    """Where the voice was last heard, as the gate knows at `sample`; `pauses` are (start, end) of silence."""
    return next((start for start, end in pauses if start < sample <= end), sample)


def listen(ears, pcm, edges, n_after=0, step=lambda _: True, pauses=None):
    """Feed `pcm` cut at `edges`, the last `n_after` samples being hang-over; partials, and the final."""
    speech_end = len(pcm) - n_after
    edges = [0, *sorted(edges), len(pcm)]
    partials = []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        is_last = i == len(edges) - 2
        voiced_end = None if is_last or pauses is None else voiced_until(end, [*pauses, (speech_end, len(pcm))])
        known_end = speech_end if is_last else 0
        ears.feed(SpeechChunk(1, 0, pcm[start:end], start, voiced_end, is_last=is_last, speech_end=known_end))
        if step(i) and (partial := ears.step()):
            partials.append(partial)
    return partials, ears.finish()


def offline(ears, pcm):
    ears.feed(transcriber.whole(pcm))
    return ears.finish()


def said(final):
    return final.text, final.n_tokens, final.start, final.end, final.language, final.rejected, final.stable_chars


def assert_orderly(partials, final, hop, n_pauses=0):
    """What is heard in advance in one of the `n_pauses` is shown, and keeps to no hop."""
    known, stable, n_early = 0, "", 0
    for i, partial in enumerate(partials):
        assert partial.revision == i + 1
        assert not partial.is_final
        assert 0 <= partial.stable_chars <= len(partial.text)
        assert partial.text.startswith(stable)
        stable = partial.text[: partial.stable_chars]
        if partial.end - known < hop:
            n_early += 1
        else:
            known = partial.end
    assert n_early <= n_pauses
    assert final.is_final
    assert final.revision == len(partials) + 1
    assert final.stable_chars == len(final.text)
