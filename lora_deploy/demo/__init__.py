"""The whole way on a real model: what the command `lora-deploy demo` does."""

from lora_deploy.demo.demo import run_demo

__all__ = ["run_demo"]
