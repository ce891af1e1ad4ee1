"""Where the nodes of a graph really ran, from onnxruntime's own profile."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime

from lora_deploy.run.session import OnnxSession

# What works on shapes belongs on the CPU, whose values the other nodes are launched with.
SHAPE_OPERATORS = {"Shape", "Concat", "Gather", "Unsqueeze", "Squeeze", "Cast", "Slice", "Reshape", "Expand"}


def operators_by_provider(directory: Path, provider: Literal["cpu", "cuda"], scratch: Path) -> dict[str, set[str]]:
    """Open an export with profiling, run a prompt and a token, and read which operators each provider ran.

    Args:
        directory: The export.
        provider: The one to ask for.
        scratch: Where the profile is written.
    """
    original = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        options = original()
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / "profile")
        return options

    onnxruntime.SessionOptions = profiled
    try:
        session = OnnxSession(directory, provider)
    finally:
        onnxruntime.SessionOptions = original
    ids = np.array([[5, 6, 7]])
    _, cache = session.forward(ids, np.ones_like(ids))
    session.forward(ids[:, :1], np.ones((1, 4), np.int64), cache)
    found: dict[str, set[str]] = defaultdict(set)
    for event in json.loads(Path(session.session.end_profiling()).read_text()):
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in arguments:
            found[arguments["provider"]].add(arguments["op_name"])
    return dict(found)
