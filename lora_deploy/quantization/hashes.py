"""Hashes that say whether two bases are the same, tensor for tensor."""

from __future__ import annotations

import atexit
import hashlib
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import torch
from torch import nn

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.quantization.bnb import bitsandbytes as bnb
from lora_deploy.quantization.model import quantized_weight

__all__ = ["CheckpointHash", "TensorHash", "combine_hashes", "hash_codes", "hash_tensors"]

_LARGE = 1 << 24  # values


class TensorHash:
    """SHA-256 over names, types, shapes and bytes of tensors, each of which may come in parts."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """What the next tensor is."""
        self._digest.update(f"{name}:{dtype}:{shape};".encode())

    def add(self, part: torch.Tensor) -> None:
        """Its values, or the next of them."""
        flat = part.detach().cpu().contiguous().reshape(-1)
        self._digest.update(flat.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """The hash of all that has come."""
        return self._digest.hexdigest()


def hash_tensors(named: Iterable[tuple[str, list[torch.Tensor]]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order given."""
    digest = TensorHash()
    for name, tensors in named:
        for tensor in tensors:
            digest.begin(name, tensor.dtype, tuple(tensor.shape))
            digest.add(tensor)
    return digest.hexdigest()


class CheckpointHash:
    """Hash of a checkpoint's tensors, names included: the same for any sharding, before any quantization.

    Args:
        checkpoint: Holds them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._future: Future[str] | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def begin(self) -> None:
        """Hash beside whatever else is done."""
        if self._future is None:
            self._future = Future()
            # A command that ends with an error does not wait for it.
            self._thread = threading.Thread(target=self._run, args=(self._future,), daemon=True, name="checkpoint hash")
            atexit.register(self._stop)
            self._thread.start()

    def result(self) -> str:
        """The hash, when all is read.

        Raises:
            CheckpointError: A file was damaged since it was opened.
        """
        self.begin()
        assert self._future is not None
        return self._future.result()

    def _stop(self) -> None:
        """Python ends threads that are still at work in the middle of torch, and with that the process."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join()

    def _run(self, future: Future[str]) -> None:
        try:
            digest = TensorHash()
            for name in sorted(self._checkpoint):
                for number, part in enumerate(self._parts(name)):
                    if not number:
                        digest.begin(name, part.dtype, self._checkpoint.shape(name))
                    digest.add(part)
                    del part
                    if self._stopped:
                        raise SystemExit
            future.set_result(digest.hexdigest())
        except BaseException as error:
            future.set_exception(error)
        finally:
            if not self._stopped:
                atexit.unregister(self._stop)

    def _parts(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor, or some rows of a large one at a time: what was read is in memory until the part is let go of."""
        shape = self._checkpoint.shape(name)
        if len(shape) != 2 or math.prod(shape) <= _LARGE:
            yield self._checkpoint.read(name)
            return
        step = max(1, _LARGE // shape[1])
        for start in range(0, shape[0], step):
            yield self._checkpoint.read(name, range(start, min(start + step, shape[0])))


def hash_codes(model: nn.Module) -> str | None:
    """Hash of the quantized weights of a model's linear layers (`TrainingRecord.codes_sha256`), adapters apart.

    Returns:
        The hash, or None where no layer is quantized.
    """
    hashes = {}
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            name = name.removesuffix(".base_layer")
            hashes[name] = hash_tensors([(name, list(quantized_weight(module).stored()))])
    return combine_hashes(hashes)


def combine_hashes(hashes: dict[str, str]) -> str | None:
    """One hash of several, whatever their order; None for none."""
    if not hashes:
        return None
    return hashlib.sha256("".join(f"{name}:{hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
