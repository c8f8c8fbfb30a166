"""How far a decoded token is from what memory allows: bytes it has to move, and how fast this machine moves bytes."""

from __future__ import annotations

import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from agent.config import default_cache_dir
from agent.engine import load_engine
from agent.quiet import quiet_stderr
from whisperlet.bundle import Dims, GraphSpec, Manifest, TensorSpec, open_bundle

COPIED_BYTES = 512 * 2**20
N_COPIES = 5
N_WARM = 10
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "int32": 4}


class Token(msgspec.Struct, frozen=True):
    """One token at a time through the agent's engine."""

    token_ms: float  # wall, median
    core_ms: float  # processor time, mean
    n_cross: int  # encoder frames that the decoder looks at, masked ones included
    n_tokens: int


class Traffic(msgspec.Struct, frozen=True):
    """Bytes that a token moves through a decoder's signature."""

    weights: int
    state_read: int
    state_written: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.state_read + self.state_written


def decoder_weight_bytes(dims: Dims) -> int:
    """int8 weights that a token reads, and their float32 scales.

    A layer has four square matrices of self-attention, two of cross-attention (its keys and values are computed once
    an utterance) and two of four times the width: 4 + 2 + 8 = 14 d_model^2, with 4 + 2 + 5 = 11 d_model output
    channels. The vocabulary is read once, as the last projection: n_vocab * d_model.
    """
    weights = dims.n_text_layer * 14 * dims.d_model**2 + dims.n_vocab * dims.d_model
    scales = dims.n_text_layer * 11 * dims.d_model + dims.n_vocab
    return weights + 4 * scales


def traffic(manifest: Manifest, n_cross: int) -> Traffic:
    """What `decode_1_<n_cross>` moves: every weight, the keys and values that it takes in, and those that it gives."""
    graph = next(graph for graph in manifest.graphs if graph.name == f"decode_1_{n_cross}")
    return Traffic(decoder_weight_bytes(manifest.dims), *state_bytes(graph))


def state_bytes(graph: GraphSpec) -> tuple[int, int]:
    """Bytes of keys and values that a signature takes in and gives."""

    def total(tensors: list[TensorSpec]) -> int:
        kept = [t for t in tensors if t.name.startswith(("self_k_", "self_v_", "cross_k_", "cross_v_"))]
        return sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in kept)

    return total(graph.inputs), total(graph.outputs)


def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read and written ones counted, of copying 512 MiB; the best of five."""
    source, target = np.ones(COPIED_BYTES, np.uint8), np.zeros(COPIED_BYTES, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    best_s = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(N_COPIES):
            began_s = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * COPIED_BYTES / best_s


def time_token(bundle: Path, threads: int, n_tokens: int) -> Token:
    """Decode a token after the prompt again and again, each time from the same position."""
    engine = load_engine(open_bundle(bundle), threads, default_cache_dir())
    manifest, state = engine.manifest, engine.new_state()
    n_cross = manifest.cross_frames[0]
    n_frames = max(n for n in manifest.encode_frames if n <= n_cross)
    engine.encode(state, np.zeros((1, 2 * n_frames, manifest.dims.n_mels), np.float32))
    engine.decode(state, [manifest.vocabulary.sot, manifest.vocabulary.no_timestamps])
    position, times_ms, core_s = state.position, [], 0.0
    for i in range(N_WARM + n_tokens):
        state.position = position
        began_s, began_core_s = time.perf_counter(), time.process_time()
        engine.decode(state, [manifest.vocabulary.no_speech])
        if i >= N_WARM:
            times_ms.append(1e3 * (time.perf_counter() - began_s))
            core_s += time.process_time() - began_core_s
    return Token(float(np.median(times_ms)), 1e3 * core_s / n_tokens, n_cross, n_tokens)


def main() -> None:
    """`python -m tests.benchmarks.floor BUNDLE THREADS N`: print what `time_token` finds, as JSON."""
    bundle, threads, n_tokens = sys.argv[1:]
    with quiet_stderr():
        token = time_token(Path(bundle), int(threads), int(n_tokens))
    print(msgspec.json.encode(token).decode(), flush=True)
    os._exit(0)  # the runtime would announce its own end on standard error


if __name__ == "__main__":
    main()
