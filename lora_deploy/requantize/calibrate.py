"""The merged weights become codes in one forward pass over a calibration text.

Every row of the text goes through the model twice at once: with the full-precision weights, and with the codes. When the
pass comes to a linear layer, both inputs are known, the weight is read, merged and rounded, and either half goes on with its
own product. So each weight is read once, one layer is in memory at a time, and later layers make up for what earlier ones
lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from lora_deploy.export.merge import MergedParameters
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.rounding import Gram, round_plain, round_with_feedback
from lora_deploy.requantize.streamed import run_streamed
from lora_deploy.requantize.text import Text

__all__ = ["Grid", "calibrate"]

# bits and block size
Grid = tuple[int, int]
OnWeight = Callable[[str, AffineWeight], None]


def calibrate(
    parameters: MergedParameters,
    grids: Mapping[str, Grid],
    texts: Sequence[Text],
    on_weight: OnWeight,
    *,
    towards: float = 1.0,
) -> None:
    """Round the weights of linear layers so that the model's outputs change least on some texts.

    Args:
        parameters: The merged parameters.
        grids: Bits and block size of each layer that is rounded, by name.
        texts: Each counts the same, however many tokens it has.
        on_weight: Is given each weight once it is rounded.
        towards: How much a layer is asked for the output of the full-precision model (1) or of itself on the input that
            it gets (0).
    """
    calibration = _Calibration(grids, texts, on_weight, towards)
    if grids:
        ids, mask = calibration.input_ids, calibration.attention_mask
        run_streamed(parameters, torch.cat([ids, ids]), torch.cat([mask, mask]), calibration.run)
    for name in grids:  # layers that the model did not run
        if name not in calibration.done:
            bits, blocksize = grids[name]
            transposed = parameters.base.linears[name].is_conv1d
            weight = parameters.read(f"{name}.weight", transposed=transposed).float()
            on_weight(name, round_plain(weight, bits, blocksize))


class _Calibration:
    def __init__(self, grids: Mapping[str, Grid], texts: Sequence[Text], on_weight: OnWeight, towards: float) -> None:
        self.grids, self.on_weight, self.towards = grids, on_weight, towards
        length = max(text.input_ids.shape[1] for text in texts)
        self.input_ids = torch.cat([F.pad(text.input_ids, (0, length - text.input_ids.shape[1])) for text in texts])
        masks = [F.pad(text.attention_mask, (0, length - text.attention_mask.shape[1])) for text in texts]
        self.attention_mask = torch.cat(masks)
        self.valid = self.attention_mask.bool()
        share = torch.cat([mask / float(mask.sum() * len(texts)) for mask in masks])
        self.weight = share[self.valid].sqrt()[:, None]
        self.done: set[str] = set()
        self._last: tuple[torch.Tensor, Gram] | None = None

    def run(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        if name not in self.grids:
            return F.linear(x, weight, bias)
        bits, blocksize = self.grids[name]
        rounded = round_with_feedback(weight, self._gram(x), bits, blocksize)
        self.on_weight(name, rounded)
        self.done.add(name)
        half = len(self.input_ids)
        return torch.cat([F.linear(x[:half], weight, bias), F.linear(x[half:], rounded.dequantize(), bias)])

    def _gram(self, x: torch.Tensor) -> Gram:
        """Of one input; q, k and v read the same."""
        if self._last is None or self._last[0] is not x:
            self._last = None
            half = len(self.input_ids)
            full, quantized = (part[self.valid] * self.weight for part in (x[:half], x[half:]))
            self._last = x, Gram(quantized.t() @ quantized, full.t() @ quantized, self.towards)
        return self._last[1]
