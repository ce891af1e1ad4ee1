"""The training run: everything checked, the base loaded and quantized, the adapter trained and written."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_deploy.adapter import TrainingRecord, save_adapter
from lora_deploy.data.examples import Example, load_examples, split_examples
from lora_deploy.errors import CheckpointError, UsageError
from lora_deploy.integrity import hash_file
from lora_deploy.layers import count_parameters, get_lora_model
from lora_deploy.quantization.base import TrainingBase
from lora_deploy.quantization.hashes import hash_codes
from lora_deploy.quantization.model import load_base_model
from lora_deploy.train.arguments import trainer_arguments
from lora_deploy.train.batches import Row, check_packing, pack
from lora_deploy.train.checkpoints import (
    check_options,
    check_output,
    check_record,
    clear_output,
    finished_steps,
    last_checkpoint,
)
from lora_deploy.train.interrupt import Interruption, StopCallback
from lora_deploy.train.options import TrainOptions, TrainResult
from lora_deploy.train.progress import LOG_NAME, PLOT_NAME, LogCallback, ProgressCallback, draw_loss, quiet_libraries
from lora_deploy.versions import installed_versions

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lora_deploy.train.trainer import AdapterTrainer

__all__ = ["load_tokenizer", "row_length", "train_adapter"]

_DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class _Data:
    """What is trained and evaluated on, as rows of examples."""

    train: list[Row]
    evaluation: list[Row]
    examples: int
    eval_examples: int
    warnings: list[str]


@dataclass(frozen=True)
class _Job:
    """All that the training itself needs."""

    options: TrainOptions
    args: TrainingArguments
    model: PreTrainedModel
    data: _Data
    record: TrainingRecord
    matter: dict[str, Any]
    checkpoint: Path | None
    pad_id: int


def train_adapter(options: TrainOptions, *, console: Console | None = None) -> TrainResult:
    """Train an adapter over a quantized base and write it with the record of that base.

    Runs in one process, or in each of those that `accelerate launch` starts; only the first one writes. The output
    holds PEFT's two files, `lora_deploy.json`, `training_log.jsonl`, `loss.png` and `checkpoints/`.

    Args:
        options: What to do.
        console: Where progress is shown; None for nowhere.

    Raises:
        UsageError: An option cannot be, the extra is not installed, nothing is there to resume, or the loss diverged.
        InputError: The base or the data is missing, damaged or does not fit.
        OutputError: The output holds a run already, or could not be written.
        KeyboardInterrupt: Ctrl-C; what was trained so far is saved and can be resumed.
    """
    _require_extra()
    console = console or Console(quiet=True)
    checkpoint = check_output(options.output, resume=options.resume, overwrite=options.overwrite)
    with quiet_libraries():
        base = _open_base(options)
        args = trainer_arguments(options)
        if args.process_index:
            console = Console(quiet=True)
        with console.status("reading the data"):
            tokenizer = load_tokenizer(base.directory)
            data = _load_data(options, base, tokenizer)
        for warning in data.warnings:
            console.print(f"warning: {warning}")
        matter = _options_that_matter(options, args)
        if checkpoint is not None:
            check_options(matter, checkpoint)
        with console.status(f"loading the base ({base.scheme})"):
            model, record = _load_model(options, base, args)
        if options.pack:
            check_packing(model, args.device)
        if args.should_save:
            if checkpoint is not None:
                check_record(record, checkpoint)
            else:
                clear_output(options.output)
        return _train(_Job(options, args, model, data, record, matter, checkpoint, _pad_id(tokenizer)), console)


def _require_extra() -> None:
    for package in ("accelerate", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"training needs {package}", remedy='pip install "lora-deploy[train]"')


def _open_base(options: TrainOptions) -> TrainingBase:
    base = TrainingBase(options.model, options.scheme(), task="causal-lm")
    if options.quantization is None and not base.prequantized:
        base.scheme = options.default_scheme()
    limit = getattr(base.config, "max_position_embeddings", None)
    if options.max_length is not None and limit is not None and options.max_length > limit:
        raise UsageError(
            "--max-length is more than the model takes", found=options.max_length, expected=f"at most {limit}"
        )
    return base


def row_length(asked: int | None, base: TrainingBase) -> int:
    """Tokens that are kept of a row: as many as asked for, or 1024, or less where the model takes less."""
    if asked is not None:
        return asked
    return min(_DEFAULT_LENGTH, getattr(base.config, "max_position_embeddings", None) or _DEFAULT_LENGTH)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a base.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # what transformers and tokenizers raise has no common base
        raise CheckpointError(
            "the base's tokenizer cannot be read",
            file=directory,
            found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            expected="tokenizer.json and tokenizer_config.json",
            remedy="copy the tokenizer's files beside the model",
        ) from error
    return tokenizer


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do: what is filled up is neither attended to nor learned."""
    return int(next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0))


