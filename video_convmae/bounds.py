"""Bounds of the numbers of a configuration: `epochs: Annotated[float, Bounds(above=0)] = 800`.

The command line checks them all at once, before anything is built, and `--help` says them; `check_bounds` is for
configurations that are made in Python or stand in a list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Finite numbers `least <= number <= most` and `above < number < below`, of those bounds that are given.

    Of a field that holds several numbers they bound each; null is within all.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        lower = f"{self.least} or more" if self.least is not None else f"more than {self.above}"
        lower = "" if self.least is self.above is None else lower
        upper = f"at most {self.most}" if self.most is not None else f"less than {self.below}"
        upper = "" if self.most is self.below is None else upper
        return " and ".join(filter(None, (lower, upper))) or "finite"

    def contain(self, value: Any) -> bool:
        """Return whether a value of a field lies within; NaN does not."""
        if isinstance(value, (list, tuple)):
            return all(map(self.contain, value))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True  # null, or a wrong type, which is another error
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def check_bounds(config: object, place: str = "{}") -> None:
    """Check the numbers of a dataclass; `place` names a field in the message, as `train.{}` does.

    Raises:
        ValueError: a number lies outside its bounds.
    """
    for name, bounds in bounds_of(type(config)).items():
        if not bounds.contain(value := getattr(config, name)):
            raise ValueError(f"{place.replace('{}', name)} is {value}; expected {bounds}")


def bounds_of(kind: type) -> dict[str, Bounds]:
    """Return the bounds of those fields of a dataclass that have any."""
    notes = {
        name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(kind, include_extras=True).items()
    }
    return {name: each for name, several in notes.items() for each in several if isinstance(each, Bounds)}
