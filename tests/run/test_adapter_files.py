"""`.onnx_adapter` files that are missing, damaged, hostile, or made for another base, type or graph."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lora_deploy.errors import AdapterError
from lora_deploy.export.inspect import describe_adapter
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import Tensors, read_onnx_adapter, read_tensors
from lora_deploy.run.adapter_seal import seal_adapter
from tests.export.conftest import BranchExport, BranchFactory

SITE = "model/layers/1/self_attn/o_proj"
A, B = f"{SITE}/lora_A", f"{SITE}/lora_B"


@pytest.fixture
def hot_swap(branch_export: BranchFactory) -> BranchExport:
    return branch_export("llama", "nf4")


def _manifest(export: BranchExport) -> Manifest:
    return Manifest.load(export.output)


def _own(export: BranchExport) -> Path:
    return find_adapters(export.output)["own"]


def write(file: Path, tensors: Tensors, version: int) -> Path:
    """Write any tensors as onnxruntime writes them."""
    container = onnxruntime.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(version)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
    container.set_parameters(values)
    container.export_adapter(str(file))
    seal_adapter(file)
    return file


def test_a_file_that_is_not_there_is_named(hot_swap: BranchExport, tmp_path: Path) -> None:
    for file in (tmp_path / "none.onnx_adapter", tmp_path):
        with pytest.raises(AdapterError, match="no such adapter") as caught:
            read_onnx_adapter(file, _manifest(hot_swap))
        assert caught.value.details["file"] == str(file)
        assert "adapter convert" in caught.value.details["remedy"]


@pytest.mark.parametrize("content", [b"", b"\0", b"not an adapter", b"\xff" * 4096, b"{}"])
def test_what_is_no_adapter_is_named(content: bytes, hot_swap: BranchExport, tmp_path: Path) -> None:
    file = tmp_path / "a.onnx_adapter"
    file.write_bytes(content)
    for read in (lambda: read_onnx_adapter(file, _manifest(hot_swap)), lambda: describe_adapter(file)):
        with pytest.raises(AdapterError, match="cannot be read") as caught:
            read()
        assert caught.value.details["file"] == str(file)
        assert caught.value.details["found"]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_a_truncated_adapter_is_named(share: float, hot_swap: BranchExport, tmp_path: Path) -> None:
    content = _own(hot_swap).read_bytes()
    file = tmp_path / "a.onnx_adapter"
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AdapterError, match="cannot be read"):
        read_onnx_adapter(file, _manifest(hot_swap))


def test_no_flipped_bits_crash_the_process_or_escape_as_another_error(hot_swap: BranchExport, tmp_path: Path) -> None:
    """In a process of its own, for a flatbuffer of lies could take this one along."""
    program = """
import random, sys
from pathlib import Path
from lora_deploy.errors import LoraDeployError
from lora_deploy.export.inspect import describe_adapter
from lora_deploy.manifest import Manifest
from lora_deploy.run.adapter_files import read_onnx_adapter
source, file, export = map(Path, sys.argv[1:])
manifest, content, chance, refused = Manifest.load(export), source.read_bytes(), random.Random(0), 0
for number in range(500):
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        where = chance.choice([64, 6000, len(content)])  # the header, the tables, anywhere
        place = chance.randrange(min(where, len(content)))
        damaged[place if chance.random() < 0.7 else -1 - place] ^= 1 << chance.randrange(8)
    file.write_bytes(damaged)
    for read in (lambda: read_onnx_adapter(file, manifest), lambda: describe_adapter(file)):
        try:
            read()
        except LoraDeployError:
            refused += 1
