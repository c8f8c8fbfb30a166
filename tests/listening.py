"""Speech fed to a transcriber in parts, and what must hold of the transcripts that come."""

import itertools

from agent import transcriber
from agent.messages import SpeechChunk


def voiced_until(sample, pauses):
    """Where the voice was last heard, as the gate knows at `sample`; `pauses` are (start, end) of silence."""
    return next((start for start, end in pauses if start < sample <= end), sample)


def listen(ears, pcm, edges, n_after=0, step=lambda _: True, pauses=None, early=None):
    """Feed `pcm` cut at `edges`, the last `n_after` samples being hang-over; partials, and the final.

    Revisions that come in a pause are added to the set `early`.
    """
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
            if early is not None and ears.in_pause:
                early.add(partial.revision)
    return partials, ears.finish()


def offline(ears, pcm):
    ears.feed(transcriber.whole(pcm))
    return ears.finish()


def said(final):
    return final.text, final.n_tokens, final.start, final.end, final.language, final.rejected, final.stable_chars


def assert_orderly(partials, final, hop, early=()):
    """The revisions in `early` were heard in advance in a pause, and keep to no hop."""
    known, reached, stable = 0, 0, ""
    for i, partial in enumerate(partials):
        assert partial.revision == i + 1
        assert not partial.is_final
        assert 0 <= partial.stable_chars <= len(partial.text)
        assert partial.text.startswith(stable)
        stable = partial.text[: partial.stable_chars]
        assert partial.end >= reached
        reached = partial.end
        if partial.revision not in early:
            assert partial.end - known >= hop
            known = partial.end
    assert final.is_final
    assert final.revision == len(partials) + 1
    assert final.stable_chars == len(final.text)
