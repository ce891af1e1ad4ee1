"""The export of a torch module against that module, dequantized, on batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_deploy.adapter import LoraAdapter, adapter_of, read_adapter
from lora_deploy.entries import recorded_adapters, recorded_text
from lora_deploy.errors import InputError
from lora_deploy.export.merge import drop_copies, hash_adapter
from lora_deploy.export.module import Examples, name_inputs, name_outputs
from lora_deploy.export.module_base import ModuleBase
from lora_deploy.export.traced import DTYPES
from lora_deploy.integrity import check_files
from lora_deploy.layers.model import adapted_layers
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.session import OnnxSession, numpy_dtype
from lora_deploy.verify.codes import check_adapter_codes, check_codes
from lora_deploy.verify.conclude import conclude
from lora_deploy.verify.metrics import compare_logits, is_within, worst_of
from lora_deploy.verify.reference import apply_live
from lora_deploy.verify.report import CaseResult, Metrics, ParityReport
from lora_deploy.verify.saving import save_verified
from lora_deploy.verify.sessions import open_sessions
from lora_deploy.verify.tolerances import TOLERANCES, Tolerance
from lora_deploy.verify.verify import expect_same

__all__ = ["check_module", "verify_module"]

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]


def verify_module(
    directory: str | Path,
    module: nn.Module,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    example_inputs: Examples,
    provider: str = "cpu",
) -> ParityReport:
    """Compare the export of a module, that is there already, with the module; its report is written anew.

    Args:
        directory: The export.
        module: The module that it was made from.
        adapter: As `export_onnx` took it.
        example_inputs: As `export_onnx` takes them.
        provider: "cpu" or "cuda".

    Raises:
        InputError: The export is damaged, or the module or an adapter is not the one it was made from.
        ParityError: The codes in the export are not the module's.
    """
    directory = Path(directory)
    entries, graph = check_files(directory), directory / "model.onnx"
    base = ModuleBase(module, name_inputs(module, example_inputs))
    expect_same(base.sha256(), recorded_text(entries, "base_sha256", graph), "module", base.directory, "module")
    if adapter is None:
        read = {"default": adapter_of(module)} if adapted_layers(module) else {}
    elif isinstance(adapter, Mapping):
        read = {name: read_adapter(place) for name, place in adapter.items()}
    else:
        read = {Path(adapter).resolve().name: read_adapter(adapter)}
    adapters = {name: drop_copies(lora, base) for name, lora in read.items()}
    recorded = recorded_adapters(entries, graph)
    if set(recorded) != set(adapters):
        raise InputError(
            "these are not the adapters that the export was made from",
            file=directory,
            found=", ".join(adapters) or "none",
            expected=", ".join(recorded) or "none",
            remedy="name them with adapter={NAME: DIR}",
        )
    for name, lora in adapters.items():
        expect_same(hash_adapter(lora), recorded[name]["sha256"], "adapter", lora.source, "adapter")
    report = check_module(directory, base, adapters, provider=provider)
    save_verified(directory, entries, report, {name: lora.source for name, lora in adapters.items()})
    return report


def check_module(
    directory: Path,
    base: ModuleBase,
    adapters: Mapping[str, LoraAdapter],
    *,
    provider: str = "cpu",
    max_kl: float | None = None,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> ParityReport:
    """Compare an export with the twin of the module: every output, with the batch of the example and with others.

    Args:
        directory: The export.
        base: The module and the example of its inputs.
        adapters: The adapters, by name.
        provider: The provider it was made for.
        max_kl: By how much outputs, taken for logits, may differ; None for any amount.
        on_progress: Is told the task, how much is done and of how much.

    Returns:
        The report. It passes if every case is within the tolerance and the module without each adapter's update is not.

    Raises:
        ParityError: The codes in the export are not the module's.
    """
    codes = check_codes(directory, base)
    check_adapter_codes(directory, adapters)
    on_progress("verifying", 0, len(adapters) + 1)
    results: list[CaseResult] = []
    with open_sessions(directory, provider, "stored") as sessions:
        tolerance = TOLERANCES[sessions.row]
        check = _Check(sessions.gated, directory, base, tolerance)
        branch = check.branch
        if branch in ("hot-swap", "pooled") or not adapters:
            results += check.compare("no adapter" if branch else "", None, None, None)
        for number, (name, lora) in enumerate(adapters.items()):
            on_progress("verifying", number + 1, len(adapters) + 1)
            label, chosen = ("", None) if branch in (None, "fixed") else (name, name)
            results += check.compare(label, chosen, lora, replace(lora, updates={}, tables={}))
    on_progress("verifying", len(adapters) + 1, len(adapters) + 1)
    return conclude(
        results,
        tolerance,
        sessions.notes,
        precision=sessions.row,
        provider=sessions.gated.provider,
        codes=codes,
        max_kl=max_kl,
    )


class _Check:
    """An export of a module and the batches that it is run on."""

    def __init__(self, session: OnnxSession, directory: Path, base: ModuleBase, tolerance: Tolerance) -> None:
        assert session.manifest is not None
        self.session, self.base, self.tolerance = session, base, tolerance
        self.branch = session.manifest.branch
        self.adapters = Adapters(session, directory)
        self.dtype = DTYPES[session.manifest.compute_dtype]
        # Of the session: a shadow of a bfloat16 graph takes float32.
        self.types = {node.name: node.type for node in session.session.get_inputs()}
        self.batches = _make_batches(session, base.inputs)

    def compare(
        self, label: str, chosen: str | None, trained: LoraAdapter | None, without: LoraAdapter | None
    ) -> list[CaseResult]:
        """Every batch with one adapter, against the twin with it and, as the control, without its update."""
        twin, control = _twin(self.base, trained), None if without is None else _twin(self.base, without)
        given = self.adapters.inputs(chosen)
        results = []
        for name, batch in self.batches.items():
            rounded = {
                key: value.to(self.dtype) if value.is_floating_point() else value
                for key, value in batch.items()
                if key in self.types  # torch leaves out an input that nothing reads
            }
            arrays = {key: _array(value, self.types[key]) for key, value in rounded.items()}
            found = self.session.run(arrays, given)
            exported = {key: torch.from_numpy(value.astype("float32")) for key, value in found.items()}
            rounded = {**batch, **rounded}
            export = self._distance(_run(twin, rounded), exported)
            # A single row may be one that the adapter changes little.
            other = (
                self._distance(_run(control, rounded), exported) if control is not None and name != "one row" else None
            )
            results.append(
                CaseResult(
                    adapter=label,
                    name=name,
                    export=export,
                    control=other,
                    passed=is_within(export, self.tolerance),
                    control_passed=is_within(other, self.tolerance),
                )
            )
        return results

    def _distance(self, expected: Outputs, found: Outputs) -> Metrics:
        """The worst of all outputs."""
        metrics = []
        for name, reference in expected.items():
            one, other = _as_logits(reference), _as_logits(found[name])
            if one.shape != other.shape:
                raise InputError(
                    "an output has another shape than the module's", tensor=name, found=tuple(found[name].shape)
                )
            metrics.append(compare_logits(one, other, torch.ones(one.shape[:2]), self.tolerance.tie_margin))
        worst = worst_of(metrics)
        assert worst is not None
        return worst


def _make_batches(session: OnnxSession, inputs: Inputs) -> dict[str, Inputs]:
    """The example; and, where the graph takes any number of rows, one row of it, and its rows twice, turned round."""
    first = {node.name: node.shape[0] for node in session.session.get_inputs() if node.name in inputs and node.shape}
    batch = next((size for size in first.values() if isinstance(size, str)), None)
    batches = {"as given": inputs}
    if batch is not None:
        rows = {name for name, size in first.items() if size == batch}

        def take(change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
            return {name: change(value) if name in rows else value for name, value in inputs.items()}

        batches["one row"] = take(lambda value: value[:1])
        batches["more rows"] = take(lambda value: torch.cat([value.flip(0), value]))
    return batches


def _array(value: torch.Tensor, kind: str) -> NDArray[Any]:
    """As onnxruntime's input of this type takes it."""
    if not value.is_floating_point():
        return value.numpy()
    if kind == "tensor(bfloat16)":
        return value.float().numpy().astype(numpy_dtype("bf16"))
    return value.float().numpy().astype(np.float16 if kind == "tensor(float16)" else np.float32)


def _twin(base: ModuleBase, adapter: LoraAdapter | None) -> nn.Module:
    """The dequantized module with an adapter live beside its layers, and what the adapter trained whole in place."""
    twin = base.float_twin()
    if adapter is None:
        return twin
    if adapter.updates or adapter.tables:
        return apply_live(twin, adapter)
    own = twin.state_dict()
    for name, values in adapter.parameters.items():
        own[name].copy_(values)
    return twin


@torch.inference_mode()
def _run(module: nn.Module, inputs: Inputs) -> Outputs:
    """The float32 twin on values that the export is given too."""
    given = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    return {name: value.float() for name, value in name_outputs(module(**given)).items()}


def _as_logits(values: torch.Tensor) -> torch.Tensor:
    """(batch, positions, features) of an output of any shape."""
    while values.ndim < 2:
        values = values[..., None]
    return values.reshape(values.shape[0], -1, values.shape[-1])
