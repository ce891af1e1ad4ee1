"""The codes that bitsandbytes left in a checkpoint, read as a stranger's: nothing of them is believed unchecked."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.bounds import first_fault
from lora_deploy.checkpoint import Checkpoint
from lora_deploy.codes import CODES
from lora_deploy.errors import CheckpointError
from lora_deploy.quantization.quantize import expand_absmax
from lora_deploy.quantization.weight import Blockwise4BitWeight, Int8Weight, QuantizedWeight

__all__ = ["StoredCodes", "all_finite"]

_KINDS = ("nf4", "fp4")
# bitsandbytes writes some 200 bytes.
_LARGEST_STATE = 4096
_PIECE = 1 << 20
_AGAIN = "copy or download the checkpoint again, or quantize the model again"

_Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]  # those that bitsandbytes has kernels for
_Float = Literal["float32", "float16", "bfloat16"]


class _State(BaseModel):
    """What the JSON in a `quant_state` tensor says of a weight, in bitsandbytes' words."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    quant_type: Literal["nf4", "fp4"]
    blocksize: _Blocksize
    dtype: _Float
    shape: list[int] = Field(min_length=2, max_length=2)


class _NestedState(_State):
    """The same, of a weight that is double-quantized."""

    nested_blocksize: _Blocksize
    nested_dtype: _Float
    nested_offset: float = Field(allow_inf_nan=False)


