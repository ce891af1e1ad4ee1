"""Index files of any kind: only our own error escapes, and no file outside of the directory is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lora_deploy.checkpoint import Checkpoint
from lora_deploy.errors import InputError
from tests.conftest import CheckpointFactory
from tests.fuzz.until import fuzz

_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)


def test_only_our_own_error_escapes(own_checkpoint: CheckpointFactory) -> None:
    directory = own_checkpoint("llama", max_shard_size=60_000)
    index = directory / "model.safetensors.index.json"
    real: dict[str, Any] = json.loads(index.read_text())
    shards = sorted(set(real["weight_map"].values()))
    names = st.one_of(
        st.sampled_from(
            [*shards, "..", "../x.safetensors", "/x.safetensors", "x\0.safetensors", "a/b.safetensors", ""]
        ),
        _VALUES,
    )
    maps = st.one_of(
        _VALUES,
        st.dictionaries(st.one_of(st.sampled_from(sorted(real["weight_map"])), st.text(max_size=5)), names).map(
            lambda changes: {"weight_map": real["weight_map"] | changes}
        ),
    )
    texts = st.one_of(maps.map(json.dumps).map(str.encode), st.binary(max_size=60), st.text(max_size=60).map(_encode))

    def check(content: bytes) -> None:
        index.write_bytes(content)
        try:
            found = Checkpoint(directory)
        except InputError:
            return
        assert {found.file(name).parent for name in found} == {directory}

    fuzz(check, texts)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def test_a_link_in_the_index_leads_nowhere_else(own_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    directory = own_checkpoint("llama", max_shard_size=60_000)
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out"):
        Checkpoint(directory)
