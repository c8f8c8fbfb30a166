"""Bytes that are nearly right: seeds with a few edits, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

MAX_EDITS = 8
TOKENS = [b"\0", b"\xff" * 4, b"[", b"{", b'"', b"=", b"]]", b"9" * 20, b"-1", b"nan", b"1e999", b"PK\x01\x02", b"\n"]

edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "cut", "repeat"]),
        st.floats(0, 1),  # where, as a part of the whole
        st.integers(1, 64),  # bytes
        st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=8),
    ),
    max_size=MAX_EDITS,
)


def edited(data: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    """The seed after its edits."""
    for verb, where, size, piece in changes:
        at = int(where * len(data))
        if verb == "insert":
            data = data[:at] + piece + data[at:]
        elif verb == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif verb == "cut":
            data = data[:at] + data[at + size :]
        else:
            data = data[: at + size] + data[at : at + size] * size + data[at + size :]
    return data


def near(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with some edits, or something else altogether."""
    return st.builds(edited, st.sampled_from(seeds), edits) | st.binary(max_size=200)
