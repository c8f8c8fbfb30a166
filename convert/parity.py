"""Each signature of a .tflite against the PyTorch module that it was traced from, and the bundle's text against
Whisper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from whisperlet.audio import SAMPLES_PER_FRAME, WINDOW_FRAMES, Pcm16, to_float32
from whisperlet.bundle import Dims
from whisperlet.errors import ModelError
from whisperlet.logmel import log_mel

from . import mixed
from .fold import FoldedWhisper
from .graphs import MASKED, Decode, Encode, Module, Stream, by_layer, signatures
from .int4 import Packed
from .recipe import Export

Tensors = dict[str, NDArray[Any]]
MAX_FLOAT_ERROR = 5e-2  # in logits, whose range is about 60, and in keys and values, about 30
MIN_INT8_COSINE = 0.99
MIN_MIXED_COSINE = 0.98  # where some matrices have four bits; the logits after the very first token are worst


class SignatureParity(msgspec.Struct, frozen=True):
    """How far a signature's outputs are from the reference's; the worst output counts."""

    signature: str
    float_max_abs: float
    int8_max_abs: float = 0.0
    int8_cosine: float = 1.0


class TextParity(msgspec.Struct, frozen=True):
    """What both heard in a clip."""

    clip: str
    reference: str
    bundle: str


def golden_clips() -> list[tuple[str, Pcm16]]:
    """Short read English that ships with the converter, by name."""
    with as_file(files("convert") / "golden") as folder:
        return [(path.stem, soundfile.read(path, dtype="int16")[0]) for path in sorted(folder.glob("*.flac"))]


class Probe:
    """Inputs from real speech: the encoder's from a clip, the decoder's from the reference encoder's output.

    A pass of the decoder as long as the prompt takes that, any other what the checkpoint itself says after it: so the
    agent asks. Logits after the very first token alone say little else than which language it is, and round worst.
    """

    def __init__(self, whisper: FoldedWhisper, dims: Dims, stage: Export, tokens: list[int]) -> None:
        self.whisper, self.dims, self.stage, self.tokens = whisper, dims, stage, tokens
        self.speech = to_float32(golden_clips()[0][1])
        self._cross: dict[int, dict[str, torch.Tensor]] = {}

    def inputs(self, module: Module) -> dict[str, torch.Tensor]:
        """Inputs for a signature."""
        if isinstance(module, Encode):
            return {**module.examples(), "mel": self.mel(module.n_frames)}
        if isinstance(module, Stream):
            return self._second_step(module)
        cross = self._cross_state(module.n_cross)
        if module.n_tokens == len(self.tokens):
            return {**module.examples(), **cross, **self._at(0, self.tokens)}
        ids, state = self._said(module.n_tokens, cross)
        return {**module.examples(), **cross, **state, **self._at(len(self.tokens), ids)}

    def _said(self, n_tokens: int, cross: dict[str, torch.Tensor]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The most likely ids after the prompt, one by one, and the state of self-attention before the first of them."""
        asked, going_on = (self._reference(n, cross) for n in (len(self.tokens), 1))
        out = asked(**{**asked.examples(), **cross, **self._at(0, self.tokens)})
        state = {key: value for key, value in out.items() if key.startswith("self_")}
        ids = [int(out["logits"][0, -1].argmax())]
        while len(ids) < n_tokens:
            at = self._at(len(self.tokens) + len(ids) - 1, ids[-1:])
            out = going_on(**{**going_on.examples(), **cross, **{key: out[key] for key in state}, **at})
            ids.append(int(out["logits"][0, -1].argmax()))
        return ids, state

    def _reference(self, n_tokens: int, cross: dict[str, torch.Tensor]) -> Decode:
        return Decode(self.whisper, self.dims, n_tokens, cross["cross_k_0"].shape[1], {})

    def _at(self, position: int, ids: list[int]) -> dict[str, torch.Tensor]:
        """Tokens from `position` on, each of which sees itself and all before it."""
        mask = torch.full((len(ids), self.dims.n_text_ctx), MASKED).triu(position + 1)
        tokens, first = (torch.tensor(value, dtype=torch.int32) for value in ([ids], [position]))
        return {"tokens": tokens, "position": first, "self_mask": mask}

    def _second_step(self, module: Stream) -> dict[str, torch.Tensor]:
        """A step after one that was committed."""
        spec = module.spec
        mel = torch.nn.functional.pad(self.mel(spec.chunk + spec.width + 1), (0, 0, 2, 0))
        mask = torch.full((1, spec.context + spec.width), MASKED)
        mask[:, spec.context :] = 0.0
        first = {**module.examples(), "mel": mel[:, : 2 * spec.width + 3], "mask": mask}
        committed = module(**first)
        second = {**first, "mel": mel[:, 2 * spec.chunk :][:, : 2 * spec.width + 3], "mask": mask.clone()}
        second["offset"] = torch.full((1,), float(spec.chunk))
        second["mask"][:, : spec.chunk] = 0.0
        for i in range(self.dims.n_audio_layer):
            second[f"past_k_{i}"] = _placed(first[f"past_k_{i}"], committed[f"new_k_{i}"], 1)
            second[f"past_v_{i}"] = _placed(first[f"past_v_{i}"], committed[f"new_v_{i}"], 2)
        return second

    def mel(self, n_frames: int) -> torch.Tensor:
        """Log-mel of the clip in a window. shape = (1, 2 n_frames, n_mels)"""
        fitting = self.speech[: SAMPLES_PER_FRAME * n_frames]
        return torch.from_numpy(log_mel(fitting, 2 * n_frames, self.dims.n_mels))

    def _cross_state(self, n_cross: int) -> dict[str, torch.Tensor]:
        if n_cross not in self._cross:
            encode = Encode(self.whisper, self.dims, n_cross, n_cross)
            self._cross[n_cross] = encode(self.mel(n_cross), torch.zeros(1))
        return self._cross[n_cross]


