"""Whether the codes in a graph are the training base's own, byte for byte, and give its values, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from pydantic import BaseModel

from lora_deploy.errors import ParityError
from lora_deploy.export.coded import decode, encode
from lora_deploy.manifest import CodedWeight, Manifest, StoredModule
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors

__all__ = ["CodesResult", "check_codes"]


class CodesResult(BaseModel):
    """What was compared.

    Attributes:
        layers: How many layers' weights are kept as codes.
        bytes: Size of codes and scales.
        exact: Whether the codes are the base's own; if not, they are its values transcoded to 8 bits.
        scales: Type of the scales; any other than float32 is rounded to what the graph computes in.
    """

    layers: int
    bytes: int
    exact: bool
    scales: str = "float32"


def check_codes(directory: Path, base: TrainingBase) -> CodesResult | None:
    """Compare the codes of an export with those of its training base.

    For each layer: the base's quantized weight has the hash that the export recorded; the initializers hold the same
    bytes; and what they stand for is what the base dequantizes to, exactly, where the scales are float32.

    Args:
        directory: The export.
        base: The training base.

    Returns:
        What was compared; None for an export without codes.

    Raises:
        ParityError: A layer differs.
    """
    file = directory / "model.onnx"
    model = ir.load(file)
    manifest = Manifest.read(model.metadata_props, file)
    layers = size = 0
    dtype = torch.float32
    for weight in manifest.coded:
        codes, scales = (_flat(model, name) for name in (weight.codes, weight.scales))
        size += codes.nbytes + scales.nbytes
        dtype = scales.dtype
        for module in weight.modules:
            taken = _check_module(file, base, weight, module, codes, scales)
            codes, scales = codes[taken[0] :], scales[taken[1] :]
            layers += 1
    if not manifest.coded:
        return None
    exact = all(weight.exact for weight in manifest.coded)
    return CodesResult(layers=layers, bytes=size, exact=exact, scales=str(dtype).removeprefix("torch."))


def _flat(model: ir.Model, name: str) -> torch.Tensor:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    array = tensor.numpy().reshape(-1)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _check_module(
    file: Path,
    base: TrainingBase,
    weight: CodedWeight,
    module: StoredModule,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[int, int]:
    """Compare one layer with the beginning of what is left; returns how much of it was the layer's."""
    stored = base.weight(module.name)
    sha256 = hash_tensors(iter([(module.name, list(stored.stored()))]))
    if sha256 != module.sha256:
        raise _differs(file, module, "the base's quantized weight", f"sha256 {sha256[:16]}…", f"{module.sha256[:16]}…")
    expected_codes, expected_scales = encode(stored, weight)
    found_codes, found_scales = codes[: expected_codes.numel()], scales[: expected_scales.numel()]
    if not torch.equal(found_codes, expected_codes):
        count = int((found_codes != expected_codes).sum())
        raise _differs(file, module, "the codes", f"{count} other bytes", f"{expected_codes.numel()} bytes")
    if not torch.equal(found_scales, expected_scales.to(found_scales.dtype)):
        count = int((found_scales != expected_scales.to(found_scales.dtype)).sum())
        raise _differs(file, module, "the scales", f"{count} other values", f"{expected_scales.numel()} values")
    if weight.exact and found_scales.dtype == torch.float32:
        values = decode(found_codes, found_scales, weight, module.shape)
        if not torch.equal(values, stored.dequantize()):
            raise _differs(file, module, "the dequantized values", "other values", "the base's, bit for bit")
    return expected_codes.numel(), expected_scales.numel()


def _differs(file: Path, module: StoredModule, what: str, found: str, expected: str) -> ParityError:
    return ParityError(
        f"{what} of a layer in the export are not those of the training base",
        file=file,
        tensor=module.name,
        found=found,
        expected=expected,
        remedy="export again; if it was made on another machine, verify it there",
    )
