"""The merged weights become codes in one forward pass over a calibration text.

Every row of the text goes through the model twice at once: with the full-precision weights, and with the codes. When
the pass comes to a linear layer, both inputs are known, the weight is read, merged and rounded, and either half goes on
with its own product. So each weight is read once, one layer is in memory at a time, and later layers make up for what
earlier ones lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_deploy.adapter import LoraUpdate
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.correction import round_with_correction
from lora_deploy.requantize.options import Grid
from lora_deploy.requantize.rounding import Gram, round_plain, round_with_feedback
from lora_deploy.requantize.streamed import run_streamed
from lora_deploy.requantize.text import Text

if TYPE_CHECKING:
    from lora_deploy.export.merge import MergedParameters

__all__ = ["calibrate"]

OnWeight = Callable[[str, AffineWeight, "LoraUpdate | None"], None]


def calibrate(
    parameters: MergedParameters,
    grids: Mapping[str, Grid],
    texts: Sequence[Text],
    on_weight: OnWeight,
    *,
    scale_dtype: torch.dtype = torch.float32,
    correction: int = 0,
) -> None:
    """Round the weights of linear layers so that the model's outputs change least on some texts.

    Args:
        parameters: The merged parameters.
        grids: Bits and block size of each layer that is rounded, by name.
        texts: Each counts the same, however many tokens it has. None: every weight is rounded by itself.
        on_weight: Is given each weight once it is rounded, and its correction.
        scale_dtype: Type that the scales will be stored in.
        correction: Rank of a branch beside each layer that takes back part of the error; 0 for none.
    """
    done: set[str] = set()
    if texts and grids:
        calibration = _Calibration(grids, texts, on_weight, scale_dtype, correction)
        ids, mask = calibration.input_ids, calibration.attention_mask
        run_streamed(parameters, torch.cat([ids, ids]), torch.cat([mask, mask]), calibration.run)
        done = calibration.done
    for name, (bits, blocksize) in grids.items():
        if name not in done:  # no text, or a layer that the model did not run
            weight = parameters.read(f"{name}.weight", transposed=parameters.base.linears[name].is_conv1d)
            on_weight(name, round_plain(weight, bits, blocksize, scale_dtype), None)


class _Calibration:
    """The layers' part in the forward pass."""

    def __init__(
        self,
        grids: Mapping[str, Grid],
        texts: Sequence[Text],
        on_weight: OnWeight,
        scale_dtype: torch.dtype,
        correction: int,
    ) -> None:
        self.grids, self.on_weight = grids, on_weight
        self.scale_dtype, self.correction = scale_dtype, correction
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
        """One layer: of the full-precision half with its weight, of the other with its codes."""
        if name not in self.grids:
            return F.linear(x, weight, bias)
        gram, (bits, blocksize) = self._gram(x), self.grids[name]
        wanted, update = gram.target(weight), None
        if self.correction:
            rounded, update = round_with_correction(wanted, gram, bits, blocksize, self.scale_dtype, self.correction)
            deployed = rounded.dequantize() + update.delta_weight()
        else:
            rounded = round_with_feedback(wanted, gram, bits, blocksize, self.scale_dtype)
            deployed = rounded.dequantize()
        self.on_weight(name, rounded, update)
        self.done.add(name)
        half = len(self.input_ids)
        return torch.cat([F.linear(x[:half], weight, bias), F.linear(x[half:], deployed, bias)])

    def _gram(self, x: torch.Tensor) -> Gram:
        """Of one input; q, k and v read the same."""
        if self._last is None or self._last[0] is not x:
            self._last = None
            half = len(self.input_ids)
            full, quantized = (part[self.valid] * self.weight for part in (x[:half], x[half:]))
            self._last = x, Gram(quantized.t() @ quantized, full.t() @ quantized)
        return self._last[1]
