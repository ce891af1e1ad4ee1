"""The hub: model cards, and pushing what has passed."""

from lora_deploy.hub.card import adapter_card, export_card
from lora_deploy.hub.push import Pushed, push_to_hub

__all__ = ["Pushed", "adapter_card", "export_card", "push_to_hub"]
