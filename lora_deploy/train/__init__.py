"""Training: JSONL in, an adapter and the record of its base out. Needs the extra `lora-deploy[train]`."""

from lora_deploy.train.loop import train_adapter
from lora_deploy.train.options import TrainOptions, TrainResult

__all__ = ["TrainOptions", "TrainResult", "train_adapter"]
