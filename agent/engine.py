"""Runs the graphs of a bundle. Weights live here, state in `DecoderState`, policy in `decoding.py` and `drafting.py`.

Two runtimes behind one interface: LiteRT's `CompiledModel`, whose buffers are made once and passed from signature to
signature without a copy, and TensorFlow Lite's `Interpreter` for platforms where the first has no wheel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from whisperlet.audio import Float32
from whisperlet.bundle import Bundle, Manifest, StreamSpec, kv_names
from whisperlet.errors import BundleError

from .alignment import Looks
from .state import DecoderState, StreamState, cross_mask, self_mask, stream_mask


class Engine(Protocol):
    """What the transcriber asks of a runtime."""

    manifest: Manifest

    def new_state(self) -> DecoderState:
        """Room for one utterance at a time."""

    def encode(self, state: DecoderState, mel: Float32) -> None:
        """Put the keys and values of a window into `state`. mel shape = (1, 2n, n_mels), n one of encode_frames."""

    def decode(self, state: DecoderState, tokens: Sequence[int]) -> Float32:
        """Append tokens; logits after each. shape = (n_tokens, n_vocab). Leaves `state.looks`.

        Raises ValueError if there is no room for them.
        """

    def new_stream(self, spec: StreamSpec) -> StreamState:
        """Room for one segment at a time."""

    def listen(self, stream: StreamState, mel: Float32, n_frames: int) -> None:
        """One step of the streaming encoder: `n_frames` of audio from `stream.committed` on, then padding.

        A step that is full commits its chunk. mel shape = (1, 2 * width + 3, n_mels), see `LogMel.stretch`.
        """

    def attend(self, state: DecoderState, stream: StreamState) -> None:
        """Let the decoder look at what the stream holds. Tokens so far are kept."""


def pass_size(manifest: Manifest, n_tokens: int, room: int) -> int:
    """Tokens in the signature for the next pass: the smallest that takes all, and no more than there is room for.

    A pass writes that many rows of state, so the padded ones must fit as well.
    """
    fitting = [size for size in manifest.decode_tokens if size <= room]
    if not fitting:
        raise ValueError("the decoder's context is full")
    return min((size for size in fitting if size >= n_tokens), default=max(fitting))


class _Passes:
    """What both runtimes share: `decode` in passes of the sizes that the bundle has, and a stream's bookkeeping."""

    manifest: Manifest

    def new_stream(self, spec: StreamSpec) -> StreamState:
        """See `Engine`."""
        return StreamState(self.manifest.dims, spec, self.manifest.cross_frames[0])

    def listen(self, stream: StreamState, mel: Float32, n_frames: int) -> None:
        """See `Engine`."""
        end = stream.committed + n_frames + stream.spec.padding
        if end > stream.n_cross:
            stream.grow(next(n for n in self.manifest.cross_frames if n >= end))
        mask = stream_mask(stream.spec, stream.committed, n_frames)
        stream.take_in(self._run_stream(stream, mel, mask), n_frames)

    def _run_stream(self, stream: StreamState, mel: Float32, mask: Float32) -> dict[str, Float32]:
        raise NotImplementedError

    def decode(self, state: DecoderState, tokens: Sequence[int]) -> Float32:
        """See `Engine`."""
        rows, attention, dims = [], [], self.manifest.dims
        while tokens:
            size = pass_size(self.manifest, len(tokens), dims.n_text_ctx - state.position)
            now, tokens = tokens[:size], tokens[size:]
            padded = np.full((1, size), self.manifest.vocabulary.eot, np.int32)
            padded[0, : len(now)] = now
            logits, weights = self._run_pass(state, padded)
            rows.append(logits[: len(now)])
            attention.append(weights[: len(now)])
            state.position += len(now)
        state.looks = Looks.of(np.concatenate(attention), state.n_frames)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    def _run_pass(self, state: DecoderState, tokens: np.ndarray[Any, Any]) -> tuple[Float32, Float32]:
        """Logits (n_tokens, n_vocab) and attention to the audio (n_tokens, n_cross)."""
        raise NotImplementedError


