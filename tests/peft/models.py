"""Small models of torch, after those of PEFT's tests/test_custom_models.py, adapted by PEFT and by us."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_deploy.config import LoraConfig
from lora_deploy.layers import get_lora_model

PREFIX = "base_model.model."


class MLP(nn.Module):
    """Two linear layers with biases, and a norm to save."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.drop = nn.Dropout(0.0)
        self.lin1 = nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 6)."""
        return self.lin1(self.drop(torch.relu(self.norm(self.lin0(x)))))


class Deep(nn.Module):
    """Blocks in a list, with experts in a list of their own, and names that are ends of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(3):
            block = nn.ModuleDict({"lin": nn.Linear(10, 10), "my_lin": nn.Linear(10, 10), "act": nn.ReLU()})
            block["experts"] = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(10, 10)}) for _ in range(2)])
            self.layers.append(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 10)."""
        for block in self.layers:
            x = x + block["my_lin"](block["act"](block["lin"](x)))
            for expert in block["experts"]:
                x = x + expert["up"](x)
        return x


class Wrapped(nn.Module):
    """`Deep` one name further in, as the decoders of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Deep()
        self.head = nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 6)."""
        return self.head(self.model(x))


class EmbConv1D(nn.Module):
    """An embedding and transformers' Conv1D, whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(7, 5)
        self.lin0 = nn.Linear(7, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 3, 6)."""
        return self.lin0(torch.tanh(self.conv1d(self.emb(x[:, :3].abs().mul(20).long().clamp(max=99)))))


class ModelEmbConv1D(nn.Module):
    """`EmbConv1D` as an inner model, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = EmbConv1D()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 3, 4)."""
        return self.head(self.model(x))


class Shared(nn.Module):
    """One linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10) -> (batch, 10)."""
        return self.lin(torch.tanh(self.lin(x)))


KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (MLP, Deep, Wrapped, EmbConv1D, ModelEmbConv1D, Shared)
}


def model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of KINDS: the same numbers each time, no weight small and no bias zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = KINDS[kind]()
        for parameter in made.parameters():
            parameter.data = torch.randn_like(parameter) * 0.25
    return made.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(4, 10) numbers."""
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(5)).to(dtype)


def theirs_and_ours(
    kind: str, config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """The same model adapted by PEFT and by us, untrained, in training mode."""
    base = model(kind, dtype)
    settings = {"r": 4, "lora_alpha": 10} | config
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(settings)))
    return theirs.train(), get_lora_model(base, LoraConfig(**{"task_type": None} | settings)).train()


def move(trained: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move everything that is trained, the same way each time for the same shapes in the same order."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)
    return trained


def plain(name: str) -> str:
    """The name of one of PEFT's parameters as it is called here."""
    return name.removeprefix(PREFIX).replace("modules_to_save.default.", "").replace(".default", "")


def their_parameters(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """What PEFT trains, by our names."""
    named = {plain(name): parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    return {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p for name, p in named.items()}


def our_parameters(ours: nn.Module) -> dict[str, nn.Parameter]:
    """What we train."""
    return {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}


def copied(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours what PEFT trained; the names must be the same."""
    values, places = their_parameters(theirs), our_parameters(ours)
    assert values.keys() == places.keys()
    with torch.no_grad():
        for name, place in places.items():
            assert place.shape == values[name].shape
            place.copy_(values[name])


def trained_by_peft(kind: str, config: dict[str, Any], directory: Path) -> nn.Module:
    """An adapter of PEFT, every number moved, and saved."""
    theirs = move(theirs_and_ours(kind, config)[0])
    theirs.save_pretrained(directory)
    return theirs
