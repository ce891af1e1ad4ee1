"""Any torch module: traced, lowered as every graph, and compared with released PEFT on the same module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_deploy.adapter import LoraUpdate, save_adapter
from lora_deploy.config import LoraConfig
from lora_deploy.errors import AdapterError, CheckpointError, InputError, LoraDeployError, ParityError, UsageError
from lora_deploy.export import export_onnx, traced
from lora_deploy.export import module as module_export
from lora_deploy.layers import get_lora_model
from lora_deploy.layers.model import lora_layers
from lora_deploy.quantization import QuantizationScheme, quantize_model
from lora_deploy.run import OnnxSession
from lora_deploy.run.adapters import Adapters
from lora_deploy.verify import verify, verify_module
from tests.commands import tree

# PEFT has one such field for the layers of both kinds.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

TARGETS = ["first", "mix", "gate"]


class Net(nn.Module):
    """A convolution, a norm with buffers, a Conv1D, linear layers that read the same; tensors of 2 and 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(3, 64, 3, padding=1)
        self.norm = nn.BatchNorm1d(64)
        self.first = nn.Linear(64, 128)
        self.mix = Conv1D(96, 128)
        self.gate = nn.Linear(128, 96, bias=False)
        self.head = nn.Linear(96, 5)
        self.register_buffer("shift", torch.linspace(-1, 1, 96), persistent=False)

    def forward(self, signal: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """signal (batch, 3, length), scale (batch,) -> scores (batch, 5), features (batch, length, 96)."""
        x = torch.relu(self.norm(self.filter(signal))).transpose(1, 2) * scale[:, None, None]
        x = torch.nn.functional.gelu(self.first(x))
        features = self.mix(x) * torch.sigmoid(self.gate(x)) + self.shift
        return {"scores": self.head(features.mean(1)), "features": features}


INPUTS = {"signal": torch.randn(3, 3, 10, generator=torch.Generator().manual_seed(1)), "scale": torch.rand(3) + 0.5}


def _net() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for name, values in (*net.named_parameters(), *net.named_buffers()):
            if name.startswith("norm") and values.is_floating_point():
                values.copy_(torch.rand_like(values) + 0.5)
            elif values.ndim == 2:
                values.mul_(8 if name == "mix.weight" else 3)
    return net.eval()


def _train(directory: Path, **options: Any) -> peft.PeftModel:
    """Let PEFT make and save an adapter of the module; what it is on is returned."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**({"target_modules": TARGETS, "r": 4, "lora_alpha": 10} | options))
    model = peft.get_peft_model(copy.deepcopy(_net()), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def _peft(directory: Path, base: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return peft.PeftModel.from_pretrained(base, directory).eval()(**inputs)


def _distance(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    return max(float((torch.from_numpy(found[name]) - values).abs().max()) for name, values in expected.items())


def _run(directory: Path, inputs: dict[str, torch.Tensor], adapter: str | None = None) -> dict[str, np.ndarray]:
    session = OnnxSession(directory)
    arrays = {name: values.numpy() for name, values in inputs.items()}
    return session.run(arrays, Adapters(session, directory).inputs(adapter))


def _rows(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    signal = torch.randn(count, 3, 10, generator=generator)
    return {"signal": signal, "scale": torch.rand(count, generator=generator) + 0.5}


@pytest.fixture(scope="module", autouse=True)
def _remembered() -> Iterator[None]:
    """Trace `Net` once for each type and its dynamic sizes, and hand out copies."""
    made: dict[str, Any] = {}

    def trace(model: nn.Module, inputs: Any, axes: Any, outputs: Any) -> Any:
        if not isinstance(model, Net):
            return traced.trace_module(model, inputs, axes, outputs)
        key = f"{model.head.weight.dtype} {[type(child) for child in model.children()]} {axes}"
        if key not in made:
            made[key] = traced.trace_module(model, inputs, axes, outputs)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_export, "trace_module", trace)
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on three layers, and the head trained whole."""
    directory = tmp_path_factory.mktemp("module") / "adapter"
    _train(directory, modules_to_save=["head"])
    return directory


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on all linear layers, the head among them."""
    directory = tmp_path_factory.mktemp("module") / "low"
    _train(directory, target_modules=[*TARGETS, "head"])
    return directory


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("branch", [None, "fixed", "hot-swap"])
def test_a_module_computes_what_peft_computes_for_any_batch(
    branch: str | None, method: str, adapter: Path, low_rank: Path, tmp_path: Path
) -> None:
    used = low_rank if branch == "hot-swap" else adapter
    base, twin = _net(), _net()
    if method == "nf4":  # the head is left as it is where it is trained whole
        skipped = [] if branch == "hot-swap" else ["head"]
        scheme = QuantizationScheme(method="nf4", skip_modules=tuple(skipped))
        quantize_model(base, scheme)
        quantize_model(twin, scheme)
    before = {name: values.clone() for name, values in base.state_dict().items() if isinstance(values, torch.Tensor)}
    result = export_onnx(
        base, used, output=tmp_path / "out", merge=branch is None, branch=branch, example_inputs=INPUTS
    )
    assert result.report is not None
    assert result.report.passed
    assert result.report.control_failed
    assert (result.report.codes is not None) == (method == "nf4" and branch is not None)
    assert {"as given", "one row", "more rows"} == {case.name for case in result.report.cases}
    for count in (1, 2, 7):
        inputs = _rows(count)
        expected = _peft(used, copy.deepcopy(twin), inputs)
        assert 1 < float(expected["scores"].abs().max()) < 100
        name = "low" if branch == "hot-swap" else None
        assert _distance(_run(result.output, inputs, name), expected) <= 1e-3
        with torch.no_grad():
            alone = twin(**inputs)
        assert _distance({key: values.numpy() for key, values in alone.items()}, expected) > 0.1
        if branch == "hot-swap":
            assert _distance(_run(result.output, inputs), alone) <= 1e-3
    assert not lora_layers(base)
    assert all(torch.equal(values, base.state_dict()[name]) for name, values in before.items())
    assert verify_module(result.output, base, used, example_inputs=INPUTS).passed


def test_the_adapter_that_is_on_the_module_is_exported(tmp_path: Path) -> None:
    module = get_lora_model(_net(), LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS))
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_B.weight.normal_(std=0.2)
    module.eval()
    with torch.no_grad():
        expected = module(**_rows(4))
    result = export_onnx(module, output=tmp_path / "out", example_inputs=tuple(INPUTS.values()))
    assert result.report is not None
    assert result.report.control_failed
    assert _distance(_run(result.output, _rows(4)), expected) <= 1e-3
    assert verify_module(result.output, module, example_inputs=INPUTS).passed
    save_adapter(module, tmp_path / "saved")
    with pytest.raises(UsageError, match="has an adapter already"):
        export_onnx(module, tmp_path / "saved", output=tmp_path / "two", example_inputs=INPUTS)


def test_the_length_may_vary_where_it_is_named(adapter: Path, tmp_path: Path) -> None:
    axes = {"signal": {0: "batch", 2: "length"}, "scale": {0: "batch"}}
    result = export_onnx(
        _net(), adapter, output=tmp_path / "out", example_inputs=INPUTS, dynamic_axes=axes, precision="fp16"
    )
    assert result.report is not None
    assert result.report.passed
    inputs = {"signal": torch.randn(2, 3, 23).half(), "scale": torch.ones(2).half()}
    assert _run(result.output, inputs)["features"].shape == (2, 23, 96)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape. .*lora_B.bias")
@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("branch", [None, "fixed"])
def test_a_dora_and_a_bias_of_b_are_carried_over(branch: str | None, setting: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    _train(directory, **{setting: True})
    result = export_onnx(
        _net(), directory, output=tmp_path / "out", merge=branch is None, branch=branch, example_inputs=INPUTS
    )
    inputs = _rows(4)
    assert _distance(_run(result.output, inputs), _peft(directory, _net(), inputs)) <= 1e-3
    assert result.report is not None
    assert result.report.control_failed


@pytest.mark.parametrize("branch", [None, "fixed"])
def test_a_lost_update_fails_the_gate(
    branch: str | None, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_deploy.export import write

    monkeypatch.setattr(LoraUpdate, "merge_into", lambda update, values: values)
    if branch is not None:
        own = write.stream_branches
        monkeypatch.setattr(
            write, "stream_branches", lambda *given: ((name, values * 0) for name, values in own(*given))
        )
    with pytest.raises(ParityError, match="does not compute what was trained"):
        export_onnx(
            _net(), adapter, output=tmp_path / "out", merge=branch is None, branch=branch, example_inputs=INPUTS
        )
    assert not (tmp_path / "out").exists()


class Choosing(nn.Module):
    """What it computes depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 0:
            return self.first(x)
        return x


class OneSize(Choosing):
    """Works for batches of two only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x.reshape(2, 8))


class Idle(Choosing):
    """Does not run through its layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Text(Choosing):
    """Returns no tensor."""

    def forward(self, x: torch.Tensor) -> Any:
        return "text", self.first(x)


@pytest.mark.parametrize(
    ("kind", "error", "message", "remedy"),
    [
        (Choosing, CheckpointError, "no graph can be built", "no branch may depend on values"),
        (OneSize, CheckpointError, "no graph can be built", "may become a number"),
        (Idle, AdapterError, "does not read", "run through every adapted layer"),
        (Text, UsageError, "must return tensors", "wrap it"),
    ],
)
def test_what_cannot_be_traced_is_one_message_with_the_remedy(
    kind: type[nn.Module], error: type[LoraDeployError], message: str, remedy: str, tmp_path: Path
) -> None:
    module = get_lora_model(kind(), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(error, match=message) as caught:
        export_onnx(module, output=tmp_path / "out", example_inputs=torch.ones(2, 8))
    assert remedy in caught.value.details["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_module_does_not_take_is_refused(adapter: Path, low_rank: Path, tmp_path: Path) -> None:
    output, net = tmp_path / "out", _net()
    for options, message in (
        ({}, "needs an example"),
        ({"example_inputs": {"signal": 3}}, "needs an example"),
        ({"example_inputs": INPUTS, "quantization": "nf4"}, "does not take this option"),
        ({"example_inputs": INPUTS, "precision": "int4"}, "keeps its weights"),
        ({"example_inputs": INPUTS, "merge": False, "branch": "pooled"}, "cannot be pooled"),
        ({"example_inputs": INPUTS, "merge": False, "adapter_precision": "int8"}, "does not take this option"),
    ):
        with pytest.raises(UsageError, match=message):
            export_onnx(net, adapter, output=output, **options)
    with pytest.raises(CheckpointError, match="does not run on its example"):
        export_onnx(net, adapter, output=output, example_inputs={"signal": torch.ones(2, 4, 4)})
    with pytest.raises(CheckpointError, match="PEFT's own layers") as caught:
        export_onnx(peft.PeftModel.from_pretrained(_net(), low_rank), output=output, example_inputs=INPUTS)
    assert "save_pretrained" in caught.value.details["remedy"]
    with pytest.raises(AdapterError, match="trains parameters of the base whole"):
        export_onnx(net, adapter, output=output, merge=False, example_inputs=INPUTS)
    with pytest.raises(UsageError, match="only a torch module"):
        export_onnx("somewhere", adapter, output=output, example_inputs=INPUTS)
    assert not output.exists()


def test_an_export_of_a_module_is_verified_with_the_module(low_rank: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_onnx(_net(), low_rank, output=output, example_inputs=INPUTS, verify=False)
    assert sorted(file.suffix for file in output.iterdir()) == [".data", ".onnx"]
    with pytest.raises(UsageError, match="only Python has") as caught:
        verify(output)
    assert "verify_module" in caught.value.details["remedy"]
    other = _net()
    other.head.bias.data += 1
    with pytest.raises(InputError, match="not the module"):
        verify_module(output, other, low_rank, example_inputs=INPUTS)
    with pytest.raises(InputError, match="not the adapters"):
        verify_module(output, _net(), example_inputs=INPUTS)
    assert verify_module(output, _net(), low_rank, example_inputs=INPUTS).passed
    assert (output / "parity.json").is_file()


class Twice(nn.Module):
    """Runs one layer two times, and has a weight of three dimensions and one that no linear layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(8, 8))
        self.stack = nn.Parameter(torch.randn(1, 8, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(self.first(torch.tanh(self.first(x))) @ self.table)
        return x, (x[:, None] @ self.stack).sum()


def test_a_layer_that_runs_twice_is_merged_and_the_files_are_the_same_again(tmp_path: Path) -> None:
    module = get_lora_model(Twice(), LoraConfig(r=2, target_modules=["first"]))
    nn.init.normal_(module.get_parameter("first.lora_B.weight"))
    example = torch.randn(3, 8)
    for name in ("out", "again"):
        result = export_onnx(module, output=tmp_path / name, example_inputs=example)
        assert result.report is not None
        assert result.report.control_failed
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    for word in (b"stack_trace", b".py", b"pkg.torch", str(tmp_path).encode()):
        assert word not in content
    inputs = torch.randn(5, 8)
    found = OnnxSession(tmp_path / "out").run({"x": inputs.numpy()})
    with torch.no_grad():
        expected = module(inputs)
    for number, values in enumerate(expected):
        assert float((torch.from_numpy(found[f"output_{number}"]) - values).abs().max()) <= 1e-3
    with pytest.raises(AdapterError, match="not one product in the graph"):
        export_onnx(module, output=tmp_path / "branch", merge=False, branch="fixed", example_inputs=example)
