"""Bytes that were good once."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["mutated"]

_WORDS = [0, 1, 4, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def mutated(content: bytes) -> SearchStrategy[bytes]:
    """The content with some bytes changed, words put over others, pieces taken out or doubled, or its end missing."""
    place = st.integers(0, max(len(content) - 1, 0))
    changes = st.one_of(
        st.tuples(st.just("byte"), place, st.integers(0, 255)),
        st.tuples(st.just("word"), place, st.sampled_from(_WORDS)),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("double"), place, st.integers(1, 64)),
        st.tuples(st.just("end"), place, st.just(0)),
    )
    return st.lists(changes, min_size=1, max_size=6).map(lambda asked: _apply(content, asked))


def _apply(content: bytes, asked: list[tuple[str, int, int]]) -> bytes:
    found = bytearray(content)
    for kind, place, number in asked:
        if kind == "byte":
            found[place : place + 1] = bytes([number])
        elif kind == "word":
            width = 8 if number >= 1 << 32 else 4
            found[place : place + width] = number.to_bytes(width, "little")
        elif kind == "cut":
            del found[place : place + number]
        elif kind == "double":
            found[place:place] = found[place : place + number]
        else:
            del found[place:]
    return bytes(found)