print(refused)
"""
    arguments = [_own(hot_swap), tmp_path / "damaged.onnx_adapter", hot_swap.output]
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert 100 < int(ended.stdout) < 1000


def test_sizes_that_lie_are_not_believed(hot_swap: BranchExport, tmp_path: Path) -> None:
    """Both halves of an update agree on a rank whose values are not in the file."""
    content = bytearray(_own(hot_swap).read_bytes())
    for name, array in read_tensors(_own(hot_swap))[1].items():
        if name not in (A, B):
            continue
        sizes, lie = np.array(array.shape, np.int64), np.array(array.shape, np.int64)
        lie[1 if name == A else 0] = 1 << 20
        assert sizes.tobytes() in content
        content = content.replace(sizes.tobytes(), lie.tobytes())
    file = tmp_path / "a.onnx_adapter"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match="cannot be read"):
        read_onnx_adapter(file, _manifest(hot_swap))


def _lose(tensors: Tensors) -> None:
    del tensors[A], tensors[B]


def _swap(tensors: Tensors) -> None:
    tensors[A], tensors[B] = tensors[B], tensors[A]


def _set(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def _poison(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def poison(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[array.size // 2] = value
        return array

    return poison


# What is done to the tensors, and what the message must say.
DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a missing layer": (_lose, "lacks a layer"),
    "only A": (lambda t: t.pop(B), "only one half"),
    "only B": (lambda t: t.pop(A), "only one half"),
    "nothing at all": (lambda t: t.clear(), "lacks a layer"),
    "another layer": (lambda t: t.update({"model/layers/9/lora_A": t[A]}), "a layer that the graph does not have"),
    "A and B the other way round": (_swap, "does not fit its slot"),
    "A of another width": (_set(A, lambda a: a[:-1]), "does not fit its slot"),
    "B of another width": (_set(B, lambda b: b[:, :-1]), "does not fit its slot"),
    "ranks that differ": (_set(B, lambda b: b[:-1]), "does not fit its slot"),
    "A with one dimension": (_set(A, lambda a: a[:, 0]), "does not fit its slot"),
    "A with three dimensions": (_set(A, lambda a: a[None]), "does not fit its slot"),
    "another type": (_set(A, lambda a: a.astype(np.float16)), "does not fit its slot"),
    "float64": (_set(B, lambda b: b.astype(np.float64)), "does not fit its slot"),
    "integers": (_set(B, lambda b: b.astype(np.int32)), "does not fit its slot"),
    "NaN": (_set(A, _poison(float("nan"))), "NaN or infinity"),
    "infinity": (_set(B, _poison(float("inf"))), "NaN or infinity"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_by_name(damage: str, hot_swap: BranchExport, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    version, tensors = read_tensors(_own(hot_swap))
    change(tensors)
    file = write(tmp_path / "a.onnx_adapter", tensors, version)
    with pytest.raises(AdapterError, match=message) as caught:
        read_onnx_adapter(file, _manifest(hot_swap))
    assert caught.value.details["file"] == str(file)
    assert "model" in caught.value.details["tensor"]


def test_a_rank_of_zero_and_one_that_differs_from_slot_to_slot_are_fine(hot_swap: BranchExport, tmp_path: Path) -> None:
    version, tensors = read_tensors(_own(hot_swap))
    tensors[A], tensors[B] = tensors[A][:, :0].copy(), tensors[B][:0].copy()
    found = read_onnx_adapter(write(tmp_path / "a.onnx_adapter", tensors, version), _manifest(hot_swap))
    assert found.keys() == tensors.keys()
    assert found[A].shape[1] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"base": {"max_position_embeddings": 40, "attention_bias": False, "num_hidden_layers": 1}},
        {"compute_dtype": "fp16"},
        {"method": "fp4"},
        {"method": "int8"},
        {"method": "none"},
        {"double_quant": False},
    ],
    ids=str,
)
def test_an_adapter_for_another_base_type_or_quantization_is_refused(
    other: dict[str, object], hot_swap: BranchExport, branch_export: BranchFactory
) -> None:
    """Also where all shapes are the same: 4-bit and 8-bit bases of one checkpoint are different bases."""
    made = branch_export("llama", **({"method": "nf4"} | other))  # type: ignore[arg-type]
    for ours, theirs in ((hot_swap, made), (made, hot_swap)):
        with pytest.raises(AdapterError, match="another base or another graph") as caught:
            read_onnx_adapter(_own(ours), _manifest(theirs))
        assert str(_manifest(theirs).fingerprint) in caught.value.details["expected"]


def test_an_adapter_for_other_weights_of_the_same_shapes_is_refused(
    hot_swap: BranchExport, branch_export: BranchFactory
) -> None:
    other = branch_export("llama", "nf4", base={"max_position_embeddings": 40, "seed": 5})
    assert _manifest(other).slots == _manifest(hot_swap).slots
    with pytest.raises(AdapterError, match="another base"):
        read_onnx_adapter(_own(other), _manifest(hot_swap))


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "int8"}, {"expand": True}], ids=str)
def test_an_adapter_serves_every_export_of_its_base_that_computes_in_its_type(
    options: dict[str, object], hot_swap: BranchExport, branch_export: BranchFactory
) -> None:
    other = branch_export("llama", "nf4", **options)
    ours, theirs = (read_onnx_adapter(_own(export), _manifest(hot_swap)) for export in (hot_swap, other))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_random_files_are_no_adapters(hot_swap: BranchExport, tmp_path: Path) -> None:
    chance, file, manifest = random.Random(1), tmp_path / "a.onnx_adapter", _manifest(hot_swap)
    for _ in range(50):
        file.write_bytes(chance.randbytes(chance.randrange(500)))
        with pytest.raises(AdapterError, match="cannot be read"):
            read_onnx_adapter(file, manifest)


def test_only_whole_visible_files_are_found(tmp_path: Path) -> None:
    assert find_adapters(tmp_path) == {}
    (tmp_path / "adapters").mkdir()
    for name in ("b.onnx_adapter", "a.1.onnx_adapter", ".c.onnx_adapter.partial", ".d.onnx_adapter", "e.txt"):
        (tmp_path / "adapters" / name).touch()
    assert list(find_adapters(tmp_path)) == ["a.1", "b"]
