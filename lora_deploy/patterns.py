"""Regular expressions of strangers, matched without backtracking.

`re` tries one way after the other: `(a+)+$` on forty letters takes longer than anyone waits. Whether a pattern matches
a whole name can be told without: the places that it can have come to are kept as a set, after each part of the pattern.
That takes the pattern's length times the name's. `re` itself is asked where it cannot take long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any

__all__ = ["MOST_PATTERNS", "Pattern", "check_pattern", "compile_pattern"]

_parser: Any = getattr(re, "_parser", None) or import_module("sre_parse")  # the latter before Python 3.11
_LONGEST = 20_000  # the patterns that tools write have a thousand letters, those that list every module some more
_LONGEST_NAME = 1_000
MOST_PATTERNS = 4096  # each is tried on every module
_MOST_STEPS = 50_000  # on one name; what tools write takes some hundreds
_FEW_WAYS = 64
_SHORT_NAME = 200
_PLAIN = int(re.UNICODE)

_Nodes = Any  # re's own list of (what, argument)
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda letter: letter.isalnum() or letter == "_",
}


def check_pattern(pattern: str, *, loops: int | None = None) -> None:
    """Refuse a regular expression that is none, or that could take too long.

    Args:
        pattern: The expression.
        loops: How many repetitions of any length it may have one after the other; None for any number.

    Raises:
        ValueError: It is refused; the message says why.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"{len(pattern)} letters, more than {_LONGEST}")
    try:
        tree = _parser.parse(pattern)
        ways, found = _cost(tree)
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if loops is not None and (found > loops or ways > _FEW_WAYS):
        raise ValueError(f"{found} repetitions one after the other in {ways} ways, more than {loops} in {_FEW_WAYS}")
    if not _is_quick(ways, found):
        _check_plain(tree)


def _is_quick(ways: int, loops: int) -> bool:
    return loops <= 1 and ways <= _FEW_WAYS


def _cost(nodes: _Nodes) -> tuple[int, int]:
    """In how many ways a pattern can go on, and how many repetitions it has one after the other.

    Raises:
        ValueError: A repetition repeats what has a choice itself: the ways multiply with each letter of a name.
    """
    ways, loops = 1, 0
    for what, argument in nodes:
        name, inner = str(what), _inner(str(what), argument)
        costs = [_cost(part) for part in inner]
        if name in _REPEATS or name == "POSSESSIVE_REPEAT":
            least, most = int(argument[0]), int(argument[1])
            own, own_loops = costs[0]
            if most > 1 and (own > 1 or own_loops):
                raise ValueError("a repetition or a choice inside a repetition, which could take for ever to match")
            more = (own + 1, own_loops) if (least, most) == (0, 1) else (1, int(most > least))
        elif name == "BRANCH":
            more = (sum(one for one, _ in costs), max(found for _, found in costs))
        elif name == "GROUPREF":
            more = (1, 1)
        else:
            more = (1, 0)
            for one, found in costs:
                more = (more[0] * one, more[1] + found)
        ways, loops = min(ways * more[0], 1 << 62), loops + more[1]
    return ways, loops


