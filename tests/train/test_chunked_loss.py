"""The loss in chunks: transformers' own loss is the judge of value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from lora_deploy.config import LoraConfig
from lora_deploy.layers import get_lora_model
from lora_deploy.train.chunked_loss import can_be_chunked, chunked_cross_entropy, chunked_loss
from tests.conftest import TINY_FAMILIES, VOCABULARY, random_adapter, tiny_model, token_ids
from tests.layers.kept import kept_storages


def batch() -> dict[str, torch.Tensor]:
    """Two rows of which some tokens are learned."""
    ids = token_ids()
    labels = ids.clone()
    labels[0, :4], labels[1, -2:] = -100, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def adapted(family: str, **config: Any) -> PreTrainedModel:
    model = tiny_model(family).train()
    random_adapter(model, **config)
    return model


def loss_and_gradients(model: PreTrainedModel, **more: Any) -> list[torch.Tensor]:
    loss = model(**batch(), use_cache=False, **more).loss
    return [loss.detach(), *torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad])]


@pytest.mark.parametrize("items", [None, 40, torch.tensor(37)], ids=["mean", "a number", "a tensor"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_value_and_gradients_are_those_of_transformers(family: str, items: Any) -> None:
    model = adapted(family).double()
    assert can_be_chunked(model)
    more = {} if items is None else {"num_items_in_batch": items}
    expected = loss_and_gradients(model, **more)
    with chunked_loss(model):
        found = loss_and_gradients(model, **more)
    assert (found[0].dtype, found[0].shape) == (torch.float32, torch.Size([]))
    for one, other in zip(found, expected, strict=True):  # both compute the loss itself in float32
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    torch.testing.assert_close(loss_and_gradients(model, **more), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_label_less_is_another_loss() -> None:
    model, given = adapted("llama"), batch()
    expected = float(model(**given, use_cache=False).loss)
    given["labels"][0, 5:] = -100
    with chunked_loss(model):
        assert abs(float(model(**given, use_cache=False).loss) - expected) > 1e-3 * expected


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_any_size_of_chunk_gives_the_same(chunk: int) -> None:
    head = torch.nn.Linear(6, 50).requires_grad_(False)
    hidden, labels = torch.randn(10, 6, requires_grad=True), torch.randint(0, 50, (10,))
    expected = F.cross_entropy(head(hidden), labels, reduction="sum")
    found = chunked_cross_entropy(head, hidden, labels, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(3 * loss, hidden)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_answer() -> None:
    head = torch.nn.Identity()
    logits = torch.tensor([[1e4, -1e4, 0.0], [80.0, 81.0, -200.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    found = chunked_cross_entropy(head, logits, labels)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="sum"), rtol=1e-6, atol=0)


def test_a_narrow_head_is_scaled_in_float32() -> None:
    head = torch.nn.Linear(6, 50).bfloat16().requires_grad_(False)
    hidden, labels = torch.randn(10, 6).bfloat16().requires_grad_(), torch.randint(0, 50, (10,))
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="sum") / 300
    found = chunked_cross_entropy(head, hidden, labels, chunk=4) / 300
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2**-6, atol=2**-7 * float(gradients[1].abs().max()))


def test_the_logits_are_not_kept() -> None:
    model, ids = adapted("llama"), token_ids(4, 30)
    own = [*model.parameters(), *model.buffers(), ids]
    sizes = []
    for chunked in (True, False):

        def forward(chunked: bool = chunked) -> torch.Tensor:
            if not chunked:
                return model(input_ids=ids, labels=ids, use_cache=False).loss
            with chunked_loss(model):
                return model(input_ids=ids, labels=ids, use_cache=False).loss

        sizes.append(kept_storages(forward, own).values())
    logits = ids.numel() * VOCABULARY * 4
    assert max(sizes[1]) == logits
    assert logits not in sizes[0]
    assert sum(sizes[0]) <= sum(sizes[1]) - logits + 4 * 29 * model.config.hidden_size * 4


def test_tokens_that_are_not_learned_do_not_go_through_the_head() -> None:
    model, rows = adapted("llama"), []
    own = model.lm_head.forward

    def count(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return own(hidden)

    model.lm_head.forward = count
    with chunked_loss(model):
        model(**batch(), use_cache=False)
        assert sum(rows) == int((batch()["labels"][:, 1:] != -100).sum()) == 11
    with chunked_loss(model, every_token=True):
        model(input_ids=token_ids(), labels=token_ids(), use_cache=False)
        assert sum(rows) == 11 + 16
    assert model.lm_head.forward is count


def test_nothing_learned_is_no_number_as_in_transformers() -> None:
    model, given = adapted("llama"), batch()
    given["labels"].fill_(-100)
    with torch.no_grad(), chunked_loss(model):
        assert model(**given, use_cache=False).loss.isnan()


def test_what_changes_logits_on_their_way_is_found() -> None:
    fields = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    capped = Gemma2ForCausalLM(Gemma2Config(**fields, final_logit_softcapping=5.0)).requires_grad_(False)
    assert not can_be_chunked(capped)
    assert can_be_chunked(Gemma2ForCausalLM(Gemma2Config(**fields, final_logit_softcapping=None)).requires_grad_(False))


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_head_that_is_trained_keeps_the_loss_of_transformers(config: dict[str, Any]) -> None:
    assert not can_be_chunked(adapted("llama", **config))


def test_a_head_or_a_loss_of_somebody_else_is_left_alone() -> None:
    model = adapted("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert not can_be_chunked(model)
    model = adapted("llama")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert not can_be_chunked(model)
    assert not can_be_chunked(torch.nn.Linear(2, 2))


def test_looking_changes_nothing() -> None:
    model = get_lora_model(tiny_model("llama").train(), LoraConfig(lora_dropout=0.5))
    state = torch.get_rng_state()
    assert can_be_chunked(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert "forward" not in vars(model.lm_head)
    assert "_loss_function" not in vars(model)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = adapted("llama")
    with pytest.raises(RuntimeError, match="stop"), chunked_loss(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model.lm_head)
