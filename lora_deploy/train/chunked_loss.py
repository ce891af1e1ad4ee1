"""Cross entropy over the output head, some tokens at a time, so that the logits of a whole batch are never there.

Only tokens that are to be learned go through the head. The gradient of the hidden states is made together with the
loss, chunk by chunk, so that nothing is computed twice. The value is that of transformers' `ForCausalLMLoss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_deploy.data.examples import IGNORED

__all__ = ["can_be_chunked", "chunked_cross_entropy", "chunked_loss"]

# Tokens at a time. A GPU reads the whole head for each chunk, so there are fewer of them there.
_CHUNK = {"cpu": 128}
_GPU_CHUNK = 512

Head = Callable[[torch.Tensor], torch.Tensor]


def chunked_cross_entropy(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, *, chunk: int | None = None
) -> torch.Tensor:
    """The sum of the cross entropies of head(hidden), to be differentiated once, with respect to `hidden`.

    Args:
        head: Hidden states to logits, (tokens, dim) to (tokens, vocabulary); frozen.
        hidden: (tokens, dim).
        labels: int64 (tokens,), none of them to be ignored.
        chunk: Tokens at a time; None for what suits the device.

    Returns:
        float32, a scalar.
    """
    chunk = chunk or _CHUNK.get(hidden.device.type, _GPU_CHUNK)
    return cast(torch.Tensor, _ChunkedCrossEntropy.apply(head, hidden, labels, chunk))  # type: ignore[no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward; only that is kept."""

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
        wanted = ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden.device)
        parts: list[torch.Tensor] = []
        for rows, answers in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True):
            rows, answers = rows.detach().requires_grad_(wanted), answers[:, None]
            with torch.set_grad_enabled(wanted):
                logits = head(rows)
            values = logits.detach().float()
            odds = torch.softmax(values, dim=1)
            largest, at = odds.max(dim=1, keepdim=True)
            # The logarithm of the sum of exponentials, from the largest of them, which is never small.
            total += (values.gather(1, at) - largest.log() - values.gather(1, answers)).sum()
            if wanted:
                odds.scatter_add_(1, answers, torch.full_like(largest, -1))
                parts += torch.autograd.grad(logits, rows, odds.to(logits.dtype))
        if wanted:
            ctx.save_for_backward(torch.cat(parts))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return None, (kept.float() * grad).to(kept.dtype), None, None


@contextmanager
def chunked_loss(model: PreTrainedModel, *, every_token: bool = False) -> Iterator[None]:
    """While it lasts, the loss of a language model is computed in chunks; its `logits` are the hidden states.

    Args:
        model: One that `can_be_chunked`.
        every_token: Take it that no token is ignored: for tensors without values.
    """
    head = cast(nn.Module, _head_of(model)).forward

    def loss(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return _causal_loss(head, logits, labels, options.get("num_items_in_batch"), every_token)

    with _replaced(model, lambda hidden: hidden, loss):
        yield


def can_be_chunked(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a model puts its hidden states through a frozen head and does nothing else before transformers' loss.

    It is run once on two tokens, in evaluation mode. No random number is drawn.
    """
    head = _head_of(model) if isinstance(model, PreTrainedModel) else None
    if head is None or model.loss_function is not ForCausalLMLoss:
        return False
    if head._forward_hooks or head._forward_pre_hooks or any(one.requires_grad for one in head.parameters()):
        return False
    given: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def pass_on(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden

    def loss(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(logits)
        return logits.new_zeros(())

    ids = torch.tensor([[0, 1]], device=next(head.parameters()).device)
    training = model.training
    with torch.no_grad(), _replaced(cast(PreTrainedModel, model), pass_on, loss):
        model.eval()(input_ids=ids, labels=ids, use_cache=False)
    model.train(training)
    return len(given) == len(seen) == 1 and given[0] is seen[0]


def _head_of(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


@contextmanager
def _replaced(model: Any, forward: Head, loss: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While it lasts, a model's head computes something else, and so does its loss function."""
    head = vars(_head_of(model))
    before = [(place, name, place.get(name)) for place, name in ((head, "forward"), (vars(model), "_loss_function"))]
    head["forward"], vars(model)["_loss_function"] = forward, loss
    try:
        yield
    finally:
        for place, name, value in before:
            if value is None:
                del place[name]
            else:
                place[name] = value


def _causal_loss(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    every_token: bool,
) -> torch.Tensor:
    """Each token predicts the one behind it; the mean over the learned ones, or their sum / num_items_in_batch."""
    hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    if not every_token:
        learned = labels != IGNORED
        hidden, labels = hidden[learned], labels[learned]
    total = chunked_cross_entropy(head, hidden, labels)
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
