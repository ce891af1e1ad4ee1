"""onnxruntime-node: merged exports as they are, branches after `require_inputs`.

It takes no input that is optional (1.30), and says nothing: every adapter would answer as the bare base.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock
from safetensors.numpy import save_file

from lora_deploy.export.required_inputs import require_inputs
from tests.clients.conftest import NEW_TOKENS, POOL, Answers, Prompts
from tests.clients.test_onnxruntime import read_tensors

VERSION = "1.30.0"
SCRIPT = Path(__file__).with_name("greedy.mjs")
NODE = shutil.which("node")


@pytest.fixture(scope="session")
def node_modules(pytestconfig: pytest.Config) -> Path:
    """The package, installed once by npm into pytest's cache (`pytest --cache-clear` removes it)."""
    npm = shutil.which("npm")
    if NODE is None or npm is None:
        pytest.skip("needs Node.js and npm, https://nodejs.org")
    cache = getattr(pytestconfig, "cache", None)
    if cache is None:
        pytest.skip("needs pytest's cache, without -p no:cacheprovider")
    place = cache.mkdir("onnxruntime-node") / VERSION
    with FileLock(place.with_name(f"{VERSION}.lock")):
        if not place.is_dir():
            partial = place.with_name(f"{VERSION}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            # Its binaries for CPUs are in the package; the script after it would look for those of CUDA.
            environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
            command = [npm, "install", "--prefix", partial, "--no-audit", "--no-fund", f"onnxruntime-node@{VERSION}"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
            except subprocess.SubprocessError as error:
                said = getattr(error, "stderr", None) or error
                pytest.skip(f"npm could not install onnxruntime-node {VERSION}, which needs a network: {said}")
            partial.rename(place)
    return place / "node_modules"


def decode(node_modules: Path, prompts: Prompts, jobs: list[dict[str, Any]]) -> list[Any]:
    """What onnxruntime-node answers to the prompts in each job."""
    assert NODE is not None
    rest = {"prompts": prompts.ids, "newTokens": NEW_TOKENS, "ends": sorted(prompts.ends)}
    given = json.dumps([{**rest, **job} for job in jobs], default=str)
    done = subprocess.run(
        [NODE, SCRIPT, node_modules], input=given, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    return results


def required(export: Path, directory: Path) -> Path:
    """The export's graph with its optional inputs required."""
    model = onnx.load(export / "model.onnx", load_external_data=False)
    assert require_inputs(model)
    for data in export.glob("*.data"):
        shutil.copy(data, directory)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    return directory / "model.onnx"


@pytest.fixture(scope="module")
def adapters(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """The adapters of the hot-swap export in a format that JavaScript reads; None: without any rank."""
    folder = exports["hot-swap"] / "adapters"
    made: dict[str | None, dict[str, np.ndarray]] = {
        name: read_tensors(folder / f"{name}.onnx_adapter") for name in POOL
    }
    empty = {name: values[:, :0] if name.endswith("lora_A") else values[:0] for name, values in made["a"].items()}
    directory = tmp_path_factory.mktemp("adapters")
    files = {name: directory / f"{name}.safetensors" for name in (None, *POOL)}
    for name, tensors in {**made, None: empty}.items():
        save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, files[name])
    return files


def test_a_merged_export_is_a_plain_model(
    node_modules: Path, exports: dict[str, Path], prompts: Prompts, ours: Answers
) -> None:
    assert decode(node_modules, prompts, [{"model": exports["merge"] / "model.onnx"}]) == [ours["merge"]["a"]]


def test_adapters_are_inputs_once_they_are_required(
    node_modules: Path,
    exports: dict[str, Path],
    adapters: dict[str | None, Path],
    prompts: Prompts,
    ours: Answers,
    tmp_path: Path,
) -> None:
    model = required(exports["hot-swap"], tmp_path)
    names = (None, *POOL)
    found = decode(node_modules, prompts, [{"model": model, "adapter": adapters[name]} for name in names])
    assert found == [ours["hot-swap"][name] for name in names]
    (refused,) = decode(node_modules, prompts, [{"model": model}])
    assert "is missing in 'feeds'" in refused["error"]


def test_a_pools_ids_are_an_input_once_they_are_required(
    node_modules: Path, exports: dict[str, Path], prompts: Prompts, ours: Answers, tmp_path: Path
) -> None:
    model = required(exports["pooled"], tmp_path)
    ids = {None: -1, "a": 0, "b": 1}
    found = decode(node_modules, prompts, [{"model": model, "given": {"adapter_ids": [ids[name]]}} for name in ids])
    assert found == [ours["pooled"][name] for name in ids]


def test_an_optional_input_is_dropped_in_silence(
    node_modules: Path, exports: dict[str, Path], adapters: dict[str | None, Path], prompts: Prompts, ours: Answers
) -> None:
    """Why they must be required. Should this fail, they need not be any more: then the README's table can say so."""
    jobs: list[dict[str, Any]] = [{"model": exports["hot-swap"] / "model.onnx", "adapter": adapters["a"]}]
    jobs += [{"model": exports["pooled"] / "model.onnx", "given": {"adapter_ids": [0]}}]
    assert decode(node_modules, prompts, jobs) == [ours["hot-swap"][None], ours["pooled"][None]]
