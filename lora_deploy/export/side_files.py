"""Configuration and tokenizer beside the graph, for the programs that open an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora_deploy.checkpoint import read_json
from lora_deploy.errors import OutputError
from lora_deploy.export.plan import ExportPlan
from lora_deploy.integrity import TOKENIZER_FILES

__all__ = ["write_side_files"]


def write_side_files(plan: ExportPlan, staging: Path) -> None:
    """Configuration and tokenizer, so that onnxruntime-genai and optimum open the directory too."""
    if plan.base.task == "module":
        return
    config = plan.base.config.to_dict()
    for key in ("_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[plan.compute_dtype]
    try:
        files = {"config.json": config}
        if plan.lowered.graph.genai_config:
            files["genai_config.json"] = _genai_config(plan)
        for name, values in files.items():
            (staging / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in ("generation_config.json", *TOKENIZER_FILES):
            source = plan.base.directory / name
            if source.is_file():
                shutil.copyfile(source, staging / name)
    except OSError as error:
        raise OutputError("the export could not be written", file=staging, found=str(error)) from error


def _genai_config(plan: ExportPlan) -> dict[str, Any]:
    """The graph's, with the special tokens of generation_config.json, which knows every token that ends an answer."""
    config = {**plan.lowered.graph.genai_config, "model": dict(plan.lowered.graph.genai_config["model"])}
    file = plan.base.directory / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(key) is not None:
            config["model"][key] = generation[key]
    return config
