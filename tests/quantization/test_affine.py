"""Codes on an even grid: exact for LLM.int8, near for nf4 and fp4, and packed as onnxruntime reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from lora_deploy.codes import FP4_CODE, NF4_CODE
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.affine import _STEPS, AffineWeight, affine_blocksize, round_to_nearest, to_affine8
from lora_deploy.quantization.quantize import quantize
from lora_deploy.quantization.weight import QuantizedWeight

Method = Literal["none", "nf4", "fp4", "int8"]


def _quantized(method: Method, rows: int, columns: int, blocksize: int = 64) -> QuantizedWeight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    return quantize(values, QuantizationScheme(method=method, blocksize=blocksize))


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("columns", [16, 48, 64, 72, 100, 101, 256])
def test_int8_rows_are_exact_whatever_their_width(columns: int) -> None:
    weight = _quantized("int8", 9, columns)
    affine = to_affine8(weight)
    assert torch.equal(affine.dequantize(), weight.dequantize())
    assert affine.blocksize == affine_blocksize("int8", columns, 0)
    assert affine.codes.shape[1] % affine.blocksize == 0
    assert (affine.codes[:, columns:] == 128).all()
    assert (affine.codes.shape[1] == columns) == (columns % 16 == 0)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize(("columns", "blocksize"), [(64, 64), (48, 64), (96, 64), (16, 64), (256, 512), (112, 128)])
def test_4bit_values_move_to_the_nearest_step_of_their_own_block(columns: int, blocksize: int, method: Method) -> None:
    weight = _quantized(method, 33, columns, blocksize)
    affine = to_affine8(weight)
    expected = weight.dequantize()
    assert affine.blocksize == affine_blocksize(method, columns, blocksize) == min(np.gcd(columns, blocksize), 128)
    assert _error(affine.dequantize(), expected) < (0.0055 if blocksize <= 128 else 0.007)
    # No value is off by more than half a step of its block's scale.
    half_steps = affine.scales.repeat_interleave(affine.blocksize, dim=1) / 2
    assert ((affine.dequantize() - expected).abs() <= half_steps * 1.0001).all()


@pytest.mark.parametrize("method", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("columns", [72, 100, 35])
def test_what_has_no_block_that_fits_is_rounded_anew(columns: int, method: Method) -> None:
    weight = _quantized(method, 33, columns)
    affine = to_affine8(weight)
    assert affine.blocksize == 32 == affine_blocksize(method, columns, 64)
    assert _error(affine.dequantize(), weight.dequantize()) < 0.007


@pytest.mark.parametrize(("method", "code"), [("nf4", NF4_CODE), ("fp4", FP4_CODE)])
def test_no_hundredth_up_to_127_makes_a_smaller_error_than_the_chosen_steps(
    method: str, code: tuple[float, ...]
) -> None:
    values = torch.tensor(code, dtype=torch.float64)
    steps = torch.arange(1600, 12701, dtype=torch.float64)[:, None] / 100
    errors = ((values * steps).round() / steps - values).square().mean(1)
    chosen = errors[round(_STEPS[method] * 100) - 1600]
    assert chosen == errors.min()
    assert chosen < 0.7 * errors[-1]  # 127, the step of plain absmax scaling


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("blocksize", [16, 32, 128])
def test_rounding_is_to_the_nearest_code_and_keeps_zero_and_the_largest(bits: int, blocksize: int) -> None:
    values = torch.randn(5, 100)
    values[2] = 0
    values[3, 7] = 0
    affine = round_to_nearest(values, bits, blocksize)
    found = affine.dequantize()
    assert found.shape == values.shape
    assert (affine.bits, affine.blocksize, affine.columns) == (bits, blocksize, 100)
    assert int(affine.codes.max()) < 2**bits
    assert (found[2] == 0).all()
    assert found[3, 7] == 0
    half_steps = affine.scales.repeat_interleave(blocksize, dim=1)[:, :100] / 2
    assert ((found - values).abs() <= half_steps * 1.0001).all()
    largest = values.abs().argmax(dim=1, keepdim=True)
    assert torch.allclose(found.gather(1, largest), values.gather(1, largest), rtol=1e-6)


def _matmul_nbits(weight: AffineWeight, x: np.ndarray, directory: Path) -> np.ndarray:
    rows = len(weight.codes)
    arrays = {"codes": weight.packed().numpy(), "scales": weight.scales.reshape(-1).numpy()}
    constants = [ir.val(name, const_value=ir.Tensor(array, name=name)) for name, array in arrays.items()]
    given = ir.val("x", dtype=ir.DataType.FLOAT, shape=x.shape)
    attributes = {"N": rows, "K": weight.columns, "bits": weight.bits, "block_size": weight.blocksize}
    node = ir.node("MatMulNBits", [given, *constants], attributes=attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([given], [node.outputs[0]], nodes=[node], initializers=constants, name="g", opset_imports=opsets)
    ir.save(ir.Model(graph, ir_version=10), directory / "m.onnx")
    session = onnxruntime.InferenceSession(str(directory / "m.onnx"), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


@pytest.mark.parametrize("columns", [64, 72, 100])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 5])
def test_onnxruntime_multiplies_with_the_values_that_the_codes_stand_for(
    count: int, bits: int, columns: int, tmp_path: Path
) -> None:
    weight = round_to_nearest(torch.randn(24, columns), bits, 32)
    x = np.random.default_rng(0).standard_normal((count, columns), np.float32)
    expected = x @ weight.dequantize().numpy().T
    found = _matmul_nbits(weight, x, tmp_path)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    if bits == 4:  # the other nibble first is another weight
        swapped = AffineWeight(
            weight.codes.view(24, -1, 2).flip(2).reshape(24, -1), weight.scales, columns, weight.blocksize, 4
        )
        assert np.abs(_matmul_nbits(swapped, x, tmp_path) - expected).max() > 0.1


def test_the_low_nibble_comes_first() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    packed = AffineWeight(codes, torch.ones(1, 1), 16, 16, 4).packed()
    assert packed.shape == (1, 1, 8)
    assert packed.reshape(-1).tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]
