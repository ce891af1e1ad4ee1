"""The choices of target modules and rank that spend the same number of trainable parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lora_deploy.errors import UsageError
from lora_deploy.planning.kinds import MatrixKind

__all__ = ["FAIR", "Choice", "find_choices", "suggest_budget"]

FAIR = 0.1
"""A choice that is further than this part from the budget is listed, but not compared with the others."""

_NEAR = 0.3  # how far from the budget asked for a better one is looked for


@dataclass(frozen=True)
class Choice:
    """Where to adapt, and with which rank.

    Attributes:
        name: The kinds, or "attention", "mlp", "all-linear" for all of them.
        kinds: What is adapted.
        rank: Of every update.
        budget: The parameters that were asked for.
    """

    name: str
    kinds: tuple[MatrixKind, ...]
    rank: int
    budget: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each adapted layer, by full dotted name."""
        return {name: shape for kind in self.kinds for name, shape in kind.shapes.items()}

    @property
    def targets(self) -> list[str]:
        """What `target_modules` has to hold."""
        return [target for kind in self.kinds for target in kind.targets]

    @property
    def parameters(self) -> int:
        """Trainable parameters, exactly."""
        return self.rank * sum(kind.parameters_per_rank for kind in self.kinds)

    @property
    def deviation(self) -> float:
        """How far that is from the budget, as a part of it; negative for less."""
        return self.parameters / self.budget - 1

    @property
    def fair(self) -> bool:
        """Whether it spends the budget nearly enough to be compared."""
        return abs(self.deviation) <= FAIR


def find_choices(kinds: Sequence[MatrixKind], budget: int) -> list[Choice]:
    """Every choice: each matrix of the attention, each two, all of them, the MLP, and everything that is linear.

    Args:
        kinds: The model's.
        budget: Trainable parameters to spend.

    Returns:
        The choices, those with the fewest kinds first, each with the rank that comes nearest to the budget.

    Raises:
        UsageError: None of them can spend it.
    """
    choices = [
        Choice(name, chosen, _nearest_rank(chosen, budget), budget) for name, chosen in _sets(kinds).items() if chosen
    ]
    if not any(choice.fair for choice in choices):
        most = max(choices, key=lambda choice: choice.parameters)
        least = min(choices, key=lambda choice: choice.parameters)
        raise UsageError(
            f"no choice spends the budget to within {FAIR:.0%}",
            found=f"{budget:,} parameters",
            expected=f"between {least.parameters:,} ({least.name} at rank {least.rank}) and {most.parameters:,} "
            f"({most.name} at rank {most.rank})"
            if budget < least.parameters or budget > most.parameters
            else None,
            remedy=f"--budget {suggest_budget(kinds, min(max(budget, least.parameters), most.parameters))}",
        )
    return choices


def _sets(kinds: Sequence[MatrixKind]) -> dict[str, tuple[MatrixKind, ...]]:
    """Sets of kinds by name; where two are the same, only the first name for it stays."""
    attention = tuple(kind for kind in kinds if kind.part == "attention")
    mlp = tuple(kind for kind in kinds if kind.part == "mlp")
    named: list[tuple[str, tuple[MatrixKind, ...]]] = []
    if len(attention) > 1:
        named += [(kind.name, (kind,)) for kind in attention]
    if len(attention) > 2:
        named += [(f"{one.name}+{two.name}", (one, two)) for one, two in itertools.combinations(attention, 2)]
    named += [("attention", attention), ("mlp", mlp), ("all-linear", tuple(kinds))]
    sets: dict[str, tuple[MatrixKind, ...]] = {}
    for name, chosen in named:
        if chosen not in sets.values():
            sets[name] = chosen
    return sets


def _nearest_rank(kinds: Sequence[MatrixKind], budget: int) -> int:
    per_rank = sum(kind.parameters_per_rank for kind in kinds)
    rank = max(1, budget // per_rank)
    if abs((rank + 1) * per_rank - budget) < abs(rank * per_rank - budget):
        rank += 1
    return min(rank, min(kind.highest_rank for kind in kinds))


def suggest_budget(kinds: Sequence[MatrixKind], budget: int) -> int:
    """The budget near the one asked for that the choices spend most evenly.

    Args:
        kinds: The model's.
        budget: The one asked for.

    Returns:
        A whole number of ranks of one of the choices, at which the largest deviation is smallest; the nearest of those
        that are equally good.
    """
    sets = [chosen for chosen in _sets(kinds).values() if chosen]
    candidates = {budget}
    for chosen in sets:
        per_rank = sum(kind.parameters_per_rank for kind in chosen)
        first, last = -(-int(budget * (1 - _NEAR)) // per_rank), int(budget * (1 + _NEAR)) // per_rank
        # A choice with tiny matrices has thousands of ranks in reach; some hundred of them say enough.
        candidates |= {rank * per_rank for rank in range(max(1, first), last + 1, max(1, (last - first) // 100))}

    def worst(candidate: int) -> float:
        choices = (Choice("", chosen, _nearest_rank(chosen, candidate), candidate) for chosen in sets)
        return max(abs(choice.deviation) for choice in choices)

    return min(sorted(candidates), key=lambda one: (round(worst(one), 4), abs(one - budget)))
