"""bitsandbytes, imported without the backends of torch's compiler: the only file that imports it.

On import bitsandbytes wraps some functions in `torch.compile`, which loads what compiles them there and then: most of
the time that the import takes. Here each is wrapped when it is first called. Where the processor has AVX512-BF16 it
warns that a kernel of its own forward is not there, which nothing here calls.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["bitsandbytes", "compiled_when_called", "functional"]


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """What is given to `torch.compile` inside goes there on its first call."""
    compile_now = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:  # a decorator with arguments
            return functools.partial(compile_later, **options)
        compiled = functools.cache(functools.partial(compile_now, model, **options))

        @functools.wraps(model)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


_forward_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _forward_logger.level
_forward_logger.setLevel(logging.ERROR)
try:
    with compiled_when_called():
        import bitsandbytes
        from bitsandbytes import functional
finally:
    _forward_logger.setLevel(_level)
