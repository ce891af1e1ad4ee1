"""Graphs and metadata of any content: read, or one LoraDeployError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lora_deploy import entries as recorded
from lora_deploy.errors import LoraDeployError
from lora_deploy.graph_check import metadata_of, read_graph
from lora_deploy.manifest import Manifest
from tests.attacks.onnx.make import DATA, SLOT, WEIGHTS, honest, metadata
from tests.faults.tally import Tally
from tests.fuzz.mutated import mutated
from tests.fuzz.until import fuzz

_NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**24, 2**24 + 1, 2**31, 2**63, 10**12, 10**40, 0.5, 1e300])
)
_TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["lin", "../x", "a\\b", "fp32", "nf4", "expand", "0" * 64]))
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)
_PART = st.fixed_dictionaries(
    {"module": _TEXTS | st.just("lin"), "rows": st.lists(_NUMBERS, max_size=6) | st.just([0, 260])},
    optional={"in_order": st.booleans() | _VALUES},
)
_SLOT = st.fixed_dictionaries(
    {
        "name": _TEXTS,
        "inputs": _NUMBERS,
        "outputs": _NUMBERS | st.just(260),
        "parts": st.lists(_PART, max_size=3) | _VALUES,
    },
    optional={"int8_blocks": st.lists(_NUMBERS, max_size=3) | _VALUES},
)
_CODED = st.fixed_dictionaries(
    {
        "operator": st.sampled_from(["MatMulBnb4", "MatMulNBits", "expand", "GatherBlockQuantized", "x"]),
        "scheme": st.sampled_from(["nf4", "fp4", "int8", "int4", "x"]),
        "blocksize": _NUMBERS,
        "codes": _TEXTS,
        "scales": _TEXTS,
        "output": _TEXTS,
        "modules": st.lists(
            st.fixed_dictionaries({"name": _TEXTS, "shape": st.lists(_NUMBERS, min_size=2, max_size=2)}), max_size=3
        )
        | _VALUES,
    }
)
_JSON: dict[str, Any] = {
    "slots": st.lists(_SLOT | st.just(SLOT), max_size=3),
    "correction": st.lists(_SLOT, max_size=2),
    "coded": st.lists(_CODED, max_size=3),
    "pool": st.lists(_TEXTS, max_size=4),
    "adapters": st.dictionaries(_TEXTS, st.fixed_dictionaries({"sha256": _VALUES}) | _VALUES),
    "files": st.dictionaries(_TEXTS, _VALUES, max_size=3),
    "calibration": st.dictionaries(_TEXTS, _VALUES, max_size=3),
    "quantization": st.fixed_dictionaries(
        {}, optional={"method": _TEXTS, "blocksize": _NUMBERS, "skip_modules": _VALUES}
    ),
}
_WORDS = ("precision", "compute_dtype", "base_sha256", "branch", "task", "base_model")


@st.composite
def _metadata(draw: st.DrawFn) -> dict[str, str]:
    """The honest entries with some others."""
    found = metadata()
    for name in draw(st.lists(st.sampled_from([*_JSON, *_WORDS]), min_size=1, max_size=4, unique=True)):
        value = draw(_JSON[name] | _VALUES) if name in _JSON else draw(_TEXTS)
        text = draw(_TEXTS) if draw(st.integers(0, 9)) == 0 else value if name in _WORDS else json.dumps(value)
        found[f"lora_deploy.{name}"] = text
    return found


def _use(entries: dict[str, str]) -> None:
    """What the commands do with metadata before anything else is read."""
    manifest = Manifest.read(entries, "model.onnx")
    assert manifest.fingerprint >= 0
    assert manifest.entries()
    for slot in (*manifest.slots, *manifest.correction):
        assert len(slot.input_shapes("r")) == len(slot.input_names)
        assert sum(end.stop - end.start for name in slot.modules for end, _ in slot.places(name)) == slot.outputs
    assert all(min(weight.shape) > 0 for weight in manifest.coded)
    recorded.recorded_scheme(manifest.quantization, "model.onnx")


_READERS: tuple[Callable[[dict[str, str]], object], ...] = (
    _use,
    lambda entries: recorded.recorded_adapters(entries, "model.onnx"),
    lambda entries: recorded.recorded_files(entries, "model.onnx"),
    lambda entries: recorded.recorded_base(entries, "model.onnx"),
    lambda entries: recorded.recorded_calibration(entries, "model.onnx"),
)


def _counted(tally: Tally, kind: str, read: Callable[[], object]) -> bool:
    survived = kept = False
    try:
        read()
        survived = kept = True
    except LoraDeployError:
        survived = True
    finally:
        tally(kind, survived)
    return kept


def test_no_metadata_ends_in_another_error(tally: Tally) -> None:
    kept = 0

    def check(entries: dict[str, str]) -> None:
        nonlocal kept
        for read in _READERS:
            kept += _counted(tally, "fuzzed manifest", lambda read=read: read(entries))  # type: ignore[misc]

    assert fuzz(check, _metadata()) > 100
    assert kept


def test_no_graph_ends_in_another_error(tmp_path: Path, tally: Tally) -> None:
    """The bytes of a graph: what is read of it is texts, and weights that are within their file."""
    file = tmp_path / "model.onnx"
    (tmp_path / DATA).write_bytes(WEIGHTS)
    kept = 0

    def read() -> None:
        _use(metadata_of(read_graph(file), file))

    def check(content: bytes) -> None:
        nonlocal kept
        file.write_bytes(content)
        kept += _counted(tally, "fuzzed ONNX graph", read)

    assert fuzz(check, mutated(bytes(honest().SerializeToString()))) > 100
    assert kept
