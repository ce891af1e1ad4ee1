"""What a study is asked to do: everything that its runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.errors import UsageError
from lora_deploy.train.options import TrainOptions
from lora_deploy.validation import as_usage_error

__all__ = ["StudyOptions"]

# They may change between a study and its continuation: they say what else to try, and where and how it runs.
_OPEN = {
    "model",
    "data",
    "held_out",
    "output",
    "seeds",
    "learning_rates",
    "only",
    "answers",
    "device",
    "jobs",
    "overwrite",
}


class StudyOptions(BaseModel):
    """Everything that `run_study` is told.

    Every choice is trained on the same rows in the same number of steps, from the same quantized base; a seed decides
    the initial A and the order of the rows. The update is scaled by alpha / rank with one alpha for all, as the LoRA
    paper does, so that the first steps are as large at any rank. Of several learning rates each choice gets the one
    that is best for it with the first seed: what suits one rank and one set of matrices need not suit another.

    Attributes:
        model: The base: a local directory or a hub id.
        data: JSONL to train on.
        held_out: JSONL to judge on; None for a part of the data that is then not trained on.
        held_out_fraction: That part.
        output: Directory of the study.
        seeds: Each choice is trained with each.
        learning_rates: Each choice is trained at each with the first seed, and with the other seeds at its best.
        only: Names of the choices to train; none for all that spend the budget nearly enough.
        answers: Held-out prompts that are answered greedily; 0 for none.
        quantization: Scheme of the base's linear layers; None for nf4, or for what the checkpoint is quantized to.
        double_quant: Quantize the absmax values too (4 bits only).
        blocksize: Weights that share one absmax (4 bits only).
        alpha: Numerator of the scaling.
        use_rslora: Scale by alpha / sqrt(rank).
        steps: Optimizer steps; None for one pass over the data.
        batch_size: Rows to a step.
        schedule: Of the learning rate.
        max_length: Tokens in a row; None for 1024, or less where the model takes less.
        chat_template: Turn prompt and completion into chat messages where the tokenizer has a template.
        device: "auto" is a GPU where there is one.
        jobs: Runs at the same time, in processes of their own.
        overwrite: Begin anew in a directory that holds another study.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    data: Path
    held_out: Path | None = None
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    output: Path
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    learning_rates: tuple[float, ...] = Field(default=(2e-4,), min_length=1)
    only: tuple[str, ...] = ()
    answers: int = Field(default=40, ge=0)
    quantization: Literal["none", "nf4", "fp4", "int8"] | None = None
    double_quant: bool = True
    blocksize: int = Field(default=64, gt=0)
    alpha: float = Field(default=16, gt=0)
    use_rslora: bool = False
    steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_length: int | None = Field(default=None, gt=1)
    chat_template: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    jobs: int = Field(default=1, gt=0)
    overwrite: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise as_usage_error(error, "an option of the study has a value that it cannot have") from None
        for name in ("seeds", "learning_rates", "only"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise UsageError("something is asked for twice", found=f"{name} = {', '.join(map(str, values))}")

    def that_matter(self) -> dict[str, Any]:
        """The options that every run of a study must share."""
        return self.model_dump(mode="json", exclude=_OPEN)

    def training(self, targets: list[str], rank: int, rate: float, seed: int, data: Path, output: Path) -> TrainOptions:
        """The options of one run.

        Args:
            targets: Of the choice.
            rank: Of the choice.
            rate: The highest learning rate.
            seed: Of A and of the order of the rows.
            data: The rows to train on.
            output: Directory of the adapter.

        Raises:
            UsageError: A value cannot be.
        """
        return TrainOptions(
            model=self.model,
            data=data,
            output=output,
            quantization=self.quantization,
            double_quant=self.double_quant,
            blocksize=self.blocksize,
            rank=rank,
            alpha=self.alpha,
            use_rslora=self.use_rslora,
            target_modules=targets,
            max_steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            schedule=self.schedule,
            max_length=self.max_length,
            chat_template=self.chat_template,
            seed=seed,
            device=self.device,
        )
