"""What a model is for: to go on with a text, or to say which class a text, or each of its tokens, belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

__all__ = ["Task", "auto_class", "find_task", "is_classification"]

# "module" is any torch module that was given in memory.
Task = Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq-lm", "module"]

# The end of a model's class, and PEFT's task_type, for each task that is not the default.
_NAMES: dict[Task, tuple[str, str]] = {
    "sequence-classification": ("ForSequenceClassification", "SEQ_CLS"),
    "token-classification": ("ForTokenClassification", "TOKEN_CLS"),
}
# T5 and mT5; other encoder-decoders are not known.
_SEQ2SEQ = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


def find_task(architectures: Iterable[str] | None, task_types: Iterable[str | None] = ()) -> Task:
    """The task of a checkpoint and its adapters.

    Args:
        architectures: Of the checkpoint's configuration, "BertForSequenceClassification" for one.
        task_types: PEFT's `task_type` of each adapter: a classifier may have been trained on a checkpoint without head.
    """
    names, types = list(architectures or ()), list(task_types)
    for task, (ending, _) in _NAMES.items():
        if any(name.endswith(ending) for name in names):
            return task
    if any(name in _SEQ2SEQ for name in names):
        return "seq2seq-lm"
    return next((task for task, (_, peft_type) in _NAMES.items() if peft_type in types), "causal-lm")


def is_classification(task: Task) -> bool:
    """Whether the model has classes for logits, and neither a vocabulary nor a cache."""
    return task in _NAMES


def auto_class(task: Task) -> Any:
    """The class of transformers that loads models for a task."""
    import transformers

    classes = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    }
    return classes.get(task, transformers.AutoModelForCausalLM)
