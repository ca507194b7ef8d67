"""Allowed values of flags and options: anything that answers `in` and tells in words what it takes."""
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

LARGEST_SIZE = 2 ** 31 - 1  # what sizes and counts may be anywhere in torch


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`.

    Attributes:
        low: Smallest value.
        high: Largest value.
        without_low: Leave `low` itself out.
        without_high: Leave `high` itself out.
        whole: Integers only.
    """
    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below and -math.inf < value < math.inf  # which no comparison with nan is

    def __str__(self) -> str:
        return f'an integer {self._span()}' if self.whole else self._span()

    def _span(self) -> str:
        if math.isinf(self.low):
            return 'a finite number'
        if math.isinf(self.high):
            return f'a finite number {"above" if self.without_low else "from"} {self.low:.12g}'
        if self.high == LARGEST_SIZE:
            return f'{self.low:.12g} or more, at most {LARGEST_SIZE}'
        low = f'above {self.low:.12g}' if self.without_low else f'{self.low:.12g} or more'
        high = f'below {self.high:g}' if self.without_high else f'at most {self.high:.12g}'
        if self.without_low or self.without_high:
            return f'{low} and {high}'
        return f'between {self.low:.12g} and {self.high:.12g}'


class OneOf:
    """A few values, each of its own type: 1 is not True.

    Args:
        values: The values.
    """

    def __init__(self, *values: Any):
        self.values = values

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return f'one of {", ".join(map(str, self.values))}'


NOT_NEGATIVE = Range(0)
