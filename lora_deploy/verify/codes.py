"""Whether the codes in a graph are the training base's own, byte for byte, and give its values, bit for bit.

And whether A and B that are stored as int8 are what the adapter gives when it is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from pydantic import BaseModel

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.packing import pack_slots, pack_strips
from lora_deploy.errors import CheckpointError, ParityError
from lora_deploy.export.coded import decode, encode, initializer_shapes
from lora_deploy.integrity import find_adapters
from lora_deploy.manifest import CodedWeight, Manifest, StoredModule
from lora_deploy.quantization import QuantizedWeight
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_tensors
from lora_deploy.run.adapter_files import read_onnx_adapter
from lora_deploy.verify.deployed import check_stored, flat_initializer, split_modules

__all__ = ["CodesResult", "check_adapter_codes", "check_codes"]


class CodesResult(BaseModel):
    """What was compared.

    Attributes:
        layers: How many layers' weights are kept as codes.
        bytes: Size of codes and scales.
        exact: Whether the codes are the base's own; if not, they are its values transcoded to 8 bits, or made anew.
        requantized: Whether they were made anew, of the merged weights.
        scales: Type of the scales; any other than float32 is rounded to what the graph computes in.
    """

    layers: int
    bytes: int
    exact: bool
    requantized: bool = False
    scales: str = "float32"


def check_codes(directory: Path, base: TrainingBase) -> CodesResult | None:
    """Compare the codes of an export with those of its training base.

    For each layer: the base's quantized weight has the hash that the export recorded; the initializers hold the same
    bytes; and what they stand for is what the base dequantizes to, exactly, where the scales are float32. Codes that
    were made anew have the hash that was recorded when they were made.

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
    check_stored(model, manifest, file)
    layers = size = 0
    dtype = torch.float32
    for weight in manifest.coded:
        codes, scales = (flat_initializer(model, name) for name in (weight.codes, weight.scales))
        size += codes.nbytes + scales.nbytes
        dtype = scales.dtype
        if weight.requantized:
            layers += _check_made_anew(file, model, weight)
            continue
        for module in weight.modules:
            taken = _check_module(file, base, weight, module, codes, scales)
            codes, scales = codes[taken[0] :], scales[taken[1] :]
            layers += 1
    if not manifest.coded:
        return None
    _check_correction(file, model, manifest)
    return CodesResult(
        layers=layers,
        bytes=size,
        exact=all(weight.exact for weight in manifest.coded),
        requantized=any(weight.requantized for weight in manifest.coded),
        scales=str(dtype).removeprefix("torch."),
    )


def _check_correction(file: Path, model: ir.Model, manifest: Manifest) -> None:
    """Compare the branch that takes back part of what rounding lost with the recorded hash."""
    expected = model.metadata_props.get("lora_deploy.correction_sha256", "")
    names = [name for slot in manifest.correction for name in slot.input_names]
    found = hash_tensors((name, [flat_initializer(model, name)]) for name in names)
    if names and found != expected:
        raise ParityError(
            "the correction in the export is not the one that was made for it",
            file=file,
            found=f"sha256 {found[:16]}…",
            expected=f"sha256 {expected[:16]}…",
            remedy="export again",
        )


def _check_made_anew(file: Path, model: ir.Model, weight: CodedWeight) -> int:
    """Compare codes and scales with the recorded hashes; returns of how many layers they are."""
    for module, codes, scales in split_modules(model, weight):
        codes_shape, scales_shape = initializer_shapes(weight.model_copy(update={"modules": (module,)}))
        # Where the scales are stored in 16 bits, they had been rounded to them before they were hashed.
        tensors = [codes.view(codes_shape), scales.view(scales_shape).float()]
        sha256 = hash_tensors([(module.name, tensors)])
        if sha256 != module.sha256:
            raise ParityError(
                "the codes or scales of a layer in the export are not those that were made for it",
                file=file,
                tensor=module.name,
                found=f"sha256 {sha256[:16]}…",
                expected=f"sha256 {module.sha256[:16]}…",
                remedy="export again",
            )
    return len(weight.modules)


