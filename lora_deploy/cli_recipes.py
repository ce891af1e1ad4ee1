"""`lora-deploy recipes`, and what `export --recipe` takes from one."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_deploy.cli_adapter import Json, Quiet
from lora_deploy.errors import UsageError
from lora_deploy.terminal import make_console, print_json

__all__ = ["RecipeOption", "decide_mode", "recipes_app"]

recipes_app = typer.Typer(name="recipes", help="The recipes for exports, and when to take which.")

_KEY = "lora_deploy.recipe"


@recipes_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context, quiet: Quiet = False, as_json: Json = False) -> None:
    """The recipes for exports, and when to take which."""
    if context.invoked_subcommand is not None:
        return
    from lora_deploy.recipes import load_recipe, shipped_recipes

    recipes = [load_recipe(name) for name in shipped_recipes()]
    if as_json:
        print_json([recipe.model_dump() for recipe in recipes])
        return
    console = make_console(quiet)
    for recipe in recipes:
        console.print(recipe.name, style="bold", markup=False)
        for line in (recipe.description, f"take it {recipe.when}"):
            console.print(f"    {line}", soft_wrap=True, markup=False)


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Of a recipe, or a file.", metavar="NAME|FILE")]) -> None:
    """Print the file of a recipe: to read it, or to write one's own from it."""
    from lora_deploy.recipes import find_recipe, load_recipe

    load_recipe(name)
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Let a recipe's values stand in for the defaults of the other options, so that what is given wins over them."""
    if name is not None:
        from lora_deploy.recipes import load_recipe

        recipe = load_recipe(name)
        context.default_map = {**(context.default_map or {}), **recipe.defaults()}
        context.meta[_KEY] = recipe
    return name


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Take the options from a recipe (see `lora-deploy recipes`); those that are given too win over it.",
        metavar="NAME|FILE",
        is_eager=True,  # the other options are read when the recipe has been
        callback=_take_recipe,
    ),
]


def decide_mode(
    context: typer.Context, merge: bool, branch: bool, fixed: bool, pool: bool
) -> tuple[bool, bool, bool, bool]:
    """--merge, --branch, --fixed and --pool as given, or as the recipe has it where they leave that open.

    Raises:
        UsageError: They contradict the recipe.
    """
    recipe = context.meta.get(_KEY)
    if recipe is None:
        return merge, branch, fixed, pool
    given = {"--merge": merge, "--branch": branch, "--fixed": fixed, "--pool": pool}
    # A hot-swap branch is one that is not said to be anything else.
    fitting = {
        "merge": {"--merge"},
        "fixed": {"--branch", "--fixed"},
        "pooled": {"--branch", "--pool"},
        "hot-swap": {"--branch", "--fixed", "--pool"},
    }[recipe.mode]
    contradicting = [flag for flag, is_given in given.items() if is_given and flag not in fitting]
    if contradicting:
        raise UsageError(
            "the recipe exports adapters in another way",
            found=f"{' '.join(contradicting)} with --recipe {context.params.get('recipe', recipe.name)}",
            expected=f"mode {recipe.mode}, as the recipe has it: {' or '.join(sorted(fitting))}, or none of them",
            remedy="leave it out, or take another recipe (see `lora-deploy recipes`)",
        )
    merged = recipe.mode == "merge"
    return merged, not merged, fixed or recipe.mode == "fixed", pool or recipe.mode == "pooled"
