"""The hostile files of this folder, made anew: python -m tests.attacks.make [DIRECTORY]"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

__all__ = ["CONFIGURATIONS", "HEADERS", "INDEXES", "make"]

_ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _one(**changes: Any) -> bytes:
    return _file({"a": {key: value for key, value in (_ONE | changes).items() if value is not None}})


_RAW = json.dumps(_ONE).encode()
# By name of the file: its bytes, and what the message must say.
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven-bytes": (bytes(7), "7 bytes"),
    "length-beyond-the-file": (_file({"a": _ONE}, length=1 << 20), "ends before the file does"),
    "length-of-all-ones": (_file({"a": _ONE}, length=(1 << 64) - 1), "ends before the file does"),
    "no-json": (_file(b"{nonsense"), "JSON"),
    "a-list": (_file(b"[]"), "JSON object"),
    "spaces-first": (_file(b"  " + json.dumps({"a": _ONE}).encode()), "JSON object"),
    "no-utf-8": (_file(b'{"\xff":' + _RAW + b"}"), "UTF-8"),
    "half-a-surrogate": (_file(b'{"\\ud800":' + _RAW + b"}"), "surrogate"),
    "nested": (_file(b'{"a":' + b"[" * 3000), "RecursionError"),
    "many-digits": (_file(b'{"a":' + b"1" * 3900 + b"}"), "the number 111"),
    "one-name-twice": (_file(b'{"a":' + _RAW + b',"a":' + _RAW + b"}"), "twice"),
    "one-key-twice": (_file(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "one-metadata-twice": (_file(b'{"__metadata__":{"x":"1","x":"2"},"a":' + _RAW + b"}"), "twice"),
    "metadata-with-a-number": (_file({"__metadata__": {"x": 1}, "a": _ONE}), "metadata"),
    "metadata-that-is-null": (_file({"__metadata__": None, "a": _ONE}), "metadata"),
    "no-dtype": (_one(dtype=None), "dtype, shape and data_offsets"),
    "another-key": (_one(more=1), "dtype, shape and data_offsets"),
    "unknown-dtype": (_one(dtype="F33"), "F33"),
    "dtype-that-is-a-number": (_one(dtype=1), "the type"),
    "shape-that-is-a-number": (_one(shape=2), "whole numbers"),
    "shape-of-booleans": (_one(shape=[True, True]), "whole numbers"),
    "shape-of-floats": (_one(shape=[2.0]), "whole numbers"),
    "shape-below-zero": (_one(shape=[-2]), "-2"),
    "shape-that-overflows": (_one(shape=[1 << 32, 1 << 32]), "2^63"),
    "shape-that-overflows-to-fit": (_one(shape=[(1 << 62) + 2], dtype="F32"), "2^63"),
    "zero-that-hides-an-overflow": (
        _file({"a": _ONE | {"shape": [1 << 62, 8, 0], "data_offsets": [0, 0]}}, b""),
        "2^63",
    ),
    "two-to-the-64": (_one(shape=[1 << 64]), "2^63"),
    "thousand-dimensions": (_one(shape=[1] * 1000), "1000 dimensions"),
    "offsets-beyond-the-file": (_one(shape=[1000], data_offsets=[0, 4000]), "bytes in the file"),
    "offsets-in-reverse": (_one(data_offsets=[8, 0]), "data_offsets"),
    "three-offsets": (_one(data_offsets=[0, 4, 8]), "data_offsets"),
    "size-of-another-shape": (_one(shape=[3]), "8 bytes"),
    "overlap": (_file({"a": _ONE, "b": _ONE | {"data_offsets": [4, 12]}}, bytes(12)), "in another tensor"),
    "the-same-bytes-twice": (_file({"a": _ONE, "b": _ONE}), "in another tensor"),
    "hole": (_file({"a": _ONE | {"data_offsets": [4, 12]}}, bytes(12)), "after a hole"),
    "trailing-bytes": (_file({"a": _ONE}, bytes(9)), "behind the last tensor"),
    "pickle-with-another-name": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueR." * 4, "ends before the file does"),
}
_SHARDS = {
    "climbs-out": "../other/model.safetensors",
    "absolute-path": "/etc/passwd.safetensors",
    "backslashes": "..\\other\\model.safetensors",
    "drive": "C:model.safetensors",
    "parent": "..",
    "nul": "model\x00.safetensors",
    "newline": "model\n.safetensors",
    "empty": "",
    "number": 3,
    "list": ["model.safetensors"],
    "null": None,
    "pickle": "pytorch_model-00001-of-00001.bin",
    "very-long": "m" * 300 + ".safetensors",
}
INDEXES: dict[str, tuple[bytes, str]] = {
    name: (json.dumps({"weight_map": {"a": shard}}).encode(), "the index names something else")
    for name, shard in _SHARDS.items()
} | {
    "no-json": (b'{"weight_map":', "cannot be read"),
    "nested": (b"[" * 4000, "cannot be read"),
    "many-digits": (b'{"metadata":' + b"1" * 4050 + b"}", "no tensors"),
    "no-map": (b'{"weight_map": ["a"]}', "no tensors"),
    "empty-map": (b'{"weight_map": {}}', "no tensors"),
    "a-list": (b"[]", "no JSON object"),
    "no-utf-8": (b'{"\xff": 1}', "cannot be read"),
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
_CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "billion-layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "more-layers-than-tensors": ({"num_hidden_layers": 1000}, "tensors"),
    "billion-labels": ({"num_labels": 10**9}, "num_labels"),
    "billion-positions": ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
    "table-of-positions": ({"max_position_embeddings": 1 << 24, "head_dim": 128}, "1 GB"),
    "width-beyond-64-bits": ({"hidden_size": 10**30}, "hidden_size"),
    "number-beyond-64-bits": ({"bos_token_id": 10**30}, "bos_token_id"),
    "billion-experts": ({"num_local_experts": 10**9}, "num_local_experts"),
    "nested-layers": ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
    "rope-factor": ({"rope_parameters": {"rope_type": "linear", "factor": 1e12}}, "rope_parameters.factor"),
    "kind-that-is-a-number": ({"model_type": 3}, "model_type"),
    "architectures-that-are-numbers": ({"architectures": [1]}, "architectures"),
    "quantization-that-is-a-list": ({"quantization_config": [1]}, "quantization_config"),
    "skipped-modules-that-are-a-number": ({"quantization_config": {"llm_int8_skip_modules": 7}}, "skip_modules"),
}
CONFIGURATIONS: dict[str, tuple[bytes, str]] = {
    name: (json.dumps(_LLAMA | fields).encode(), named) for name, (fields, named) in _CHANGED.items()
} | {
    "no-json": (b"{", "cannot be read"),
    "a-list": (b"[]", "no JSON object"),
    "nested": (b'{"a":' * 800, "cannot be read"),
    "many-digits": (b'{"vocab_size":' + b"1" * 4050 + b"}", "vocab_size"),
    "no-utf-8": (b'{"\xff": 1}', "cannot be read"),
}


def make(directory: Path) -> None:
    """Write every file.

    Args:
        directory: Where to.
    """
    kinds = {
        "headers": (HEADERS, "safetensors"),
        "indexes": (INDEXES, "json"),
        "configurations": (CONFIGURATIONS, "json"),
    }
    for folder, (attacks, ending) in kinds.items():
        (directory / folder).mkdir(parents=True, exist_ok=True)
        for name, (content, _) in attacks.items():
            (directory / folder / f"{name}.{ending}").write_bytes(content)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
