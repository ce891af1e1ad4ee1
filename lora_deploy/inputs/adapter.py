"""The files of an adapter's directory, looked at before the tensors are read."""

from __future__ import annotations

from pathlib import Path

from lora_deploy.config import CONFIG_NAME, LoraConfig
from lora_deploy.errors import AdapterError
from lora_deploy.inputs.headers import Entry, read_header

__all__ = ["WEIGHTS_NAME", "find_adapter", "open_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"


def find_adapter(directory: Path) -> Path:
    """The file with the weights of an adapter. It need not be there.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        AdapterError: It is no directory, holds adapters in folders of their names, or has only a pickle.
    """
    if not directory.is_dir():
        raise AdapterError(
            "the adapter is not a directory",
            file=directory,
            expected=f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}",
        )
    _check_folders(directory)
    file = directory / WEIGHTS_NAME
    pickle = directory / "adapter_model.bin"
    if pickle.exists() and not file.exists():
        raise AdapterError(
            "the adapter is a pickle, which can run code when it is read",
            file=pickle,
            expected=WEIGHTS_NAME,
            remedy="load it with PEFT where you trust it, and save it again with save_pretrained()",
        )
    return file


def open_adapter(directory: str | Path) -> tuple[LoraConfig, Path, dict[str, Entry]]:
    """Read the configuration of an adapter and the header of its weights, and check both.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The configuration, the file with the weights, and what its header says of each tensor.

    Raises:
        ConfigError: The configuration is missing, damaged or asks for something that is not supported.
        AdapterError: The weights are missing, truncated, damaged or pickled, or lead out of the directory.
    """
    file = find_adapter(Path(directory))
    config = LoraConfig.load(directory)
    try:
        return config, file, read_header(file, AdapterError, "the adapter's weights")
    except FileNotFoundError:
        raise AdapterError("the adapter has no weights", file=file) from None


def _check_folders(directory: Path) -> None:
    """PEFT saves an adapter that is not named "default" in a folder of its name; which one is meant is not guessed."""
    inside = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG_NAME}"))
    if inside and not (directory / CONFIG_NAME).exists():
        raise AdapterError(
            "the directory holds adapters in folders of their names, and is none itself",
            file=directory,
            found=", ".join(inside),
            expected=f"a directory with {CONFIG_NAME} and {WEIGHTS_NAME}",
            remedy=f"give the folder of the adapter: {directory / inside[0]}",
        )
