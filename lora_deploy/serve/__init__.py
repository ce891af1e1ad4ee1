"""Serve an export: the OpenAI API, with requests for different adapters in one batch."""

from lora_deploy.serve.app import create_app
from lora_deploy.serve.engine import Engine

__all__ = ["Engine", "create_app"]
