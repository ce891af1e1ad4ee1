"""Recipes on the command line: shown, taken, overruled; and every way in which a recipe can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from lora_deploy import cli
from lora_deploy.errors import UsageError
from lora_deploy.recipes import Recipe, find_recipe, load_recipe, shipped_recipes
from tests.commands import Command, assert_one_message, command
from tests.conftest import CheckpointFactory
from tests.export.conftest import SHORT, adapter_dir

__all__ = ["adapter_dir", "command"]

NAMES = [
    "encoder-classifier",
    "gpt2-conv1d",
    "hot-swap-many-adapters",
    "merged-fp16-cuda",
    "merged-int4-cpu",
    "merged-int8-cpu",
    "pooled-mixed-batch",
    "qlora-lossless-cpu",
    "qlora-lossless-cuda",
    "webgpu-int4",
]
# What says where and from what, not what is made.
NOT_IN_RECIPES = {"model", "output", "adapter", "recipe", "overwrite", "no_verify", "quiet", "as_json"}
NOT_IN_RECIPES |= {"compare", "compare_on", "max_kl", "push_to_hub", "layout"}
MODES = {"merge", "branch", "fixed", "pool"}

OWN = "name: own\ndescription: Mine.\nwhen: always\n"


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """`own(text, name="own.yaml")`: a recipe of the user's."""

    def write(text: str, name: str = "own.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, command: Command) -> Callable[..., dict[str, Any]]:
    """`asked(*arguments)`: what `export` asks `export_onnx` for."""

    class AskedError(Exception):
        exit_code = 77

        def show(self) -> None:
            """As click's own errors."""

    def take(*arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def export(model: str, adapter: object, **options: Any) -> None:
            found.update(options)
            raise AskedError

        monkeypatch.setattr("lora_deploy.export.export_onnx", export)
        ended = command("export", "--model", "m", "--output", "o", "--quiet", *arguments)
        assert ended.code == 77, ended.err
        return found

    return take


def test_the_list_says_when_to_take_which(command: Command) -> None:
    assert shipped_recipes() == NAMES
    ended = command("recipes")
    assert ended.code == 0
    for name in NAMES:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert f"{name}\n    {recipe.description}\n    take it {recipe.when}\n" in ended.out
        assert "\n" not in recipe.description
    printed = json.loads(command("recipes", "--json").out)
    assert [recipe["name"] for recipe in printed] == NAMES
    assert printed[0].keys() == set(Recipe.model_fields)
    assert command("recipes", "--quiet") == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_the_file_with_its_reasons(name: str, command: Command) -> None:
    ended = command("recipes", "show", name)
    assert ended == (0, find_recipe(name).read_text(), "")
    comments = [line for line in ended.out.splitlines() if line.startswith("# ")]
    assert len(comments) >= 3


def test_the_keys_are_the_options_of_the_command_line_with_their_defaults() -> None:
    group = typer.main.get_command(cli.app)
    parameters = {one.name: one for one in group.commands["export"].params}  # type: ignore[attr-defined]
    names = set(parameters) - NOT_IN_RECIPES - MODES - {"help"}
    assert set(Recipe.model_fields) == names | {"name", "description", "when", "mode"}
    for name in names:
        default = Recipe.model_fields[name].default
        assert default == (parameters[name].default or ([] if name == "keep" else parameters[name].default)), name


@pytest.mark.parametrize("name", NAMES)
def test_the_command_asks_for_what_the_function_is_told(name: str, asked: Callable[..., dict[str, Any]]) -> None:
    found = asked("--recipe", name)
    assert {key: found[key] for key in load_recipe(name).options()} == load_recipe(name).options()


def test_what_the_command_line_gives_wins(asked: Callable[..., dict[str, Any]]) -> None:
    given = ["--provider", "cuda", "--block-size", "64", "--keep", "int8:down_proj", "--calibration-rows", "0"]
    for arguments in (["--recipe", "merged-int4-cpu", *given], [*given, "--recipe", "merged-int4-cpu"]):
        found = asked(*arguments)
        assert (found["merge"], found["precision"], found["provider"]) == (True, "int4", "cuda")
        requantization = found["requantization"]
        assert (requantization.bits, requantization.blocksize, requantization.rows) == (4, 64, 0)
        assert requantization.keep == (("down_proj", 8),)
    assert asked("--recipe", "merged-int4-cpu", "--precision", "fp32")["requantization"] is None
    assert asked("--recipe", "pooled-mixed-batch", "--branch", "--provider", "cpu")["branch"] == "pooled"
    assert asked("--recipe", "hot-swap-many-adapters", "--fixed")["branch"] == "fixed"
    assert asked("--recipe", "merged-fp16-cuda", "--merge")["merge"] is True


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qlora-lossless-cpu", ["--merge"]),
        ("qlora-lossless-cpu", ["--pool"]),
        ("pooled-mixed-batch", ["--branch", "--fixed"]),
        ("hot-swap-many-adapters", ["--merge"]),
        ("merged-int4-cpu", ["--branch"]),
        ("gpt2-conv1d", ["--fixed"]),
    ],
)
def test_another_way_of_exporting_than_the_recipes_is_a_contradiction(
    name: str, flags: list[str], command: Command
) -> None:
    ended = command("export", "--recipe", name, "--model", "m", "--output", "o", *flags)
    assert_one_message(ended, 2, "the recipe exports adapters in another way", flags[-1], name, "mode", "remedy:")


