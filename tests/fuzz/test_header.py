"""Headers of any kind: refused with our own error, or accepted by the library too."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lora_deploy.errors import CheckpointError
from lora_deploy.inputs.headers import BITS, read_header
from tests.faults.tally import Tally
from tests.fuzz.until import fuzz

_NUMBERS = st.one_of(
    st.integers(0, 16), st.sampled_from([-1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, True])
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F33", 1, None]),
        "shape": st.lists(_NUMBERS, max_size=4),
        "data_offsets": st.lists(_NUMBERS, min_size=1, max_size=3),
    }
)
_HEADERS = st.dictionaries(st.one_of(st.text(max_size=4), st.just("__metadata__")), _ENTRIES, max_size=3)


@st.composite
def _whole(draw: Any) -> tuple[dict[str, Any], int]:
    """A right header, tensors of any type one behind the other, and the size of its data."""
    end, header = 0, {}
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = [*draw(st.lists(st.integers(0, 4), max_size=3)), 8]
        size = BITS[dtype]
        for length in shape:
            size *= length
        header[f"{number}{draw(st.text(max_size=3))}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size // 8],
        }
        end += size // 8
    return header, end


@st.composite
def _files(draw: Any) -> bytes:
    """A right file or a nearly right one, with some bytes changed, added or cut off."""
    if draw(st.booleans()):
        header, size = draw(_whole())
    else:
        header, size = draw(_HEADERS), draw(st.integers(0, 32))
    raw = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    length = draw(st.one_of(st.just(len(raw)), st.integers(0, 2**64 - 1)))
    content = bytearray(struct.pack("<Q", length) + raw + bytes(size))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([0, 0, 0, 1, 9]))
    return bytes(content[: len(content) - cut]) + draw(st.sampled_from([b"", b"", b"\0", b"}"]))


def _theirs(file: Path) -> dict[str, tuple[int, ...]] | None:
    """What the library makes of a file; None where it refuses."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def test_what_is_accepted_the_library_accepts_and_reads_alike(tmp_path: Path, tally: Tally) -> None:
    file = tmp_path / "model.safetensors"
    accepted = 0

    def check(content: bytes) -> None:
        nonlocal accepted
        file.write_bytes(content)
        theirs = _theirs(file)
        try:
            ours = {name: entry.shape for name, entry in read_header(file, CheckpointError).items()}
        except CheckpointError:
            tally("fuzzed header", True)
            return
        accepted += 1
        tally("fuzzed header", ours == theirs)
        assert ours == theirs

    assert fuzz(check, _files()) > accepted > 0
