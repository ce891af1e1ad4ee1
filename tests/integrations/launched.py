"""What `accelerate launch` runs in the tests: transformers' Trainer, PEFT and an ExportCallback, on CPUs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, set_seed

from lora_deploy import LoraConfig, get_lora_model
from lora_deploy.integrations import ExportCallback
from tests.integrations.test_callback import SETTINGS, Rows, arguments

SPREADS = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
if SPREADS:
    # accelerate leaves them out on CPUs; this and ACCELERATE_TORCH_DEVICE are all that they need there.
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def load(base: str, storage: str | None) -> Any:
    """The base: dense, or in NF4, with codes that are kept in values of a type of floats, as FSDP wants them."""
    if storage is None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dtype = getattr(torch, storage)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)


def main(
    base: str,
    directory: Path,
    *,
    storage: str | None = None,
    layers: str = "peft",
    late: bool = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Train and export; each process writes what it saw.

    Args:
        base: The checkpoint.
        directory: Where to.
        storage: As `load` takes it.
        layers: "peft", or "own" for those of get_lora_model.
        late: Add the callback when the Trainer has been made.
        options: Of the callback.
    """
    settings = arguments(directory / "run", use_cpu=not SPREADS, dataloader_pin_memory=False)
    set_seed(0)
    model = load(base, storage)
    if layers == "own":
        get_lora_model(model, LoraConfig(**SETTINGS))
    else:
        extra = {"modules_to_save": ["lm_head"]} if storage is None else {}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS, **extra))
    callback = ExportCallback(directory / "out", adapter=directory / "adapter", quiet=True, **(options or {}))
    trainer = Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[] if late else [callback])
    if late:
        trainer.add_callback(callback)
    if trainer.is_deepspeed_enabled:
        # Parameters as small as these would stay whole.
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        config["stage3_param_persistence_threshold"] = 0
    trainer.train()
    ended = time.time()
    parameters = trainer.model.named_parameters()
    weight = next(values for name, values in parameters if "layers.1.mlp.down_proj.base" in name)
    seen = {
        "ended": ended,
        "passed": None if callback.result is None else callback.result.report.passed,
        "units": sum(isinstance(module, FSDPModule) for module in trainer.model.modules()),
        "here": (weight.to_local() if isinstance(weight, DTensor) else weight).numel(),
    }
    (directory / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[3]))
