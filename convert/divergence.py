"""How far what a decoder would say over a stream is from what it says over the teacher's frames.

A frame may be far from the teacher's and none the worse to read, or near it and misread: what counts is the next token.
So the decoder reads the teacher's own transcript over the teacher's frames, and again over what a step of the stream
leaves it with, at the end of an utterance or amid it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import sublayers
from .utterances import Batch

MARGIN = 10  # frames, 200 ms, for which the audio of a token goes on after the frame that its heads look at


class Wanted(NamedTuple):
    """What the teacher expects, for each token that is said."""

    hidden: Tensor  # the decoder's last states. shape = (n_said, d_model)
    ends: Tensor  # frame before which its audio has ended. shape = (n_said,)
    clip_ends: Tensor  # the same of its utterance's. shape = (n_said,)


@torch.no_grad()
def wanted(model: Any, batch: Batch, silence: int, frames: Tensor, heads: Sequence[tuple[int, int]]) -> Wanted:
    """Over the teacher's frames, shape = (batch, n, d_model); `silence` is how many of them follow an utterance.

    `heads` are the alignment heads, (decoder layer, head); they do not look back behind where they were.
    """
    decoder, attention = model.model.decoder, torch.zeros(())
    x = sublayers.read(decoder, batch.read)
    for sublayer in sublayers.of(model, "decoder"):
        watched = [head for number, head in heads if number == sublayer.number and sublayer.kind == sublayers.CROSS]
        if watched:
            attention = attention + sublayer.attention(x, frames)[:, watched].sum(1)
        x = sublayer.add(x, frames)
    looks = attention.argmax(-1).cummax(-1).values
    clip_ends = (batch.n_frames - silence)[:, None].expand_as(looks)
    is_said = batch.is_said
    return Wanted(decoder.layer_norm(x)[is_said], looks[is_said] + MARGIN, clip_ends[is_said])


def at_step(model: Any, batch: Batch, wanted: Wanted, frames: Tensor, step: int, chunk: int, padding: int) -> Tensor:
    """Mean divergence, in nats, of what is expected at a step from what is wanted, over the tokens that it has heard.

    `frames` are those of all steps, their padding included. Zero if nothing was heard.
    """
    n_heard = step * chunk + frames.shape[2] - padding
    is_heard = (wanted.ends <= n_heard) | (wanted.clip_ends <= n_heard)
    hidden = sublayers.decode(model, batch.read, seen(frames, step, chunk))[batch.is_said][is_heard]
    with torch.no_grad():
        said = model.proj_out(wanted.hidden[is_heard]).float().log_softmax(-1)
    found = model.proj_out(hidden).float().log_softmax(-1)
    return F.kl_div(found, said, reduction="sum", log_target=True) / max(1, len(said))


def seen(frames: Tensor, step: int, chunk: int) -> Tensor:
    """What the decoder reads at a step: what was committed before it, then all of its own.

    shapes = (batch, n_steps, width, d_model) -> (batch, step * chunk + width, d_model)
    """
    return torch.cat([frames[:, :step, :chunk].flatten(1, 2), frames[:, step]], 1)


def steps(rng: random.Random, n_steps: int, n: int) -> list[int]:
    """At which the decoder reads: the last, and others drawn of all."""
    return [n_steps - 1, *(rng.randrange(n_steps) for _ in range(n - 1))]
