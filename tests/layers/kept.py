"""What autograd keeps for a backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_storages(forward: Callable[[], object], own: Iterable[torch.Tensor] = ()) -> dict[int, int]:
    """Sizes in bytes, by address, of the storages that the graph of a result keeps.

    Args:
        forward: Makes the graph and returns what holds it.
        own: Tensors that are there anyway.
    """
    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    assert result is not None
    alive = [kept.tensor.untyped_storage() for kept in (one() for one in packed) if kept is not None]
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    return {storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in there}
