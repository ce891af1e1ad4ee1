"""What an export says of itself in the `metadata_props` of its graph, beyond single words.

Read by `verify`, by `adapter convert` and by the run time, so it depends on nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from lora_deploy.bounds import AdapterName, Name, Size, first_fault
from lora_deploy.errors import CheckpointError
from lora_deploy.slots import Entry, Slot
from lora_deploy.task import Task

__all__ = [
    "ADAPTER_DIRECTORY",
    "ADAPTER_SUFFIX",
    "BranchKind",
    "CodedWeight",
    "Manifest",
    "StoredModule",
    "read_metadata",
]

BranchKind = Literal["fixed", "hot-swap", "pooled"]

# Where an export keeps the adapters that it can be given: adapters/NAME.onnx_adapter.
ADAPTER_DIRECTORY, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"

_PREFIX = "lora_deploy."


def read_metadata(directory: str | Path) -> dict[str, str]:
    """The `metadata_props` of an export's graph.

    Raises:
        CheckpointError: There is none, it is damaged, or hostile.
    """
    from lora_deploy.graph_check import metadata_of, read_graph

    file = Path(directory) / "model.onnx"
    return metadata_of(read_graph(file), file)


class StoredModule(Entry):
    """One linear layer whose quantized weight is in the graph.

    Attributes:
        name: In the transformers model.
        shape: (out, in).
        sha256: Of the codes and scales of the base's own weight, as `lora_deploy.quantization.hashes` hashes them.
    """

    name: Name
    shape: tuple[Size, Size]
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?\z")


class CodedWeight(Entry):
    """One matrix product of the graph whose weight is kept as codes.

    Attributes:
        operator: "MatMulBnb4", "MatMulNBits", "expand": standard operators that onnxruntime folds to a float weight; or
            "GatherBlockQuantized", of an embedding that shares no codes with the output head.
        scheme: What the codes are: "nf4", "fp4", "int8" or "int4".
        blocksize: Weights that share one scale; of "int8" rows that are expanded, a whole row.
        codes: The initializer that holds them.
        scales: The initializer that holds the absmax of each block (4 bits) or the factor on its codes (8 bits).
        output: The value that the product gives, or, expanded, the float weight (out, in).
        modules: The layers, whose rows follow each other.
        exact: Whether the codes are the training base's own. If not, they were transcoded, or made anew.
        requantized: Whether they were made anew, of the merged weight.
        accuracy_level: Of MatMulNBits: 0 leaves activations as they are, 4 rounds them to int8.
    """

    operator: Literal["MatMulBnb4", "MatMulNBits", "expand", "GatherBlockQuantized"]
    scheme: Literal["nf4", "fp4", "int8", "int4"]
    blocksize: Size
    codes: Name
    scales: Name
    output: Name
    modules: tuple[StoredModule, ...] = Field(min_length=1)
    exact: bool = True
    requantized: bool = False
    accuracy_level: int = Field(default=0, ge=0, le=4)

    @model_validator(mode="after")
    def _layers_of_one_width(self) -> CodedWeight:
        if len({module.shape[1] for module in self.modules}) > 1:
            raise ValueError(f"{self.codes}: layers of different widths cannot follow each other")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all layers together."""
        return sum(module.shape[0] for module in self.modules), self.modules[0].shape[1]


_CODED = TypeAdapter(tuple[CodedWeight, ...])
_SLOTS = TypeAdapter(tuple[Slot, ...])
_NAMES = TypeAdapter(tuple[AdapterName, ...])


def _dump_slots(slots: tuple[Slot, ...]) -> str:
    """As JSON. What is None is left out, so that slots of floats keep the fingerprint that their files carry."""
    return _SLOTS.dump_json(slots, exclude_none=True).decode()


