"""Tiny encoder-decoders of T5's kind, and what released PEFT computes of them with an adapter live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_deploy.export import prepare, seq2seq
from lora_deploy.export.graph import Graph
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.model import keep_codes
from lora_deploy.verify.reference import load_twin
from lora_deploy.verify.seq2seq import _Batch, open_parts, run_parts
from tests.conftest import four_bit

# T5 1.0, whose head is the embedding, scaled; T5 1.1 and mT5, with a head and a gate of their own.
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "mt5": {"tie_word_embeddings": False, "num_layers": 1, "num_decoder_layers": 2},
    "gated": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 1,
        "num_decoder_layers": 2,
    },
}
TARGETS = ["q", "k", "v", "o", "wi", "wo", "wi_0", "wi_1"]
VOCABULARY = 131


def save_t5(kind: str, directory: Path) -> None:
    torch.manual_seed(0)
    is_mt5 = kind == "mt5"
    config = (MT5Config if is_mt5 else T5Config)(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=12,
        d_ff=112,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **({"num_layers": 2} | KINDS[kind]),
    )
    config.tie_word_embeddings = kind == "tied"  # what T5Config makes of its argument is always True
    model = (MT5ForConditionalGeneration if is_mt5 else T5ForConditionalGeneration)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                size = 2.5 if name == "decoder.final_layer_norm.weight" else 1.0  # so that logits are of order 10
                parameter.copy_(size + torch.randn_like(parameter) * 0.1)
            elif "relative" in name:
                parameter.copy_(torch.randn_like(parameter) * 2)
            elif name == "lm_head.weight":
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif name != "shared.weight":  # what is read must outweigh the embedding of the last token
                parameter.mul_(5 if name.endswith(("o.weight", "wo.weight")) else 2)
    model.save_pretrained(directory)


def load_theirs(directory: Path, method: str) -> Any:
    options: dict[str, Any] = {}
    if method in ("nf4", "fp4"):
        options["quantization_config"] = four_bit(method)
    if method == "int8":  # its own forward rounds activations too, which no export does
        return load_twin(TrainingBase(directory, QuantizationScheme(method="int8")))
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, **options)
    keep_codes(model)
    return model.eval()


def train_with_peft(base: Path, directory: Path, targets: list[str], **config: Any) -> None:
    torch.manual_seed(1)
    present = {name.rpartition(".")[2] for name, _ in load_theirs(base, "none").named_modules()}
    options = {"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 10} | config
    targets = [name for name in targets if name in present]
    model: Any = peft.get_peft_model(load_theirs(base, "none"), peft.LoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)


def padded_batches() -> list[_Batch]:
    """The same texts padded on the right and on the left, and answers."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in (13, 9, 1, 6)]
    answers = torch.randint(2, VOCABULARY, (4, 10), generator=generator)
    batches = []
    for left in (False, True):
        ids = torch.zeros(len(rows), 13, dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[slice(13 - len(tokens), 13) if left else slice(0, len(tokens))] = tokens
        batches.append(_Batch("left" if left else "right", ids, (ids != 0).long(), answers))
    return batches


@torch.no_grad()
def peft_outputs(base: Path, adapter: Path | None, method: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What released PEFT computes with the adapter live: the encoder's output, and logits."""
    model = load_theirs(base, method)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for batch in padded_batches():
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=batch.decoder_ids
        )
        found.append((output.encoder_last_hidden_state, output.logits))
    return found


def distance(directory: Path, expected: list[tuple[torch.Tensor, torch.Tensor]], adapter: str | None = None) -> float:
    parts, worst = open_parts(directory), 0.0
    for batch, (hidden, logits) in zip(padded_batches(), expected, strict=True):
        found = run_parts(parts, directory, adapter, batch)
        mask = batch.attention_mask.bool()
        worst = max(worst, float((found.hidden - hidden)[mask].abs().max()), float((found.logits - logits).abs().max()))
    return worst


@contextmanager
def remembered_traces() -> Iterator[None]:
    """Trace each model once and hand out copies."""
    made: dict[str, dict[str, Graph]] = {}

    def trace(config: Any, aliases: Any, **options: Any) -> dict[str, Graph]:
        key = f"{config.to_json_string()} {aliases} {options['precision']}"
        if key not in made:
            made[key] = seq2seq.trace_parts(config, aliases, **options)
        return {name: Graph(one.model.clone(), dict(one.sources), {}) for name, one in made[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "trace_parts", trace)
        yield