class StoredCodes:
    """The quantized weights of a checkpoint.

    Args:
        checkpoint: Holds them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._states: dict[str, _State] = {}

    def holds(self, prefix: str) -> bool:
        """Whether there are codes under a prefix ("model.layers.0.self_attn.q_proj.")."""
        return f"{prefix}SCB" in self._checkpoint or self._state_key(prefix) is not None

    def kind(self, prefix: str, shape: tuple[int, int]) -> tuple[str, int]:
        """What the codes are, and how many weights share one absmax.

        Args:
            prefix: Of their names.
            shape: (out, in) of the layer, as the model's configuration gives it.

        Raises:
            CheckpointError: What the checkpoint says of them cannot be.
        """
        if self._state_key(prefix) is None:
            return "int8", shape[1]
        state = self._state(prefix, shape)
        return state.quant_type, state.blocksize

    def check(self, prefix: str, shape: tuple[int, int]) -> None:
        """Check what can be checked without reading the codes; arguments and exceptions as `kind`."""
        if self._state_key(prefix) is not None:
            self._state(prefix, shape)
            return
        self._expect_shape(f"{prefix}weight", self._checkpoint.shape(f"{prefix}weight"), shape)
        rows = f"{prefix}SCB"
        if math.prod(self._checkpoint.shape(rows)) != shape[0]:
            self._refuse(rows, "does not fit its codes", self._checkpoint.shape(rows), f"({shape[0]},), one a row")

    def weight(self, prefix: str, shape: tuple[int, int]) -> QuantizedWeight:
        """The weight of a layer; arguments as `kind`.

        Raises:
            CheckpointError: Codes or scales are missing, of another size or type than they must be, or not finite.
        """
        self.check(prefix, shape)
        return self._int8(prefix) if self._state_key(prefix) is None else self._four_bit(prefix, shape)

    def _int8(self, prefix: str) -> Int8Weight:
        order = f"{prefix}weight_format"
        if order in self._checkpoint and bool(self._checkpoint.read(order).any()):
            # The other orders are those of GPUs of 2022; bitsandbytes itself does not read them any more.
            self._refuse(order, "are not in rows", self._checkpoint.read(order).tolist(), "0, for rows")
        codes = self._checkpoint.read(f"{prefix}weight")
        if codes.dtype != torch.int8:
            self._refuse(f"{prefix}weight", "are of the wrong type", codes.dtype, torch.int8)
        return Int8Weight(codes, self._floats(f"{prefix}SCB", codes.shape[0]).reshape(-1))

    def _four_bit(self, prefix: str, shape: tuple[int, int]) -> Blockwise4BitWeight:
        state = self._state(prefix, shape)
        count = math.prod(shape)
        codes = self._checkpoint.read(f"{prefix}weight")
        self._expect_bytes(f"{prefix}weight", codes.numel() * codes.element_size(), -(-count // 2))
        table = self._floats(f"{prefix}weight.quant_map", 16)
        own = torch.tensor(CODES[state.quant_type])
        if not torch.allclose(table, own, rtol=1e-2, atol=0):  # rounded where the model was cast to 16 bits
            self._refuse(f"{prefix}weight.quant_map", "stand for other values", table.tolist(), f"{state.quant_type}'s")
        absmax = self._absmax(prefix, state, -(-count // state.blocksize))
        codes = codes.reshape(-1).view(torch.uint8)
        return Blockwise4BitWeight(codes, absmax, shape, state.quant_type, state.blocksize)

    def _absmax(self, prefix: str, state: _State, count: int) -> torch.Tensor:
        key = f"{prefix}weight.absmax"
        if not isinstance(state, _NestedState):
            return self._floats(key, count).reshape(-1)
        codes = self._read(key)
        if codes.dtype != torch.uint8:
            self._refuse(key, "are of the wrong type", codes.dtype, f"{torch.uint8}, for double quantization")
        self._expect_bytes(key, codes.numel(), count)
        absmax = expand_absmax(
            codes,
            self._floats(f"{prefix}weight.nested_quant_map", 256).reshape(-1),
            self._floats(f"{prefix}weight.nested_absmax", -(-count // state.nested_blocksize)).reshape(-1),
            state.nested_offset,
            state.nested_blocksize,
        )
        if not all_finite(absmax):
            self._refuse(
                f"{prefix}weight.nested_absmax", "hold numbers that are not finite", "an overflow", "finite numbers"
            )
        return absmax

    def _state(self, prefix: str, shape: tuple[int, int]) -> _State:
        if prefix not in self._states:
            self._states[prefix] = self._read_state(prefix, shape)
        return self._states[prefix]

    def _read_state(self, prefix: str, shape: tuple[int, int]) -> _State:
        key = self._state_key(prefix)
        assert key is not None
        size = self._checkpoint.shape(key)
        if len(size) != 1 or size[0] > _LARGEST_STATE:
            self._refuse(key, "say nothing that can be read of themselves", size, f"at most {_LARGEST_STATE} bytes")
        raw = self._checkpoint.read(key)
        if raw.dtype != torch.uint8:
            self._refuse(key, "say nothing that can be read of themselves", raw.dtype, torch.uint8)
        try:
            values = json.loads(bytes(raw.tolist()))
            # The name of either tensor makes bitsandbytes take the weight for double-quantized.
            nested = f"{prefix}weight.nested_absmax" in self._checkpoint or _names_nested(values)
            state = (_NestedState if nested else _State).model_validate(values)
        except (ValueError, RecursionError) as error:
            found = first_fault(error) if isinstance(error, ValidationError) else ascii(str(error))[1:-1][:200]
            self._refuse(key, "say nothing that can be read of themselves", found, "what bitsandbytes writes", error)
        if not key.endswith(state.quant_type):
            self._refuse(key, "are said to be of two kinds", state.quant_type, key.rpartition("__")[2])
        self._expect_shape(key, tuple(state.shape), shape)
        return state

    def _state_key(self, prefix: str) -> str | None:
        keys = (f"{prefix}weight.quant_state.bitsandbytes__{kind}" for kind in _KINDS)
        return next((key for key in keys if key in self._checkpoint), None)

    def _read(self, key: str) -> torch.Tensor:
        if key not in self._checkpoint:
            raise CheckpointError(
                "a tensor that belongs to the codes of a weight is missing",
                file=self._checkpoint.directory,
                tensor=key,
                found="no such tensor",
                expected="what bitsandbytes writes beside its codes",
                remedy=_AGAIN,
            )
        return self._checkpoint.read(key)

    def _floats(self, key: str, count: int) -> torch.Tensor:
        """So many finite numbers, in float32."""
        values = self._read(key)
        if not values.is_floating_point():
            self._refuse(key, "are of the wrong type", values.dtype, "floating-point numbers")
        if values.numel() != count:
            self._refuse(key, "are of another size", f"{values.numel()} values", f"{count}")
        if not all_finite(values):
            self._refuse(key, "hold numbers that are not finite", "NaN or infinity", "finite numbers")
        return values.float()

    def _expect_bytes(self, key: str, found: int, expected: int) -> None:
        if found != expected:
            self._refuse(key, "are of another size", f"{found} bytes", f"{expected} bytes")

    def _expect_shape(self, key: str, found: tuple[int, ...], expected: tuple[int, int]) -> None:
        if found != expected:
            raise CheckpointError(
                "a quantized weight does not have the shape that the model's configuration gives it",
                file=self._checkpoint.file(key),
                tensor=key,
                found=found,
                expected=expected,
                remedy=_AGAIN,
            )

    def _refuse(self, key: str, what: str, found: object, expected: object, cause: Exception | None = None) -> NoReturn:
        raise CheckpointError(
            f"the codes of a weight, or what belongs to them, {what}",
            file=self._checkpoint.file(key),
            tensor=key,
            found=str(found)[:200],
            expected=expected,
            remedy=_AGAIN,
        ) from cause


def _names_nested(values: Any) -> bool:
    return isinstance(values, dict) and any(str(name).startswith("nested_") for name in values)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum says so in one pass; else look at each.

    In pieces, for torch turns all it sums into float32 first.
    """
    for piece in torch.split(values.reshape(-1), _PIECE):
        if not bool(torch.isfinite(piece.sum(dtype=torch.float32))) and not bool(torch.isfinite(piece).all()):
            return False
    return True
