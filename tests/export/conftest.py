"""Exports of tiny models, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lora_deploy.adapter import TrainingRecord, load_adapter, write_adapter
from lora_deploy.export import ExportResult, export_onnx
from lora_deploy.quantization import QuantizationScheme
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify.batches import Batch, make_batches
from lora_deploy.verify.reference import compute_logits, load_twin
from tests.conftest import CheckpointFactory, random_adapter, tiny_model

ExportFactory = Callable[..., tuple[Path, Path, ExportResult]]


# Rows of the matrices that are slow: Qwen2 is a Llama with biases, of which tests/test_families.py has all modes; FP4
# is NF4 with another table, which tests/quantization and tests/native have.
_SLOW_ROWS = {"family": "qwen2", "method": "fp4"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; pytest gives the items of every directory."""
    here = Path(__file__).parent
    for item in items:
        matrix = item.callspec.params if hasattr(item, "callspec") and here in item.path.parents else {}
        if len(matrix) > 1 and any(matrix.get(name) == value for name, value in _SLOW_ROWS.items()):
            item.add_marker(pytest.mark.slow)


# A short context makes the batches of the parity check short.
SHORT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 20},
    "qwen2": {"max_position_embeddings": 20},
    "gpt2": {"n_positions": 20},
}
# Blocks of 64 cross rows, end inside a byte (35 x 101), and q, k and v cannot be one initializer.
_ODD_ROPE = {"hidden_size": 35, "intermediate_size": 101, "head_dim": 14}
_ODD_ROPE |= {"num_attention_heads": 5, "num_key_value_heads": 1}
ODD: dict[str, dict[str, Any]] = {
    "llama": SHORT["llama"] | _ODD_ROPE,
    "qwen2": SHORT["qwen2"] | _ODD_ROPE,
    "gpt2": SHORT["gpt2"] | {"n_embd": 36, "n_inner": 101},
}