class LiteRtEngine(_Passes):
    """On `ai_edge_litert.CompiledModel`."""

    def __init__(self, bundle: Bundle, threads: int, cache_dir: Path) -> None:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import CpuOptions, Options

        self.manifest = bundle.manifest
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(weight_cache(bundle, cache_dir)))
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        try:
            self._model = CompiledModel.from_file(str(bundle.path), options=options)
        except RuntimeError as error:
            raise BundleError(f"{bundle.path}: the runtime refuses it: {error}") from None
        self._shapes = {(graph.name, out.name): out.shape for graph in self.manifest.graphs for out in graph.outputs}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._outputs: dict[str, dict[str, Any]] = {}

    def new_state(self) -> DecoderState:
        """See `Engine`."""
        names = kv_names("self", self.manifest.dims.n_text_layer)
        signature = self._decode_name(self.manifest.decode_tokens[0], self.manifest.cross_frames[0])
        first, second = ({name: self._zeros(signature, name) for name in names} for _ in range(2))
        return DecoderState({}, (first, second))

    def _zeros(self, signature: str, name: str) -> Any:
        """A buffer of state. Cleared, since a masked score hides everything but what is not a number."""
        buffer = self._model.create_output_buffer_by_name(signature, name)
        buffer.write(np.zeros(self._shapes[signature, name], np.float32))
        return buffer

    def encode(self, state: DecoderState, mel: Float32) -> None:
        """See `Engine`."""
        n_frames = mel.shape[1] // 2
        n_cross = next(n for n in self.manifest.cross_frames if n >= n_frames)
        name = f"encode_{n_frames}"
        inputs = self._input_buffers(name, ["mel", "offset"])
        inputs["mel"].write(mel)
        inputs["offset"].write(np.zeros(1, np.float32))
        self._model.run_by_name(name, inputs, self._cross_buffers(state, n_cross))
        self._mask_cross(n_frames, n_cross)
        state.n_cross, state.n_frames, state.position = n_cross, n_frames, 0

    def _mask_cross(self, n_frames: int, n_cross: int) -> None:
        for size in self.manifest.decode_tokens:
            mask = self._input_buffers(self._decode_name(size, n_cross), _DECODE_INPUTS)["cross_mask"]
            mask.write(cross_mask(n_frames, n_cross))

    def attend(self, state: DecoderState, stream: StreamState) -> None:
        """See `Engine`."""
        for name, buffer in self._cross_buffers(state, stream.n_cross).items():
            buffer.write(stream.cross[name])
        self._mask_cross(stream.n_frames + stream.spec.padding, stream.n_cross)
        state.n_cross, state.n_frames = stream.n_cross, stream.n_frames

    def _run_stream(self, stream: StreamState, mel: Float32, mask: Float32) -> dict[str, Float32]:
        name, dims = stream.spec.name, self.manifest.dims
        inputs = self._input_buffers(name, ["mel", "offset", "mask", *stream.past])
        written = {"mel": mel, "offset": np.array([stream.committed], np.float32), "mask": mask, **stream.past}
        for key, value in written.items():
            inputs[key].write(value)
        names = [*kv_names("cross", dims.n_text_layer), *kv_names("new", dims.n_audio_layer)]
        outputs = self._output_buffers(name, names)
        self._model.run_by_name(name, inputs, outputs)
        return {key: self._read(name, key, buffer) for key, buffer in outputs.items()}

    def _read(self, signature: str, name: str, buffer: Any) -> Float32:
        shape = self._shapes[signature, name]
        values: Float32 = buffer.read(math.prod(shape), np.float32).reshape(shape)
        return values

    def _run_pass(self, state: DecoderState, tokens: np.ndarray[Any, Any]) -> tuple[Float32, Float32]:
        size, dims = tokens.shape[1], self.manifest.dims
        name = self._decode_name(size, state.n_cross)
        own = self._input_buffers(name, _DECODE_INPUTS)
        own["tokens"].write(tokens)
        own["position"].write(np.array([state.position], np.int32))
        own["self_mask"].write(self_mask(size, state.position, dims.n_text_ctx))
        read, write = state.self_kv
        outputs = self._output_buffers(name, ["logits", "attention"])
        inputs = {**own, **read, **state.cross[state.n_cross]}
        self._model.run_by_name(name, inputs, {**outputs, **write})
        state.self_kv = (write, read)
        logits, attention = (self._read(name, key, buffer)[0] for key, buffer in outputs.items())
        return logits, attention

    def _cross_buffers(self, state: DecoderState, n_cross: int) -> dict[str, Any]:
        """Buffers of one cross length. Those of the longest take 37 MB: they and all others take turns."""
        if n_cross not in state.cross:
            if max([n_cross, *state.cross]) == self.manifest.cross_frames[-1]:
                state.cross.clear()
            signature = self._decode_name(self.manifest.decode_tokens[0], n_cross)
            names = kv_names("cross", self.manifest.dims.n_text_layer)
            state.cross[n_cross] = {n: self._model.create_input_buffer_by_name(signature, n) for n in names}
        return state.cross[n_cross]

    def _input_buffers(self, signature: str, names: Sequence[str]) -> dict[str, Any]:
        if signature not in self._inputs:
            make = self._model.create_input_buffer_by_name
            self._inputs[signature] = {name: make(signature, name) for name in names}
        return self._inputs[signature]

    def _output_buffers(self, signature: str, names: Sequence[str]) -> dict[str, Any]:
        if signature not in self._outputs:
            make = self._model.create_output_buffer_by_name
            self._outputs[signature] = {name: make(signature, name) for name in names}
        return self._outputs[signature]

    @staticmethod
    def _decode_name(n_tokens: int, n_cross: int) -> str:
        return f"decode_{n_tokens}_{n_cross}"


