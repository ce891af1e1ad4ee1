"""Classification of texts, and of their tokens, by an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.inputs.json_files import read_json
from lora_deploy.manifest import read_metadata
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, Weights
from lora_deploy.task import Task
from lora_deploy.tokenizer import load_tokenizer

__all__ = ["Classification", "OnnxClassifier", "OnnxTokenClassifier", "TokenClassification", "exported_task"]


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


@dataclass(frozen=True)
class TokenClassification:
    """What a token of a text is.

    Attributes:
        token: As the tokenizer writes it.
        label: The class of the highest probability.
        probability: Its own.
    """

    token: str
    label: str
    probability: float


class _Classifier:
    """An exported directory as a model with classes for logits.

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
        UsageError: It is a model of another task, onnxruntime or the provider is not installed, or there is no such
            adapter.
    """

    _task: ClassVar[Task]

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
        task = self.session.manifest.task if self.session.manifest is not None else None
        if task != self._task:
            opener = next((kind.__name__ for kind in _Classifier.__subclasses__() if kind._task == task), "OnnxModel")
            kind = "classifier" if self._task == "sequence-classification" else "classifier of tokens"
            raise UsageError(f"this export is no {kind}", found=directory, remedy=f"open it with {opener}")
        self._inputs = Adapters(self.session, directory).inputs(adapter)
        self.tokenizer = load_tokenizer(directory)
        config = read_json(directory / "config.json")
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers takes for granted
        self.labels = [str(names[index]) for index in sorted(names, key=int)]
        self.context_length = _find_context_length(config, self.tokenizer)
        self._config = config

    def _logits(self, encoded: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
        """What the model gives for tokens (batch, length): (batch, labels) or (batch, length, labels)."""
        types = encoded.get("token_type_ids")
        logits, _ = self.session.forward(
            encoded["input_ids"], encoded["attention_mask"], adapter=self._inputs, token_type_ids=types
        )
        return logits.astype(np.float64)

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


class OnnxClassifier(_Classifier):
    """An exported directory as a model that tells classes of texts apart.

    Arguments, attributes and errors are those of every classifier:
    `OnnxClassifier(directory, adapter=None, provider="cpu", weights="stored")`, with `tokenizer`, `labels` and
    `context_length`.
    """

    _task = "sequence-classification"

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
        squash = _choose_squash(self._config, len(self.labels))
        return [self._read(row) for row in squash(self._logits(encoded))]

    def _read(self, row: NDArray[np.float64]) -> Classification:
        probabilities = {label: float(value) for label, value in zip(self.labels, row, strict=True)}
        return Classification(self.labels[int(row.argmax())], probabilities)


class OnnxTokenClassifier(_Classifier):
    """An exported directory as a model that says of every token of a text which class it is of (names, for one).

    Arguments, attributes and errors are those of `OnnxClassifier`.
    """

    _task = "token-classification"

    def classify(self, texts: Sequence[str]) -> list[list[TokenClassification]]:
        """Classify the tokens of texts, in one run.

        Args:
            texts: The texts, one or more.

        Returns:
            For each text its tokens in order, without padding, special tokens of the tokenizer included.

        Raises:
            UsageError: There is no text, or one is longer than the model's context.
        """
        if isinstance(texts, str) or not texts:
            raise UsageError("classify takes a list of texts", found=repr(texts)[:200])
        encoded = self._encode(list(texts), None)
        found = []
        for ids, mask, rows in zip(
            encoded["input_ids"], encoded["attention_mask"], _softmax(self._logits(encoded)), strict=True
        ):
            kept = mask.astype(bool)
            tokens = self.tokenizer.convert_ids_to_tokens(ids[kept].tolist())
            found.append([self._read(token, row) for token, row in zip(tokens, rows[kept], strict=True)])
        return found

    def _read(self, token: str, row: NDArray[np.float64]) -> TokenClassification:
        best = int(row.argmax())
        return TokenClassification(token, self.labels[best], float(row[best]))


def exported_task(directory: str | Path) -> Task:
    """What an export is for; "causal-lm" for what is no export of ours."""
    try:
        task = read_metadata(directory).get("lora_deploy.task")
    except CheckpointError:
        return "causal-lm"
    return next((known for known in get_args(Task) if known == task), "causal-lm")


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
