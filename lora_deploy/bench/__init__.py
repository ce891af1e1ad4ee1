"""How fast an export of one's own runs here, and in how much memory."""

from lora_deploy.bench.bench import run_benchmark
from lora_deploy.bench.options import BenchOptions
from lora_deploy.bench.report import Benchmark, Measure

__all__ = ["BenchOptions", "Benchmark", "Measure", "run_benchmark"]
