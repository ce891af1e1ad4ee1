"""Merged weights become codes again, for the function's sake: calibrated rounding, and what takes back its error."""

from lora_deploy.requantize.options import Requantization, parse_keep

__all__ = ["Requantization", "parse_keep"]
