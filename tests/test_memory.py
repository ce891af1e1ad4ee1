"""Large tensors lie on large pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FAULTS = """
import resource, sys
from lora_deploy.memory import use_huge_pages

if sys.argv[1] == "huge":
    use_huge_pages()
import torch

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str, **environment: str) -> int:
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS, how], env=own | environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(
    not _SETTING.is_file() or "[madvise]" not in _SETTING.read_text(), reason="the system gives no pages on demand"
)
def test_large_tensors_get_large_pages_unless_the_user_says_no() -> None:
    """Five times 80 MB are 98,000 pages of 4 KB; the system may be short of large ones, but not of all."""
    huge, small = _faults("huge"), _faults("small")
    assert small > 90_000
    assert huge < small / 2
    assert _faults("huge", THP_MEM_ALLOC_ENABLE="0") > 90_000
