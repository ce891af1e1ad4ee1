"""`.onnx_adapter` files of any content: read, or one LoraDeployError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from lora_deploy.errors import LoraDeployError
from lora_deploy.export.inspect import describe_adapter
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import read_onnx_adapter
from tests.attacks.onnx.adapters import Parameter, build, honest
from tests.attacks.onnx.make import A, B, metadata
from tests.faults.tally import Tally
from tests.fuzz.mutated import mutated
from tests.fuzz.until import fuzz

_SIZES = st.one_of(st.integers(-2, 300), st.sampled_from([1 << 31, 1 << 32, 1 << 62, -(1 << 63), (1 << 63) - 1]))
_RAW = st.one_of(st.none(), st.binary(max_size=64), st.integers(0, 4200).map(bytes))
_NAMES = st.one_of(st.none(), st.sampled_from([A, B, f"{A}_codes", f"{A}_scales", "x/lora_A", "x/lora_B"]), st.text())
_ANY = st.builds(Parameter, _NAMES, st.none() | st.lists(_SIZES, max_size=5), st.integers(-2, 30), _RAW)


@st.composite
def _fitting(draw: st.DrawFn) -> Parameter:
    """A tensor whose bytes are those of its shape, whatever that is, so that what reads it later is reached."""
    shape = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(lambda sizes: np.prod(sizes) < 4000))
    data_type, width = draw(st.sampled_from([(1, 4), (2, 1), (3, 1), (6, 4), (7, 8), (10, 2), (11, 8), (16, 2)]))
    count = int(np.prod(shape)) * width
    return Parameter(draw(_NAMES), shape, data_type, bytes([draw(st.integers(0, 255))]) * count)


_FILES = st.one_of(
    mutated(build(honest())),
    st.builds(build, st.lists(st.one_of(_ANY, _fitting(), st.sampled_from(honest())), max_size=5)),
    st.lists(_fitting(), max_size=6).map(lambda more: build([*honest(), *more])),
    st.binary(max_size=200),
)


def test_no_file_ends_in_another_error(tmp_path: Path, tally: Tally) -> None:
    file, manifest = tmp_path / "a.onnx_adapter", Manifest.read(metadata(), "model.onnx")
    kept = 0

    def check(content: bytes) -> None:
        nonlocal kept
        file.write_bytes(content)
        for read in (lambda: read_onnx_adapter(file, manifest), lambda: describe_adapter(file)):
            survived = False
            try:
                read()
                kept += 1
                survived = True
            except LoraDeployError:
                survived = True
            finally:
                tally("fuzzed .onnx_adapter", survived)

    assert fuzz(check, _FILES) > 100
    assert kept  # else the fuzzing would not get past the door
