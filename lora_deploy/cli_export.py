"""`lora-deploy export`, `verify` and `run`: from an adapter to an export, and what is done with one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.errors import UsageError
from lora_deploy.terminal import make_console, print_json, print_report, show_progress

if TYPE_CHECKING:
    from lora_deploy.requantize import Requantization
    from lora_deploy.run.session import Weights

__all__ = ["export", "run", "verify"]

CompareOn = Annotated[
    Path | None,
    typer.Option(help="JSONL to compare rounded weights with the trained ones on. [default: the training data]"),
]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", help="Fail if they differ by more than this on any text, in nats a token."),
]

HowWeights = Annotated[
    str,
    typer.Option("--weights", help="How codes run: stored; expand, to float, on opening; native, our kernels, on cpu."),
]


def export(
    model: Annotated[str, typer.Option("--model", help="The base it was trained on: a directory or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="Directory to write.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="Directory of the adapter; may be repeated with --branch.", metavar="[NAME=]DIR"
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the dequantized weights.")] = False,
    branch: Annotated[
        bool, typer.Option("--branch", help="Keep the base's own codes, and adapters beside them, given per run.")
    ] = False,
    fixed: Annotated[bool, typer.Option("--fixed", help="With --branch: one adapter, built in.")] = False,
    pool: Annotated[
        bool, typer.Option("--pool", help="With --branch: all adapters built in, chosen for each row of a batch.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the weights: fp32, fp16, bf16; with --merge also int8 or int4, with --branch nf4, fp4 or int8. "
            "[default: fp32 on cpu, fp16 on cuda; with --branch what the base was in training]"
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16, where the weights are codes. [default: as for --precision]")
    ] = None,
    expand: Annotated[
        bool,
        typer.Option("--expand", help="With --branch: codes that standard operators turn into floats on loading."),
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="Of int8 and int4: 0 leaves activations as they are, 4 rounds them to int8. "
            "[default: 4 for merged weights on cpu, else 0]"
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="With --merge: int8 or int4 weights that share a scale.")] = 32,
    head_precision: Annotated[
        str, typer.Option(help="With merged int8 or int4: of embedding and output head: int8, int4 or float.")
    ] = "int8",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that get another precision, by part of their name: int8:down_proj,layers.0 or float:v_proj.",
            metavar="PRECISION:PART,...",
        ),
    ] = None,
    budget_bits: Annotated[
        float | None,
        typer.Option(help="With int4: mean bits of a weight, scales as 16 bits; what fits is given int8."),
    ] = None,
    correction: Annotated[
        int, typer.Option(help="With merged int8 or int4: rank of a branch that takes back what rounding lost.")
    ] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSONL to calibrate int8 or int4 on. [default: the training data, if it is there]"),
    ] = None,
    calibration_rows: Annotated[
        int, typer.Option(help="Rows of text to calibrate on; 0 rounds every weight by itself.")
    ] = 64,
    adapter_precision: Annotated[
        str | None,
        typer.Option(
            help="With --branch, without --pool: int8 stores A and B as int8 codes with blockwise scales. "
            "[default: floats, as the graph computes]"
        ),
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="What the base was in training: auto, none, nf4, fp4 or int8.")
    ] = "auto",
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="The absmax values were left alone.")
    ] = False,
    provider: Annotated[str, typer.Option(help="What it will run on: cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave the parity check out.")] = False,
    compare_on: CompareOn = None,
    max_kl: MaxKl = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export an adapter and its base to ONNX, and prove that nothing was lost."""
    if merge == branch:
        raise UsageError("say how the adapter is exported", remedy="add --merge or --branch")
    if (fixed or pool or expand or compute_dtype or adapter_precision) and not branch:
        raise UsageError(
            "--fixed, --pool, --expand, --compute-dtype and --adapter-precision go with --branch",
            remedy="add --branch, or leave them out",
        )
    if no_verify and (compare_on is not None or max_kl is not None):
        raise UsageError("--compare-on and --max-kl are of the check", found="--no-verify", remedy="leave one out")
    if fixed and pool:
        raise UsageError("a branch is fixed or pooled", found="--fixed --pool", remedy="leave one out")
    requantization = None
    if merge and precision in ("int8", "int4"):
        requantization = _requantization(
            precision, block_size, head_precision, keep, budget_bits, correction, calibration, calibration_rows
        )
    elif keep or budget_bits is not None or correction or calibration is not None:
        raise UsageError(
            "--keep, --budget-bits, --correction and --calibration go with --merge --precision int8 or int4",
            remedy="add them, or leave these out",
        )
    console = make_console(quiet, as_json)
    with show_progress(console) as on_progress:
        from lora_deploy.export import export_onnx

        result = export_onnx(
            model,
            _named(adapter or []),
            output=output,
            merge=merge,
            branch=None if merge else "fixed" if fixed else "pooled" if pool else "hot-swap",
            precision=precision,
            compute_dtype=compute_dtype,
            expand=expand,
            accuracy_level=accuracy_level,
            requantization=requantization,
            adapter_precision=adapter_precision,
            quantization=quantization,
            double_quant=not no_double_quant,
            provider=provider,
            overwrite=overwrite,
            verify=not no_verify,
            data=compare_on,
            max_kl=max_kl,
            on_progress=on_progress,
        )
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if result.report is not None:
        print_report(console, result.report)
    console.print(f"{result.bytes / 1e6:,.1f} MB in {result.output}", soft_wrap=True, markup=False)
    if as_json:
        report = result.report.model_dump() if result.report else None
        print_json(
            {"output": result.output, "bytes": result.bytes, "parity": report, "warnings": list(result.warnings)}
        )


