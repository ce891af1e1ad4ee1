"""Something new to learn, with answers that can be checked: reminders become strict JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

__all__ = ["write_task"]

_PEOPLE = "Anna Ben Carla David Elena Felix Grace Hugo Ines Jonas Kira Leo Mona Nils Olga Paul Rosa Sven Tina Viktor"
_TASKS = (
    "water the plants",
    "call the dentist",
    "pick up the parcel",
    "send the invoice",
    "feed the cat",
    "book the train tickets",
    "return the library books",
    "clean the kitchen",
    "renew the passport",
    "buy bread",
    "charge the camera",
    "write the report",
    "walk the dog",
    "pay the rent",
    "fix the bicycle",
    "pack the tent",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FORMS = (
    "Remind {who} to {task} on {day} at {hour} {half}.",
    "{who} has to {task} at {hour} {half} on {day}.",
    "On {day} at {hour} {half}, {who} should {task}.",
    "Please tell {who} to {task}, {day}, {hour} {half}.",
)


def write_task(
    directory: Path, *, train: int = 320, held_out: int = 20, seed: int = 0
) -> tuple[Path, list[dict[str, str]]]:
    """Write the training examples, and keep others that the model will not see.

    Args:
        directory: Where `train.jsonl` and `held_out.jsonl` go.
        train: How many examples to train on.
        held_out: How many to keep.
        seed: Decides which.

    Returns:
        The training file, and the kept examples, each with `prompt` and `completion`.
    """
    chance = random.Random(seed)
    examples: dict[str, dict[str, str]] = {}
    while len(examples) < train + held_out:
        example = _make_example(chance)
        examples.setdefault(example["prompt"], example)
    rows = list(examples.values())
    directory.mkdir(parents=True, exist_ok=True)
    for name, some in (("train.jsonl", rows[:train]), ("held_out.jsonl", rows[train:])):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return directory / "train.jsonl", rows[train:]


def _make_example(chance: random.Random) -> dict[str, str]:
    who, task, day = chance.choice(_PEOPLE.split()), chance.choice(_TASKS), chance.choice(_DAYS)
    hour, half = chance.randint(1, 12), chance.choice(("am", "pm"))
    prompt = chance.choice(_FORMS).format(who=who, task=task, day=day, hour=hour, half=half)
    answer = {"who": who, "task": task, "day": day[:3].lower(), "time": f"{hour} {half}"}
    return {"prompt": prompt, "completion": json.dumps(answer)}
