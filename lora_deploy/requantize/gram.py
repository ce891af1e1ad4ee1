"""What a calibration text says of a layer's input, kept in as few square matrices as there can be."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Gram"]

_DAMPING = 0.02  # of the mean of the diagonal


class Gram:
    """The products of a layer's inputs with one another, and what is derived from them.

    A square of an MLP's inner width is among the largest tensors of an export. So only three are kept at most (`cross`,
    `root`, `inverse_root`), all that can be is made in place, and columns are in one order everywhere.

    Args:
        quantized: X.T @ X of the input that the layer gets, float32 (in, in); is overwritten.
        cross: Y.T @ X of the full-precision input Y and the one that the layer gets; is overwritten. None where they
            are one.

    Attributes:
        importance: Mean square of each input, float32 (in,).
        order: The columns, those of the largest inputs first, int64 (in,).
    """

    def __init__(self, quantized: torch.Tensor, cross: torch.Tensor | None = None) -> None:
        self.importance = quantized.diagonal().clone()
        self.order = self.importance.argsort(descending=True, stable=True)
        damping = float(self.importance.mean()) * _DAMPING or 1.0
        for matrix in (quantized, cross):
            if matrix is not None:
                matrix.diagonal().add_(damping)
        self._damped: torch.Tensor | None = quantized
        self._cross = cross
        self._root: torch.Tensor | None = None
        self._inverse_root: torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Gram:
        """Sum up inputs that come in pieces.

        Args:
            inputs: Pairs of the full-precision input and the one that the layer gets, float32 (tokens, in).
        """
        quantized = cross = torch.empty(0)
        for number, (full, rounded) in enumerate(inputs):
            if not number:
                quantized, cross = (torch.zeros(rounded.shape[1], rounded.shape[1]) for _ in range(2))
            quantized.addmm_(rounded.t(), rounded)
            cross.addmm_(full.t(), rounded)
        return cls(quantized, cross)

    @property
    def root(self) -> torch.Tensor:
        """Upper factor R of the damped Gram matrix H, its columns in order: H = R @ R.T, (in, in)."""
        if self._root is None:
            assert self._damped is not None
            # R is the lower factor of H turned round, back to front.
            back = self.order.flip(0)
            turned = self._damped[back[:, None], back]
            self._damped = None
            lower = torch.linalg.cholesky(turned)
            del turned
            self._root = lower.flip(0, 1)
        return self._root

    @property
    def inverse_root(self) -> torch.Tensor:
        """The upper Cholesky factor U of H's inverse, its columns in order: H^-1 = U.T @ U, and U = R^-1, (in, in)."""
        if self._inverse_root is None:
            identity = torch.eye(len(self.order))
            self._inverse_root = torch.linalg.solve_triangular(self.root, identity, upper=True, out=identity)
        return self._inverse_root

    def target(self, values: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) that gives, on the input that the layer gets, what `values` give on the full one."""
        if self._cross is None:
            return values
        wanted = (values @ self._cross)[:, self.order]  # on the inputs X: W' @ H
        half = torch.linalg.solve_triangular(self.root.t(), wanted, upper=False, left=False)
        return self.in_place(torch.linalg.solve_triangular(self.root, half, upper=True, left=False))

    def in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Columns that are in order go back to where they belong, (rows, in)."""
        back = torch.empty_like(values)
        back[:, self.order] = values
        return back
