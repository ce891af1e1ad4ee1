"""Which layers get 8 bits, when the mean of all is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_deploy.requantize.calibrate import name_weight
from lora_deploy.requantize.options import Grid, Requantization, mean_bits
from lora_deploy.requantize.rounding import round_plain
from lora_deploy.requantize.streamed import cut, run_streamed
from lora_deploy.requantize.text import Text

if TYPE_CHECKING:
    from lora_deploy.export.merge import MergedParameters

__all__ = ["measure_sensitivity", "spend_budget"]


def measure_sensitivity(
    parameters: MergedParameters, grids: Mapping[str, Grid], texts: Sequence[Text]
) -> dict[str, float]:
    """What rounding does to each layer's output: the square of its change over that of the output, on the texts.

    Args:
        parameters: The merged parameters.
        grids: Bits and block size of each layer.
        texts: Each counts the same.
    """
    found: dict[str, float] = {}
    for text in texts:
        batches = cut(text)

        def linear(
            name: str,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            inputs: Sequence[torch.Tensor],
            batches: Sequence[Text] = batches,
        ) -> Callable[[torch.Tensor], torch.Tensor]:
            if name in grids:
                with name_weight(parameters, name):
                    lost = weight - round_plain(weight, *grids[name]).dequantize()
                error = size = 0.0
                for x, batch in zip(inputs, batches, strict=True):
                    valid = x[batch.attention_mask.bool()]
                    error += float(F.linear(valid, lost).square().sum())
                    size += float(F.linear(valid, weight).square().sum())
                found[name] = found.get(name, 0.0) + error / max(size, 1e-30) / len(texts)
            return lambda x: F.linear(x, weight, bias)

        run_streamed(parameters, [(batch.input_ids, batch.attention_mask) for batch in batches], linear)
    return found


def spend_budget(asked: Requantization, parameters: MergedParameters, texts: Sequence[Text]) -> Requantization:
    """Give 8 bits to the layers that gain most for each bit, as far as the budget goes.

    Args:
        asked: With a budget.
        parameters: The merged parameters.
        texts: To judge by.

    Returns:
        The same with the choice in `keep` in the place of the budget.
    """
    base = parameters.base
    assert asked.budget_bits is not None
    grids = {name: grid for name, grid in asked.grids(base).items() if name in base.linears}
    small = {name: grid for name, grid in grids.items() if grid[0] == 4}
    gains = measure_sensitivity(parameters, small, texts)
    sizes = {name: base.linears[name].shape[0] * base.linears[name].shape[1] for name in small}
    room = (asked.budget_bits - mean_bits(grids, base, asked.correction)) * sum(
        base.linears[name].shape[0] * base.linears[name].shape[1] for name in grids
    )
    kept = []
    for name in sorted(gains, key=lambda one: -gains[one] / sizes[one]):
        if 4 * sizes[name] <= room:
            room -= 4 * sizes[name]
            kept.append((name, 8))
    return replace(asked, keep=(*asked.keep, *kept), budget_bits=None)
