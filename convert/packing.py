"""Puts matrices of four bits in place of eight-bit ones in a .tflite, two codes a byte.

The quantiser has made every matrix int8 before. Which tensor is which matrix is found by its values, since tensors'
names do not survive conversion: each must be what int8 makes of a known float matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from whisperlet.errors import ModelError

from .int4 import Packed

HALF_STEP = 0.502  # of an int8 scale: what rounding may move a weight, and float arithmetic besides


def pack_in(
    model: Any, contents: list[bytes], weights: Mapping[str, Tensor], chosen: Mapping[str, Packed]
) -> dict[str, int]:
    """Replace the `chosen` matrices of a model; how many tensors each of them was, by name.

    `contents` are the buffers' bytes, `weights` the float matrices. Raises ModelError if one is not there.
    """
    packer = _Packer(model, contents)
    found = dict.fromkeys(chosen, 0)
    for graph, tensor in _matrices(model):
        name = _name(tensor, contents[tensor.buffer], {name: weights[name] for name in chosen}, packer.known)
        if name:
            found[name] += 1
            packer.replace(graph, tensor, name, chosen[name])
    if lacking := [name for name, n in found.items() if not n]:
        raise ModelError(f"matrices that are to have four bits are not in the graphs: {', '.join(lacking)}")
    return found


def _matrices(model: Any) -> Iterator[tuple[Any, Any]]:
    """Weights of linears and lookups with one scale a channel, with their graphs; each tensor once."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = {schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.EMBEDDING_LOOKUP}
    for graph in model.subgraphs:
        operators = [op for op in graph.operators if model.operatorCodes[op.opcodeIndex].builtinCode in kinds]
        for index in sorted({int(op.inputs[1]) for op in operators}):
            tensor = graph.tensors[index]
            if tensor.type == schema.TensorType.INT8 and tensor.quantization.scale is not None:
                yield graph, tensor


def _name(tensor: Any, content: bytes, weights: Mapping[str, Tensor], known: dict[int, str | None]) -> str | None:
    """Which matrix a tensor is, None if none of them. `known` remembers it by buffer."""
    if tensor.buffer not in known:
        shape = tuple(int(n) for n in tensor.shape)
        codes = np.frombuffer(content, np.int8).reshape(shape)
        scales = np.asarray(tensor.quantization.scale, np.float32).reshape(-1, 1)
        like = ((name, weight.numpy()) for name, weight in weights.items() if tuple(weight.shape) == shape)
        known[tensor.buffer] = next((name for name, weight in like if _is_rounded(weight, codes, scales)), None)
    return known[tensor.buffer]


def _is_rounded(weight: NDArray[np.float32], codes: NDArray[np.int8], scales: NDArray[np.float32]) -> bool:
    """Whether these codes are a matrix to the nearest step; the first row tells nearly always."""
    return all(
        bool((np.abs(codes[rows] * scales[rows] - weight[rows]) <= HALF_STEP * scales[rows]).all())
        for rows in (slice(1), slice(None))
    )


def two_a_byte(codes: NDArray[np.int8]) -> bytes:
    """Codes of four bits, the first of each pair in the lower half."""
    flat = codes.reshape(-1).view(np.uint8) & 0xF
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (flat[0::2] | flat[1::2] << 4).tobytes()


class _Packer:
    """Writes codes and scales, each matrix's once."""

    def __init__(self, model: Any, contents: list[bytes]) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.model, self.contents, self.schema = model, contents, schema
        self.known: dict[int, str | None] = {}
        self._buffers: dict[str, tuple[int, int]] = {}  # of codes and scales, by matrix

    def replace(self, graph: Any, tensor: Any, name: str, packed: Packed) -> None:
        """Let a tensor be the packed matrix."""
        if name not in self._buffers:
            scales = packed.scales.numpy().astype(np.float16 if packed.block else np.float32)
            self._buffers[name] = self._add(two_a_byte(packed.codes.numpy())), self._add(scales.tobytes())
        tensor.buffer, scales_buffer = self._buffers[name]
        tensor.type = self.schema.TensorType.INT4
        tensor.quantization = (
            self._per_block(graph, packed, scales_buffer) if packed.block else self._per_channel(packed)
        )

    def _add(self, content: bytes) -> int:
        self.model.buffers.append(self.schema.BufferT())
        self.contents.append(content)
        return len(self.contents) - 1

    def _per_channel(self, packed: Packed) -> Any:
        quantisation = self.schema.QuantizationParametersT()
        quantisation.scale = packed.scales.numpy().reshape(-1)
        quantisation.zeroPoint = np.zeros(len(quantisation.scale), np.int64)
        return quantisation

    def _per_block(self, graph: Any, packed: Packed, buffer: int) -> Any:
        """The scales are a tensor of the same graph."""
        scales = self.schema.TensorT()
        scales.shape, scales.buffer = np.array(packed.scales.shape, np.int32), buffer
        scales.type = self.schema.TensorType.FLOAT16
        graph.tensors.append(scales)
        details = self.schema.BlockwiseQuantizationT()
        details.scales, details.zeroPoints, details.blockSize = len(graph.tensors) - 1, -1, packed.block
        quantisation = self.schema.QuantizationParametersT()
        quantisation.detailsType, quantisation.details = self.schema.QuantizationDetails.BlockwiseQuantization, details
        return quantisation
