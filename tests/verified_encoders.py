"""Tiny classifiers and encoder-decoders, measured as `tests.verified` measures decoders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from lora_deploy.adapter import LoraAdapter, read_adapter, write_adapter
from lora_deploy.export import export_onnx
from lora_deploy.export.source import SourceChoice
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from tests import classifiers, encoder_decoders
from tests.measured import ADAPTER, Measured

__all__ = ["T5_KINDS", "ClassifierTask", "TinyClassifier", "TinyEncoderDecoder"]

ClassifierTask = Literal["sequence-classification", "token-classification"]
T5_KINDS = tuple(encoder_decoders.KINDS)


class _Tiny:
    """A base, and two adapters of all its linear layers: "own", and "other" for a pool to choose the right one of."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, root / "base"

    @property
    def model_type(self) -> str:
        """As the configuration has it."""
        return str(AutoConfig.from_pretrained(self.base).model_type)

    def _export(self, adapter: Path, mode: str, method: str) -> tuple[Path, SourceChoice, str | None]:
        """Where it is, where its graph came from, and the name that its adapter is chosen by."""
        output = Path(tempfile.mkdtemp(dir=self.root)) / "out"
        adapters = {ADAPTER: adapter}
        if mode == "pooled":
            adapters = {"other": _negated(adapter), ADAPTER: adapter}
        how: dict[str, Any] = {"merge": True} if mode == "merge" else {"merge": False, "branch": mode}
        result = export_onnx(self.base, adapters, output=output, quantization=method, verify=False, **how)
        assert result.graph is not None
        return output, result.graph, ADAPTER if mode in ("hot-swap", "pooled") else None


def _negated(directory: Path) -> Path:
    other = directory.parent / f"{directory.name}-other"
    if not other.exists():
        adapter = read_adapter(directory)
        updates = {name: type(one)(one.A, -one.B, one.scaling) for name, one in adapter.updates.items()}
        write_adapter(LoraAdapter(adapter.config, updates, adapter.parameters), other)
    return other


class TinyClassifier(_Tiny):
    """A classifier; its head is trained whole for merge and fixed, and has a low rank where it goes into slots.

    Args:
        root: Where its files go.
        family: "bert", "roberta" or "distilbert".
        task: Of texts, or of their tokens.
    """

    def __init__(self, root: Path, family: str, task: ClassifierTask) -> None:
        super().__init__(root)
        self._family, self._of_tokens = family, task == "token-classification"
        kind = AutoModelForTokenClassification if self._of_tokens else AutoModelForSequenceClassification
        classifiers.save_classifier(family, self.base, kind=kind)

    def _adapter(self, mode: str) -> Path:
        in_slots = mode in ("hot-swap", "pooled")
        adapter = self.root / ("low-rank-head" if in_slots else "whole-head")
        if not adapter.exists():
            targets = classifiers.OF_TOKENS[self._family]
            if in_slots:
                heads = ["classifier"]
                if not self._of_tokens:
                    heads = {"roberta": ["out_proj"], "distilbert": ["classifier"]}.get(self._family, heads)
                classifiers.train_with_peft(self.base, adapter, [*targets, *heads], task_type=None)
            else:
                task_type = "TOKEN_CLS" if self._of_tokens else "SEQ_CLS"
                classifiers.train_with_peft(self.base, adapter, targets, task_type=task_type)
        return adapter

    def measure(self, mode: str, method: str) -> Measured:
        """Export, run, and compare."""
        adapter = self._adapter(mode)
        output, graph, name = self._export(adapter, mode, method)
        session = OnnxSession(output)
        chosen = Adapters(session, output).inputs(name)
        found, counts = [], []
        for ids, mask in classifiers.padded_batches():
            found.append(torch.from_numpy(session.forward(ids.numpy(), mask.numpy(), adapter=chosen)[0]))
            counts.append(mask.bool() if self._of_tokens else torch.ones(len(ids), dtype=torch.bool))
        expected, alone = (classifiers.peft_logits(self.base, one, method) for one in (adapter, None))

        def worst(others: list[torch.Tensor]) -> float:
            pairs = zip(others, expected, counts, strict=True)
            return max(float((one - other)[count].abs().max()) for one, other, count in pairs)

        size = max(float(one.abs().max()) for one in expected)
        return Measured(worst(found), worst(alone), size, graph)


class TinyEncoderDecoder(_Tiny):
    """T5 or mT5.

    Args:
        root: Where its files go.
        kind: "tied" (T5 1.0), "gated" (T5 1.1) or "mt5".
    """

    def __init__(self, root: Path, kind: str) -> None:
        super().__init__(root)
        encoder_decoders.save_t5(kind, self.base)
        encoder_decoders.train_with_peft(self.base, root / ADAPTER, encoder_decoders.TARGETS)

    def measure(self, mode: str, method: str) -> Measured:
        """Export, run, and compare: what the encoder gives, prefill and cached decode."""
        adapter = self.root / ADAPTER
        output, graph, name = self._export(adapter, mode, method)
        expected, alone = (encoder_decoders.peft_outputs(self.base, one, method) for one in (adapter, None))
        control = max(float((one - other).abs().max()) for (_, one), (_, other) in zip(alone, expected, strict=True))
        size = max(float(logits.abs().max()) for _, logits in expected)
        return Measured(encoder_decoders.distance(output, expected, name), control, size, graph)
