"""The exceptions a user can meet, each with the exit code of the command line.

* LoraDeployError (1: a bug of ours)

  x UsageError (2: the command or its options)
    + DivergenceError
  x InputError (3: bad or mismatched input)
    + ConfigError
    + CheckpointError
    + AdapterError
    + DataError
  x ParityError (4: the export does not compute what was trained)
  x OutputError (5: could not write)
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "InputError",
    "LoraDeployError",
    "OutputError",
    "ParityError",
    "UsageError",
]


class LoraDeployError(Exception):
    """One message that names the place, what was found, what was expected and the remedy.

    Args:
        summary: What is wrong, in one sentence.
        file: The file it was found in.
        tensor: The tensor, module or configuration key it is about.
        found: What is there.
        expected: What should be there.
        remedy: What the user can do.
    """

    exit_code = 1

    def __init__(
        self,
        summary: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.summary = summary
        self.details: dict[str, str] = {
            label: str(value)
            for label, value in (
                ("file", file),
                ("tensor", tensor),
                ("found", found),
                ("expected", expected),
                ("remedy", remedy),
            )
            if value is not None
        }
        super().__init__(summary)

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {label + ':':<10}{value}" for label, value in self.details.items())]
        return "\n".join(lines)


class UsageError(LoraDeployError):
    """The command line or the arguments of a function ask for something that cannot be."""

    exit_code = 2


class DivergenceError(UsageError):
    """Training came to a loss that is no number: the learning rate is too high."""


class InputError(LoraDeployError):
    """A file given to us is missing, damaged, hostile or does not fit the others."""

    exit_code = 3


class ConfigError(InputError):
    """A configuration file holds something we must not ignore."""


class CheckpointError(InputError):
    """A model checkpoint is missing, damaged or of a kind that is not supported."""


class AdapterError(InputError):
    """An adapter is missing, damaged or does not fit its base."""


class DataError(InputError):
    """Training data that cannot be read."""


class ParityError(LoraDeployError):
    """The exported model does not compute what was trained, or the check could not tell."""

    exit_code = 4


class OutputError(LoraDeployError):
    """The output could not be written; what was there before is unchanged."""

    exit_code = 5
