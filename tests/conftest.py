"""Tiny models, checkpoints and adapters, random but never trivial: no zero bias, no layer norm of ones, odd shapes."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is imported: no test reaches the network.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # The models are too small to share out; waiting threads cost more.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils import logging as transformers_logging

from lora_deploy.adapter import LoraAdapter, adapter_of
from lora_deploy.config import LoraConfig
from lora_deploy.layers import get_lora_model, lora_layers
from lora_deploy.quantization import QuantizedWeight
from tests.faults.tally import pytest_addoption, pytest_sessionfinish, pytest_testnodedown, tally

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_sessionfinish",
    "pytest_testnodedown",
    "tally",
]  # hooks and a fixture, which pytest finds here

# What PEFT says of what is meant: of Conv1D, of adapted and saved output heads, of a bias of B on a layer without one.
QUIET_PEFT = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "fan_in_fan_out is set to:UserWarning",
        "Setting `save_embedding_layers` to `True`:UserWarning",
        "Model (has|with) `tie_word_embeddings=True`:UserWarning",
        "`lora_bias=True` was passed",
        "Adapter 'default'. .* have invalid shape. .*lora_B.bias",
    )
]
TINY_FAMILIES = ("llama", "qwen2", "gpt2")
QUANTIZED = ("nf4", "fp4", "int8")
VOCABULARY = 131
CheckpointFactory = Callable[..., Path]

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROPE_MODEL = _TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_GPT2 = _TOKENS | {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 128, "initializer_range": 0.2}
# No dropout inside the models, so that training mode and evaluation compute the same.
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_CONFIGS = {"llama": (LlamaConfig, _ROPE_MODEL), "qwen2": (Qwen2Config, _ROPE_MODEL), "gpt2": (GPT2Config, _GPT2)}

transformers_logging.disable_progress_bar()

# Minutes each, of one process; the others are files of seconds.
_LONGEST = ("tests/real/", "tests/test_families.py", "tests/faults/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that two processes end together."""

    def rank(item: pytest.Item) -> int:
        return next((place for place, part in enumerate(_LONGEST) if item.nodeid.startswith(part)), len(_LONGEST))

    items.sort(key=rank)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of two layers, in evaluation mode. GPT-2 ties its head, the others do not.

    Args:
        family: One of TINY_FAMILIES.
        seed: The same seed gives the same model.
        **overrides: Fields of the model's configuration.
    """
    kind, fields = _CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**(fields | overrides)), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and layer norms
                noise = torch.randn_like(parameter) * 0.1
                parameter.data = noise if name.endswith("bias") else 1 + noise
    return model.eval()


def save_tiny(
    family: str,
    method: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    double_quant: bool = True,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Save a tiny model as transformers saves it, dense or quantized by bitsandbytes through transformers.

    Args:
        family: One of TINY_FAMILIES.
        method: "none", "nf4", "fp4" or "int8".
        directory: Where to.
        seed: Of the model.
        dtype: Of the dense weights, before any quantization.
        double_quant: Whether 4-bit checkpoints quantize their absmax.
        max_shard_size: As save_pretrained takes it.
        **overrides: Fields of the model's configuration.
    """
    model = tiny_model(family, seed, **overrides).to(dtype)
    if method == "none":
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return directory
    dense = directory / "dense"
    model.save_pretrained(dense)
    quantized = load_quantized(dense, method, double_quant=double_quant)
    quantized.save_pretrained(directory, max_shard_size=max_shard_size)
    shutil.rmtree(dense)
    return directory


def four_bit(method: str, double_quant: bool = True, **more: Any) -> BitsAndBytesConfig:
    """How transformers and bitsandbytes quantize a model that computes in float32 to nf4 or fp4."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        **more,
    )


def load_quantized(directory: Path, method: str, *, double_quant: bool = True, **options: Any) -> PreTrainedModel:
    """Load a dense checkpoint and let transformers and bitsandbytes quantize it: the oracle of our quantization."""
    config = BitsAndBytesConfig(load_in_8bit=True) if method == "int8" else four_bit(method, double_quant)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map="cpu", **options)


def random_adapter(
    model: PreTrainedModel, r: int = 4, lora_alpha: float = 10, *, scale: float = 0.2, seed: int = 1, **config: Any
) -> LoraAdapter:
    """Put a random adapter on a model, in place: every B, and whatever else is trained, is moved away from the base.

    Args:
        model: The base.
        r: Rank.
        lora_alpha: Numerator of the scaling; not r by default, so that a forgotten scaling shows.
        scale: Standard deviation of A and B, and of what is added to whole trained parameters.
        seed: Of the random numbers.
        **config: Other fields of LoraConfig.

    Returns:
        The adapter as tensors, for comparing and saving. Its effect on the logits is of the order of one.
    """
    get_lora_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, **config))
    generator = torch.Generator().manual_seed(seed)
    halves = {id(half.weight) for layer in lora_layers(model).values() for half in (layer.lora_A, layer.lora_B)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).mul_(scale)
                parameter.copy_(noise if id(parameter) in halves else parameter + noise)
    return adapter_of(model)


def token_ids(batch: int = 2, length: int = 9, seed: int = 7) -> torch.Tensor:
    """Random token ids (batch, length), special tokens left out."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The model's logits (batch, length, vocabulary) in float32, for `token_ids()` where none are given."""
    return model(input_ids=token_ids() if ids is None else ids).logits.float()


def assert_same_weight(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Same scheme, same shape, and the same bits in everything that is stored."""
    assert (found.scheme, found.shape) == (expected.scheme, expected.shape)
    for ours, theirs in zip(found.stored(), expected.stored(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where bases and adapters lie is noted in the cache of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache", numbered=False)))
        yield


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`checkpoint_dir(family, method="none", **options)`: what `save_tiny` wrote, once. Do not change it."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, method: str = "none", **options: Any) -> Path:
        key = (family, method, *sorted(options.items()))
        if key not in made:
            made[key] = save_tiny(family, method, tmp_path_factory.mktemp(f"{family}-{method}"), **options)
        return made[key]

    return make


@pytest.fixture
def own_checkpoint(checkpoint_dir: CheckpointFactory, tmp_path: Path) -> CheckpointFactory:
    """As `checkpoint_dir`, but a copy that the test may damage."""

    def make(family: str, method: str = "none", **options: Any) -> Path:
        return Path(shutil.copytree(checkpoint_dir(family, method, **options), tmp_path / "checkpoint"))

    return make


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Each test begins at the same seed, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
