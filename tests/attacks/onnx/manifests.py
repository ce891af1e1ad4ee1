"""Metadata with one lie each, laid over what the honest graph says of itself."""

from __future__ import annotations

import json
from typing import Any

from tests.attacks.onnx.make import ALL, CONVERT, DATA, SHA256, SLOT, VERIFY, VOCABULARY, Case

_LONG = 10**12
_READ = (VERIFY,)
_CODED = {
    "operator": "expand",
    "scheme": "int8",
    "blocksize": 4,
    "codes": "head",
    "scales": "table",
    "output": "base",
    "modules": [{"name": "lin", "shape": [VOCABULARY, 4]}],
}


def cases() -> dict[str, Case]:
    """Every manifest, by name."""
    return {
        name: Case(json.dumps(entries, indent=1).encode() + b"\n", does, commands)
        for name, (entries, does, commands) in (_slots() | _coded() | _words() | _provenance()).items()
    }


_Found = dict[str, tuple[dict[str, Any], str, tuple[str, ...]]]


def _slot(**changes: Any) -> dict[str, str]:
    return {"lora_deploy.slots": json.dumps([SLOT | changes])}


def _rows(rows: Any, in_order: bool = True, **more: Any) -> dict[str, str]:
    return _slot(parts=[{"module": "lin", "rows": rows, "in_order": in_order}], **more)


def _slots() -> _Found:
    found: dict[str, tuple[dict[str, Any], str]] = {
        "slots_not_json": ({"lora_deploy.slots": "["}, "half a list"),
        "slots_number": ({"lora_deploy.slots": "7"}, "a number for a list"),
        "slots_nested": ({"lora_deploy.slots": "[" * 3000 + "]" * 3000}, "lists in lists, 3,000 deep"),
        "rows_endless": (_rows([0, _LONG], outputs=_LONG), "a range of 10^12 rows"),
        "rows_backward": (_rows([260, 0]), "a range that ends before it begins"),
        "rows_negative": (_rows([-260, 0]), "rows before the first"),
        "rows_three": (_rows([0, 1, 260]), "a range of three numbers"),
        "rows_none": (_rows([]), "a range of no numbers"),
        "rows_texts": (_rows(["0", "260"]), "rows that are texts"),
        "rows_fraction": (_rows([0.5, 260.5]), "half rows"),
        "rows_twice": (_rows([0] * VOCABULARY, in_order=False), "one row 260 times"),
        "rows_elsewhere": (_rows([1000, 1260]), "rows that the layer does not have"),
        "parts_too_few": (_rows([0, 10]), "parts that are fewer than the outputs"),
        "parts_missing": (_slot(parts=[]), "no parts"),
        "size_negative": (_slot(inputs=-4), "a negative width"),
        "size_zero": (_slot(inputs=0), "no width"),
        "size_giant": (_slot(inputs=1 << 62), "a width that no memory holds"),
        "size_infinite": ({"lora_deploy.slots": json.dumps([SLOT]).replace("4", "1e999", 1)}, "an infinite width"),
        "size_true": (_slot(inputs=True), "a width that is true"),
        "blocks_do_not_divide": (_slot(int8_blocks=[3, 7]), "blocks that end in the middle"),
        "blocks_zero": (_slot(int8_blocks=[0, 0]), "blocks of nothing, to divide by"),
        "blocks_one": (_slot(int8_blocks=[4]), "one size for two"),
        "slot_twice": ({"lora_deploy.slots": json.dumps([SLOT, SLOT])}, "two slots of one name"),
        "slot_path": (_slot(name="../../etc/passwd"), "a name that leads elsewhere"),
        "slot_control": (_slot(name="\x1b[2Jlin"), "a name that clears the terminal"),
        "slot_nul": (_slot(name="lin\0"), "a name that ends early in C"),
        "slot_empty": (_slot(name=""), "no name"),
        "slot_long": (_slot(name="x" * 5000), "a name of 5,000 letters"),
        "slot_extra": (_slot(run="rm"), "a field that there is not"),
    }
    return {name: (entries, does, ALL) for name, (entries, does) in found.items()}


