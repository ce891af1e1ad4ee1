"""How merged weights become codes again: what can be asked for, and what each layer gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_deploy.errors import UsageError
from lora_deploy.quantization.base import TrainingBase

__all__ = ["Grid", "Requantization", "bits_per_weight", "mean_bits", "parse_keep"]

# Bits and block size of a layer's codes.
Grid = tuple[int, int]

_BITS = {"int4": 4, "int8": 8, "float": None}
_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Requantization:
    """How merged weights become codes.

    Attributes:
        bits: Of the linear layers, 4 or 8.
        blocksize: Weights that share a scale.
        head: Bits of the output head and the embedding; None to leave them in floats.
        keep: Layers that get other bits than the rest (None: floats), by part of their name.
        budget_bits: Mean bits of a weight of the linear layers, with 16-bit scales: as many layers as fit are given 8
            bits, those first that gain most. None to leave that to `keep`.
        correction: Rank of the branch that takes back part of what the rounding lost; 0 for none.
        data: Text to calibrate on, JSONL as for training; None for the training data, where it is known.
        rows: How many rows of text to calibrate on; 0 to round every weight by itself.
    """

    bits: Literal[4, 8]
    blocksize: int = 32
    head: Literal[4, 8] | None = 8
    keep: tuple[tuple[str, int | None], ...] = ()
    budget_bits: float | None = None
    correction: int = 0
    data: Path | None = None
    rows: int = 96

    def __post_init__(self) -> None:
        if self.blocksize not in _BLOCKS:
            raise UsageError("there is no such block size", found=self.blocksize, expected=", ".join(map(str, _BLOCKS)))
        if self.correction < 0 or self.rows < 0:
            raise UsageError("a rank, and a number of rows, is not negative", found=min(self.correction, self.rows))
        if (self.correction or self.budget_bits is not None) and not self.rows:
            raise UsageError(
                "corrections are made, and layers chosen, for a calibration text",
                found="--calibration-rows 0",
                remedy="leave it out",
            )
        lowest = bits_per_weight((self.bits, self.blocksize))
        if self.budget_bits is not None and (self.bits == 8 or self.budget_bits < lowest):
            raise UsageError(
                "the budget leaves no choice" if self.bits == 8 else "the budget is below what the codes need",
                found=self.budget_bits,
                expected=f"--precision int4 and {lowest} bits or more",
            )

    def grids(self, base: TrainingBase) -> dict[str, Grid]:
        """What each linear layer gets that is rounded.

        Raises:
            UsageError: A part of a name in `keep` is in no layer's name.
        """
        found: dict[str, Grid] = {}
        unused = {part for part, _ in self.keep}
        for name in base.linears:
            bits: int | None = self.bits
            for part, wanted in self.keep:
                if f".{part}." in f".{name}.":
                    bits = wanted
                    unused.discard(part)
            if bits is not None and name not in base.heads:
                found[name] = (bits, self.blocksize)
        for name in self._lookups(base):
            rows, columns = base.shapes[f"{name}.weight"]
            # The lookup knows no padding.
            fitting = [block for block in _BLOCKS if block <= self.blocksize and columns % block == 0]
            if self.head is not None and fitting and rows:
                found[name] = (self.head, fitting[-1])
        if unused:
            raise UsageError(
                "no linear layer has this in its name",
                found=", ".join(sorted(unused)),
                expected=f"part of a name as {next(iter(base.linears), 'none')}",
                remedy="change --keep",
            )
        return found

    def _lookups(self, base: TrainingBase) -> list[str]:
        """Embedding and output head; one name where they share a weight."""
        if base.task != "causal-lm":
            return []
        names = [base.embedding, *base.heads]
        shared = [base.aliases.get(f"{name}.weight", f"{name}.weight") for name in names if name is not None]
        return list(dict.fromkeys(name.removesuffix(".weight") for name in shared))


def bits_per_weight(grid: Grid) -> float:
    """Bits of a weight with its share of a 16-bit scale."""
    return grid[0] + 16 / grid[1]


def parse_keep(texts: Sequence[str]) -> tuple[tuple[str, int | None], ...]:
    """`int8:down_proj,layers.0` as bits by part of a name.

    Raises:
        UsageError: It is not of this form.
    """
    kept: list[tuple[str, int | None]] = []
    for text in texts:
        precision, separator, parts = text.partition(":")
        if not separator or precision not in _BITS or not all(parts.split(",")):
            raise UsageError(
                "this does not say which layers to keep", found=text, expected="int8:down_proj,layers.0 for one"
            )
        kept += [(part, _BITS[precision]) for part in parts.split(",")]
    return tuple(kept)


def mean_bits(grids: Mapping[str, Grid], base: TrainingBase, correction: int = 0) -> float:
    """Mean bits of a weight of the linear layers that are rounded, with 16-bit scales and an int8 correction."""
    weights = spent = 0.0
    for name, grid in grids.items():
        if name not in base.linears:
            continue
        rows, columns = base.linears[name].shape
        weights += rows * columns
        spent += rows * columns * bits_per_weight(grid) + correction * (rows + columns) * bits_per_weight((8, 32))
    return spent / weights if weights else 0.0
