"""TRL's SFTTrainer with the callback, on a 4-bit base, as a QLoRA tutorial has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_deploy.integrations import ExportCallback
from lora_deploy.quantization.model import keep_codes
from lora_deploy.run import OnnxModel
from tests.conftest import QUIET_PEFT, four_bit
from tests.train.conftest import tiny_base

__all__ = ["tiny_base"]

pytestmark = [
    pytest.mark.slow,  # and needs the extra `trl`
    *QUIET_PEFT,
    # trl 1.16 sets fields of the arguments that transformers 5.24 has renamed.
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]


@pytest.mark.parametrize("merge", [True, False])
def test_what_sft_trained_is_exported(tiny_base: Callable[..., str], tmp_path: Path, merge: bool) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    place = tiny_base()
    model = AutoModelForCausalLM.from_pretrained(place, quantization_config=four_bit("nf4"), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = [{"prompt": f"{number} is ", "completion": "even" if number % 2 == 0 else "odd"} for number in range(8)]
    settings = {"r": 3, "lora_alpha": 9, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    callback = ExportCallback(tmp_path / "out", merge=merge, quiet=True)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**settings),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.result is not None
    assert callback.result.report is not None
    assert callback.result.report.passed
    exported = OnnxModel(tmp_path / "out", None if merge else "adapter")
    ids = tokenizer("5 is ", return_tensors="pt")
    keep_codes(trainer.model.eval().float())  # TRL keeps the adapter of a 4-bit base in bfloat16, and multiplies in it
    with torch.no_grad():
        expected = trainer.model(**ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(**ids).logits
    found, _ = exported.session.forward(
        ids["input_ids"].numpy(), ids["attention_mask"].numpy(), adapter=exported._inputs
    )
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-3
    assert (base - expected).abs().max() > 0.1
