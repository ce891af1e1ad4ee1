"""The compiled kernels, and the paths through them that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from lora_deploy.errors import UsageError
from lora_deploy.native import load_kernels
from tests.native.graphs import one_node, session

_PATHS = {"best": 0, "generic": 1, "avx2": 2, "avx512": 3}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            library = load_kernels()
        except UsageError as error:
            pytest.skip(f"no kernels here: {error.summary}")
    return str(library)


@pytest.fixture(params=list(_PATHS))
def path(request: pytest.FixtureRequest, kernels: str) -> int:
    """The value of the attribute `path`; skips where the processor does not have it."""
    value = _PATHS[request.param]
    constants = {"B": np.zeros((1, 1), np.int8), "scale": np.ones(1, np.float32)}
    try:
        session(one_node("MatMulInt8", constants, {"K": 1, "N": 1, "path": value}), kernels)
    except RuntimeException as error:
        if "does not exist on this processor" not in str(error):
            raise
        pytest.skip(f"no {request.param} here")
    return value
