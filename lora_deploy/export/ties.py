"""What an adapter changes of tables of tokens, where embedding and output head may be one weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lora_deploy.adapter import LoraAdapter
from lora_deploy.adapter.tables import EmbeddingUpdate, TableUpdate, TokenRows
from lora_deploy.errors import AdapterError
from lora_deploy.manifest import BranchKind
from lora_deploy.quantization.base import TrainingBase

__all__ = ["broken_ties", "changed_tables", "check_tables", "note_ties", "table_change"]


def table_change(adapter: LoraAdapter, parameter: str, aliases: Mapping[str, str]) -> TableUpdate | None:
    """What changes in a table; a head that is tied to an embedding has its rows, unless it has rows of its own.

    Args:
        adapter: The adapter.
        parameter: Name of the table.
        aliases: Of the base.
    """
    own = adapter.tables.get(parameter.removesuffix(".weight"))
    if own is not None or parameter not in aliases:
        return own
    followed = adapter.tables.get(aliases[parameter].removesuffix(".weight"))
    return followed if isinstance(followed, TokenRows) else None


def changed_tables(adapter: LoraAdapter, aliases: Mapping[str, str]) -> dict[str, TableUpdate]:
    """Everything that changes in tables, by the parameter, those that follow another among them."""
    names = [f"{name}.weight" for name in adapter.tables]
    found = {name: table_change(adapter, name, aliases) for name in [*names, *aliases]}
    return {name: change for name, change in found.items() if change is not None}


def check_tables(adapter: LoraAdapter, base: TrainingBase) -> None:
    """Make sure that an export can change the tables that the adapter changes.

    Raises:
        AdapterError: It cannot.
    """
    for name in adapter.tables:
        if base.task == "seq2seq-lm" or base.holds_codes(name):
            raise AdapterError(
                "the adapter changes a table of tokens that an export cannot change",
                file=adapter.source,
                tensor=name,
                found="the embedding of an encoder-decoder" if base.task == "seq2seq-lm" else "a quantized output head",
                expected="a table in floats, of a model that is no encoder-decoder",
                remedy="train without trainable_token_indices and without LoRA on embeddings",
            )


def broken_ties(base: TrainingBase, adapters: Mapping[str, LoraAdapter], branch: BranchKind | None) -> set[str]:
    """Names of tied parameters that a merged or trained weight makes differ from the one they were tied to."""
    return {
        alias
        for alias, name in base.aliases.items()
        if any(_differ(lora, alias, name, merged=branch is None) for lora in adapters.values())
    }


def _differ(adapter: LoraAdapter, alias: str, name: str, *, merged: bool) -> bool:
    """Whether the two sides of a tie are changed in another way each."""
    first, second = adapter.parameters.get(name), adapter.parameters.get(alias)
    if first is not None or second is not None:
        return first is None or second is None or not torch.equal(first, second)
    embedding, head = name.removesuffix(".weight"), alias.removesuffix(".weight")
    table = adapter.tables.get(embedding)
    if head in adapter.tables:
        return True
    if isinstance(table, EmbeddingUpdate):
        return not (merged and _follows(adapter, head, table))
    return merged and bool({embedding, head} & adapter.updates.keys())


def _follows(adapter: LoraAdapter, head: str, table: EmbeddingUpdate) -> bool:
    """Whether a head's update is its embedding's, turned: PEFT's `ensure_weight_tying`."""
    if head not in adapter.updates or table.magnitude is not None:
        return False
    update = adapter.updates[head]
    same = torch.equal(update.A.t(), table.B) and torch.equal(update.B.t(), table.A)
    return same and update.scaling == table.scaling


def note_ties(base: TrainingBase, adapters: Iterable[LoraAdapter], branch: BranchKind | None) -> list[str]:
    """What became of the ties of tables that an adapter changes, for the user."""
    notes = []
    for alias, name in base.aliases.items():
        for lora in adapters:
            changed = {table.removesuffix(".weight") for table in (alias, name)} & lora.tables.keys()
            if not changed and not {alias, name} & lora.parameters.keys():
                continue
            broken = bool(broken_ties(base, {"": lora}, branch) & {alias})
            how = "are two weights now: the adapter changes them apart" if broken else "stay one weight, changed as one"
            notes.append(f"{name} and {alias} were tied and {how}")
    return notes
