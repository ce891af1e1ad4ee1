"""The kinds of matrices that a model is made of, read off its modules.

A transformer repeats one block, so its linear layers fall into a few kinds: the same place in every block. Which kinds
there are, what they are called and whether they belong to the attention is taken from the model's own modules; no
family is known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lora_deploy.errors import CheckpointError
from lora_deploy.quantization.model import linear_modules
from lora_deploy.quantization.skeleton import describe_linear

__all__ = ["MatrixKind", "find_kinds"]

Part = Literal["attention", "mlp", "outside"]


@dataclass(frozen=True)
class MatrixKind:
    """The linear layers that stand at one place in every block.

    Attributes:
        name: The shortest end of their names that no other module has: "q_proj", or "attn.c_proj" where the MLP has a
            `c_proj` too.
        part: "attention"; "mlp" for everything else inside the blocks; "outside" for what is in no block.
        shapes: (out, in) of each layer, by full dotted name.
        targets: What `target_modules` has to hold to mean these layers and no others.
    """

    name: str
    part: Part
    shapes: Mapping[str, tuple[int, int]]
    targets: tuple[str, ...]

    @property
    def parameters_per_rank(self) -> int:
        """Trainable parameters that each rank costs: in + out of every layer (A is (r, in), B is (out, r))."""
        return sum(sum(shape) for shape in self.shapes.values())

    @property
    def highest_rank(self) -> int:
        """The rank beyond which B @ A can hold nothing more in the smallest of the layers."""
        return min(min(shape) for shape in self.shapes.values())


def find_kinds(model: nn.Module) -> list[MatrixKind]:
    """The kinds of a model, in the order of its modules.

    Args:
        model: May be on the meta device. The output head is no kind: it gets no adapter.

    Raises:
        CheckpointError: No attention can be recognised in it.
    """
    places: dict[str, dict[str, nn.Module]] = {}
    for name, module in linear_modules(model).items():
        places.setdefault(_place(name), {})[name] = module
    everything = [name for name, _ in model.named_modules() if name]
    kinds = []
    for place, layers in places.items():
        part: Part = (
            "outside" if "*" not in place else "attention" if _in_attention(model, next(iter(layers))) else "mlp"
        )
        shapes = {name: describe_linear(module).shape for name, module in layers.items()}
        name, targets = _name(place, shapes, everything)
        kinds.append(MatrixKind(name, part, shapes, targets))
    if not any(kind.part == "attention" for kind in kinds):
        raise CheckpointError(
            "no attention can be recognised in this model, so its choices cannot be told apart",
            tensor=next((kind.name for kind in kinds), None),
            found=f"{type(model).__name__} with {', '.join(kind.name for kind in kinds) or 'no linear layers'}",
            expected="numbered blocks with linear layers inside a module whose class or name says attention",
            remedy="name the layers yourself: lora-deploy train --target-modules",
        )
    return kinds


def _place(name: str) -> str:
    """The name with its numbers left open: layers.3.mlp.up_proj -> layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _in_attention(model: nn.Module, name: str) -> bool:
    """Whether a module above the layer says, by its class or its name, that it is attention."""
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        path = ".".join(parents[:depth])
        words = (type(model.get_submodule(path)).__name__ + " " + parents[depth - 1]).lower()
        # A block may be called after what it is made of (DecoderBlockWithAttention); attention itself has no number.
        if not parents[depth - 1].isdecimal() and ("attention" in words or "attn" in words):
            return True
    return False


def _name(place: str, layers: Mapping[str, object], everything: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The shortest end of a place that means its layers alone, and the targets that mean them."""
    parts = place.split(".")
    for length in range(1, len(parts) + 1):
        tail = parts[-length:]
        end = ".".join(tail)
        if "*" in tail:  # from here on no plain end can mean all of them
            break
        if {name for name in everything if name == end or name.endswith(f".{end}")} == set(layers):
            return end, (end,)
    return place, tuple(layers)
