"""`lora_deploy.json`: what training leaves beside an adapter, so that export need not guess its base."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_deploy.errors import AdapterError, OutputError
from lora_deploy.inputs.json_files import parse_json
from lora_deploy.quantization.scheme import QuantizationScheme

__all__ = ["RECORD_NAME", "TrainingRecord"]

RECORD_NAME = "lora_deploy.json"


class TrainingRecord(BaseModel):
    """The base that an adapter was trained on.

    Attributes:
        base_model: Directory or hub id, as it was given.
        quantization: How the base's linear layers were quantized.
        base_sha256: `TrainingBase.sha256()`: hash of the checkpoint's tensors, before any quantization.
        codes_sha256: Hash of the quantized weights of the linear layers as they were in memory during training.
        data: The training data's file, if there was one.
        versions: Versions of the libraries that trained it.
    """

    model_config = ConfigDict(extra="ignore")

    base_model: str
    quantization: QuantizationScheme
    base_sha256: str
    codes_sha256: str | None = None
    data: str | None = None
    versions: dict[str, str] = {}

    @classmethod
    def load(cls, directory: str | Path) -> TrainingRecord | None:
        """Read the record beside an adapter; None where there is none (an adapter that PEFT trained).

        Raises:
            AdapterError: It is damaged.
        """
        file = Path(directory) / RECORD_NAME
        try:
            return cls(**parse_json(file, AdapterError))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, ValidationError) as error:
            raise AdapterError(
                "the record of the training base cannot be read",
                file=file,
                found=str(error).splitlines()[0][:200],
                remedy="remove the file and name the base's quantization with --quantization",
            ) from error

    def save(self, directory: str | Path) -> None:
        """Write the record beside an adapter.

        Raises:
            OutputError: It could not be written.
        """
        file = Path(directory) / RECORD_NAME
        try:
            partial = file.with_suffix(".json.partial")
            partial.write_text(json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            raise OutputError(
                "the record of the training base could not be written", file=file, found=str(error)
            ) from error
