"""Classification of texts by an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.manifest import read_metadata
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights
from lora_deploy.run.tokenizer import load_tokenizer

__all__ = ["Classification", "OnnxClassifier", "is_classifier"]


@dataclass(frozen=True)
class Classification:
    """What a text is.

    Attributes:
        label: The class of the highest probability, by its name in the model's configuration.
        probabilities: Of every class, by name. They add up to one, but for a model of several labels a text
            (`problem_type` "multi_label_classification"), whose classes stand each for themselves. A regression's are
            its values as they are.
    """

    label: str
    probabilities: dict[str, float]


class OnnxClassifier:
    """An exported directory as a model that tells classes of texts apart.

    Args:
        directory: What `lora-deploy export` wrote.
        adapter: The adapter to run with, as `OnnxModel` takes it.
        provider: "cpu" or "cuda".
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.

    Attributes:
        tokenizer: The tokenizer of the base.
        labels: Names of the classes, in the order of the logits.
        context_length: How many tokens the model takes; None where nothing says.

    Raises:
        CheckpointError: The directory is no export or is damaged.
        AdapterError: The adapter cannot be read or is not one for this export.
        UsageError: It is no classifier, onnxruntime or the provider is not installed, or there is no such adapter.
    """

    def __init__(
        self,
        directory: str | Path,
        adapter: str | Mapping[str, float] | None = None,
        *,
        provider: Literal["cpu", "cuda"] = "cpu",
        weights: Weights = "stored",
    ) -> None:
        directory = Path(directory)
        self.session = OnnxSession(directory, provider, weights)
        if self.session.manifest is None or self.session.manifest.task != "sequence-classification":
            raise UsageError("this export is no classifier", found=directory, remedy="open it with OnnxModel")
        self._inputs = Adapters(self.session, directory).inputs(adapter)
        self.tokenizer = load_tokenizer(directory)
        config = read_json(directory / "config.json")
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers takes for granted
        self.labels = [str(names[index]) for index in sorted(names, key=int)]
        self.context_length = _find_context_length(config, self.tokenizer)
        self._squash = _choose_squash(config, len(self.labels))

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Classification]:
        """Classify texts, in one run.

        Args:
            texts: The texts, one or more.
            pairs: The second text of each, for a model of pairs (does the first entail the second?).

        Raises:
            UsageError: There is no text, the numbers of texts differ, or one is longer than the model's context.
        """
        if isinstance(texts, str) or not texts or (pairs is not None and len(pairs) != len(texts)):
            raise UsageError("classify takes a list of texts, and as many second ones or none", found=repr(texts)[:200])
        encoded = self._encode(list(texts), None if pairs is None else list(pairs))
        types = encoded.get("token_type_ids")
        logits, _ = self.session.forward(
            encoded["input_ids"], encoded["attention_mask"], adapter=self._inputs, token_type_ids=types
        )
        return [self._read(row) for row in self._squash(logits.astype(np.float64))]

    def _encode(self, texts: list[str], pairs: list[str] | None) -> Mapping[str, NDArray[np.int64]]:
        """The tokens as arrays (batch, length), padded to the longest text."""
        if len(texts) > 1 and self.tokenizer.pad_token_id is None:
            raise CheckpointError(
                "the tokenizer has no padding token, so that several texts cannot be run at once",
                file=self.tokenizer.name_or_path,
                remedy="classify one text at a time",
            )
        encoded = self.tokenizer(texts, pairs, padding=len(texts) > 1, return_tensors="np")
        longest = encoded["input_ids"].shape[1]
        if self.context_length is not None and longest > self.context_length:
            raise UsageError(
                "the text is longer than the model's context",
                found=f"{longest} tokens",
                expected=f"at most {self.context_length}",
                remedy="shorten the text",
            )
        return {name: values.astype(np.int64) for name, values in encoded.items()}

    def _read(self, row: NDArray[np.float64]) -> Classification:
        probabilities = {label: float(value) for label, value in zip(self.labels, row, strict=True)}
        return Classification(self.labels[int(row.argmax())], probabilities)


def is_classifier(directory: str | Path) -> bool:
    """Whether an export is a classifier; False for what is no export of ours."""
    try:
        return read_metadata(directory).get("lora_deploy.task") == "sequence-classification"
    except CheckpointError:
        return False


def _find_context_length(config: Mapping[str, Any], tokenizer: Any) -> int | None:
    """The smaller of what model and tokenizer say; a tokenizer that does not know says 1e30.

    RoBERTa's own configuration says two more than it takes, and its tokenizer knows better.
    """
    own = config.get("max_position_embeddings")
    limits = [int(limit) for limit in (own, tokenizer.model_max_length) if limit is not None and limit < 1e9]
    return min(limits, default=None)


def _choose_squash(config: Mapping[str, Any], labels: int) -> Any:
    """What makes probabilities of logits (batch, labels), chosen as transformers' pipeline chooses it."""
    kind = config.get("problem_type")
    if kind == "regression":
        return lambda logits: logits
    if kind == "multi_label_classification" or labels == 1:
        return lambda logits: 1 / (1 + np.exp(-logits))
    return _softmax


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
