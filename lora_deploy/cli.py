"""The command line: arguments in, exit code out. The heavy parts are imported inside the commands."""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast

import typer

from lora_deploy.cli_adapter import Json, Quiet, adapter_app
from lora_deploy.cli_bench import bench
from lora_deploy.cli_export import export, verify
from lora_deploy.cli_models import models
from lora_deploy.cli_plan import plan
from lora_deploy.cli_push import PushOption, push, show_pushed
from lora_deploy.cli_recipes import recipes_app
from lora_deploy.cli_run import run
from lora_deploy.cli_serve import serve
from lora_deploy.cli_web import web
from lora_deploy.errors import LoraDeployError
from lora_deploy.inputs import check_inputs
from lora_deploy.terminal import make_console, print_json, show_progress

app = typer.Typer(
    name="lora-deploy",
    help="What you trained is what you deploy: QLoRA adapters from training to onnxruntime, with proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(adapter_app)
app.add_typer(recipes_app)


@app.callback()
def _root() -> None:
    """What you trained is what you deploy: QLoRA adapters from training to onnxruntime, with proof."""
    # bitsandbytes warns on import about an optional kernel; transformers draws bars of its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(command: str | None = None, arguments: Sequence[str] | None = None, name: str = "lora-deploy") -> None:
    """Run the command line and end the process with the exit code of the design.

    Args:
        command: Run this command alone, for a program of another name that has it as its own; None for all of them.
        arguments: What it is given; None for the process's own.
        name: What the user called.

    0 done; 1 a bug of ours; 2 usage; 3 bad or mismatched input; 4 parity failed; 5 could not write; 130 interrupted.
    """
    with _noting_interrupts() as interrupts:
        try:
            code = _runner(command)(args=arguments, prog_name=name, standalone_mode=False) or 0
            if code == 130:  # typer's own answer to Ctrl-C, which says nothing
                _fail("interrupted", code)
        except (typer.Abort, KeyboardInterrupt):
            code = _fail("interrupted", 130)
        except Exception as error:
            if interrupts:
                code = _fail("interrupted", 130)
            elif isinstance(error, LoraDeployError):
                code = _fail(str(error), error.exit_code)
            elif hasattr(error, "exit_code"):  # click's usage errors have one, and are bugs of nobody
                error.show()  # type: ignore[attr-defined]
                code = int(error.exit_code)
            else:
                raise
    sys.exit(code)


def _runner(command: str | None) -> Callable[..., Any]:
    """The command line, or one command of it by itself."""
    if command is None:
        return app
    _root()
    return cast("Callable[..., Any]", typer.main.get_command(app).commands[command])  # type: ignore[attr-defined]


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C that came: compiled code (torch's) may make another exception of a KeyboardInterrupt.

    One that comes in a destructor, where Python prints it and goes on, comes again a moment later. When the process
    ends, its work is done or given up, and no more are heard.
    """
    interrupts: list[int] = []
    usual_hook = sys.unraisablehook

    def come_again(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.05, _interrupt)
            again.daemon = True
            again.start()
        else:
            usual_hook(unraisable)

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, or somebody's own
    usual = usual and threading.current_thread() is threading.main_thread()
    if usual:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = come_again
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        yield interrupts
    finally:
        if usual:
            sys.unraisablehook = usual_hook
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt() -> None:
    """Ctrl-C, from within. A real signal, where there is one, ends a wait of the main thread too."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _fail(message: str, code: int) -> int:
    print(f"lora-deploy: {message}", file=sys.stderr)
    return code


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="The base: a directory or a hub id.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL with prompt and completion, messages, or text.")],
    output: Annotated[Path, typer.Option("--output", help="Directory for the adapter.")],
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8 or none. [default: nf4, or what the checkpoint is]")
    ] = None,
    no_double_quant: Annotated[bool, typer.Option("--no-double-quant", help="Leave the absmax values alone.")] = False,
    blocksize: Annotated[int, typer.Option(help="Weights that share one absmax (nf4, fp4).")] = 64,
    rank: Annotated[int, typer.Option(help="Rank of the update.")] = 16,
    alpha: Annotated[float, typer.Option(help="The update is scaled by alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout on the input of the update.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="Names, separated by commas.")] = "all-linear",
    lora_config: Annotated[
        Path | None, typer.Option(help="PEFT's adapter_config.json, in the place of the four options before.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in the place of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a process takes at once.")] = 4,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches to one optimizer step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="linear, cosine or constant, after the warmup.")] = "linear",
    warmup_ratio: Annotated[float, typer.Option(help="Part of the steps in which the rate rises.")] = 0.03,
    optimizer: Annotated[
        str, typer.Option(help="auto, adamw, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit.")
    ] = "auto",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens in a row. [default: 1024, or the model's limit]")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Put several examples into a row.")] = False,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Take prompt and completion as they are.")
    ] = False,
    eval_fraction: Annotated[float, typer.Option(help="Part of the data kept for evaluation.")] = 0.0,
    eval_data: Annotated[Path | None, typer.Option(help="JSONL for evaluation.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations. [default: a tenth]")] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output.")] = False,
    push_to_hub: PushOption = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train an adapter over a quantized base. Ctrl-C saves; --resume goes on bit for bit."""
    values = dict(locals())
    check_inputs(model)
    from lora_deploy.config import LoraConfig
    from lora_deploy.train import TrainOptions, train_adapter

    for name in ("context", "quiet", "as_json", "lora_config", "push_to_hub"):
        del values[name]
    values["double_quant"] = not values.pop("no_double_quant")
    values["chat_template"] = not values.pop("no_chat_template")
    if target_modules != "all-linear":
        values["target_modules"] = [name.strip() for name in target_modules.split(",") if name.strip()]
    if lora_config is not None:
        values["lora"] = LoraConfig.load(lora_config)
        for name in ("rank", "alpha", "dropout", "target_modules"):
            if getattr(context.get_parameter_source(name), "name", "") != "COMMANDLINE":
                del values[name]
    console = make_console(quiet, as_json)
    result = train_adapter(TrainOptions(**values), console=console)
    if not result.main_process:
        return
    if push_to_hub is not None:
        from lora_deploy.hub import push_to_hub as send

        show_pushed(console, send(output, push_to_hub))
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    console.print(f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters trained")
    console.print(f"{result.steps} steps, loss {result.loss:.4f}, {result.tokens_per_second or 0:,.0f} tokens/s")
    console.print(f"the adapter is in {result.output}", soft_wrap=True, markup=False)


app.command()(plan)
app.command()(export)
app.command()(verify)
app.command()(run)
app.command()(bench)
app.command()(serve)
app.command()(push)
app.command()(web)
app.command()(models)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Directory for everything.")] = Path("lora-deploy-demo"),
    model: Annotated[str | None, typer.Option("--model", help="Another model than SmolLM2-135M-Instruct.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 40,
    precision: Annotated[str, typer.Option(help="Of the export: fp32 or fp16.")] = "fp32",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole way on a real model: train on 4 bits, export merged, prove it, run it."""
    from lora_deploy.demo import run_demo

    console = make_console(quiet, as_json)
    result = run_demo(output, steps=steps, precision=precision, console=console, progress=show_progress, model=model)
    if as_json:
        print_json(vars(result))


if __name__ == "__main__":
    main()