def _coded() -> _Found:
    def coded(**changes: Any) -> dict[str, str]:
        return {"lora_deploy.coded": json.dumps([_CODED | changes])}

    def shape(*sizes: int) -> dict[str, str]:
        return coded(modules=[{"name": "lin", "shape": list(sizes)}])

    found: dict[str, tuple[dict[str, Any], str]] = {
        "coded_no_modules": (coded(modules=[]), "codes of no layer"),
        "coded_shape_negative": (shape(-1, -1040), "negative sizes, whose product is right"),
        "coded_shape_giant": (shape(1 << 40, 1 << 40), "a layer of 2^80 weights"),
        "coded_blocks_zero": (coded(blocksize=0), "blocks of nothing, to divide by"),
        "coded_operator": (coded(operator="system"), "an operator that there is not"),
        "coded_widths": (
            coded(modules=[{"name": "a", "shape": [2, 4]}, {"name": "b", "shape": [2, 8]}]),
            "layers of two widths in one product",
        ),
        "coded_hash": (coded(modules=[{"name": "lin", "shape": [260, 4], "sha256": "../x"}]), "a hash that is a path"),
        "coded_twice": ({"lora_deploy.coded": json.dumps([_CODED, _CODED])}, "two weights of one product"),
    }
    return {name: (entries, does, ALL) for name, (entries, does) in found.items()}


def _words() -> _Found:
    return {
        "branch_unknown": ({"lora_deploy.branch": "telepathy"}, "a branch of no kind", ALL),
        "compute_dtype_unknown": ({"lora_deploy.compute_dtype": "fp1"}, "a type that there is not", ALL),
        "pool_paths": ({"lora_deploy.pool": '["../../x"]'}, "an adapter's name that leads elsewhere", ALL),
        "pool_twice": ({"lora_deploy.pool": '["a", "a"]'}, "two adapters of one name", ALL),
        "pool_numbers": ({"lora_deploy.pool": "[1, 2]"}, "names that are numbers", ALL),
        "task_unknown": ({"lora_deploy.task": "world-domination"}, "a task that there is not", ALL),
        "quantization_not_json": ({"lora_deploy.quantization": "{"}, "half a scheme", (VERIFY, CONVERT)),
        "quantization_unknown": ({"lora_deploy.quantization": '{"method":"q9"}'}, "no such scheme", (VERIFY, CONVERT)),
        "quantization_blocks": (
            {"lora_deploy.quantization": '{"method":"nf4","blocksize":-1}'},
            "a negative block size",
            (VERIFY, CONVERT),
        ),
        "not_ours": ({"lora_deploy.precision": None}, "a graph that lora-deploy has not made", (VERIFY, CONVERT)),
    }


def _provenance() -> _Found:
    def adapters(recorded: Any) -> dict[str, str]:
        return {"lora_deploy.adapters": json.dumps(recorded)}

    def files(recorded: Any) -> dict[str, str]:
        return {"lora_deploy.files": json.dumps(recorded)}

    whole = {"sha256": "a" * 64}
    return {
        "files_not_json": ({"lora_deploy.files": "{"}, "half a table of files", _READ),
        "files_list": (files([]), "a list for a table", _READ),
        "files_path": (files({"../secret.bin": "0" * 64}), "reads any file", _READ),
        "files_absolute": (files({"/etc/passwd": "0" * 64}), "reads any file", _READ),
        "files_deep": (files({"adapters/../../x": "0" * 64}), "reads any file", _READ),
        "files_gone": (files({"encoder.onnx": "0" * 64}), "a graph that is not there", _READ),
        "files_short": (files({DATA: "abc"}), "a hash of three letters", _READ),
        "files_other": (files({DATA: "0" * 64}), "the hash of other weights", _READ),
        "files_without_tokenizer": (files({DATA: SHA256}), "a tokenizer that nobody vouches for", _READ),
        "adapters_not_json": ({"lora_deploy.adapters": "{"}, "half a table of adapters", _READ),
        "adapters_list": (adapters([]), "a list for a table", _READ),
        "adapters_text": (adapters({"own": "x"}), "a text for an adapter", _READ),
        "adapters_no_hash": (adapters({"own": {"config": {}}}), "an adapter without a hash", _READ),
        "adapters_path": (adapters({"../own": whole}), "an adapter's name that leads elsewhere", _READ),
        "adapters_missing": (adapters({"gone": whole}), "an adapter whose file is not there", _READ),
        "base_model_nul": (
            {"lora_deploy.base_model": "x\0y", "lora_deploy.adapters": None},
            "a path that ends early in C",
            _READ,
        ),
        "base_sha256_missing": (
            {"lora_deploy.base_sha256": None, "lora_deploy.adapters": None},
            "no word of the base",
            _READ,
        ),
    }
