"""The exception tree and what a message holds."""

from __future__ import annotations

import pytest

from lora_deploy import errors
from lora_deploy.errors import InputError, LoraDeployError

EXIT_CODES = {
    "LoraDeployError": 1,
    "UsageError": 2,
    "DivergenceError": 2,
    "InputError": 3,
    "ConfigError": 3,
    "CheckpointError": 3,
    "AdapterError": 3,
    "DataError": 3,
    "ParityError": 4,
    "OutputError": 5,
}


def test_every_public_exception_has_its_exit_code() -> None:
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == EXIT_CODES


@pytest.mark.parametrize("name", [name for name, code in EXIT_CODES.items() if code == 3])
def test_bad_input_of_every_kind_is_one_family(name: str) -> None:
    assert issubclass(getattr(errors, name), InputError)


def test_a_message_names_all_it_was_given_one_detail_a_line() -> None:
    error = LoraDeployError("it broke", file="a.json", tensor="w", found=(1, 2), expected=(2, 1), remedy="turn it")
    assert str(error).splitlines() == [
        "it broke",
        "  file:     a.json",
        "  tensor:   w",
        "  found:    (1, 2)",
        "  expected: (2, 1)",
        "  remedy:   turn it",
    ]


def test_details_that_were_not_given_leave_no_line_but_falsy_values_do() -> None:
    assert str(LoraDeployError("it broke")) == "it broke"
    assert str(LoraDeployError("it broke", found=0, expected="")).count("\n") == 2
