"""What is verified of each family, found by exporting tiny models: the table that `lora-deploy models` prints.

python -m tests.verified --write    finds out everything, some ten minutes, and writes the table into the package
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.export import export_onnx, prepare
from lora_deploy.export.graph import Graph
from lora_deploy.export.source import SourceChoice, choose_source
from lora_deploy.export.traced_decoder import trace_decoder
from lora_deploy.models import VerifiedFamily, VerifiedTask, write_table
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.model import keep_codes, quantize_model
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify.batches import Batch
from lora_deploy.verify.reference import load_twin
from tests import classifiers, encoder_decoders
from tests.conftest import four_bit
from tests.families import CONTEXT, FAMILIES
from tests.measured import ADAPTER, METHODS, MODES, Measured
from tests.verified_encoders import T5_KINDS, ClassifierTask, TinyClassifier, TinyEncoderDecoder


class Tiny:
    """A tiny random model of a family, its checkpoint, and an adapter on all linear layers that PEFT made and saved.

    Args:
        root: Where its files go.
        name: Of the family.
        variant: Of its configuration.
    """

    def __init__(self, root: Path, name: str, variant: str = "") -> None:
        self.config = FAMILIES[name].config(variant)
        self.base, self.adapter = root / "base", root / ADAPTER
        self._root = root
        self._references: dict[tuple[str, bool], list[torch.Tensor]] = {}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1:  # Gemma's norms multiply by one more than their weights
                    noise = torch.randn_like(parameter) * 0.1
                    around_zero = key.endswith("bias") or self.config.model_type.startswith("gemma")
                    parameter.copy_(noise if around_zero else 1 + noise)
        model.save_pretrained(self.base)
        self._train(model)

    def _train(self, model: PreTrainedModel) -> None:
        is_conv1d = self.config.model_type == "gpt2"
        config = peft.LoraConfig(
            target_modules="all-linear", r=3, lora_alpha=7, fan_in_fan_out=is_conv1d, task_type="CAUSAL_LM"
        )
        adapted: Any = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
        adapted.save_pretrained(self.adapter)
        with torch.no_grad():  # another one, for a pool to choose the right one of
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.neg_()
        adapted.save_pretrained(self._root / "other")

    def reference(self, method: str, adapted: bool = True) -> list[torch.Tensor]:
        """What released PEFT computes of each batch, the adapter live on a base that bitsandbytes quantized."""
        if (method, adapted) not in self._references:
            model: Any = _load(self.base, method, self.config.model_type)
            if adapted:
                model = peft.PeftModel.from_pretrained(model, self.adapter).eval()
            self._references[method, adapted] = [_peft_logits(model, batch) for batch in make_batches()]
        return self._references[method, adapted]

    def measure(self, mode: str, method: str, graph: str = "auto", **options: Any) -> Measured:
        """Export, run, and compare.

        Raises:
            CheckpointError: It cannot be exported.
        """
        output = Path(tempfile.mkdtemp(dir=self._root)) / "out"
        adapters = (
            {ADAPTER: self.adapter} if mode != "pooled" else {"other": self._root / "other", ADAPTER: self.adapter}
        )
        how: dict[str, Any] = {"merge": True} if mode == "merge" else {"merge": False, "branch": mode}
        how |= {"quantization": method, "graph": graph, "verify": False, **options}
        result = export_onnx(self.base, adapters, output=output, **how)
        session = OnnxSession(output)
        chosen = Adapters(session, output).inputs(ADAPTER if mode in ("hot-swap", "pooled") else None)
        found = [_onnx_logits(session, batch, chosen) for batch in make_batches()]
        expected, base = self.reference(method), self.reference(method, adapted=False)
        assert result.graph is not None
        size = max(float(one.abs().max()) for one in expected)
        return Measured(_distance(found, expected), _distance(base, expected), size, result.graph)


def make_batches() -> list[Batch]:
    """Rows of different lengths padded on the right, on the left, and one row alone, each with tokens to decode.

    Windows are shorter than the longest row, and than what is decoded; a row of one token is all padding to others.
    """
    generator = torch.Generator().manual_seed(3)
    lengths, decoded = (13, 9, 1, 6), 9
    assert max(lengths) + decoded < CONTEXT
    rows = [torch.randint(3, 131, (length,), generator=generator) for length in lengths]
    more = torch.randint(3, 131, (len(rows), decoded), generator=generator)
    batches = []
    for name, some in (("right", rows), ("left", rows), ("single", rows[:1])):
        ids = torch.zeros((len(some), max(lengths)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(some):
            place = slice(-len(row), None) if name == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        grown = more[: len(some)]
        whole = torch.cat([mask, torch.ones_like(grown)], dim=1)
        batches.append(Batch(name, torch.cat([ids, grown], dim=1), whole, decoded))
    return batches


def _load(base: Path, method: str, model_type: str) -> PreTrainedModel:
    """The base as transformers loads it, quantized by bitsandbytes through transformers.

    transformers 5.24 quantizes layers of the very class nn.Linear only and leaves Falcon's own dense; `train` does not.
    """
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if model_type == "falcon" and method in ("nf4", "fp4"):
        return quantize_model(AutoModelForCausalLM.from_pretrained(base, **options), method).eval()  # type: ignore[return-value]
    if method in ("nf4", "fp4"):
        options["quantization_config"] = four_bit(method)
    elif method == "int8":
        # Its own forward rounds activations too, which no export does: the dequantized twin is the reference.
        return load_twin(TrainingBase(base, QuantizationScheme(method="int8")))
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    keep_codes(model)
    return model.eval()


@torch.no_grad()
def _peft_logits(model: Any, batch: Batch) -> torch.Tensor:
    mask = batch.attention_mask
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    output = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return torch.as_tensor(output.logits * mask[:, :, None])


def _onnx_logits(session: OnnxSession, batch: Batch, adapter: Any) -> torch.Tensor:
    """Most of it at once, the rest token by token from the cache; zeros for padding."""
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    logits, cache = session.forward(ids[:, : batch.prefilled], mask[:, : batch.prefilled], None, adapter)
    parts = [torch.from_numpy(logits)]
    for end in range(batch.prefilled + 1, ids.shape[1] + 1):
        logits, cache = session.forward(ids[:, end - 1 : end], mask[:, :end], cache, adapter)
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1) * batch.attention_mask[:, :, None]


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


@contextmanager
def remembered_traces() -> Iterator[None]:
    """Trace each graph once and hand out copies: a trace takes seconds, and the weights have no part in it."""
    made: dict[tuple[str, str], Graph] = {}

    def trace(config: PreTrainedConfig, shapes: Any, *, precision: str, file: str | Path) -> Graph:
        key = (config.to_json_string(), precision)
        if key not in made:
            made[key] = trace_decoder(config, shapes, precision=precision, file=file)
        return Graph(made[key].model.clone(), dict(made[key].sources), {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "trace_decoder", trace)
        yield


def choose(config: PreTrainedConfig) -> SourceChoice:
    """Where `--graph auto` takes a graph from."""
    return choose_source("auto", copy.deepcopy(config), "causal-lm", "config.json")


def find_family(root: Path, name: str) -> VerifiedFamily:
    """What holds for one family of decoders: every mode on every base, and its variants, merged."""
    model = Tiny(root / name, name)
    traced, refused = [], []
    for variant in FAMILIES[name].variants:
        try:
            measured = Tiny(root / f"{name} {variant}", name, variant).measure("merge", "none")
        except CheckpointError:
            refused.append(variant)
            continue
        if not measured.holds:
            raise AssertionError(f"{name}, {variant}: exported, and wrong: {measured}")
        if measured.choice.source != choose(model.config).source:
            traced.append(variant)
    row = _row(model, model.config.model_type, "causal-lm")
    return row.model_copy(update={"traced": tuple(traced), "refused": tuple(refused)})


def find_classifier(root: Path, name: str, task: ClassifierTask) -> VerifiedFamily:
    """What holds for a family of classifiers."""
    model = TinyClassifier(root / f"{name} {task}", name, task)
    return _row(model, model.model_type, task)


def find_encoder_decoder(root: Path, kind: str) -> VerifiedFamily:
    """What holds for T5 1.0 ("tied"), T5 1.1 ("gated") and mT5."""
    model = TinyEncoderDecoder(root / kind, kind)
    name = model.model_type if kind != "gated" else f"{model.model_type}, gated"
    return _row(model, name, "seq2seq-lm")


def _row(model: Tiny | TinyClassifier | TinyEncoderDecoder, model_type: str, task: VerifiedTask) -> VerifiedFamily:
    held: dict[str, tuple[str, ...]] = {}
    sources = set()
    for mode in MODES:
        kept = []
        for method in METHODS:
            try:
                measured = model.measure(mode, method)
            except UsageError:  # a kind of export that there is not for this task
                continue
            sources.add(measured.choice.source)
            kept += [method] if measured.holds else []
        held[mode] = tuple(kept)
    (source,) = sources
    return VerifiedFamily(model_type=model_type, task=task, graph=source, merge=held.pop("merge"), branch=held)


def find_table(root: Path) -> list[VerifiedFamily]:
    """The whole table, found anew."""
    with remembered_traces(), classifiers.remembering_traces(), encoder_decoders.remembered_traces():
        rows = [find_family(root, name) for name in FAMILIES]
        for task in get_args(ClassifierTask):
            rows += [find_classifier(root, name, task) for name in classifiers.FAMILIES]
        return [*rows, *(find_encoder_decoder(root, kind) for kind in T5_KINDS)]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as directory:
        write_table(find_table(Path(directory)))
