"""`lora-deploy run`: what is done with an export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.errors import UsageError
from lora_deploy.task import is_classification
from lora_deploy.terminal import print_json

if TYPE_CHECKING:
    from lora_deploy.run.classify import Classification, TokenClassification
    from lora_deploy.run.session import Weights

__all__ = ["HowWeights", "run"]

_Model = TypeVar("_Model")

HowWeights = Annotated[
    str,
    typer.Option("--weights", help="How codes run: stored; expand, to float, on opening; native, our kernels, on cpu."),
]


def run(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="What export wrote.", metavar="OUT")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to say to the model, or the text to classify.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="The adapter to run with; several, with weights, are blended.", metavar="NAME[=WEIGHT]"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message, in the place of the template's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the most probable token; above: drawn by chance.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that reach this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    no_chat_template: Annotated[bool, typer.Option("--no-chat-template", help="Take the prompt as it is.")] = False,
    weights: HowWeights = "stored",
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate text from an export; it streams to the screen. A classifier says which class the text, or each of its
    tokens, belongs to."""
    from lora_deploy.run import OnnxClassifier, OnnxModel, OnnxTokenClassifier
    from lora_deploy.run.classify import exported_task

    task = exported_task(directory)
    if is_classification(task):
        _refuse_generation(context)
        how = (directory, adapter or [], provider, weights)
        if task == "sequence-classification":
            _show_class(_open(OnnxClassifier, *how).classify([prompt])[0], as_json)
        else:
            _show_tokens(_open(OnnxTokenClassifier, *how).classify([prompt])[0], as_json)
        return
    model = _open(OnnxModel, directory, adapter or [], provider, weights)
    pieces = []
    for piece in model.stream(
        prompt,
        chat_template=not no_chat_template,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print_json({"text": "".join(pieces), "tokens_per_second": model.tokens_per_second})
        return
    print()
    if not quiet and model.tokens_per_second:
        print(f"[{model.tokens_per_second:.1f} tokens/s]", file=sys.stderr)


_GENERATION = ("system", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "no_chat_template")


def _refuse_generation(context: typer.Context) -> None:
    """A classifier writes no text, so that options for text can only be a mistake."""
    given = [name for name in _GENERATION if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        raise UsageError(
            "this export is a classifier: it writes no text",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            remedy="leave out what is for generation",
        )


def _open(kind: Callable[..., _Model], directory: Path, adapters: list[str], provider: str, weights: str) -> _Model:
    return kind(
        directory,
        _blend(adapters),
        provider=cast("Literal['cpu', 'cuda']", provider),
        weights=cast("Weights", weights),
    )


def _show_class(found: Classification, as_json: bool) -> None:
    """Print the class of a text, and the probability of every class."""
    if as_json:
        print_json({"label": found.label, "probabilities": found.probabilities})
        return
    print(found.label)
    for label, probability in sorted(found.probabilities.items(), key=lambda item: -item[1]):
        print(f"  {probability:.4f}  {label}")


def _show_tokens(found: list[TokenClassification], as_json: bool) -> None:
    """Print the class of every token of a text."""
    if as_json:
        print_json({"tokens": [asdict(token) for token in found]})
        return
    for token in found:
        print(f"{token.probability:.4f}  {token.label}  {token.token}")


def _blend(adapters: list[str]) -> str | dict[str, float] | None:
    """`NAME` or several `NAME=WEIGHT`."""
    if not adapters:
        return None
    if len(adapters) == 1 and "=" not in adapters[0]:
        return adapters[0]
    weights = {}
    for text in adapters:
        name, _, weight = text.partition("=")
        if name in weights:
            raise UsageError("an adapter is named twice", found=name, remedy="give each one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise UsageError("a blend needs a weight for each adapter", found=text, expected="NAME=0.5") from None
    return weights
