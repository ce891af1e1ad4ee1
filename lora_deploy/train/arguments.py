"""Our options as the arguments of transformers' Trainer."""

from __future__ import annotations

import os

import torch
from transformers import TrainingArguments

from lora_deploy.errors import UsageError
from lora_deploy.train.checkpoints import CHECKPOINTS
from lora_deploy.train.options import TrainOptions

__all__ = ["trainer_arguments"]


def trainer_arguments(options: TrainOptions) -> TrainingArguments:
    """The Trainer's arguments; making them joins the processes that a launcher started.

    Raises:
        UsageError: The device or the optimizer cannot be had here, or a launcher wants to spread the parameters.
    """
    _refuse_spreading()
    on_gpu, optimizer = _place(options)
    evaluates = bool(options.eval_fraction or options.eval_data)
    args = TrainingArguments(
        output_dir=str(options.output / CHECKPOINTS),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=optimizer,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.keep_checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps or 0.1,
        eval_on_start=evaluates and not options.resume,
        seed=options.seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        fp16=on_gpu and not torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    if on_gpu:
        args.device  # noqa: B018 - counts the GPUs, so that the next line is not undone
        args._n_gpu = 1  # one process uses one GPU; several are what `accelerate launch` is for
    return args


def _refuse_spreading() -> None:
    """Each process has all of the base, and writes or reads the adapter as it is in memory."""
    asked = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]
    if asked:
        raise UsageError(
            "lora-deploy train does not spread the parameters over processes",
            found=f"{asked[0]}, by accelerate launch",
            expected="all of the base in each process",
            remedy="accelerate launch --multi_gpu; or train with transformers' Trainer, PEFT and ExportCallback",
        )


def _place(options: TrainOptions) -> tuple[bool, str]:
    """Whether to train on a GPU, and the Trainer's name of the optimizer."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no GPU that torch can use", found="--device cuda", remedy="--device cpu, or auto")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    optimizer = options.optimizer
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if on_gpu else "adamw"
    elif optimizer != "adamw" and not on_gpu:
        raise UsageError("bitsandbytes' optimizers need a GPU", found=optimizer, remedy="--optimizer auto or adamw")
    return on_gpu, "adamw_torch" if optimizer == "adamw" else optimizer
