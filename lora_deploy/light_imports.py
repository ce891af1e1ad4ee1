"""torch and transformers, imported for a command that is one process and compiles nothing.

transformers loads torch's distributed tensors, its compiler and what they need in turn, for classes that only training
on several devices uses, for marks that only the compiler reads, and for one context manager. That is a third of the
time of all imports.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["light_imports"]

_COMPILER = "torch._dynamo"
_INSIDE = f"{_COMPILER}._trace_wrapped_higher_order_op"
# Decorators that tell the compiler something. torch's own operations on the meta device ask for them too, and
# bitsandbytes', when they are first called.
_MARKS = ("assume_constant_result", "allow_in_graph", "disable")


@contextmanager
def light_imports() -> Iterator[None]:
    """What is imported inside is imported without that, and without collecting garbage meanwhile.

    transformers then takes it, as long as the process lives, that there is no torch.distributed. Where it has been
    imported before, nothing is changed.
    """
    if any(name in sys.modules for name in ("transformers", _COMPILER)):
        yield
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        _import_transformers()
        yield
    finally:
        gc.freeze()  # modules stay: no collection need look at them
        if collecting:
            gc.enable()


def _import_transformers() -> None:
    import torch
    import torch.compiler
    import torch.distributed

    inside = ModuleType(_INSIDE)
    inside.TransformGetItemToIndex = _transform_later  # type: ignore[attr-defined]
    compiler = _Compiler(_COMPILER)
    torch._dynamo = compiler
    sys.modules |= {_COMPILER: compiler, _INSIDE: inside}
    with (
        _replaced(torch.compiler, "allow_in_graph", _as_it_is),
        _replaced(torch.compiler, "disable", _as_it_is),
        _replaced(torch.distributed, "is_available", lambda: False),
    ):
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()  # remembers the answer
        import transformers.masking_utils
        import transformers.modeling_utils  # noqa: F401


class _Compiler(ModuleType):
    """In the place of torch._dynamo, until more than a mark is asked for: a part of it, or a module inside."""

    def __getattr__(self, name: str) -> Any:
        if name in _MARKS:
            return _as_it_is
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            import torch

            del sys.modules[_COMPILER], torch._dynamo
            sys.modules.pop(_INSIDE, None)
        return getattr(import_module(_COMPILER), name)


def _transform_later() -> Any:
    """What `TransformGetItemToIndex()` gives, from the compiler itself."""
    getattr(import_module(_COMPILER), "config")  # noqa: B009 - brings the real one
    return import_module(_INSIDE).TransformGetItemToIndex()


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return _as_it_is if function is None else function


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, a module has another attribute."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