def test_a_users_own_recipe_is_taken(
    own: Callable[..., Path],
    asked: Callable[..., dict[str, Any]],
    command: Command,
) -> None:
    text = OWN + "mode: merge\nprecision: int8\nkeep: ['float:v_proj']\nbudget_bits: null\ncalibration: texts.jsonl\n"
    for name in ("own.yaml", "own.yml"):
        file = own(text, name)
        found = asked("--recipe", file)
        assert found["requantization"].keep == (("v_proj", None),)
        assert found["requantization"].data == file.parent / "texts.jsonl"
        assert load_recipe(file).options() == load_recipe(str(file)).options()
        assert command("recipes", "show", file).out == text


def test_a_users_own_recipe_exports(
    own: Callable[..., Path],
    checkpoint_dir: CheckpointFactory,
    adapter_dir: Callable[..., Path],
    command: Command,
    tmp_path: Path,
) -> None:
    file = own(OWN + "mode: fixed\nquantization: nf4\nexpand: true\n")
    base = checkpoint_dir("llama", **SHORT["llama"])
    arguments = ["--model", base, "--adapter", adapter_dir("llama"), "--output", tmp_path / "out", "--json"]
    ended = command("export", "--recipe", file, *arguments)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["parity"]["passed"] is True


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (OWN + "mode: merge\nprecison: int4\n", ["no such key", "precison", "int4", "precision", "take it out"]),
        (OWN + "mode: blend\n", ["cannot say this", "mode", "'blend'", "'merge', 'fixed'"]),
        (OWN + "mode: merge\nprecision: int3\n", ["cannot say this", "'int3'", "'int8' or 'int4'", "--precision"]),
        (OWN + "mode: merge\nprovider: tpu\n", ["cannot say this", "'tpu'", "'webgpu' or 'dml'"]),
        (OWN + "mode: merge\nblock_size: 33\n", ["cannot say this", "33", "--block-size"]),
        (OWN + "mode: merge\ncorrection: -1\n", ["cannot say this", "-1", "greater than or equal to 0"]),
        (OWN + "mode: merge\nexpand: maybe\n", ["cannot say this", "'maybe'", "valid boolean"]),
        (OWN + "mode: merge\nkeep: int8:v_proj\n", ["cannot say this", "'int8:v_proj'", "valid list"]),
        (OWN + "mode: merge\nkeep: [8]\n", ["cannot say this", "keep.0", "8", "valid string"]),
        (OWN, ["lacks this key", "mode"]),
        ("mode: merge\nwhen: always\n", ["lacks this key", "name"]),
        (OWN + "mode: [merge\n", ["no YAML", "line 5", "KEY: VALUE"]),
        (OWN + "mode: merge\nmode: fixed\n", ["something twice", "mode", "leave one"]),
        ("- merge\n", ["no recipe", "a list", "KEY: VALUE"]),
        ("", ["no recipe", "an empty file"]),
        (OWN + "mode: merge\n1: 2\n", ["no such key", "1"]),
    ],
)
def test_a_recipe_that_is_wrong_ends_with_two_and_one_message(
    text: str, named: list[str], own: Callable[..., Path], command: Command
) -> None:
    file = own(text)
    ended = command("export", "--recipe", file, "--model", "m", "--output", "o")
    assert_one_message(ended, 2, f"file:     {file}", *named)
    assert_one_message(command("recipes", "show", file), 2, *named)


def test_a_recipe_that_is_not_there(tmp_path: Path, command: Command) -> None:
    for arguments in (["recipes", "show"], ["export", "--model", "m", "--output", "o", "--recipe"]):
        assert_one_message(command(*arguments, "merged-int3"), 2, "no such recipe", "merged-int3", "merged-int4-cpu")
        missing = tmp_path / "none.yaml"
        assert_one_message(command(*arguments, missing), 2, "no such file", missing, "lora-deploy recipes")
        (tmp_path / "latin.yaml").write_bytes(b"name: \xe4\n")
        assert_one_message(command(*arguments, tmp_path / "latin.yaml"), 2, "cannot be read", "UTF-8")
    with pytest.raises(UsageError, match="no such file"):
        load_recipe(Path("merged-int4-cpu"))  # a path is never a name


def test_neither_a_mode_nor_a_recipe_is_an_error_that_names_both(command: Command) -> None:
    ended = command("export", "--model", "m", "--output", "o")
    assert_one_message(ended, 2, "say how", "--merge or --branch", "--recipe NAME")
