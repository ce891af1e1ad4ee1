"""What a choice costs, against real files, real exports and real memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_deploy.adapter import adapter_of, save_adapter
from lora_deploy.adapter.files import WEIGHTS_NAME
from lora_deploy.config import LoraConfig
from lora_deploy.export import export_onnx
from lora_deploy.layers import get_lora_model
from lora_deploy.manifest import Manifest
from lora_deploy.planning.base import PlannedBase
from lora_deploy.planning.choices import find_choices
from lora_deploy.planning.cost import adapter_bytes, branch_cost, estimate_memory
from lora_deploy.planning.kinds import find_kinds
from lora_deploy.planning.trace import Meter, find_sites, trace_step
from lora_deploy.quantization import QuantizationScheme, load_base_model
from lora_deploy.quantization.model import linear_modules
from lora_deploy.quantization.skeleton import describe_linear, make_skeleton
from lora_deploy.train.chunked_loss import chunked_loss
from tests.conftest import CheckpointFactory, save_tiny
from tests.planning.families import CONFIGS

BUDGET = 2_000


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_size_of_the_file_is_exact(family: str, checkpoint_dir: CheckpointFactory, tmp_path: Path) -> None:
    directory = checkpoint_dir(family)
    for choice in find_choices(PlannedBase.open(directory).kinds, BUDGET):
        model = AutoModelForCausalLM.from_pretrained(directory)
        get_lora_model(model, LoraConfig(r=choice.rank, target_modules=choice.targets))
        save_adapter(model, tmp_path / choice.name)
        size = (tmp_path / choice.name / WEIGHTS_NAME).stat().st_size
        assert adapter_bytes(choice.shapes, choice.rank) == size, choice.name


@pytest.mark.parametrize(("family", "name"), [("llama", "q_proj"), ("llama", "all-linear"), ("gpt2", "attention")])
def test_the_cost_as_a_branch_is_that_of_the_export(
    family: str, name: str, checkpoint_dir: CheckpointFactory, tmp_path: Path
) -> None:
    directory = checkpoint_dir(family)
    base = PlannedBase.open(directory)
    choice = next(one for one in find_choices(base.kinds, BUDGET) if one.name == name)
    model = AutoModelForCausalLM.from_pretrained(directory)
    get_lora_model(model, LoraConfig(r=choice.rank, target_modules=choice.targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert len(adapter_of(model).updates) == len(choice.shapes)
    save_adapter(model, tmp_path / "adapter")
    asked: dict[str, Any] = {"merge": False, "branch": "fixed", "quantization": "none", "verify": False}
    export_onnx(directory, tmp_path / "adapter", output=tmp_path / "out", **asked)
    graph = ir.load(tmp_path / "out" / "model.onnx")
    manifest = Manifest.read(graph.metadata_props, tmp_path / "out")
    tensors = [graph.graph.initializers[key].const_value for slot in manifest.slots for key in slot.input_names]
    shapes = {key: describe_linear(module).shape for key, module in linear_modules(base.skeleton).items()}
    cost = branch_cost(choice, find_sites(base.config, base.task), shapes)
    assert cost.bytes == sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert cost.multiply_adds == sum(tensor.size for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_linear_layer_has_its_site(family: str) -> None:
    model = make_skeleton(CONFIGS[family], "causal-lm")
    sites = find_sites(CONFIGS[family], "causal-lm")
    assert sorted(name for site in sites for name in site) == sorted(linear_modules(model))
    if family in ("llama", "qwen3"):
        assert sites[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
        assert sites[2] == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", ["attention", "all-linear"])
def test_fake_tensors_need_what_real_ones_need(family: str, name: str) -> None:
    """The same meter on a real step: what is simulated is what happens."""
    config = CONFIGS[family]
    kinds = find_kinds(make_skeleton(config, "causal-lm"))
    choice = next(one for one in find_choices(kinds, 3_000) if one.name == name)
    found = trace_step(config, choice.targets, choice.rank, batch=2, length=40, compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    get_lora_model(model, LoraConfig(r=choice.rank, target_modules=choice.targets))
    ids = torch.zeros(2, 40, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0  # padding, as rows of different lengths have it: without, no mask is made
    meter = Meter([*model.parameters(), *model.buffers(), ids, mask])
    with meter, chunked_loss(model):
        model.train()(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert found.activations == pytest.approx(meter.peak, rel=0.02)


def test_more_of_everything_needs_more_memory(checkpoint_dir: CheckpointFactory) -> None:
    base = PlannedBase.open(checkpoint_dir("llama"))
    choices = {choice.name: choice for choice in find_choices(base.kinds, BUDGET)}
    small = estimate_memory(base, choices["attention"], batch=2, length=16)
    longer = estimate_memory(base, choices["attention"], batch=2, length=32)
    more = estimate_memory(base, choices["all-linear"], batch=2, length=16)
    assert longer.activations > 1.8 * small.activations
    assert more.activations > small.activations
    assert small.adapter == 16 * choices["attention"].parameters
    assert small.total == small.base + small.adapter + small.activations + small.workspace


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(method="none"),
        QuantizationScheme(method="nf4"),
        QuantizationScheme(method="fp4", double_quant=False, blocksize=128),
        QuantizationScheme(method="int8"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bytes_of_the_base_are_exact(family: str, scheme: QuantizationScheme, tmp_path: Path) -> None:
    directory = save_tiny(family, "none", tmp_path)
    model = load_base_model(str(directory), scheme)
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            parts = [parameter.data, getattr(parameter, "SCB", None)]
            if state is not None:
                parts += [state.absmax, state.code]
                if state.nested:
                    parts += [state.offset, state.state2.absmax, state.state2.code]
            for part in parts:
                if part is not None:
                    tensors[id(part)] = part
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors.values()}
    found = PlannedBase.open(directory, scheme).training_bytes(torch.float32)
    assert found == sum(held.values())


@pytest.mark.slow
def test_the_estimate_is_what_training_smollm2_allocates(tmp_path: Path) -> None:
    """In a process of its own, against the kernel's count of its memory."""
    from lora_deploy.demo.model import fetch_smollm2
    from tests.benchmarks.training_memory import measure

    found = measure(fetch_smollm2(tmp_path / "model"), 921_600, "attention", 4, 64)
    assert found.estimate == pytest.approx(found.measured, rel=0.1)
