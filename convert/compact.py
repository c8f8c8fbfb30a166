"""Stores everything in a .tflite once: equal buffers, equal quantisation vectors, and no names but the signatures'.

The quantiser writes each signature's scales and zero points again (0.9 MB a decoder signature: the embedding alone has
51,865 of each), and tensors carry names that only a debugger reads. Written anew with the weights outside the
flatbuffer, reached by offset, each aligned as the runtime wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .portable import move_scales_out

ALIGNMENT = 64  # bytes, what the runtime asks of host memory
IDENTIFIER = b"TFL3"


class _Once:
    """An object of the flatbuffer that is packed the first time and referred to after that."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.offset = inner, None

    def Pack(self, builder: Any) -> Any:  # noqa: N802 - called by the generated code
        if self.offset is None:
            self.offset = self.inner.Pack(builder)
        return self.offset


def compact(
    sources: Sequence[Path], target: Path, change: Callable[[Any, list[bytes]], object] = lambda _model, _contents: None
) -> None:
    """Rewrite the signatures of several .tflite files as one.

    `change` may rewrite the merged model before scales leave the weights; it is given its objects and the buffers' bytes.
    """
    models, contents = zip(*(_read(path) for path in sources), strict=True)
    model, content = models[0], contents[0]
    for other, its_content in zip(models[1:], contents[1:], strict=True):
        _append(model, other)
        content += its_content
    change(model, content)
    move_scales_out(model, content)
    _share_buffers(model, content)
    _share_quantisation(model)
    _drop_names(model)
    used = {i: data for i, data in enumerate(content) if data}
    for i, data in used.items():
        model.buffers[i].data, model.buffers[i].offset, model.buffers[i].size = None, 1, len(data)
    target.write_bytes(b"".join(_laid_out(_packed(model), used)))


def _read(path: Path) -> tuple[Any, list[bytes]]:
    """A model as objects, and the bytes of its buffers."""
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    return model, [_content(buffer, data) for buffer in model.buffers]


def _append(model: Any, other: Any) -> None:
    """Add the subgraphs of another model; what they refer to by index comes after what is there."""
    for tensor in _tensors(other):
        tensor.buffer += len(model.buffers)
    for graph in other.subgraphs:
        for operator in graph.operators:
            operator.opcodeIndex += len(model.operatorCodes)
    for signature in other.signatureDefs:
        signature.subgraphIndex += len(model.subgraphs)
    for name in ("buffers", "operatorCodes", "subgraphs", "signatureDefs"):
        getattr(model, name).extend(getattr(other, name))


def _content(buffer: Any, data: bytes) -> bytes:
    """Bytes of a buffer, wherever the file keeps them."""
    if buffer.offset:
        return data[buffer.offset : buffer.offset + buffer.size]
    return b"" if buffer.data is None else bytes(np.asarray(buffer.data, np.uint8))


def _share_buffers(model: Any, contents: list[bytes]) -> None:
    """Let every tensor refer to the first of equal buffers; those that none refers to are emptied."""
    first: dict[bytes, int] = {}
    same = [first.setdefault(content, i) if content else i for i, content in enumerate(contents)]
    for tensor in _tensors(model):
        tensor.buffer = same[tensor.buffer]
    for i in set(range(len(contents))) - {tensor.buffer for tensor in _tensors(model)}:
        contents[i] = b""
        model.buffers[i].data, model.buffers[i].offset, model.buffers[i].size = None, 0, 0


def _share_quantisation(model: Any) -> None:
    """Let equal quantisation parameters be one object, and equal vectors in different ones too."""
    first: dict[bytes, _Once] = {}
    for tensor in _tensors(model):
        q = tensor.quantization
        if q is None or q.details is not None:  # blocks: their scales are a tensor of one graph
            continue
        vectors = [np.asarray([] if v is None else v) for v in (q.scale, q.zeroPoint)]
        key = repr(q.quantizedDimension).encode() + b"|".join(v.tobytes() for v in vectors)
        tensor.quantization = first.setdefault(key, _Once(q))


def _drop_names(model: Any) -> None:
    """Signatures refer to tensors by index; the names inside the graphs serve nobody on a device."""
    for tensor in _tensors(model):
        tensor.name = None
    model.description = None
    model.metadata, model.metadataBuffer = [], []


def _tensors(model: Any) -> Iterator[Any]:
    for graph in model.subgraphs:
        yield from graph.tensors


def _packed(model: Any) -> bytearray:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytearray(builder.Output())


def _laid_out(head: bytearray, contents: dict[int, bytes]) -> Iterator[bytes]:
    """The flatbuffer with the offsets filled in, then the buffers."""
    parts: list[bytes] = []
    end = len(head)
    for i, content in contents.items():
        padding = -end % ALIGNMENT
        _set_offset(head, i, end + padding)
        parts += [bytes(padding), content]
        end += padding + len(content)
    yield bytes(head)
    yield from parts


def _set_offset(head: bytearray, index: int, offset: int) -> None:
    """Overwrite the placeholder that stands for a buffer's place in the file."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    table = schema.Model.GetRootAs(head, 0).Buffers(index)._tab  # noqa: SLF001 - there is no other way to patch in place
    field = table.Pos + table.Offset(6)  # Buffer.offset is the table's second field
    flatbuffers.encode.Write(flatbuffers.packer.uint64, head, field, offset)