def joined(model: ir.Model, parts: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The initializers of which a stream gives one part after the other."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, part in parts:
        assert part.is_contiguous()
        found.setdefault(name, []).append(part.reshape(-1))
    shapes = {name: value.shape.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    return {name: torch.cat(own).view(tuple(shapes[name])) for name, own in found.items()}


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`adapter_dir(family, **random_adapter's options)`: a saved random adapter."""
    made: dict[object, Path] = {}

    def make(family: str, **options: object) -> Path:
        key = (family, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-adapter")
            write_adapter(random_adapter(tiny_model(family), **options), made[key])  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_export(
    checkpoint_dir: CheckpointFactory, adapter_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> ExportFactory:
    """`tiny_export(family, method, **export_onnx's options)`: (base, adapter, result) of a merged export, made once."""
    made: dict[object, tuple[Path, Path, ExportResult]] = {}

    def make(family: str = "llama", method: str = "nf4", **options: object) -> tuple[Path, Path, ExportResult]:
        key = (family, method, *sorted(options.items()))
        if key not in made:
            base, adapter = checkpoint_dir(family), adapter_dir(family)
            output = tmp_path_factory.mktemp(f"{family}-{method}-export") / "out"
            result = export_onnx(base, adapter, output=output, quantization=method, **options)  # type: ignore[arg-type]
            made[key] = (base, adapter, result)
        return made[key]

    return make


class BranchExport(NamedTuple):
    """An export and what it was made from."""

    base_dir: Path
    scheme: QuantizationScheme
    adapters: dict[str, Path]
    result: ExportResult

    @property
    def output(self) -> Path:
        """The export's directory."""
        return self.result.output

    @property
    def base(self) -> TrainingBase:
        """The training base."""
        return TrainingBase(self.base_dir, self.scheme)


BranchFactory = Callable[..., BranchExport]


@pytest.fixture(scope="session")
def branch_export(checkpoint_dir: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> BranchFactory:
    """`branch_export(family, method, branch, **options)`: an export, made once and without the parity check.

    Options: `adapters`, random_adapter's options by name; `base`, the fields of the base's configuration; `scheme`,
    recorded beside the adapters; `stored`, whether transformers quantized the checkpoint; export_onnx's own.
    """
    made: dict[str, BranchExport] = {}

    def make(
        family: str = "llama",
        method: str = "nf4",
        branch: str | None = "hot-swap",
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        base: Mapping[str, Any] | None = None,
        scheme: QuantizationScheme | None = None,
        stored: bool = False,
        **options: Any,
    ) -> BranchExport:
        key = repr((family, method, branch, adapters, base, scheme, stored, sorted(options.items())))
        if key in made:
            return made[key]
        fields = SHORT[family] if base is None else dict(base)
        directory = checkpoint_dir(family, method if stored else "none", **fields)
        root = tmp_path_factory.mktemp(f"{family}-{method}-branch")
        places = {}
        for name, asked in ({"own": {}} if adapters is None else adapters).items():
            places[name] = root / name
            write_adapter(random_adapter(tiny_model(family, **fields), **asked), places[name])
            if scheme is not None:
                sha256 = TrainingBase(directory).sha256()
                TrainingRecord(base_model="b", quantization=scheme, base_sha256=sha256).save(places[name])
        result = export_onnx(
            directory,
            places,
            output=root / "out",
            quantization="auto" if stored or scheme else method,
            **({"merge": True} if branch is None else {"merge": False, "branch": branch}),  # type: ignore[arg-type]
            **({"verify": False} | options),
        )
        made[key] = BranchExport(directory, scheme or QuantizationScheme(method=method), places, result)  # type: ignore[arg-type]
        return made[key]

    return make


def run_batch(session: OnnxSession, batch: Batch, inputs: Mapping[str, Any] | None = None) -> torch.Tensor:
    """Logits of a batch: most of it at once, the rest token by token from the cache; zeros for padding."""
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    logits, cache = session.forward(ids[:, : batch.prefilled], mask[:, : batch.prefilled], None, inputs)
    parts = [logits]
    for end in range(batch.prefilled + 1, ids.shape[1] + 1):
        logits, cache = session.forward(ids[:, end - 1 : end], mask[:, :end], cache, inputs)
        parts.append(logits)
    return torch.from_numpy(np.concatenate(parts, axis=1) * mask[:, :, None])


def run_export(export: BranchExport, adapter: str | None = None, directory: Path | None = None) -> list[torch.Tensor]:
    """What an export computes of every batch of the parity check, with one adapter for all rows."""
    session = OnnxSession(directory or export.output)
    inputs = Adapters(session, export.output).inputs(adapter)
    return [run_batch(session, batch, inputs) for batch in make_batches(export.base)]


def run_twin(export: BranchExport, adapter: str | None) -> list[torch.Tensor]:
    """What the dequantized twin computes of the same batches, with the adapter as PyTorch runs it."""
    twin = load_twin(export.base)
    if adapter is not None:
        twin = load_adapter(twin, export.adapters[adapter]).eval()
    batches = make_batches(export.base)
    return [
        compute_logits(twin, batch.input_ids, batch.attention_mask) * batch.attention_mask[:, :, None]
        for batch in batches
    ]


def distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit."""
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def cut_branches(export: BranchExport, directory: Path) -> Path:
    """The same graph on the same weights without any branch: the bare base. Returns the file."""
    model = ir.load(export.output / "model.onnx")
    for node in list(model.graph):
        if node.name is not None and node.name.endswith(".lora_add"):
            base = node.inputs[0]
            assert base is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], base)
    RemoveUnusedNodesPass()(model)
    kept = [value for value in model.graph.inputs if value.uses()]
    del model.graph.inputs[:]
    model.graph.inputs.extend(kept)
    for data in export.output.glob("*.data"):
        (directory / data.name).write_bytes(data.read_bytes())
    ir.save(model, directory / "model.onnx")
    return directory / "model.onnx"
