"""What a model is for: to go on with a text, or to say which class a text belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

__all__ = ["Task", "auto_class", "find_task"]

Task = Literal["causal-lm", "sequence-classification"]

_CLASSIFIER, _PEFT_CLASSIFIER = "ForSequenceClassification", "SEQ_CLS"


def find_task(architectures: Iterable[str] | None, task_types: Iterable[str | None] = ()) -> Task:
    """The task of a checkpoint and its adapters.

    Args:
        architectures: Of the checkpoint's configuration, "BertForSequenceClassification" for one.
        task_types: PEFT's `task_type` of each adapter: a classifier may have been trained on a checkpoint without head.
    """
    is_classifier = any(name.endswith(_CLASSIFIER) for name in architectures or ()) or _PEFT_CLASSIFIER in task_types
    return "sequence-classification" if is_classifier else "causal-lm"


def auto_class(task: Task) -> Any:
    """The class of transformers that loads models for a task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "sequence-classification" else AutoModelForCausalLM