def _requantization(
    precision: str,
    block_size: int,
    head_precision: str,
    keep: list[str] | None,
    budget_bits: float | None,
    correction: int,
    calibration: Path | None,
    calibration_rows: int,
) -> Requantization:
    from lora_deploy.requantize import Requantization, parse_keep

    heads: dict[str, Literal[4, 8] | None] = {"int8": 8, "int4": 4, "float": None}
    if head_precision not in heads:
        raise UsageError("there is no such precision of the head", found=head_precision, expected=", ".join(heads))
    return Requantization(
        bits=4 if precision == "int4" else 8,
        blocksize=block_size,
        head=heads[head_precision],
        keep=parse_keep(keep or []),
        budget_bits=budget_bits,
        correction=correction,
        data=calibration,
        rows=calibration_rows,
    )


def _named(adapters: list[str]) -> dict[str, str | Path]:
    """`[NAME=]DIR` as directories by name; without one, the directory's own."""
    named: dict[str, str | Path] = {}
    for text in adapters:
        name, separator, place = text.partition("=")
        if not separator or Path(text).is_dir():
            name, place = Path(text).resolve().name, text
        if name in named:
            raise UsageError("two adapters have the same name", found=name, remedy="give names: --adapter NAME=DIR")
        named[name] = Path(place)
    return named


def verify(
    directory: Annotated[Path, typer.Argument(help="What export wrote.", metavar="OUT")],
    model: Annotated[str | None, typer.Option("--model", help="The base, if it has moved.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="Check this adapter only; its directory, if it has moved or was converted later.",
            metavar="NAME|[NAME=]DIR",
        ),
    ] = None,
    weights: HowWeights = "stored",
    provider: Annotated[str | None, typer.Option(help="cpu or cuda. [default: what it was made for]")] = None,
    compare_on: CompareOn = None,
    max_kl: MaxKl = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare an export with the model that was trained, anew."""
    console = make_console(quiet, as_json)
    with show_progress(console) as on_progress:
        from lora_deploy.verify import verify as check

        report = check(
            directory,
            model=model,
            adapter=adapter,
            provider=provider,
            weights=cast("Weights", weights),
            data=compare_on,
            max_kl=max_kl,
            on_progress=on_progress,
        )
    print_report(console, report)
    if as_json:
        print_json(report.model_dump())
    report.require(directory)


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
    """Generate text from an export; it streams to the screen. A classifier says which class the text belongs to."""
    from lora_deploy.run import OnnxModel
    from lora_deploy.run.classify import is_classifier

    if is_classifier(directory):
        _refuse_generation(context)
        _classify(directory, prompt, adapter or [], provider, weights, as_json)
        return
    model = OnnxModel(
        directory,
        _blend(adapter or []),
        provider=cast("Literal['cpu', 'cuda']", provider),
        weights=cast("Weights", weights),
    )
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


def _classify(directory: Path, text: str, adapters: list[str], provider: str, weights: str, as_json: bool) -> None:
    """Print the class of a text, and the probability of every class."""
    from lora_deploy.run import OnnxClassifier

    classifier = OnnxClassifier(
        directory,
        _blend(adapters),
        provider=cast("Literal['cpu', 'cuda']", provider),
        weights=cast("Weights", weights),
    )
    found = classifier.classify([text])[0]
    if as_json:
        print_json({"label": found.label, "probabilities": found.probabilities})
        return
    print(found.label)
    for label, probability in sorted(found.probabilities.items(), key=lambda item: -item[1]):
        print(f"  {probability:.4f}  {label}")


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
