"""Tiny classifiers and adapters that released PEFT made for them, both random and scaled: logits are of order 10."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from lora_deploy.export import prepare
from lora_deploy.export.graph import Graph
from lora_deploy.export.traced import trace_graph
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.model import keep_codes
from lora_deploy.verify.reference import load_twin
from tests.conftest import four_bit
from tests.run.conftest import byte_tokenizer

FAMILIES = ("bert", "roberta", "distilbert")
LABELS = {0: "sad", 1: "neutral", 2: "happy"}
# What is trained whole must not be quantized; DistilBERT's head is two layers.
SKIPPED = ["classifier", "pre_classifier"]
VOCABULARY, PADDING = 260, 1  # RoBERTa counts positions from the padding token's id on

_FIELDS: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 28, "pad_token_id": PADDING}
_FIELDS |= {"initializer_range": 0.2, "id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
_BERT = _FIELDS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DISTILBERT = _FIELDS | {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
_CONFIGS = {
    "bert": (BertConfig, _BERT),
    "roberta": (RobertaConfig, _BERT | {"type_vocab_size": 1}),
    "distilbert": (DistilBertConfig, _DISTILBERT),
}
# PEFT 0.21 cannot take all of DistilBERT's linear layers: "classifier", which it saves, is the end of "pre_classifier".
ALL_LINEAR: dict[str, str | list[str]] = {
    "bert": "all-linear",
    "roberta": "all-linear",
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
# PEFT 0.21 leaves the head out of "all-linear" for classifiers of sequences only.
_BERT_LAYERS = ["query", "key", "value", "dense"]
OF_TOKENS = {"bert": _BERT_LAYERS, "roberta": _BERT_LAYERS, "distilbert": list(ALL_LINEAR["distilbert"])}
QUERY_VALUE = {"bert": ["query", "value"], "roberta": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}

ClassifierFactory = Callable[..., Path]


def save_classifier(
    family: str, directory: Path, *, kind: Any = AutoModelForSequenceClassification, **fields: Any
) -> None:
    """Save a random classifier (or, by `kind`, another model of its family) and a tokenizer of bytes."""
    torch.manual_seed(0)
    make, defaults = _CONFIGS[family]
    model = kind.from_config(make(**(defaults | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(noise if name.endswith("bias") else 1 + noise)
            elif "classifier" in name:
                parameter.mul_(5)
    model.save_pretrained(directory)
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.pad_token = "<s>"  # of id 1
    tokenizer.model_max_length = 26
    tokenizer.save_pretrained(directory)


def load_theirs(directory: Path, method: str, **options: Any) -> PreTrainedModel:
    """The base as transformers loads it, quantized by bitsandbytes if that is asked for."""
    if method in ("nf4", "fp4"):
        options["quantization_config"] = four_bit(method, llm_int8_skip_modules=SKIPPED)
    if method == "int8":  # its own forward rounds activations too, which no export does
        return load_twin(TrainingBase(directory, QuantizationScheme(method="int8")))
    names = AutoConfig.from_pretrained(directory).architectures
    of_tokens = names[0].endswith("ForTokenClassification")
    kind = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model = kind.from_pretrained(directory, **options)
    keep_codes(model)
    return model.eval()


def train_with_peft(base: Path, directory: Path, targets: str | Sequence[str], **config: Any) -> None:
    """Let PEFT make and save an adapter in which nothing that it trains is what it was."""
    torch.manual_seed(1)
    options = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 10} | config
    labels = {} if "num_labels" not in options else {"num_labels": options.pop("num_labels")}
    model: Any = peft.get_peft_model(
        load_theirs(base, "none", **labels), peft.LoraConfig(target_modules=targets, **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.2 if "lora_" in name or "bias" in name or not labels else 2.0
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(directory)


def padded_batches(seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of the same rows of different lengths, padded on the right, and on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in (13, 9, 1, 6)]
    batches = []
    for left in (False, True):
        ids = torch.full((len(rows), 13), PADDING)
        for row, tokens in zip(ids, rows, strict=True):
            row[slice(13 - len(tokens), 13) if left else slice(0, len(tokens))] = tokens
        batches.append((ids, (ids != PADDING).long()))
    return batches


@torch.no_grad()
def peft_logits(base: Path, adapter: Path | None, method: str, **options: Any) -> list[torch.Tensor]:
    """What released PEFT computes of each batch, with the adapter live."""
    model: Any = load_theirs(base, method, **options)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return [model(input_ids=ids, attention_mask=mask).logits for ids, mask in padded_batches()]


@contextmanager
def remembering_traces() -> Iterator[None]:
    """Trace each graph once and hand out copies: a trace takes seconds, and the weights have no part in it."""
    made: dict[tuple[str, str], Graph] = {}

    def trace(config: PreTrainedConfig, *, precision: str, file: str | Path) -> Graph:
        key = (config.to_json_string(), precision)
        if key not in made:
            made[key] = trace_graph(config, precision=precision, file=file)
        return Graph(made[key].model.clone(), dict(made[key].sources), {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "trace_graph", trace)
        yield


@pytest.fixture(scope="module", autouse=True)
def remembered_traces() -> Iterator[None]:
    """Within a module, each graph is traced once."""
    with remembering_traces():
        yield


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> ClassifierFactory:
    """`classifier_dir(family, method="none")`: a checkpoint, made once. Do not change it."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, method: str = "none") -> Path:
        if (family, method) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{method}")
            if method == "none":
                save_classifier(family, directory)
            else:
                dense = make(family)
                load_theirs(dense, method).save_pretrained(directory)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copyfile(dense / name, directory / name)
            made[family, method] = directory
        return made[family, method]

    return make


@pytest.fixture(scope="session")
def peft_adapter(classifier_dir: ClassifierFactory, tmp_path_factory: pytest.TempPathFactory) -> ClassifierFactory:
    """`peft_adapter(family, targets=None)`: what PEFT saved, made once; None for all linear layers."""
    made: dict[str, Path] = {}

    def make(family: str, targets: list[str] | None = None) -> Path:
        key = f"{family} {targets}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-adapter")
            train_with_peft(classifier_dir(family), made[key], targets or ALL_LINEAR[family])
        return made[key]

    return make
