"""Names beside the points of a picture, where they hide neither a point nor another name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "place_labels"]

_FREE = 4.0  # pixels between labels
_POINT = 7.0  # half a point's size


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have something in common."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        """Whether the other is inside."""
        return (
            self.left < other.left and other.right < self.right and self.bottom < other.bottom and other.top < self.top
        )


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    taken: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Where labels go; a label for which there is no free place goes to the last that was tried.

    Args:
        points: In pixels.
        sizes: Width and height of each label.
        frame: All labels stay in it.
        taken: Where no label may be, beside the points.

    Returns:
        For each label how far its left middle is from its point.
    """
    hidden = [*taken, *(Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points)]
    places = [(0.0, 0.0)] * len(points)
    for number in sorted(range(len(points)), key=lambda number: points[number]):
        (x, y), (width, height) = points[number], sizes[number]
        for dx, dy in _offsets(width):
            box = Box(x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
            padded = Box(box.left - _FREE, box.bottom - _FREE, box.right + _FREE, box.top + _FREE)
            if frame.holds(box) and not any(padded.overlaps(other) for other in hidden):
                break
        places[number] = (dx, dy)
        hidden.append(box)
    return places


def _offsets(width: float) -> Iterator[tuple[float, float]]:
    """Places of a label's left middle around its point, the nearest first."""
    beside = (12.0, -12.0 - width, -width / 2)
    rings = [0.0, *itertools.chain.from_iterable((step, -step) for step in (20.0, 35.0, 50.0, 70.0, 90.0, 115.0))]
    for dy, dx in itertools.product(rings, beside):
        yield dx, dy
