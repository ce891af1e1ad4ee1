"""`lora-deploy models`: which families of models are verified."""

from __future__ import annotations

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.terminal import make_console, print_json

__all__ = ["models"]


def models(quiet: Quiet = False, as_json: Json = False) -> None:
    """What is verified of each family of models, as the test suite found it."""
    from rich import box
    from rich.table import Table

    from lora_deploy.models import HEADINGS, load_table, table_cells

    rows = load_table()
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption="all: bases that are dense, nf4, fp4 and int8",
    )
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading != HEADINGS[-1])
    for row in rows:
        table.add_row(*table_cells(row))
    make_console(quiet).print(table)
