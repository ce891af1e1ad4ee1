"""Configurations of models and adapters of any kind: only our own error escapes, and it says 3."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lora_deploy.config import CONFIG_NAME, LoraConfig
from lora_deploy.errors import CheckpointError, InputError
from lora_deploy.inputs.configuration import check_configuration
from lora_deploy.inputs.json_files import read_json
from tests.fuzz.until import fuzz

_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**9, 10**30, 10**400, -1, "all-linear", "(", "a{99999999999}", "LORA", "pissa"]),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
_MODEL_KEYS = st.sampled_from(
    [
        "architectures",
        "head_dim",
        "hidden_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_labels",
        "quantization_config",
        "rope_parameters",
        "text_config",
        "vocab_size",
    ]
)


def _texts(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.one_of(values.map(json.dumps).map(str.encode), st.binary(max_size=40))


def test_only_our_own_error_escapes_from_the_configuration_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        try:
            check_configuration(read_json(file), file, 21)
        except CheckpointError:
            return

    fuzz(check, _texts(st.dictionaries(st.one_of(_MODEL_KEYS, st.text(max_size=4)), _VALUES, max_size=4)))


def test_only_our_own_error_escapes_from_the_configuration_of_an_adapter(tmp_path: Path) -> None:
    keys = st.one_of(st.sampled_from(sorted(LoraConfig.model_fields)), st.text(max_size=6))

    def check(content: bytes) -> None:
        (tmp_path / CONFIG_NAME).write_bytes(content)
        try:
            config = LoraConfig.load(tmp_path)
        except InputError:
            return
        assert math.isfinite(config.scaling("model.layers.0.q_proj"))
        config.to_json()

    fuzz(check, _texts(st.dictionaries(keys, _VALUES, max_size=3)))