def _placed(state: torch.Tensor, new: torch.Tensor, axis: int) -> torch.Tensor:
    """A copy of `state` that begins with `new`."""
    return torch.cat([new, state.narrow(axis, new.shape[axis], state.shape[axis] - new.shape[axis])], axis)


class Runner:
    """Signatures of some .tflite files on TensorFlow Lite's interpreter, the fallback runtime of the agent."""

    def __init__(self, paths: Sequence[Path], plain: str = " ") -> None:
        """Files whose names begin with `plain` run on the plain kernels, which take weights as they lie in the file."""
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES, OpResolverType.AUTO
        interpreters = [
            Interpreter(str(p), num_threads=2, experimental_op_resolver_type=kernels[not p.name.startswith(plain)])
            for p in paths
        ]
        self._by_signature = {name: one for one in interpreters for name in one.get_signature_list()}

    def run(self, signature: str, inputs: dict[str, torch.Tensor]) -> Tensors:
        """Outputs of one signature."""
        runner = self._by_signature[signature].get_signature_runner(signature)
        outputs: Tensors = runner(**{key: value.numpy() for key, value in inputs.items()})
        return outputs


@torch.inference_mode()
def compare_signatures(
    probe: Probe,
    float_paths: Sequence[Path],
    int8_path: Path,
    on_signature: Callable[[str], None] = lambda _: None,
    packed: Mapping[str, Packed] | None = None,
) -> list[SignatureParity]:
    """One row a signature. Raises ModelError where one is further off than rounding explains.

    `packed` are the matrices of four bits; the smaller file is to compute what the modules do with these.
    """
    rows = []
    matrices, values = mixed.matrices(probe.whisper), {name: one.values() for name, one in (packed or {}).items()}
    # Nine decoder graphs would unpack their float matrices nine times, 2 GB; the encoder's are too slow without.
    runners = Runner(float_paths, plain="decode_"), Runner([int8_path])
    for spec, module in signatures(probe.whisper, probe.dims, probe.stage):
        on_signature(spec.name)
        inputs = probe.inputs(module)
        expected = {key: value.numpy() for key, value in module(**inputs).items()}
        rounded = expected
        if values:
            with mixed.swapped(matrices, values):
                rounded = {key: value.numpy() for key, value in module(**inputs).items()}
        from_float, from_int8 = (runner.run(spec.name, inputs) for runner in runners)
        row = SignatureParity(
            spec.name,
            float_max_abs=_max_abs(expected, from_float),
            int8_max_abs=_max_abs(rounded, from_int8),
            int8_cosine=min(cosine(rounded[key], from_int8[key]) for key in expected),
        )
        _check(row, MIN_MIXED_COSINE if values else MIN_INT8_COSINE)
        rows.append(row)
    return rows


def _check(row: SignatureParity, least: float) -> None:
    if not (row.float_max_abs <= MAX_FLOAT_ERROR and row.int8_cosine >= least):  # so that what is no number is refused
        raise ModelError(
            f"{row.signature} does not compute what the checkpoint does: before rounding it is up to "
            f"{row.float_max_abs:.2g} off, where {MAX_FLOAT_ERROR:g} may be; after it the cosine of what both put out is "
            f"{row.int8_cosine:.4f}, where {least:g} is the least"
        )


@torch.inference_mode()
def folding_error(model: Any, probe: Probe) -> float:
    """Largest difference in logits between the folded modules and transformers' own, on a clip in a full window."""
    prompt = torch.tensor([probe.tokens])
    expected = model(input_features=probe.mel(WINDOW_FRAMES).transpose(1, 2), decoder_input_ids=prompt).logits
    watched = by_layer(probe.whisper.alignment_heads)
    decode = Decode(probe.whisper, probe.dims, len(probe.tokens), WINDOW_FRAMES, watched)
    return float((decode(**probe.inputs(decode))["logits"] - expected).abs().max())


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of the angle between two tensors as vectors; 1.0 if both are zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / norms if norms else float(np.array_equal(a, b))


def _max_abs(expected: Tensors, actual: Tensors) -> float:
    return max(float(np.abs(expected[key] - actual[key]).max()) for key in expected)
