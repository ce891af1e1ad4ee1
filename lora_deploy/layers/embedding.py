"""Tables of tokens that are adapted: a low-rank update of an embedding, or some rows that are trained alone.

An output head that shares its weight with the embedding may follow it: it then holds the same parameters.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LoraEmbedding", "TableLayer", "TiedLoraHead", "TokenLayer", "is_table"]


def is_table(module: nn.Module) -> bool:
    """Whether a module looks rows of a dense weight up, and does no more than multiply them by one number."""
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return isinstance(module, nn.Embedding) and plain and module.max_norm is None


class TableLayer(nn.Module):
    """A frozen embedding or output head with what is trained of its table.

    Attributes:
        base_layer: The module as it was, frozen.
        active: Whether anything is changed; if not, the layer is its base.
        follows: Whether it holds another layer's parameters, so that it is not saved.
    """

    follows = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        base_layer.requires_grad_(False)
        self.base_layer = base_layer
        self.active = True

    @property
    def weight(self) -> torch.Tensor:
        """The base's parameter (for code that asks for a device or a dtype, and for ties)."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias; None for an embedding."""
        return cast("torch.Tensor | None", getattr(self.base_layer, "bias", None))

    def _scale(self, rows: torch.Tensor) -> torch.Tensor:
        """As the base scales what it looks up (Gemma)."""
        scale = getattr(self.base_layer, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale).to(rows)


class LoraEmbedding(TableLayer):
    """An embedding with the update (B @ A).T * scaling of its table. With A zero it is its base, bit for bit.

    As in PEFT there is no dropout on tokens.

    Args:
        base_layer: nn.Embedding.
        r: Rank.
        scaling: The factor on (B @ A).T.
        init_lora_weights: False: A is random too. Anything else: A zero, B normal.
        use_dora: Train the length of each column of the table too.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Embedding,
        r: int,
        scaling: float,
        *,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
    ) -> None:
        super().__init__(base_layer)
        self.scaling = scaling
        device = base_layer.weight.device
        random = init_lora_weights is False
        rows, dim = base_layer.weight.shape
        a = torch.randn(r, rows, device=device) if random else torch.zeros(r, rows, device=device)
        self.lora_embedding_A = nn.Parameter(a)
        self.lora_embedding_B = nn.Parameter(torch.randn(dim, r, device=device))
        magnitude = nn.Parameter(self._column_norms()) if use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)

    @torch.no_grad()
    def _column_norms(self) -> torch.Tensor:
        table = self.weight.float() + (self.lora_embedding_B @ self.lora_embedding_A).t() * self.scaling
        norms: torch.Tensor = torch.linalg.vector_norm(table, dim=0)
        return norms

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look tokens up.

        Args:
            tokens: int64 (...).

        Returns:
            (..., dim), of the base's type.
        """
        result = cast(torch.Tensor, self.base_layer(tokens))
        if not self.active:
            return result
        padding = cast("int | None", self.base_layer.padding_idx)
        low = F.embedding(tokens, self.lora_embedding_A.t(), padding_idx=padding)
        branch = self._scale((low @ self.lora_embedding_B.t()) * self.scaling)
        if self.lora_magnitude_vector is None:
            return result + branch.to(result.dtype)
        ratio = self.lora_magnitude_vector / self._column_norms()
        return (ratio * (result.float() + branch)).to(result.dtype)

    def extra_repr(self) -> str:
        """Rank and scaling, for `repr`."""
        return f"r={self.lora_embedding_A.shape[0]}, scaling={self.scaling:g}"


class TiedLoraHead(TableLayer):
    """An output head whose update is its embedding's: the same A and B, turned.

    Args:
        base_layer: nn.Linear, tied to the embedding.
        embedding: Whose parameters it shares.
        scaling: The factor on the update; as in PEFT it is that of the head's own name.
        lora_dropout: Dropout probability on the input of the update, during training only.
    """

    follows = True

    def __init__(
        self, base_layer: nn.Module, embedding: LoraEmbedding, scaling: float, lora_dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer)
        self.scaling = scaling
        self.lora_embedding_A, self.lora_embedding_B = embedding.lora_embedding_A, embedding.lora_embedding_B
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the head: (..., dim) to (..., vocabulary)."""
        result = cast(torch.Tensor, self.base_layer(x))
        if not self.active:
            return result
        low = self.lora_dropout(x.float()) @ self.lora_embedding_B
        branch = cast(torch.Tensor, low @ self.lora_embedding_A * self.scaling)
        return result + branch.to(result.dtype)


class TokenLayer(TableLayer):
    """An embedding or an output head with rows that are trained in the place of the base's.

    Args:
        base_layer: nn.Embedding or nn.Linear.
        indices: Of the tokens.
        followed: A layer whose rows are these too.
    """

    trainable_tokens_delta: nn.Parameter
    order: torch.Tensor
    position: torch.Tensor

    def __init__(self, base_layer: nn.Module, indices: tuple[int, ...], followed: TokenLayer | None = None) -> None:
        super().__init__(base_layer)
        self.indices = indices
        self.follows = followed is not None
        order = torch.tensor(indices, device=self.weight.device)
        self.register_buffer("order", order, persistent=False)
        position = torch.full((len(self.weight),), -1, device=self.weight.device)
        self.register_buffer(
            "position", position.index_copy_(0, order, torch.arange(len(order)).to(order.device)), False
        )
        own = self.weight.detach()[order].float()
        self.trainable_tokens_delta = nn.Parameter(own) if followed is None else followed.trainable_tokens_delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look tokens up, or give the logits of each token, with the new rows in the place of the base's."""
        result = cast(torch.Tensor, self.base_layer(x))
        if not self.active:
            return result
        if isinstance(self.base_layer, nn.Embedding):
            place = self.position[x]
            rows = self._scale(self.trainable_tokens_delta.to(result.dtype)[place.clamp(min=0)])
            return torch.where((place >= 0)[..., None], rows, result)
        bias = None if self.bias is None else self.bias[self.order].to(x.dtype)
        return result.index_copy(
            -1, self.order, F.linear(x, self.trainable_tokens_delta.to(x.dtype), bias).to(result.dtype)
        )
