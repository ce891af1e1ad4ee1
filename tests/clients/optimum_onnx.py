"""What optimum-onnx answers, in an environment of its own: it knows nothing of lora_deploy or of the tests.

python optimum_onnx.py, with jobs as JSON on the standard input, each with `directory`, `optional` (a file of tensors
for optional inputs, or null), and either `encoded`, texts to classify as a tokenizer gives them, or `prompts` (tokens
of each), `new_tokens` and `ends`. Writes a list: of a classifier the logits, else the new tokens of each prompt, up to
and including the end token. Tokens, because transformers 4 does not open every tokenizer that transformers 5 saved.
"""

import json
import sys
from typing import Any

import torch
from onnxruntime import AdapterFormat, SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification


def open_model(kind: Any, directory: str, optional: str | None) -> Any:
    """An ORTModel whose optional inputs have these values: it has no place for them in a call."""
    options = SessionOptions()
    options.log_severity_level = 3
    file = AdapterFormat.read_adapter(optional) if optional else None
    tensors = file.get_parameters() if file else {}
    for name, value in tensors.items():
        options.add_initializer(name, value)
    model = kind.from_pretrained(directory, session_options=options)
    model.kept = file, tensors  # whose memory the session reads
    return model


def classify(job: dict[str, Any]) -> list[list[float]]:
    model = open_model(ORTModelForSequenceClassification, job["directory"], job["optional"])
    encoded = {name: torch.tensor(rows) for name, rows in job["encoded"].items()}
    logits: list[list[float]] = model(**encoded).logits.tolist()
    return logits


def generate(job: dict[str, Any]) -> list[list[int]]:
    """All prompts in one batch, padded on the left."""
    model = open_model(ORTModelForCausalLM, job["directory"], job["optional"])
    longest = max(map(len, job["prompts"]))
    ids, mask = torch.zeros(2, len(job["prompts"]), longest, dtype=torch.long)
    for row, tokens in enumerate(job["prompts"]):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    found = model.generate(ids, attention_mask=mask, max_new_tokens=job["new_tokens"], do_sample=False)
    answers = []
    for row in found[:, longest:].tolist():
        ended = [place + 1 for place, token in enumerate(row) if token in job["ends"]]
        answers.append(row[: ended[0]] if ended else row)
    return answers


print(json.dumps([classify(job) if "encoded" in job else generate(job) for job in json.load(sys.stdin)]))
