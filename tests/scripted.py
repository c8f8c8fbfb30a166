"""An engine that says what a test wants to hear."""

from types import SimpleNamespace

import numpy as np
import toy
from test_model import make_tokenizer

from agent.alignment import Looks
from whisperlet.tokenizer import Tokenizer


class ScriptedStream:
    """Counts frames as a stream does, and holds nothing else."""

    def __init__(self, spec):
        self.spec = spec
        self.begin()

    def begin(self):
        self.committed = self.n_frames = 0


class ScriptedEngine:
    """Says `answer`, whatever it hears, its tokens looking at `frames`, by default at the start; takes notes."""

    def __init__(self, answer="", no_speech=0.0, certainty=30.0, language=toy.EN, **manifest):
        silence = {"default": 64, "haw": 200}
        manifest = {"encode_frames": [128, 256, 1500], "silence_frames": silence, **manifest}
        self.manifest = toy.make_manifest(**manifest)
        self.tokenizer = Tokenizer(make_tokenizer().to_str().encode(), self.manifest.vocabulary)
        self.answer = answer
        self.no_speech, self.certainty, self.language = no_speech, certainty, language
        self.frames = []  # by token of the answer
        self.windows = []  # frames of each `encode`
        self.steps = []  # of each `listen`: signature, first frame, frames
        self.passes = []  # tokens of each `decode`

    @property
    def answer(self):
        return self.tokenizer.text(self._answer)

    @answer.setter
    def answer(self, text):
        self._answer = text if isinstance(text, list) else self.tokenizer.encode(text)

    def new_state(self):
        return SimpleNamespace(position=0, tokens=[])

    def encode(self, state, mel):
        self.windows.append(mel.shape[1] // 2)
        state.position = 0

    def new_stream(self, spec):
        return ScriptedStream(spec)

    def listen(self, stream, mel, n_frames):
        spec = stream.spec
        assert mel.shape == (1, 2 * spec.width + 3, toy.DIMS.n_mels)
        assert 0 < n_frames <= spec.reach
        self.steps.append((spec.name, stream.committed, n_frames))
        stream.n_frames = stream.committed + n_frames
        stream.committed += spec.chunk * (n_frames == spec.reach)

    def attend(self, state, stream):
        pass

    def decode(self, state, tokens):
        assert 0 <= state.position <= len(state.tokens)
        self.passes.append(list(tokens))
        rows, began = [], state.position - self._n_prompt + 1
        for token in tokens:
            state.tokens[state.position :] = [token]
            state.position += 1
            rows.append(self._logits(state.tokens))
        places = dict(enumerate(self.frames))
        frames = [places.get(i, 0) for i in range(began, began + len(rows))]
        state.looks = Looks(np.array(frames), np.zeros(len(rows), np.float32))
        return np.stack(rows)

    @property
    def _n_prompt(self):
        return 4 if self.manifest.vocabulary.transcribe else 2

    def _logits(self, tokens):
        logits = np.zeros(280, np.float32)
        if len(tokens) == 1:
            logits[self.language] = 5
            others = 278 + np.exp(5)
            logits[toy.NO_SPEECH] = np.log(others * self.no_speech / (1 - self.no_speech) + 1e-9)
        said = len(tokens) - self._n_prompt
        if said >= 0:
            logits[[*self._answer, toy.EOT][min(said, len(self._answer))]] += self.certainty
        return logits
