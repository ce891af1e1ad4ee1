"""`lora-deploy export` and `verify`: from an adapter to an export, and its proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.cli_compare import export_comparison
from lora_deploy.cli_push import PushOption, show_pushed
from lora_deploy.cli_recipes import RecipeOption, decide_mode
from lora_deploy.cli_run import HowWeights
from lora_deploy.errors import OutputError, UsageError
from lora_deploy.inputs import check_inputs
from lora_deploy.light_imports import light_imports
from lora_deploy.memory import use_huge_pages
from lora_deploy.terminal import make_console, print_json, print_page, print_report, show_progress

if TYPE_CHECKING:
    from lora_deploy.requantize import Requantization
    from lora_deploy.run.session import Weights

__all__ = ["export", "verify"]

CompareOn = Annotated[
    Path | None,
    typer.Option(help="JSONL to compare rounded weights with the trained ones on. [default: the training data]"),
]
MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", help="Fail if they differ by more than this on any text, in nats a token."),
]


def export(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="The base it was trained on: a directory or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="Directory to write.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="Directory of the adapter; may be repeated with --branch.", metavar="[NAME=]DIR"
        ),
    ] = None,
    recipe: RecipeOption = None,
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
            "[default: fp32 on cpu, else fp16; with --branch what the base was in training]"
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
    cache: Annotated[
        str | None,
        typer.Option(
            help="in-place: attention writes into the cache instead of copying it at every step (a CPU, in fp32). "
            "[default: in-place for merged int8 or int4 on cpu, else growing]"
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
    ] = 96,
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
    graph: Annotated[
        str, typer.Option(help="Where the graph comes from: mobius, traced (transformers' code), or auto to decide.")
    ] = "auto",
    provider: Annotated[str, typer.Option(help="What it will run on: cpu, cuda, webgpu or dml.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave the parity check out.")] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Export nothing: try the precisions, and show what each costs and keeps."),
    ] = False,
    compare_on: CompareOn = None,
    max_kl: MaxKl = None,
    layout: Annotated[
        str, typer.Option(help="plain; triton: a model of an NVIDIA Triton repository, OUT/config.pbtxt and OUT/1.")
    ] = "plain",
    push_to_hub: PushOption = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export an adapter and its base to ONNX, and prove that nothing was lost."""
    if compare:
        export_comparison(context, _named(adapter or []))
        return
    merge, branch, fixed, pool = decide_mode(context, merge, branch, fixed, pool)
    if merge == branch:
        raise UsageError(
            "say how the adapter is exported",
            remedy="add --merge or --branch, or --recipe NAME; --compare shows what each is worth",
        )
    floats = compute_dtype and precision not in ("int8", "int4")
    if (fixed or pool or expand or floats or adapter_precision) and not branch:
        raise UsageError(
            "--fixed, --pool, --expand, --compute-dtype and --adapter-precision go with --branch",
            remedy="add --branch, or leave them out",
        )
    if no_verify and (compare_on is not None or max_kl is not None):
        raise UsageError("--compare-on and --max-kl are of the check", found="--no-verify", remedy="leave one out")
    if no_verify and push_to_hub is not None:
        raise UsageError(
            "what was not checked is not pushed", found="--no-verify --push-to-hub", remedy="leave one out"
        )
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
    adapters = _named(adapter or [])
    if layout not in ("plain", "triton"):
        raise UsageError("there is no such layout", found=layout, expected="plain or triton")
    if layout == "triton":
        if (output / "config.pbtxt").exists() and not overwrite:
            raise OutputError(
                "the model's configuration is there", file=output / "config.pbtxt", remedy="move it, or add --overwrite"
            )
        output = output / "1"  # the version that Triton looks for
    check_inputs(model, adapters.values())
    console = make_console(quiet, as_json)
    with show_progress(console) as on_progress:
        use_huge_pages()
        with light_imports():
            from lora_deploy.export import export_onnx
        if layout == "triton":
            from lora_deploy.export.triton import check_one_graph

            check_one_graph(model)
        result = export_onnx(
            model,
            adapters,
            output=output,
            merge=merge,
            branch=None if merge else "fixed" if fixed else "pooled" if pool else "hot-swap",
            precision=precision,
            compute_dtype=compute_dtype,
            expand=expand,
            accuracy_level=accuracy_level,
            cache=cache,
            requantization=requantization,
            adapter_precision=adapter_precision,
            quantization=quantization,
            double_quant=not no_double_quant,
            graph=graph,
            provider=provider,
            overwrite=overwrite,
            verify=not no_verify,
            data=compare_on,
            max_kl=max_kl,
            on_progress=on_progress,
        )
    if layout == "triton":
        from lora_deploy.export.triton import write_triton_config

        write_triton_config(result.output, gpu=provider == "cuda")
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if result.report is not None:
        print_report(console, result.report)
    if result.graph is not None:
        console.print(f"graph: {result.graph.source} ({result.graph.reason})", soft_wrap=True, markup=False)
    if result.kept_base:
        console.print("base: the weights of the export that was replaced, which are the same")
    console.print(f"{result.bytes / 1e6:,.1f} MB in {result.output}", soft_wrap=True, markup=False)
    print_page(console, result.output)
    if push_to_hub is not None:
        from lora_deploy.hub import push_to_hub as send

        show_pushed(console, send(output, push_to_hub))
    if as_json:
        report = result.report.model_dump() if result.report else None
        printed = {"output": result.output, "bytes": result.bytes, "parity": report, "warnings": list(result.warnings)}
        origin = vars(result.graph) if result.graph is not None else None
        print_json(printed | {"graph": origin, "kept_base": result.kept_base})


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
    from lora_deploy.integrity import check_files

    check_inputs(model)
    checked = check_files(directory)
    console = make_console(quiet, as_json)
    with show_progress(console) as on_progress:
        with light_imports():
            from lora_deploy.verify import verify as check

        report = check(
            directory,
            model=model,
            adapter=adapter,
            provider=provider,
            weights=cast("Weights", weights),
            data=compare_on,
            max_kl=max_kl,
            checked=checked,
            on_progress=on_progress,
        )
    print_report(console, report)
    print_page(console, directory)
    if as_json:
        print_json(report.model_dump())
    report.require(directory)
