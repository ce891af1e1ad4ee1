"""`python -m lora_deploy.bench.child`: options as JSON in, a sample or an error as JSON out."""

from __future__ import annotations

import json
import sys

from lora_deploy.bench.measure import measure
from lora_deploy.bench.options import BenchOptions
from lora_deploy.errors import LoraDeployError


def main() -> None:
    """Measure once, in this process."""
    try:
        print(measure(BenchOptions(**json.load(sys.stdin))).model_dump_json())
    except LoraDeployError as error:
        print(json.dumps({"error": type(error).__name__, "summary": error.summary, "details": error.details}))


if __name__ == "__main__":
    main()
