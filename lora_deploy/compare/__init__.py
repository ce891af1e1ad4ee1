"""What each precision makes of the user's own model, adapter and data: size, speed, what is kept of the training."""

from lora_deploy.compare.candidates import Candidate, default_candidates
from lora_deploy.compare.compare import compare_precisions
from lora_deploy.compare.report import Comparison, Row

__all__ = ["Candidate", "Comparison", "Row", "compare_precisions", "default_candidates"]
