"""The merged weights become codes while a calibration text goes through the model.

Every row of the text goes through the model twice at once: with the full-precision weights, and with the codes. When
all rows have come to a linear layer, both inputs are known, the weight is read, merged and rounded, and either half
goes on with its own product. So each weight is read once, one layer is in memory at a time, and later layers make up
for what earlier ones lost.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_deploy.adapter import LoraUpdate
from lora_deploy.errors import InputError
from lora_deploy.quantization.affine import AffineWeight
from lora_deploy.requantize.correction import round_with_correction
from lora_deploy.requantize.gram import Gram
from lora_deploy.requantize.options import Grid
from lora_deploy.requantize.rounding import round_plain, round_with_feedback
from lora_deploy.requantize.streamed import cut, run_streamed
from lora_deploy.requantize.text import Text

if TYPE_CHECKING:
    from lora_deploy.export.merge import MergedParameters

__all__ = ["calibrate", "name_weight"]

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

    Raises:
        InputError: A merged weight is not finite, or too large for the scales' type.
    """
    done: set[str] = set()
    if texts and grids:
        calibration = _Calibration(parameters, grids, texts, on_weight, scale_dtype, correction)
        run_streamed(parameters, calibration.batches, calibration.run)
        done = calibration.done
        del calibration  # with the last layer's products
    for name, (bits, blocksize) in grids.items():
        if name not in done:  # no text, or a layer that the model did not run
            weight = parameters.read(f"{name}.weight", transposed=parameters.base.linears[name].is_conv1d)
            with name_weight(parameters, name):
                rounded = round_plain(weight, bits, blocksize, scale_dtype)
            on_weight(name, rounded, None)


@contextmanager
def name_weight(parameters: MergedParameters, name: str) -> Iterator[None]:
    """Say whose weight it is where one cannot be rounded.

    Args:
        parameters: The merged parameters.
        name: Of the layer.
    """
    try:
        yield
    except InputError as error:
        error.details = {**parameters.base.place(f"{name}.weight"), **error.details}
        raise


class _Calibration:
    """The layers' part in the forward pass."""

    def __init__(
        self,
        parameters: MergedParameters,
        grids: Mapping[str, Grid],
        texts: Sequence[Text],
        on_weight: OnWeight,
        scale_dtype: torch.dtype,
        correction: int,
    ) -> None:
        self._parameters, self.grids, self.on_weight = parameters, grids, on_weight
        self.scale_dtype, self.correction = scale_dtype, correction
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._valid: list[torch.Tensor] = []
        self._weight: list[float] = []  # of a token; its root, for products have it twice
        for text in texts:
            for batch in cut(text):
                ids, mask = batch.input_ids, batch.attention_mask
                self.batches.append((torch.cat([ids, ids]), torch.cat([mask, mask])))
                self._valid.append(mask.bool())
                self._weight.append(float(text.attention_mask.sum() * len(texts)) ** -0.5)
        self.done: set[str] = set()
        self._last: tuple[weakref.ref[torch.Tensor], Gram] | None = None

    def run(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Sequence[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """One layer: of the full-precision half with its weight, of the other with its codes."""
        if name not in self.grids:
            return lambda x: F.linear(x, weight, bias)
        with name_weight(self._parameters, name):
            deployed = self._round(name, weight, self._gram(inputs))

        def forward(x: torch.Tensor) -> torch.Tensor:
            full, quantized = x.chunk(2)
            return torch.cat([F.linear(full, weight, bias), F.linear(quantized, deployed, bias)])

        return forward

    def _round(self, name: str, weight: torch.Tensor, gram: Gram) -> torch.Tensor:
        """Round a weight, and return what it has become."""
        bits, blocksize = self.grids[name]
        wanted, update = gram.target(weight), None
        if self.correction:
            rounded, update = round_with_correction(wanted, gram, bits, blocksize, self.scale_dtype, self.correction)
            deployed = rounded.dequantize() + update.delta_weight()
        else:
            rounded = round_with_feedback(wanted, gram, bits, blocksize, self.scale_dtype)
            deployed = rounded.dequantize()
        self.on_weight(name, rounded, update)
        self.done.add(name)
        return deployed

    def _gram(self, inputs: Sequence[torch.Tensor]) -> Gram:
        """Of one input; q, k and v read the same."""
        if self._last is None or self._last[0]() is not inputs[0]:
            self._last = None  # before the next is made
            self._last = weakref.ref(inputs[0]), Gram.of(self._halves(inputs))
        return self._last[1]

    def _halves(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What counts of each input, full-precision and quantized, (tokens, in)."""
        for x, valid, weight in zip(inputs, self._valid, self._weight, strict=True):
            full, quantized = x.chunk(2)
            yield full[valid] * weight, quantized[valid] * weight
