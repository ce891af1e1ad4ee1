"""What an export frees is given out again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from lora_deploy.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str, **environment: str) -> int:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS, how], env=own | environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pages_are_asked_for_once() -> None:
    """Five times 80 MB are 98,000 pages of 4 KB, or 200 of 2 MB where the system gives such."""
    kept, given_back = _faults("keep"), _faults("give back")
    assert given_back > 150
    assert kept < given_back / 3  # the second may not fit into the place of the first, the others fit
    # What the user says of the allocator holds.
    assert _faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > given_back / 2
