"""Put adapters on the tables of tokens of a model: its embedding, and the output head that may be tied to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple, cast

from torch import nn

from lora_deploy.config import LoraConfig
from lora_deploy.errors import ConfigError
from lora_deploy.layers.embedding import LoraEmbedding, TableLayer, TiedLoraHead, TokenLayer

__all__ = ["TablePlan", "Tie", "find_tie", "plan_tables", "table_layers"]

_logger = logging.getLogger(__name__)


class Tie(NamedTuple):
    """An embedding and the output head that shares its weight, by name."""

    embedding: str
    head: str


class TablePlan(NamedTuple):
    """What is to be done to tables of tokens.

    Attributes:
        tie: Of the model; None where it has none.
        shared: The tie, where both sides are to be adapted or trained whole as one; else None.
        lora: Embeddings that get a low-rank update.
        tokens: Tokens whose rows are trained alone, by table.
        tokens_follow: Whether the tied head has the rows of the embedding.
    """

    tie: Tie | None
    shared: Tie | None
    lora: Mapping[str, nn.Embedding]
    tokens: Mapping[str, tuple[int, ...]]
    tokens_follow: bool

    @property
    def head_follows(self) -> bool:
        """Whether the tied head gets the embedding's low-rank update."""
        return self.shared is not None and self.shared.embedding in self.lora

    def put(self, model: nn.Module, config: LoraConfig) -> None:
        """Put the layers into the model, in place."""
        made: dict[str, TableLayer] = {}
        for name, module in self.lora.items():
            made[name] = LoraEmbedding(
                module,
                config.rank(name),
                config.scaling(name),
                init_lora_weights=config.init_lora_weights,
                use_dora=config.use_dora,
            )
        for name, indices in self.tokens.items():
            made[name] = TokenLayer(model.get_submodule(name), indices)
        tie = self.tie
        if self.head_follows or self.tokens_follow:
            assert tie is not None
            head, source = model.get_submodule(tie.head), made[tie.embedding]
            if isinstance(source, LoraEmbedding):
                made[tie.head] = TiedLoraHead(head, source, config.scaling(tie.head), config.lora_dropout)
            else:
                made[tie.head] = TokenLayer(head, self.tokens[tie.embedding], cast(TokenLayer, source))
        for name, layer in made.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.train(model.training))

    def say_ties(self, changed: set[str]) -> None:
        """One line of the log on a tie that the adapter touches.

        Args:
            changed: Modules that are adapted or trained whole, by name.
        """
        if self.tie is not None and {*self.tie} & {*changed, *self.tokens}:
            kept = self.shared is not None or self.tokens_follow
            said = (
                "stay one, and are trained as one" if kept else "are tied no longer: what changes one leaves the other"
            )
            _logger.info("%s and %s %s", *self.tie, said)


def find_tie(model: nn.Module) -> Tie | None:
    """The input embedding and the output head that shares its weight, if there are such."""
    embedding, head = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
    if embedding is None or head is None or embedding is head:
        return None
    if getattr(embedding, "weight", None) is not getattr(head, "weight", None):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return Tie(names[id(embedding)], names[id(head)])


def table_layers(model: nn.Module) -> dict[str, TableLayer]:
    """The adapted tables by the name of the module they stand for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TableLayer)}


def plan_tables(
    model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]
) -> TablePlan:
    """What the configuration asks of tables of tokens.

    Args:
        model: Without adapters.
        config: The configuration.
        targets: Modules that get a low-rank update, by name.
        saved: Modules that are trained whole.

    Raises:
        ConfigError: The configuration asks for what has no meaning, or for what PEFT would lose.
    """
    lora = {name: module for name, module in targets.items() if isinstance(module, nn.Embedding)}
    tokens = _find_tokens(model, config)
    tie = find_tie(model)
    shared = _shared(config, tie, {*targets, *saved})
    if shared is not None and shared.head in targets:
        lora[shared.embedding] = cast(nn.Embedding, model.get_submodule(shared.embedding))
    for name in tokens:
        if name in targets or name in saved:
            _refuse("a table is trained in two ways", f"trainable_token_indices: {name}", "one of them, in PEFT too")
    follow = tie is not None and tie.embedding in tokens and tokens.get(tie.head) in (None, tokens[tie.embedding])
    if tie is not None and follow:
        tokens.pop(tie.head, None)
        if tie.head in targets or tie.head in saved:
            found = f"{tie.head}, tied to {tie.embedding}"
            _refuse("the head has the embedding's rows, and is changed itself", found, "one of them, in PEFT too")
    if config.ensure_weight_tying and tie is not None and tie.head in tokens and tie.embedding in tokens:
        _refuse("tied tables have other tokens each", "ensure_weight_tying", "the same tokens for both")
    if lora and config.lora_bias:
        _refuse("an embedding has no bias of B", f"lora_bias: {next(iter(lora))}", "linear layers only, in PEFT too")
    if (lora or tokens) and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        _refuse(
            "the embedding of an encoder-decoder is not adapted: its two halves look tokens up by themselves",
            next(iter([*lora, *tokens])),
            "layers of the encoder and the decoder",
        )
    return TablePlan(tie, shared, lora, tokens, follow)


def _refuse(message: str, tensor: str, expected: str) -> None:
    raise ConfigError(message, tensor=tensor, expected=expected)


def _shared(config: LoraConfig, tie: Tie | None, changed: set[str]) -> Tie | None:
    """The tie that is to hold, where `ensure_weight_tying` asks for one that the adapter touches."""
    if not config.ensure_weight_tying:
        return None
    if tie is None or not changed & {*tie}:
        if not config.trainable_token_indices:
            _logger.warning("ensure_weight_tying is set, but nothing tied is adapted")
        return None
    if tie.embedding.rpartition(".")[2] != "embed_tokens":
        # PEFT knows ties by this name: it would leave the head out when it reads the adapter again.
        _refuse("PEFT ties no embedding of this name", f"ensure_weight_tying: {tie.embedding}", "embed_tokens")
    if config.use_dora:
        _refuse("a DoRA cannot be tied: embedding and head have other magnitudes", "ensure_weight_tying", "plain LoRA")
    return tie


def _find_tokens(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The tables whose rows are trained, with the tokens."""
    asked = config.trainable_token_indices
    if not asked:
        return {}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Embedding, nn.Linear))}
    if isinstance(asked, dict):
        found = {
            name: tuple(indices)
            for wanted, indices in asked.items()
            for name in modules
            if f".{name}".endswith(f".{wanted}")
        }
        missing = next((wanted for wanted in asked if not any(f".{name}".endswith(f".{wanted}") for name in found)), "")
    else:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        found = {name: tuple(asked) for name, module in modules.items() if module is embedding}
        missing = "" if found else "the input embedding"
    if missing:
        _refuse("a table whose rows are to be trained is not in the model", f"trainable_token_indices: {missing}", "")
    for name, indices in found.items():
        weight = cast(nn.Embedding, modules[name]).weight
        if not weight.is_floating_point() or max(indices) >= len(weight):
            kind = "a dense table" if not weight.is_floating_point() else f"tokens below {len(weight)}"
            _refuse("rows cannot be trained", f"trainable_token_indices: {name}: {max(indices)}", kind)
    return found