def _load_data(options: TrainOptions, base: TrainingBase, tokenizer: PreTrainedTokenizerBase) -> _Data:
    length = row_length(options.max_length, base)
    found = load_examples(options.data, tokenizer, length, chat_template=options.chat_template)
    notes = found.warnings(options.data, length)
    if options.eval_data is not None:
        held = load_examples(options.eval_data, tokenizer, length, chat_template=options.chat_template)
        notes += held.warnings(options.eval_data, length)
        train, evaluation = found.kept, held.kept
    else:
        train, evaluation = split_examples(found.kept, options.eval_fraction, options.seed)

    def rows(examples: list[Example]) -> list[Row]:
        return list(pack(examples, length)) if options.pack else [[example] for example in examples]

    return _Data(rows(train), rows(evaluation), len(train), len(evaluation), notes)


def _options_that_matter(options: TrainOptions, args: TrainingArguments) -> dict[str, Any]:
    facts = {"data_sha256": hash_file(options.data), "processes": args.world_size, "device_type": args.device.type}
    return options.that_matter() | facts


def _load_model(
    options: TrainOptions, base: TrainingBase, args: TrainingArguments
) -> tuple[PreTrainedModel, TrainingRecord]:
    """The base with a new adapter, and the record of the base as it was right after it was quantized."""
    model = load_base_model(str(base.directory), base.scheme, device=args.device)
    if base.prequantized:
        # The Trainer refuses a quantized model without PEFT's own wrapper; the adapter here is our layers.
        for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            setattr(model, name, False)
    record = TrainingRecord(
        base_model=options.model,
        quantization=base.scheme,
        base_sha256=base.sha256() if args.should_save else "",  # reads the whole checkpoint: only where it is written
        codes_sha256=None if base.scheme.method == "none" else hash_codes(model),
        data=str(options.data),
        versions=installed_versions("lora-deploy", "torch", "transformers", "accelerate", "bitsandbytes"),
    )
    torch.manual_seed(options.seed)
    get_lora_model(model, options.lora_config())
    if options.gradient_checkpointing:
        # The other kind of checkpointing needs an input that requires gradients, which a frozen base has not.
        kwargs = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:  # what older transformers call it
            model.gradient_checkpointing_enable(kwargs)  # type: ignore[no-untyped-call]
    return model, record


def _train(job: _Job, console: Console) -> TrainResult:
    from lora_deploy.train.trainer import AdapterTrainer

    output = job.options.output
    bar = ProgressCallback(console)
    with Interruption() as interruption:
        stop = StopCallback(interruption)
        trainer = AdapterTrainer(
            job.model,
            job.args,
            train_rows=job.data.train,
            eval_rows=job.data.evaluation,
            packed=job.options.pack,
            pad_id=job.pad_id,
            record=job.record,
            options=job.matter,
            callbacks=[stop, LogCallback(output / LOG_NAME), bar],
        )
        try:
            _run(trainer, job.checkpoint)
        finally:
            bar.stop()
        if job.args.should_save:
            save_adapter(job.model, output)
            job.record.save(output)
            draw_loss(trainer.state.log_history, output / PLOT_NAME)
    if stop.stopped:
        console.print(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; saved in "
            f"{last_checkpoint(output)}. The same command with --resume goes on from there.",
            soft_wrap=True,
        )
        raise KeyboardInterrupt
    return _result(job, trainer)


def _run(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    if checkpoint is None or finished_steps(checkpoint) is None:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    # The Trainer would take one more step.
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _result(job: _Job, trainer: AdapterTrainer) -> TrainResult:
    def last(name: str) -> float | None:
        return next((entry[name] for entry in reversed(trainer.state.log_history) if name in entry), None)

    count = count_parameters(job.model)
    return TrainResult(
        output=job.options.output,
        steps=trainer.state.global_step,
        loss=last("loss"),
        eval_loss=last("eval_loss"),
        tokens_per_second=trainer.tokens / trainer.seconds if trainer.seconds else None,
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        examples=job.data.examples,
        eval_examples=job.data.eval_examples,
        warnings=job.data.warnings,
        main_process=trainer.is_world_process_zero(),
    )
