"""How far an export of a tiny model is from released PEFT."""

from __future__ import annotations

from typing import NamedTuple

from lora_deploy.export.source import SourceChoice

__all__ = ["ADAPTER", "METHODS", "MODES", "TOLERANCE", "Measured"]

TOLERANCE = 1e-3
MODES = ("merge", "hot-swap", "fixed", "pooled")
METHODS = ("none", "nf4", "fp4", "int8")
ADAPTER = "own"


class Measured(NamedTuple):
    """How far an export is from PEFT, and how far the base alone: the largest differences of a logit."""

    export: float
    control: float
    logits: float
    choice: SourceChoice

    @property
    def holds(self) -> bool:
        """Whether the export computes what was trained, and the check can tell."""
        return self.export <= TOLERANCE < self.control / 100