def _check_module(
    file: Path,
    base: TrainingBase,
    weight: CodedWeight,
    module: StoredModule,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[int, int]:
    """Compare one layer with the beginning of what is left; returns how much of it was the layer's."""
    stored = _layer_of_base(file, base, weight, module)
    sha256 = hash_tensors([(module.name, list(stored.stored()))])
    if sha256 != module.sha256:
        raise _differs(file, module, "the base's quantized weight", f"sha256 {sha256[:16]}…", f"{module.sha256[:16]}…")
    expected_codes, expected_scales = encode(stored, weight)
    found_codes, found_scales = codes[: expected_codes.numel()], scales[: expected_scales.numel()]
    if not torch.equal(found_codes, expected_codes):
        other = _count_other(found_codes, expected_codes)
        raise _differs(file, module, "the codes", f"{other} bytes", f"{expected_codes.numel()} bytes")
    if not torch.equal(found_scales, expected_scales.to(found_scales.dtype)):
        other = _count_other(found_scales, expected_scales.to(found_scales.dtype))
        raise _differs(file, module, "the scales", f"{other} values", f"{expected_scales.numel()} values")
    if weight.exact and found_scales.dtype == torch.float32:
        values = decode(found_codes, found_scales, weight, module.shape)
        if not torch.equal(values, stored.dequantize()):
            raise _differs(file, module, "the dequantized values", "other values", "the base's, bit for bit")
    return expected_codes.numel(), expected_scales.numel()


def _layer_of_base(file: Path, base: TrainingBase, weight: CodedWeight, module: StoredModule) -> QuantizedWeight:
    """The base's weight, after it has been found to be of this shape, and of a scheme that the codes can be of."""
    stored = base.weight(module.name) if module.name in base.linears else None
    if stored is None or stored.shape != module.shape or weight.scheme not in (stored.scheme, "int8"):
        raise CheckpointError(
            "the model says that it holds codes of a layer which the training base has not",
            file=file,
            tensor=module.name,
            found=f"{module.shape} in {weight.scheme}",
            expected=f"{stored.shape} in {stored.scheme}" if stored is not None else "a linear layer of the base",
            remedy="export again",
        )
    return stored


def _count_other(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How many values are others, where there are as many."""
    if found.shape != expected.shape:
        return f"{found.numel()}"
    return f"{int((found != expected).sum())} other"


def _differs(file: Path, module: StoredModule, what: str, found: str, expected: str) -> ParityError:
    return ParityError(
        f"{what} of a layer in the export are not those of the training base",
        file=file,
        tensor=module.name,
        found=found,
        expected=expected,
        remedy="export again; if it was made on another machine, verify it there",
    )


def check_adapter_codes(directory: Path, adapters: Mapping[str, LoraAdapter]) -> None:
    """Compare A and B that are stored as int8, codes and scales, with what quantizing the adapters gives.

    Does nothing where they are floats: there the logits tell.

    Args:
        directory: The export.
        adapters: What it was made from, by name.

    Raises:
        AdapterError: An adapter's file cannot be read.
        ParityError: A tensor is another one.
    """
    file = directory / "model.onnx"
    model = ir.load(file)
    manifest = Manifest.read(model.metadata_props, file)
    slots = [slot for slot in manifest.slots if slot.int8_blocks is not None]
    for name, adapter in adapters.items() if slots else ():
        if manifest.branch == "fixed":
            stored = {key: flat_initializer(model, key) for slot in slots for key in slot.input_names}
            expected = pack_strips(slots, adapter, manifest.compute_dtype)
        else:
            file = find_adapters(directory)[name]
            tensors = read_onnx_adapter(file, manifest)
            stored = {key: torch.from_numpy(values).flatten() for key, values in tensors.items()}
            expected = pack_slots(slots, adapter, manifest.compute_dtype)
        for key, values in expected:
            if not torch.equal(stored[key], values.flatten()):
                raise ParityError(
                    "what is stored of an adapter in int8 is not what quantizing it gives",
                    file=file,
                    tensor=key,
                    found=f"{stored[key].numel()} values",
                    expected=f"{values.numel()} values, those of {adapter.source}",
                    remedy="export again, or make the adapter again with lora-deploy adapter convert",
                )
