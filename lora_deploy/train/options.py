"""What a training run is asked to do, and what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_deploy.config import LoraConfig
from lora_deploy.errors import UsageError
from lora_deploy.quantization.scheme import QuantizationScheme
from lora_deploy.validation import as_usage_error

__all__ = ["TrainOptions", "TrainResult"]

# They say where things lie and how often something is written, and do not change what is computed.
_WITHOUT_EFFECT = {
    "model",
    "data",
    "eval_data",
    "output",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "keep_checkpoints",
    "resume",
    "overwrite",
    "device",
}


class TrainOptions(BaseModel):
    """Everything that `train_adapter` is told.

    Attributes:
        model: The base: a local directory or a hub id.
        data: JSONL; each line has `prompt` and `completion`, `messages`, or `text`.
        output: Directory for the adapter, its record, the log, the loss curve and the checkpoints.
        quantization: Scheme of the base's linear layers; None for nf4, or for what the checkpoint is quantized to.
        double_quant: Quantize the absmax values too (4 bits only).
        blocksize: Weights that share one absmax (4 bits only).
        rank: Rank of the update.
        alpha: Numerator of the scaling.
        dropout: Dropout on the input of A.
        target_modules: Names of the layers to adapt, or "all-linear".
        use_rslora: Scale by alpha / sqrt(rank).
        lora: The adapter's whole configuration, in the place of `rank` to `use_rslora`.
        epochs: Passes over the data, unless `max_steps` is given.
        max_steps: Optimizer steps.
        batch_size: Rows a process takes in one forward.
        gradient_accumulation: Forwards to one optimizer step.
        gradient_checkpointing: Compute activations again in the backward to save memory.
        learning_rate: The highest learning rate.
        schedule: How the learning rate goes on after the warmup; it depends on the planned number of steps only.
        warmup_ratio: Part of the planned steps in which the learning rate rises from zero.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        optimizer: "auto" is bitsandbytes' paged 8-bit AdamW on a GPU and torch's AdamW on a CPU.
        max_length: Tokens in a row, what is longer is cut; None for 1024, or less where the model takes less.
        pack: Put several examples into one row.
        chat_template: Turn prompt and completion into chat messages where the tokenizer has a template.
        eval_fraction: Part of the data that is kept for evaluation.
        eval_data: JSONL for evaluation.
        eval_steps: Optimizer steps between evaluations; None for a tenth of all.
        save_steps: Optimizer steps between checkpoints.
        keep_checkpoints: Older ones are deleted.
        logging_steps: Optimizer steps to a line of the log.
        seed: Of the adapter's initial values, the dropout, the order and the split of the data.
        device: "auto" is a GPU where there is one.
        resume: Go on from the last checkpoint in `output`.
        overwrite: Replace an adapter that is in `output`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    data: Path
    output: Path
    quantization: Literal["none", "nf4", "fp4", "int8"] | None = None
    double_quant: bool = True
    blocksize: int = Field(default=64, gt=0)
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str = "all-linear"
    use_rslora: bool = False
    lora: LoraConfig | None = None
    epochs: float = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4, gt=0)
    gradient_accumulation: int = Field(default=1, gt=0)
    gradient_checkpointing: bool = False
    learning_rate: float = Field(default=2e-4, gt=0, le=1e30)  # a larger one overflows inside the optimizer
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "auto"
    max_length: int | None = Field(default=None, gt=1)
    pack: bool = False
    chat_template: bool = True
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    eval_data: Path | None = None
    eval_steps: int | None = Field(default=None, gt=0)
    save_steps: int = Field(default=100, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    logging_steps: int = Field(default=1, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    overwrite: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise as_usage_error(error, "a training option has a value that it cannot have") from None
        twice = sorted({"rank", "alpha", "dropout", "target_modules", "use_rslora"} & values.keys())
        if self.lora is not None and twice:
            raise UsageError(
                "the adapter's whole configuration is given, and parts of it once more",
                found=", ".join(twice),
                remedy="put them into the configuration",
            )
        if self.eval_fraction and self.eval_data is not None:
            raise UsageError("give an evaluation fraction or evaluation data, not both")
        if self.resume and self.overwrite:
            raise UsageError("a run is resumed or overwritten, not both")

    def scheme(self) -> QuantizationScheme | None:
        """The quantization asked for; None leaves it to the checkpoint, or nf4 where that is not quantized."""
        if self.quantization is None:
            return None
        return self._scheme(self.quantization)

    def default_scheme(self) -> QuantizationScheme:
        """The scheme of a checkpoint in full precision when none is asked for: nf4."""
        return self._scheme("nf4")

    def _scheme(self, method: Literal["none", "nf4", "fp4", "int8"]) -> QuantizationScheme:
        if method not in ("nf4", "fp4"):  # the other two fields would say nothing there
            return QuantizationScheme(method=method)
        return QuantizationScheme(method=method, double_quant=self.double_quant, blocksize=self.blocksize)

    def lora_config(self) -> LoraConfig:
        """The adapter's configuration."""
        if self.lora is not None:
            own = {"base_model_name_or_path": self.model, "task_type": "CAUSAL_LM"}
            return self.lora.model_copy(update=own)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            base_model_name_or_path=self.model,
        )

    def that_matter(self) -> dict[str, Any]:
        """The options that decide what is computed: a resumed run must have the same ones."""
        return self.model_dump(mode="json", exclude=_WITHOUT_EFFECT)


class TrainResult(BaseModel):
    """What a training run did.

    Attributes:
        output: Directory of the adapter.
        steps: Optimizer steps, those before a resume included.
        loss: Mean loss over the last logged steps, in nats a token.
        eval_loss: Of the last evaluation; None without evaluation data.
        tokens_per_second: Over this run, all processes together, padding and evaluation apart; None where nothing
            was left to train.
        trainable_parameters: How many parameters were trained.
        total_parameters: How many the model has, the adapter included.
        examples: Training examples, after those that were left out.
        eval_examples: Evaluation examples.
        warnings: What was odd about the data.
        main_process: Whether this process is the one that writes.
    """

    output: Path
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    trainable_parameters: int
    total_parameters: int
    examples: int
    eval_examples: int
    warnings: list[str]
    main_process: bool = Field(default=True, exclude=True)
