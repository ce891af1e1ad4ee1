"""The values that 4-bit codes stand for. No imports: whoever only runs a model needs no more than these."""

from __future__ import annotations

__all__ = ["CODES", "FP4_CODE", "NF4_CODE", "pair_table"]

# QLoRA, appendix E (https://arxiv.org/abs/2305.14314): quantiles of the normal distribution, exact zero included.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' bit order: sign in the highest bit, then the magnitudes below, in twelfths.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE = tuple(m / 12 for m in _FP4_MAGNITUDES) + tuple(-m / 12 for m in _FP4_MAGNITUDES)

CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}


def pair_table(scheme: str) -> list[tuple[float, float]]:
    """The two values that each of the 256 bytes of codes stands for, the high nibble's first ("nf4" or "fp4")."""
    code = CODES[scheme]
    return [(code[byte >> 4], code[byte & 15]) for byte in range(256)]