class Manifest(Entry):
    """What a graph holds.

    Attributes:
        branch: How adapters stand in the graph; None where they are merged, or there is none.
        precision: Of the weights: "fp32", "fp16", "bf16", "nf4", "fp4" or "int8".
        compute_dtype: Of the computation: "fp32", "fp16" or "bf16".
        base_sha256: Hash of the training base, before it was quantized.
        quantization: How it was quantized, the scheme as JSON.
        coded: The weights that are kept as codes.
        slots: The places of adapters.
        pool: Names of the adapters in a pooled graph, by id.
        task: What the model is for.
        correction: Where a branch stands that takes back part of what rounding merged weights lost.
    """

    branch: BranchKind | None = None
    precision: str
    compute_dtype: Literal["fp32", "fp16", "bf16"]
    base_sha256: str
    quantization: str = ""
    coded: tuple[CodedWeight, ...] = ()
    slots: tuple[Slot, ...] = ()
    pool: tuple[AdapterName, ...] = ()
    task: Task = "causal-lm"
    correction: tuple[Slot, ...] = ()

    @model_validator(mode="after")
    def _each_name_once(self) -> Manifest:
        groups = {
            "slot": [slot.name for slot in self.slots],
            "adapter": list(self.pool),
            "codes": [weight.output for weight in self.coded],
        }
        for what, names in groups.items():
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{what} {twice[0]} is there twice")
        return self

    @model_validator(mode="after")
    def _slots_hold_whole_layers(self) -> Manifest:
        places: dict[str, list[tuple[int, int]]] = {}
        for part in (part for slot in self.slots for part in slot.parts):
            found = [(part.rows[0], part.rows[1])] if part.in_order else [(row, row + 1) for row in part.rows]
            places.setdefault(part.module, []).extend(found)
        for module, ranges in places.items():
            ranges.sort()
            ends = [0, *(stop for _, stop in ranges)]
            if any(start != end for (start, _), end in zip(ranges, ends, strict=False)):
                raise ValueError(f"{module}: the slots do not hold each of its rows once")
        return self

    @property
    def fingerprint(self) -> int:
        """31 bits that an `.onnx_adapter` file carries as its model version: which base, which slots, which type.

        The file format has no room for more, and an adapter for another base fits the shapes of any fine-tune.
        """
        slots = _dump_slots(self.slots)
        text = f"{self.base_sha256}\n{self.quantization}\n{self.compute_dtype}\n{slots}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def entries(self) -> dict[str, str]:
        """As `metadata_props`."""
        found = {
            "mode": "branch" if self.branch else "merge",
            "precision": self.precision,
            "compute_dtype": self.compute_dtype,
            "base_sha256": self.base_sha256,
            "quantization": self.quantization or None,
            "branch": self.branch,
            "coded": _CODED.dump_json(self.coded).decode() if self.coded else None,
            "slots": _dump_slots(self.slots) if self.slots else None,
            "pool": json.dumps(self.pool) if self.pool else None,
            "correction": _dump_slots(self.correction) if self.correction else None,
            "task": self.task if self.task != "causal-lm" else None,
        }
        return {f"{_PREFIX}{name}": value for name, value in found.items() if value is not None}

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read that of an export.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        return cls.read(read_metadata(directory), Path(directory) / "model.onnx")

    @classmethod
    def read(cls, metadata: Mapping[str, str], file: object) -> Manifest:
        """Read it from `metadata_props`.

        Args:
            metadata: All of them.
            file: The graph's, for messages.

        Raises:
            CheckpointError: The graph is not lora-deploy's, or what it says cannot be read.
        """

        def get(name: str, default: str) -> str:
            return metadata.get(f"{_PREFIX}{name}", default)

        if f"{_PREFIX}precision" not in metadata:
            raise CheckpointError("this model was not exported by lora-deploy", file=str(file))
        precision = get("precision", "")
        try:
            return cls(
                branch=metadata.get(f"{_PREFIX}branch"),  # type: ignore[arg-type]
                precision=precision,
                compute_dtype=get("compute_dtype", precision),  # type: ignore[arg-type]
                base_sha256=get("base_sha256", ""),
                quantization=get("quantization", ""),
                coded=_CODED.validate_json(get("coded", "[]")),
                slots=_SLOTS.validate_json(get("slots", "[]")),
                pool=_NAMES.validate_json(get("pool", "[]")),
                correction=_SLOTS.validate_json(get("correction", "[]")),
                task=get("task", "causal-lm"),  # type: ignore[arg-type]
            )
        except ValidationError as error:
            raise CheckpointError(
                "what the model says of itself cannot be read",
                file=str(file),
                found=first_fault(error),
                remedy="export again",
            ) from error
