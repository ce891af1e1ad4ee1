"""TrainingBase: whatever the checkpoint looks like, the weights are those of the model that was trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_deploy.errors import CheckpointError
from lora_deploy.quantization import DenseWeight, QuantizationScheme, keep_codes, load_base_model, quantized_weight
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import combine_hashes, hash_codes, hash_tensors
from lora_deploy.quantization.model import linear_modules
from tests.conftest import QUANTIZED, TINY_FAMILIES, CheckpointFactory, assert_same_weight, load_quantized, tiny_model

WEIGHTS = "model.safetensors"


def _assert_base_is(base: TrainingBase, model: torch.nn.Module) -> None:
    """Every linear weight and every other parameter of the base is the model's, bit for bit."""
    modules = linear_modules(model)
    assert base.linears.keys() == modules.keys()
    for name, module in modules.items():
        assert base.linears[name].shape == quantized_weight(module).shape
        assert base.linears[name].has_bias == (module.bias is not None)
        assert_same_weight(base.weight(name), quantized_weight(module))
    inside = {f"{name}.weight" for name in modules}
    for name, values in model.named_parameters(remove_duplicate=False):
        if name not in inside:
            assert torch.equal(base.tensor(name), values.detach()), name


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_dense_checkpoint_has_the_models_own_weights(family: str, checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir(family))
    _assert_base_is(base, tiny_model(family))
    assert {layer.is_conv1d for layer in base.linears.values()} == {family == "gpt2"}
    assert base.shapes.keys() >= dict(tiny_model(family).named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_quantizing_a_dense_checkpoint_gives_what_bitsandbytes_trains_on(
    family: str, method: str, checkpoint_dir: CheckpointFactory
) -> None:
    directory = checkpoint_dir(family)
    _assert_base_is(TrainingBase(directory, QuantizationScheme(method=method)), load_quantized(directory, method))


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_prequantized_checkpoint_keeps_its_own_codes(
    family: str, method: str, double_quant: bool, checkpoint_dir: CheckpointFactory
) -> None:
    directory = checkpoint_dir(family, method, double_quant=double_quant)
    base = TrainingBase(directory)
    assert base.prequantized
    assert base.scheme.method == method
    assert base.scheme.double_quant == double_quant or method == "int8"
    model = AutoModelForCausalLM.from_pretrained(directory)
    keep_codes(model)
    _assert_base_is(base, model)
    assert not hasattr(base.config, "quantization_config")


def test_the_codes_of_a_base_hash_as_those_of_the_model_that_is_trained(checkpoint_dir: CheckpointFactory) -> None:
    directory = checkpoint_dir("qwen2", dtype=torch.bfloat16)
    scheme = QuantizationScheme(method="nf4")
    base = TrainingBase(directory, scheme)
    hashes = {name: hash_tensors(iter([(name, list(base.weight(name).stored()))])) for name in base.linears}
    assert combine_hashes(hashes) == hash_codes(load_base_model(str(directory), scheme))
    assert hash_codes(load_base_model(str(directory), "none")) is None


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharding_changes_neither_the_weights_nor_the_hash(
    family: str, method: str, checkpoint_dir: CheckpointFactory
) -> None:
    single = TrainingBase(checkpoint_dir(family, method))
    sharded = TrainingBase(checkpoint_dir(family, method, max_shard_size=40_000))
    assert len(list(sharded.directory.glob("*.safetensors"))) > 1
    assert sharded.sha256() == single.sha256()
    for name in single.linears:
        assert_same_weight(sharded.weight(name), single.weight(name))


def test_the_hash_sees_one_changed_value_a_name_and_a_type(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama")
    hashes = {TrainingBase(directory).sha256()}
    tensors = load_file(directory / WEIGHTS)
    for change in ("value", "name", "type"):
        changed = copy.deepcopy(tensors)
        first = min(changed)
        if change == "value":
            changed[first].view(-1)[-1] += 1
        elif change == "name":
            changed["another"] = torch.zeros(1)
        else:
            changed[first] = changed[first].view(torch.int32)
        save_file(changed, directory / WEIGHTS)
        hashes.add(TrainingBase(directory).sha256())
    assert len(hashes) == 4


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_checkpoint_of_the_inner_model_lacks_the_prefix_and_is_read_all_the_same(
    family: str, method: str, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint(family, method, tie_word_embeddings=True)
    whole = TrainingBase(directory)
    expected = {name: whole.weight(name) for name in whole.linears}
    tensors = load_file(directory / WEIGHTS)
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    assert all(name.startswith(prefix) for name in tensors)
    tensors = {name.removeprefix(prefix): values.clone() for name, values in tensors.items()}
    save_file(tensors, directory / WEIGHTS)
    bare = TrainingBase(directory)
    for name, weight in expected.items():
        assert_same_weight(bare.weight(name), weight)


def test_the_head_of_a_tied_model_is_its_embedding_and_no_linear_layer(checkpoint_dir: CheckpointFactory) -> None:
    base = TrainingBase(checkpoint_dir("gpt2"))
    assert base.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert torch.equal(base.tensor("lm_head.weight"), base.tensor("transformer.wte.weight"))
    assert "lm_head" not in base.linears
    assert TrainingBase(checkpoint_dir("llama")).aliases == {}


def test_layers_that_the_scheme_skips_stay_dense(checkpoint_dir: CheckpointFactory) -> None:
    scheme = QuantizationScheme(method="nf4", skip_modules=("v_proj",))
    base = TrainingBase(checkpoint_dir("llama"), scheme)
    dense = {name for name in base.linears if isinstance(base.weight(name), DenseWeight)}
    assert dense == {f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)}


def test_asking_a_quantized_checkpoint_for_another_scheme_is_refused(checkpoint_dir: CheckpointFactory) -> None:
    directory = checkpoint_dir("llama", "nf4")
    assert TrainingBase(directory, QuantizationScheme(method="nf4")).scheme.method == "nf4"
    assert TrainingBase(directory, QuantizationScheme()).scheme.method == "nf4"
    with pytest.raises(CheckpointError, match="quantized already") as caught:
        TrainingBase(directory, QuantizationScheme(method="int8"))
    assert caught.value.details["file"].endswith("config.json")


def test_another_quantization_method_is_refused_by_name(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        TrainingBase(directory)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_a_missing_tensor_is_named(method: str, own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama", method)
    tensors = load_file(directory / WEIGHTS)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: values for name, values in tensors.items() if name != lost}, directory / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        TrainingBase(directory)
    assert caught.value.details["tensor"] == lost


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("nf4", "weight.absmax"),
        ("nf4", "weight.nested_absmax"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4"),
        ("int8", "SCB"),
    ],
)
def test_a_quantized_weight_that_lost_a_part_of_its_state_is_refused_not_guessed(
    method: str, part: str, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint("llama", method)
    module = "model.layers.1.mlp.up_proj"
    tensors = load_file(directory / WEIGHTS)
    del tensors[f"{module}.{part}"]
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=module):
        TrainingBase(directory).weight(module)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_a_wrong_shape_names_file_and_tensor_and_both_shapes(method: str, own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama", method)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError) as caught:
        TrainingBase(directory).weight("model.layers.0.mlp.up_proj")
    details = caught.value.details
    assert ".mlp." in details["tensor"]
    assert "112" in details["found"]
    assert "96" in details["expected"]
    assert Path(details["file"]).name == WEIGHTS


@pytest.mark.parametrize("model_type", ["no-such-model", None])
def test_a_config_that_transformers_cannot_read_is_named(
    model_type: str | None, own_checkpoint: CheckpointFactory
) -> None:
    directory = own_checkpoint("llama")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    with pytest.raises(CheckpointError) as caught:
        TrainingBase(directory)
    assert caught.value.details["file"].endswith("config.json")
    assert caught.value.exit_code == 3