def _inner(name: str, argument: Any) -> list[_Nodes]:
    """The patterns inside a part of a pattern."""
    if name in (*_REPEATS, "POSSESSIVE_REPEAT"):
        return [argument[2]]
    if name == "SUBPATTERN":
        return [argument[3]]
    if name == "BRANCH":
        return list(argument[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return [argument[1]]
    if name == "ATOMIC_GROUP":
        return [argument]
    if name == "GROUPREF_EXISTS":
        return [part for part in argument[1:] if part is not None]
    return []


def _check_plain(tree: Any) -> None:
    """Make sure that `Pattern` knows all parts of a pattern that is not left to `re`."""
    if tree.state.flags != _PLAIN:
        raise ValueError("flags, in a pattern with more than one repetition")
    waiting = [tree]
    while waiting:
        for what, argument in waiting.pop():
            name = str(what)
            if name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP", "POSSESSIVE_REPEAT", "FAILURE") or (
                name == "SUBPATTERN" and (argument[1] or argument[2])
            ):
                raise ValueError("a reference to a group, or a group that is not plain, beside several repetitions")
            waiting += _inner(name, argument)


class Pattern:
    """A regular expression for whole names.

    Args:
        pattern: One that `check_pattern` lets through.
    """

    def __init__(self, pattern: str) -> None:
        self._tree = _parser.parse(pattern)
        self._expression = re.compile(pattern)
        self._quick = _is_quick(*_cost(self._tree))
        self._steps = 0

    def fullmatch(self, name: str) -> bool:
        """Whether it matches the whole of a name.

        Args:
            name: Of a module.

        Raises:
            ValueError: The name is longer than any, or takes too long.
        """
        return bool(self._ends(name, [0]))

    def matches_end(self, name: str) -> bool:
        """Whether it matches the whole of a name, or what follows one of its dots; exceptions as `fullmatch`."""
        return bool(self._ends(name, [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]))

    def _ends(self, name: str, starts: list[int]) -> bool:
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a module's name of {len(name)} letters, more than {_LONGEST_NAME}")
        if self._quick and len(name) <= _SHORT_NAME:
            return any(self._expression.fullmatch(name, start) is not None for start in starts)
        self._steps = 0
        return len(name) in self._walk(self._tree, name, set(starts))

    def _walk(self, nodes: _Nodes, name: str, places: set[int]) -> set[int]:
        """Where in a name a pattern can have come to that began at one of these places."""
        for what, argument in nodes:
            self._steps += 1 + len(places)
            if self._steps > _MOST_STEPS:
                raise ValueError("a pattern that takes too long to match")
            places = self._step(str(what), argument, name, places)
            if not places:
                break
        return places

    def _step(self, what: str, argument: Any, name: str, places: set[int]) -> set[int]:
        if what in _REPEATS:
            return self._repeat(int(argument[0]), int(argument[1]), argument[2], name, places)
        if what == "BRANCH":
            return set().union(*(self._walk(part, name, places) for part in argument[1]))
        if what == "SUBPATTERN":
            return self._walk(argument[3], name, places)
        if what == "AT":
            return {place for place in places if _is_at(str(argument), name, place)}
        if what in ("ASSERT", "ASSERT_NOT"):
            wanted = what == "ASSERT"
            return {place for place in places if self._looks(argument, name, place) == wanted}
        end = len(name)
        return {place + 1 for place in places if place < end and _is_letter(what, argument, name[place])}

    def _repeat(self, least: int, most: int, body: _Nodes, name: str, places: set[int]) -> set[int]:
        # After as many turns as the name has letters, only empty ones can follow, and they lead nowhere else.
        bound = len(name) + 2
        for _ in range(min(least, bound)):
            places = self._walk(body, name, places)
        found, new = set(places), places
        for _ in range(min(most - least, bound)):
            new = self._walk(body, name, new) - found
            if not new:
                break
            found |= new
        return found

    def _looks(self, argument: Any, name: str, place: int) -> bool:
        direction, body = argument
        if direction > 0:
            return bool(self._walk(body, name, {place}))
        start = place - int(body.getwidth()[0])  # of a fixed width, or re would not have compiled it
        return start >= 0 and place in self._walk(body, name, {start})


def _is_at(kind: str, name: str, place: int) -> bool:
    end = len(name)
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return place == 0
    if kind == "AT_END":
        return place == end or (place == end - 1 and name[place] == "\n")
    if kind == "AT_END_STRING":
        return place == end
    is_word = _CATEGORIES["CATEGORY_WORD"]
    before, after = place > 0 and is_word(name[place - 1]), place < end and is_word(name[place])
    return (before != after) == (kind == "AT_BOUNDARY") and (bool(name) or kind == "AT_BOUNDARY")


def _is_letter(what: str, argument: Any, letter: str) -> bool:
    if what == "LITERAL":
        return ord(letter) == int(argument)
    if what == "NOT_LITERAL":
        return ord(letter) != int(argument)
    if what == "ANY":
        return letter != "\n"
    if what == "RANGE":
        return int(argument[0]) <= ord(letter) <= int(argument[1])
    if what == "CATEGORY":
        kind = str(argument)
        return _CATEGORIES[kind.replace("NOT_", "")](letter) != ("NOT_" in kind)
    parts: Iterable[tuple[Any, Any]] = argument
    negated = str(argument[0][0]) == "NEGATE"
    return negated != any(_is_letter(str(kind), value, letter) for kind, value in parts if str(kind) != "NEGATE")


@lru_cache(maxsize=MOST_PATTERNS)
def compile_pattern(pattern: str) -> Pattern:
    """The pattern, made once."""
    return Pattern(pattern)
