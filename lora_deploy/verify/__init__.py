"""Proof that an export computes what was trained."""

from lora_deploy.verify.module import check_module, verify_module
from lora_deploy.verify.parity import check_parity
from lora_deploy.verify.report import ParityReport
from lora_deploy.verify.verify import verify

__all__ = ["ParityReport", "check_module", "check_parity", "verify", "verify_module"]
