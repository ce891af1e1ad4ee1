"""The tokenizer that an export brings, without torch and transformers wherever the same result is sure."""

from lora_deploy.tokenizer.light import LightTokenizer
from lora_deploy.tokenizer.load import load_tokenizer

__all__ = ["LightTokenizer", "load_tokenizer"]
