"""Text generation from an exported model: streamed, greedy or sampled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from lora_deploy.errors import UsageError
from lora_deploy.inputs.json_files import read_json
from lora_deploy.run.adapters import Adapters
from lora_deploy.run.classify import exported_task
from lora_deploy.run.pieces import Pieces
from lora_deploy.run.sampling import Sampling
from lora_deploy.run.session import OnnxSession, Weights, numpy_of
from lora_deploy.task import is_classification
from lora_deploy.tokenizer import load_tokenizer

__all__ = ["ROOM", "OnnxModel", "find_eos_token_ids", "pad_left"]

ROOM = 2048  # new tokens that a cache has room for from the beginning; a longer answer is copied at every step


class OnnxModel:
    """An exported directory as a model that answers.

    Args:
        directory: What `lora-deploy export` wrote.
        adapter: The adapter to begin with, as `set_adapter` takes it.
        provider: "cpu" or "cuda".
        weights: How weights that are kept as codes run, as `OnnxSession` takes it.
        threads: How many share one operator, as `OnnxSession` takes it.

    Attributes:
        adapters: The adapters that it can run with.
        tokenizer: The tokenizer of the base.
        eos_token_ids: The tokens that end an answer.
        context_length: How many tokens the model takes, prompt and answer; None where its configuration does not say.
        tokens_per_second: Decoding speed of the last generation, without the prompt, of all rows together; None before
            the first.

    Raises:
        CheckpointError: The directory is no export or is damaged.
        AdapterError: The adapter cannot be read or is not one for this export.
        UsageError: It is a classifier, onnxruntime or the provider is not installed, or there is no such adapter.
    """

    def __init__(
        self,
        directory: str | Path,
        adapter: str | Mapping[str, float] | None = None,
        *,
        provider: Literal["cpu", "cuda"] = "cpu",
        weights: Weights = "stored",
        threads: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        if exported_task(self.directory) == "seq2seq-lm":
            raise UsageError(
                "this export is an encoder-decoder, which OnnxModel does not run",
                found=directory,
                remedy="open it with optimum's ORTModelForSeq2SeqLM, or its three graphs with OnnxSession",
            )
        # onnxruntime opens a graph without Python, so that there is time for the tokenizer.
        with ThreadPoolExecutor(1) as beside:
            tokenizer = beside.submit(load_tokenizer, self.directory)
            self.session = OnnxSession(self.directory, provider, weights, threads=threads)
        if self.session.manifest is not None and is_classification(self.session.manifest.task):
            raise UsageError(
                "this export is a classifier: it writes no text",
                found=directory,
                remedy="open it with OnnxClassifier, or OnnxTokenClassifier if it is one of tokens",
            )
        self.adapters = Adapters(self.session, self.directory)
        self.set_adapter(adapter)
        self.tokenizer = tokenizer.result()
        self.eos_token_ids = find_eos_token_ids(self.directory, self.tokenizer)
        self.context_length = self.session.context_length
        self.tokens_per_second: float | None = None

    def set_adapter(self, adapter: str | Mapping[str, float] | None) -> None:
        """Choose the adapter of the runs to come. Costs no reload: each adapter is read and uploaded once.

        Args:
            adapter: Its name; or weights by name, for a blend of several (not of a pooled graph); None for the bare
                base.

        Raises:
            AdapterError: It cannot be read or is not one for this export.
            UsageError: There is no such adapter, or the graph has it built in.
        """
        self._inputs = self.adapters.inputs(adapter)

    def encode(self, prompt: str, *, chat_template: bool = True, system: str | None = None) -> list[int]:
        """Turn a prompt into tokens.

        Args:
            prompt: What the user says.
            chat_template: Make it the user's turn in the model's chat template, if it has one.
            system: The system message before it; None for the template's own.

        Raises:
            UsageError: There is no chat template that takes the system message.
        """
        if system is not None and not (chat_template and self.tokenizer.chat_template):
            raise UsageError("a system message needs a chat template", remedy="leave --system out")
        if chat_template and self.tokenizer.chat_template:
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self.encode_chat([*messages, {"role": "user", "content": prompt}])
        return list(self.tokenizer(prompt)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Turn a conversation into tokens, up to where the answer begins.

        Args:
            messages: Each with `role` and `content`.

        Raises:
            UsageError: The model has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise UsageError("the model has no chat template", remedy="give a plain prompt")
        try:
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise UsageError(
                "the model's chat template refuses the messages",
                found=str(error),
                remedy="leave --system out, or add --no-chat-template",
            ) from error
        return list(encoded["input_ids"])

    def generate_tokens(
        self,
        input_ids: list[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Generate token by token, up to and including the end token, or to the end of the model's context.

        Args:
            input_ids: Tokens of the prompt.
            max_new_tokens: Stop after so many.
            temperature: 0 takes the most probable token each time; above, tokens are drawn from the distribution.
            top_k: Draw from the k most probable tokens only; 0 for all.
            top_p: Draw from the most probable tokens that together reach this probability only.
            seed: Makes drawing repeatable.

        Raises:
            UsageError: A setting is out of range, or the prompt is empty or longer than the context.
        """
        settings = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        for tokens in self._decode([input_ids], self._inputs, settings):
            yield from (token for token in tokens if token is not None)

    def generate_batch(
        self,
        prompts: Sequence[str],
        adapters: Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        **encoding: Any,
    ) -> list[str]:
        """Answer several prompts in one run; on a pooled graph each with an adapter of its own.

        Args:
            prompts: What to answer.
            adapters: The adapter of each, None for the bare base (pooled graphs only); None for the one that is set.
            max_new_tokens: As `generate_tokens` takes it, as are the next four.
            temperature: See there.
            top_k: See there.
            top_p: See there.
            seed: See there.
            **encoding: As `encode` takes it.

        Raises:
            UsageError: As `generate_tokens`, or the adapters do not go with the graph or the prompts.
        """
        rows = [self.encode(prompt, **encoding) for prompt in prompts]
        inputs = self._inputs
        if adapters is not None:
            if len(adapters) != len(prompts):
                raise UsageError("each prompt needs one adapter", found=f"{len(adapters)} for {len(prompts)} prompts")
            inputs = self.adapters.row_inputs(adapters)
        answers: list[list[int]] = [[] for _ in rows]
        for tokens in self._decode(rows, inputs, Sampling(max_new_tokens, temperature, top_k, top_p, seed)):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def _decode(
        self, rows: list[list[int]], inputs: Mapping[str, Any], settings: Sampling
    ) -> Iterator[list[int | None]]:
        """The next token of every row, None for one that has ended, until all have."""
        settings.check(rows)
        longest = max(map(len, rows))
        limits = np.full(len(rows), settings.max_new_tokens)
        if self.context_length is not None:
            if longest > self.context_length:
                raise UsageError(
                    "the prompt is longer than the model's context",
                    found=f"{longest} tokens",
                    expected=f"at most {self.context_length}",
                    remedy="shorten the prompt",
                )
            limits = np.minimum(limits, [self.context_length - len(row) + 1 for row in rows])
            if len(rows) > 1 and self.session.writes_in_place and longest + limits.max() - 1 > self.context_length:
                yield from self._decode_apart(rows, inputs, settings)
                return
        self.tokens_per_second = None
        random = np.random.default_rng(settings.seed)
        new, mask = pad_left(rows, longest)
        alive = np.ones(len(rows), bool)
        cache = self.session.empty_cache(len(rows), room=longest + min(int(limits.max()), ROOM))
        started, decoded = 0.0, 0
        for step in range(int(limits.max())):
            logits, cache = self.session.forward(new, mask, cache, inputs)
            if step == 0:
                started = time.perf_counter()
            else:
                decoded += int(alive.sum())
                self.tokens_per_second = decoded / (time.perf_counter() - started)
            tokens = [settings.choose(logits[row, -1], random) if alive[row] else None for row in range(len(rows))]
            yield tokens
            alive &= [token is not None and token not in self.eos_token_ids for token in tokens]
            alive &= step + 1 < limits
            if not alive.any():
                return
            new = np.array([[token or 0] for token in tokens], np.int64)
            mask = np.concatenate([mask, alive.astype(np.int64)[:, None]], axis=1)

    def _decode_apart(
        self, rows: list[list[int]], inputs: Mapping[str, Any], settings: Sampling
    ) -> Iterator[list[int | None]]:
        """Each row by itself: in place, a row and its padding together may not be longer than the model's context."""
        ids = numpy_of(inputs["adapter_ids"]) if "adapter_ids" in inputs else np.zeros(0)
        runs = []
        for number, row in enumerate(rows):
            own = {"adapter_ids": self.session.upload(ids[number : number + 1])} if len(ids) == len(rows) else {}
            runs.append(self._decode([row], {**inputs, **own}, settings))
        for step in zip_longest(*runs):
            yield [tokens[0] if tokens else None for tokens in step]

    def stream(
        self, prompt: str, *, chat_template: bool = True, system: str | None = None, **options: Any
    ) -> Iterator[str]:
        """Generate text in pieces, as soon as each is complete. Options as `generate_tokens`."""
        pieces = Pieces(self.tokenizer)
        for token in self.generate_tokens(self.encode(prompt, chat_template=chat_template, system=system), **options):
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.rest():
            yield rest

    def generate(self, prompt: str, **options: Any) -> str:
        """Generate the whole answer. Options as `stream` and `generate_tokens`."""
        return "".join(self.stream(prompt, **options))


def pad_left(rows: Sequence[list[int]], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and attention mask of rows that end together, (batch, length)."""
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :], mask[number, length - len(row) :] = row, 1
    return ids, mask


def find_eos_token_ids(directory: Path, tokenizer: Any) -> set[int]:
    """The tokens that end an answer.

    Args:
        directory: May hold the configurations that name them.
        tokenizer: Whose end token it is where they don't.
    """
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if not file.is_file():
            continue
        found = read_json(file).get("eos_token_id")
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return {tokenizer.eos_token_id} - {None}
