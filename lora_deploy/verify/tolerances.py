"""The one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TOLERANCES", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """When two sets of logits count as the same function.

    Attributes:
        kl: Largest mean Kullback-Leibler divergence from the reference, in nats a token.
        top1: Smallest share of tokens, ties apart, whose most probable successor is the same.
        tie_margin: A token whose two most probable successors are closer than this, in logits, is a tie.
        max_abs: Largest difference of any logit; None where the type's rounding makes it meaningless.
    """

    kl: float
    top1: float
    tie_margin: float
    max_abs: float | None = None


# A half-precision network rounds at every step. Measured on SmolLM2-135M, single logits are then off by 0.1 (fp16) and
# 0.25 (bf16 weights alone), so a limit on them says little, and two successors closer than that are a tie.
# A row is of the type that is computed in: what rounding weights to codes costs is no error of the export, but one of
# the deployment, and MatMulNBits runs at accuracy level 0 when the gate looks.
# "bf16 weights" is a bf16 export on a machine without bfloat16 kernels: rounded weights, float32 arithmetic.
TOLERANCES = {
    "fp32": Tolerance(kl=1e-6, top1=1.0, tie_margin=2e-3, max_abs=1e-3),
    "fp16": Tolerance(kl=1e-4, top1=0.995, tie_margin=1e-1),
    "bf16": Tolerance(kl=1e-2, top1=0.95, tie_margin=5e-1),
    "bf16 weights": Tolerance(kl=3e-3, top1=0.98, tie_margin=2.5e-1),
}