_DECODE_INPUTS = ("tokens", "position", "self_mask", "cross_mask")


class InterpreterEngine(_Passes):
    """On a TensorFlow Lite `Interpreter`, whichever package has it. Copies state at every pass."""

    def __init__(self, bundle: Bundle, threads: int, interpreter_class: Any) -> None:
        self.manifest = bundle.manifest
        try:
            interpreter = interpreter_class(model_path=str(bundle.path), num_threads=threads)
        except (RuntimeError, ValueError) as error:
            raise BundleError(f"{bundle.path}: the runtime refuses it: {error}") from None
        self._runners = {graph.name: interpreter.get_signature_runner(graph.name) for graph in self.manifest.graphs}

    def new_state(self) -> DecoderState:
        """See `Engine`."""
        specs = next(graph for graph in self.manifest.graphs if graph.name.startswith("decode_")).inputs
        empty = {s.name: np.zeros(s.shape, np.float32) for s in specs if s.name.startswith("self_k_")}
        empty |= {s.name: np.zeros(s.shape, np.float32) for s in specs if s.name.startswith("self_v_")}
        return DecoderState({}, (empty, empty))

    def encode(self, state: DecoderState, mel: Float32) -> None:
        """See `Engine`."""
        n_frames = mel.shape[1] // 2
        state.n_cross = next(n for n in self.manifest.cross_frames if n >= n_frames)
        state.n_frames, state.position = n_frames, 0
        run = self._runners[f"encode_{n_frames}"]
        state.cross[state.n_cross] = run(mel=mel, offset=np.zeros(1, np.float32))
        state.cross[state.n_cross]["cross_mask"] = cross_mask(n_frames, state.n_cross)

    def attend(self, state: DecoderState, stream: StreamState) -> None:
        """See `Engine`."""
        mask = cross_mask(stream.n_frames + stream.spec.padding, stream.n_cross)
        state.n_cross, state.n_frames = stream.n_cross, stream.n_frames
        state.cross[state.n_cross] = {**stream.cross, "cross_mask": mask}

    def _run_stream(self, stream: StreamState, mel: Float32, mask: Float32) -> dict[str, Float32]:
        offset = np.array([stream.committed], np.float32)
        outputs: dict[str, Float32] = self._runners[stream.spec.name](mel=mel, offset=offset, mask=mask, **stream.past)
        return outputs

    def _run_pass(self, state: DecoderState, tokens: np.ndarray[Any, Any]) -> tuple[Float32, Float32]:
        size = tokens.shape[1]
        outputs = self._runners[f"decode_{size}_{state.n_cross}"](
            tokens=tokens,
            position=np.array([state.position], np.int32),
            self_mask=self_mask(size, state.position, self.manifest.dims.n_text_ctx),
            **state.self_kv[0],
            **state.cross[state.n_cross],
        )
        logits, attention = outputs.pop("logits")[0], outputs.pop("attention")[0]
        state.self_kv = (outputs, outputs)
        return logits, attention


def load_engine(bundle: Bundle, threads: int, cache_dir: Path) -> Engine:
    """The best engine that this machine has a runtime for."""
    try:
        return LiteRtEngine(bundle, threads, cache_dir)
    except ModuleNotFoundError:
        pass
    try:
        from tflite_runtime.interpreter import Interpreter
    except ModuleNotFoundError:
        raise BundleError(
            f"{bundle.path}: no runtime to run it on: install ai-edge-litert, or tflite-runtime where that has no wheel"
        ) from None
    if bundle.manifest.litert_only:
        raise BundleError(
            f"{bundle.path}: has {bundle.manifest.litert_only}, which tflite-runtime cannot compute with: install "
            'ai-edge-litert, or take a bundle whose recipe says linear = "int8"'
        )
    return InterpreterEngine(bundle, threads, Interpreter)


def weight_cache(bundle: Bundle, cache_dir: Path) -> Path:
    """File for packed weights: mapped by every signature and at the next start. One a bundle and a runtime."""
    from importlib.metadata import version

    cache_dir.mkdir(parents=True, exist_ok=True)
    return cache_dir / f"{bundle.sha256[:16]}-{version('ai-edge-litert')}.xnnpack"
