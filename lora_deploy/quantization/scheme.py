"""How a training base is quantized, as one value that travels from training to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_deploy.errors import CheckpointError

__all__ = ["QuantizationScheme"]


class QuantizationScheme(BaseModel):
    """The quantization of a base's linear layers.

    Attributes:
        method: "none", or bitsandbytes' "nf4", "fp4" or "int8" (LLM.int8, one scale a row).
        blocksize: Weights that share one absmax (4 bits only).
        double_quant: Whether the absmax values are quantized to 8 bits in turn (4 bits only; QLoRA's way).
        weight_dtype: Type that the weights had when they were quantized, as torch names it ("bfloat16"); None for
            the checkpoint's own.
        skip_modules: Names, or last parts of names, of linear layers that are left as they are. The output head
            always is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["none", "nf4", "fp4", "int8"] = "none"
    blocksize: int = Field(default=64, gt=0)
    double_quant: bool = True
    weight_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    skip_modules: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_what_counts(cls, data: Any) -> Any:
        """Blocks and double quantization are of 4 bits; for others they would tell equal schemes apart."""
        if isinstance(data, dict) and data.get("method", "none") not in ("nf4", "fp4"):
            return {name: value for name, value in data.items() if name not in ("blocksize", "double_quant")}
        return data

    @property
    def is_4bit(self) -> bool:
        """Whether the linear layers hold 4-bit codes."""
        return self.method in ("nf4", "fp4")

    def applies_to(self, module: str) -> bool:
        """Whether the linear layer of this full dotted name is quantized (the output head apart)."""
        if self.method == "none":
            return False
        return not any(module == skip or module.endswith(f".{skip}") for skip in self.skip_modules)

    def __str__(self) -> str:
        if not self.is_4bit:
            return self.method
        return f"{self.method}, block {self.blocksize}{', double quantization' if self.double_quant else ''}"

    @classmethod
    def from_model_config(cls, config: dict[str, Any], file: str | Path | None = None) -> QuantizationScheme | None:
        """Read the `quantization_config` that transformers leaves in `config.json`.

        Args:
            config: The whole of `config.json`.
            file: Its path, for messages.

        Returns:
            The scheme, or None where the checkpoint is not quantized.

        Raises:
            CheckpointError: It is quantized by another method than bitsandbytes.
        """
        section = config.get("quantization_config")
        if not section:
            return None
        if not isinstance(section, dict) or section.get("bnb_4bit_quant_type", "fp4") not in ("nf4", "fp4"):
            raise CheckpointError(
                "the checkpoint's quantization cannot be read",
                file=file,
                tensor="quantization_config",
                found=str(section)[:200],
                expected="what transformers writes for bitsandbytes",
            )
        skip = tuple(section.get("llm_int8_skip_modules") or ())
        if section.get("load_in_8bit"):
            return cls(method="int8", skip_modules=skip)
        if section.get("load_in_4bit"):
            return cls(
                method=section.get("bnb_4bit_quant_type", "fp4"),
                double_quant=bool(section.get("bnb_4bit_use_double_quant", False)),
                skip_modules=skip,
            )
        raise CheckpointError(
            "the checkpoint is quantized by a method that lora-deploy does not read",
            file=file,
            tensor="quantization_config.quant_method",
            found=section.get("quant_method"),
            expected="bitsandbytes (nf4, fp4 or int8), or no quantization",
            remedy="give the checkpoint that the adapter was trained on",
        )
