"""Passes through one model that take turns: all come to a layer before any goes on from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lora_deploy.errors import UsageError

__all__ = ["Turns"]

_Result = TypeVar("_Result")


class Turns:
    """Some passes, each in a thread of its own, of which one runs at a time.

    So the inputs of one layer are known for the whole text, while what lies between two layers is in memory for the
    rows of one pass only.

    Args:
        count: How many passes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._turn = 0
        self._stopped = False
        self._names: list[str] = [""] * count
        self._values: list[Any] = [None] * count
        self._result: Any = None

    def run(self, one_pass: Callable[[int], _Result]) -> list[_Result]:
        """Run all passes.

        Args:
            one_pass: Gets the number of its pass; calls `meet` on its way.

        Returns:
            What each gave.

        Raises:
            Exception: What one of the passes raised; the others end where they wait.
        """
        results: list[Any] = [None] * self._count
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                self._wait(number)
                results[number] = one_pass(number)
                self.meet(number, "its end", None, lambda _: None)
                self._hand_on(number)
            except _StoppedError:
                pass
            except BaseException as error:
                errors.append(error)
                self._stop()

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(self._count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._stop()
            for thread in threads:  # after an interrupt: nothing goes on when this has ended
                if thread.is_alive():
                    thread.join()
        if errors:
            raise errors[0]
        return results

    def meet(self, number: int, name: str, value: Any, do: Callable[[Sequence[Any]], _Result]) -> _Result:
        """Wait until all passes are here; the last one to come does the work for all.

        Args:
            number: Of the pass.
            name: Of the place; it must be the same for all.
            value: What this pass brings.
            do: Gets what all bring, in the order of the passes.

        Returns:
            What `do` gave.

        Raises:
            UsageError: The passes are at different places.
        """
        self._names[number], self._values[number] = name, value
        if number == self._count - 1:
            if len(set(self._names)) > 1:
                raise UsageError(
                    "the model takes another way for each text, so that it cannot be calibrated layer by layer",
                    found=", ".join(sorted(set(self._names))),
                    remedy="--calibration-rows 0",
                )
            values, self._values, self._result = self._values, [None] * self._count, None
            self._result = do(values)
            del values  # this frame lives on while the others use what they brought
        self._hand_on(number)
        self._wait(number)
        result: _Result = self._result
        return result

    def _hand_on(self, number: int) -> None:
        with self._changed:
            self._turn = (number + 1) % self._count
            self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._turn == number)
            if self._stopped:
                raise _StoppedError

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _StoppedError(Exception):
    """Another pass failed."""
