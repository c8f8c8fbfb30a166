"""Per-channel int8 weights in a form that every runtime of the last years computes rightly.

TensorFlow Lite 2.14, the last `tflite_runtime`, reads one scale a tensor in its FULLY_CONNECTED and EMBEDDING_LOOKUP
kernels and silently yields zeros where there is one a channel. So the scales leave the weights:

    linear     x @ (s * W).T + b   becomes   (x @ W.T + b / s) * s, with W an int8 tensor of scale 1
    embedding  (s * W)[ids]        becomes   W[ids] * s[ids]

Exact but for float rounding, and no slower: measured on LiteRT, where a step of the decoder takes the same time.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray


def move_scales_out(model: Any, contents: list[bytes]) -> None:
    """Rewrite every linear and embedding lookup with per-channel int8 weights. `contents` are the buffers' bytes."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = schema.BuiltinOperator
    rewriter = _Rewriter(model, contents, schema)
    rewriters = {kinds.FULLY_CONNECTED: rewriter.linear, kinds.EMBEDDING_LOOKUP: rewriter.embedding}
    for graph in model.subgraphs:
        steps = [(op, rewriters.get(model.operatorCodes[op.opcodeIndex].builtinCode)) for op in graph.operators]
        weights = {int(op.inputs[1]) for op, rewrite in steps if rewrite}
        scales = {i: _take_scales(graph.tensors[i], schema) for i in weights if _is_rewritten(graph.tensors[i], schema)}
        graph.operators = []
        for operator, rewrite in steps:
            graph.operators.append(operator)
            if rewrite and int(operator.inputs[1]) in scales:
                graph.operators += rewrite(graph, operator, scales[int(operator.inputs[1])])


def _is_rewritten(weights: Any, schema: Any) -> bool:
    """Whether there is one scale a channel. Those of four bits stay as they are: the old runtime cannot read them."""
    q = weights.quantization
    return q is not None and q.scale is not None and len(q.scale) > 1 and weights.type != schema.TensorType.INT4


def _take_scales(weights: Any, schema: Any) -> NDArray[np.float32]:
    """Leave the tensor with scale 1; returns the scales that it had. shape = (n_out,)"""
    scales = np.asarray(weights.quantization.scale, np.float32)
    weights.quantization = schema.QuantizationParametersT()
    weights.quantization.scale = np.ones(1, np.float32)
    weights.quantization.zeroPoint = np.zeros(1, np.int64)
    return scales


class _Rewriter:
    """Makes the operators that follow a rewritten one."""

    def __init__(self, model: Any, contents: list[bytes], schema: Any) -> None:
        self.model, self.contents, self.schema = model, contents, schema
        self.mul = self._operator_code(schema.BuiltinOperator.MUL)

    def linear(self, graph: Any, operator: Any, scales: NDArray[np.float32]) -> list[Any]:
        """Scale what the linear puts out."""
        if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
            bias = graph.tensors[int(operator.inputs[2])]
            divided = np.frombuffer(self.contents[bias.buffer], np.float32) / scales
            operator.inputs = np.array([*operator.inputs[:2], self._constant(graph, divided)], np.int32)
        raw, scaled = self._intercept(graph, operator)
        return [self._multiply([raw, self._constant(graph, scales)], scaled)]

    def embedding(self, graph: Any, operator: Any, scales: NDArray[np.float32]) -> list[Any]:
        """Look the scales up as well, and multiply."""
        raw, scaled = self._intercept(graph, operator)
        lookup = copy.copy(operator)
        shape = [*graph.tensors[raw].shape[:-1], 1]
        found = self._add(graph, self._float_tensor(shape, buffer=0))
        lookup.inputs = np.array([operator.inputs[0], self._constant(graph, scales[:, None])], np.int32)
        lookup.outputs = np.array([found], np.int32)
        return [lookup, self._multiply([raw, found], scaled)]

    def _intercept(self, graph: Any, operator: Any) -> tuple[int, int]:
        """Give the operator a tensor of its own to write to; returns that one and the one it wrote to before."""
        scaled = int(operator.outputs[0])
        raw = self._add(graph, copy.copy(graph.tensors[scaled]))
        operator.outputs = np.array([raw], np.int32)
        return raw, scaled

    def _multiply(self, inputs: list[int], output: int) -> Any:
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self.mul
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        operator.builtinOptionsType = self.schema.BuiltinOptions.MulOptions
        operator.builtinOptions = self.schema.MulOptionsT()
        return operator

    def _constant(self, graph: Any, values: NDArray[np.float32]) -> int:
        """Index of a new constant; equal ones become one when the file is compacted."""
        self.model.buffers.append(self.schema.BufferT())
        self.contents.append(values.tobytes())
        return self._add(graph, self._float_tensor(list(values.shape), buffer=len(self.contents) - 1))

    def _float_tensor(self, shape: list[int], buffer: int) -> Any:
        tensor = self.schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = np.array(shape, np.int32), self.schema.TensorType.FLOAT32, buffer
        return tensor

    @staticmethod
    def _add(graph: Any, tensor: Any) -> int:
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def _operator_code(self, builtin: int) -> int:
        """Index of an operator that the model uses already: LayerNorm multiplies."""
        codes = [code.builtinCode for code in self.model.operatorCodes]
        return codes.index(builtin)
